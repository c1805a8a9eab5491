"""What an H100 took beside what it must, and what that lets one expect of other cards: Markdown.

An expectation is calibrated: what a card's figures give, in the proportion in which the H100's time
departs from what its own figures give. It is arithmetic, not a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cards import CARDS, Card
from .gradient_model import H100, Gradient
from .markdown import markdown
from .measured import H100_KERNELS, H100_STEPS, H100_WAYS, SOURCE, MeasuredKernels, MeasuredStep
from .roofline_gpu import BLOCK_FLOPS, TOKENS, Kernel, kernels

OTHERS: Sequence[Card] = [card for card in CARDS if card.capability != H100.capability]
# times the forward's products: gradients of inputs, and in full tuning of all weights
_PRODUCTS = {"full": 3, "peft-lora-16": 2, "spt-unstructured": 2}


def kernel_floor_us(measured: MeasuredKernels) -> float:
    """What an H100 cannot beat."""
    return _kernel(measured).floor_us(H100)


def kernel_us(measured: MeasuredKernels, card: Card) -> float:
    """What the kernels should take on a card, calibrated by what they took."""
    kernel = _kernel(measured)
    return kernel.expected_us(card) * measured.us / kernel.expected_us(H100)


def _kernel(measured: MeasuredKernels) -> Kernel:
    return next(kernel for kernel in kernels(measured.images) if kernel.name == measured.name)


def step_floor_ms(step: MeasuredStep) -> float:
    """The products of a step that its method cannot do without, at an H100's peak."""
    peak = H100.fp32_tflops if step.dtype == "fp32" else H100.tensor_tflops
    return _PRODUCTS[step.method] * BLOCK_FLOPS / peak * 1e-9


def step_ms(step: MeasuredStep, card: Card) -> float:
    """A step's kernels: products by the card's rate for them, all else by its memory's."""
    rest = (step.ms - _products_ms(step, H100)) * H100.memory_gb / card.memory_gb
    return _products_ms(step, card) + rest


def _products_ms(step: MeasuredStep, card: Card) -> float:
    rate = card.tensor_tflops * card.tensor_share
    if step.dtype == "fp32":
        rate = card.fp32_tflops * card.fp32_share
    return _PRODUCTS[step.method] * BLOCK_FLOPS / rate * 1e-9


def section() -> str:
    """The measured figures and what follows from them."""
    expected = [f"{card.name}, calibrated" for card in OTHERS]
    titles = ("floor", "measured", "measured / floor")
    return "\n\n".join(
        (
            "### Measured on an H100, beside the floor",
            f"Times of kernels on {SOURCE}. Those of other cards are calibrated arithmetic, not "
            "measured: what a card's figures give, in the proportion in which the H100's time "
            "departs from what its own figures give; of a step the products by the card's rate for "
            "products, all else by its memory's. Kernels that were rewritten since are faster.",
            markdown(
                ("a training step of ViT-B/16, batch 64, ms", *titles, *expected), [*_steps()]
            ),
            markdown(("kernels of an op, µs", *titles, *expected), [*_kernels()]),
            "Every way to the sparse weight gradient, 12,608 tokens, µs; the fastest in bold:",
            markdown(
                ("", "floor", "torch, dense, then read", "vectors", "tensor cores"), [*_ways()]
            ),
        )
    )


def _steps() -> Iterator[Sequence[str]]:
    for step in H100_STEPS:
        floor = step_floor_ms(step)
        others = (f"{step_ms(step, card):.0f}" for card in OTHERS)
        figures = (f"{floor:.1f}", f"{step.ms:.1f}", f"{step.ms / floor:.1f}")
        yield (f"{step.method}, {step.dtype}", *figures, *others)


def _kernels() -> Iterator[Sequence[str]]:
    for measured in H100_KERNELS:
        floor = kernel_floor_us(measured)
        others = (f"{kernel_us(measured, card):,.0f}" for card in OTHERS)
        figures = (f"{floor:,.0f}", f"{measured.us:,.0f}", f"{measured.us / floor:.1f}")
        images = f", {measured.images} images" if measured.images != 64 else ""
        yield (measured.name + images, *figures, *others)


def _ways() -> Iterator[Sequence[str]]:
    for case in H100_WAYS:
        read = Gradient(case.rows, case.columns, TOKENS, 0, 4 if case.is_fp32 else 2).read_bytes
        cells = (
            f"**{us:,.0f}**" if way is case.fastest else f"{us:,.0f}" for way, us in case.us.items()
        )
        yield (str(case), f"{read / H100.memory_gb * 1e-3:.0f}", *cells)
