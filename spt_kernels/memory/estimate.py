"""What the peak of a step is made of, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

DTYPES = ("fp32", "bf16-autocast", "bf16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class MemoryEstimate:
    """Accounted memory at the moment of a step when it is highest.

    Attributes:
        peak_bytes: all live tensors at that moment.
        by_category: the same bytes as `weights` (parameters and buffers), `optimizer` (its state),
            `gradients` (of parameters), `activations` (the batch, and what the forward keeps for
            the backward) and `temporary` (everything else).
        method: what is trained.
        batch_shape: shape of the input; of a mapping that of its first tensor.
        dtype: `"fp32"`, `"bf16-autocast"` or `"bf16"`.
        training: whether it is a training step or a forward without gradients.
        num_trainable: parameters that are trained, head included.
        checkpointing: whether blocks are recomputed in the backward.
        device: whose ways of computing are accounted for, `"cpu"` or `"cuda"`.
        offload: what of the weights is on the host, as `offload` of `spt_kernels` calls it.
        host_bytes: how much that is, with copies in the dtype of autocast and what an
            `OffloadedAdamW` keeps there; no part of the peak.
        fetched_bytes: what of it is copied to the device in one step.
        made_up_scores: whether what is trained was chosen by scores that nobody measured.
        num_head: of `num_trainable`, the head's; of an MLP head those of its last layer.
        micro_batch: samples to a forward and backward where these are fewer than the batch has.
        backbone_numel: parameters of the plain model without its head. Of a model that is tuned
            already both are told by names, and no part of whether two estimates are equal.
    """

    peak_bytes: int
    by_category: Mapping[str, int]
    method: str
    batch_shape: tuple[int, ...]
    dtype: str
    training: bool
    num_trainable: int
    checkpointing: bool = False
    device: str = "cuda"
    made_up_scores: bool = False
    offload: str = "nothing"
    host_bytes: int = 0
    fetched_bytes: int = 0
    micro_batch: int | None = None
    num_head: int = field(default=0, compare=False)
    backbone_numel: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_category", MappingProxyType(dict(self.by_category)))

    @property
    def trained(self) -> int:
        """Parameters that are trained besides the head, as a budget counts them."""
        return self.num_trainable - self.num_head

    @property
    def trained_share(self) -> float:
        """`trained` as a share of the backbone; 0 where that is not known."""
        return self.trained / self.backbone_numel if self.backbone_numel else 0.0

    def summary(self) -> str:
        """A text table of the peak by category, in MiB."""
        step = "training step" if self.training else "inference"
        shape = " × ".join(map(str, self.batch_shape))
        if self.micro_batch is not None:
            shape += f", {self.micro_batch} at a time"
        lines = [f"{self.method}, {step} on {shape}, {self.dtype} (accounted, not measured)"]
        rows = [*self.by_category.items(), ("peak", self.peak_bytes)]
        lines += [f"{name:<12}{count / 2**20:>12,.2f} MiB" for name, count in rows]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """One flat object of plain values; bytes of each category go by the category's name."""
        return {
            "method": self.method,
            "batch_shape": list(self.batch_shape),
            "micro_batch": self.micro_batch,
            "dtype": self.dtype,
            "device": self.device,
            "checkpointing": self.checkpointing,
            "offload": self.offload,
            "host_bytes": self.host_bytes,
            "fetched_bytes": self.fetched_bytes,
            "training": self.training,
            "num_trainable": self.num_trainable,
            "trained": self.trained,
            "trained_share": self.trained_share,
            "made_up_scores": self.made_up_scores,
            "accounted": True,
            "peak_bytes": self.peak_bytes,
            **self.by_category,
        }
