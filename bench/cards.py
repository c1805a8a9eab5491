"""Figures of the cards that the kernels are built for: limits that decide occupancy, and rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on one multiprocessor.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
    allocation rules of Nsight Compute's occupancy calculator.
    """

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int
    registers: int = 65536
    # registers are handed out in such portions to each warp, warps in such numbers to each program
    registers_portion: int = 256
    warps_portion: int = 4
    # what the system keeps of every program's shared memory
    shared_bytes_reserved: int = 1024


# by compute capability
MULTIPROCESSORS = {
    80: Multiprocessor(
        warps=64, programs=32, shared_bytes=164 * 1024, shared_bytes_per_program=163 * 1024
    ),
    86: Multiprocessor(
        warps=48, programs=16, shared_bytes=100 * 1024, shared_bytes_per_program=99 * 1024
    ),
    90: Multiprocessor(
        warps=64, programs=32, shared_bytes=228 * 1024, shared_bytes_per_program=227 * 1024
    ),
}


def resident_programs(
    capability: int, registers: int, shared_bytes: int, num_warps: int
) -> tuple[int, str]:
    """Programs that one multiprocessor holds at once, and what allows no more.

    Args:
        capability: ten times the compute capability.
        registers: per thread.
        shared_bytes: per program.
        num_warps: per program.
    """
    limits = MULTIPROCESSORS[capability]
    per_warp = _up(registers * 32, limits.registers_portion)
    warps_by_registers = limits.registers // per_warp // limits.warps_portion * limits.warps_portion
    shared = _up(shared_bytes + limits.shared_bytes_reserved, 128)
    allowed = {
        "warps": min(limits.warps // num_warps, limits.programs),
        "registers": warps_by_registers // num_warps,
        "shared": limits.shared_bytes // shared,
    }
    tightest = min(allowed, key=lambda name: allowed[name])
    return allowed[tightest], tightest


def _up(number: int, portion: int) -> int:
    return -(-number // portion) * portion


@dataclass(frozen=True)
class Card:
    """What one card does per second.

    Peaks are the vendor's (without sparsity). Shares of a peak that a good kernel gets are common
    experience, not measured here; with them the model says what to expect, not what is.

    Attributes:
        name: as sold.
        capability: ten times the compute capability.
        multiprocessors: how many.
        clock_ghz: boost clock.
        tensor_tflops: bf16 and fp16 products on tensor cores, summed in fp32.
        tf32_tflops: TF32 products on tensor cores.
        fp32_tflops: fp32 without tensor cores.
        memory_gb: per second, from the card's memory.
        l2_gb: per second, from L2: assumed, as no vendor states what can be had.
        tensor_share: of `tensor_tflops` that torch's product of a weight gradient gets: assumed.
        fp32_share: likewise of `fp32_tflops`.
        source: where the peaks are from.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    tensor_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: float
    l2_gb: float
    tensor_share: float
    fp32_share: float
    source: str


CARDS = (
    Card(
        name="RTX 3090",
        capability=86,
        multiprocessors=82,
        clock_ghz=1.695,
        tensor_tflops=71.0,
        tf32_tflops=35.6,
        fp32_tflops=35.6,
        memory_gb=936.0,
        l2_gb=2500.0,
        tensor_share=0.85,
        fp32_share=0.65,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A",
    ),
    Card(
        name="A100 SXM 80 GB",
        capability=80,
        multiprocessors=108,
        clock_ghz=1.41,
        tensor_tflops=312.0,
        tf32_tflops=156.0,
        fp32_tflops=19.5,
        memory_gb=2039.0,
        l2_gb=4500.0,
        tensor_share=0.80,
        fp32_share=0.85,
        source="NVIDIA A100 80GB datasheet",
    ),
    Card(
        name="H100 SXM",
        capability=90,
        multiprocessors=132,
        clock_ghz=1.755,
        tensor_tflops=989.0,
        tf32_tflops=494.0,
        fp32_tflops=66.9,
        memory_gb=3350.0,
        l2_gb=5500.0,
        tensor_share=0.61,
        fp32_share=0.75,
        source="NVIDIA H100 Tensor Core GPU datasheet",
    ),
    Card(
        name="H200 SXM",
        capability=90,
        multiprocessors=132,
        clock_ghz=1.755,
        tensor_tflops=989.0,
        tf32_tflops=494.0,
        fp32_tflops=66.9,
        memory_gb=4800.0,
        l2_gb=5500.0,
        tensor_share=0.61,
        fp32_share=0.75,
        source="NVIDIA H200 Tensor Core GPU datasheet",
    ),
)
