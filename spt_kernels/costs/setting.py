"""At which size and in which precision costs are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..finetuning.base.models import ModelSource, build, preprocessing_of, sized_for
from ..memory import DTYPES
from ..methods import DEFAULT_BUDGET, Method, entry_of, table_names
from ..methods.matrices import lora_matrices
from ..model import backbone_numel
from .paper import PAPER_BATCH_SIZE, PAPER_IMAGE_SIZE, PAPER_MODEL

LORA_RANK = 16  # of the paper's LoRA, whose count is every row's budget
ROWS = table_names()

EAGER, COMPILED, CAPTURED = STEPS = ("eager", "compiled", "captured")
_LEAST = {"batch_size": 1, "timed_batch_size": 1, "num_classes": 1, "rank": 1, "rounds": 0}


@dataclass(frozen=True)
class CostSetting:
    """What all rows of a cost table have in common.

    Attributes:
        model: a timm architecture; weights play no part.
        model_args: its constructor's arguments beside the number of classes.
        batch_size: of the memory columns, and on a GPU of the times too.
        timed_batch_size: of the times on a CPU.
        num_classes: of the head.
        dtype: `"fp32"`, `"bf16-autocast"` or `"bf16"` (weights too).
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.
        rank: of the LoRA and Adapter of the SPT rows.
        rounds: timed steps and inferences, after one that warms up; 0 for memory alone.
        image_size: side in pixels, None for what the architecture is made for.
        step: how a training step runs: one of `STEPS`. Of steps that are not eager nothing else is
            measured: inference is the plain model's.
    """

    model: str = PAPER_MODEL
    model_args: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = PAPER_BATCH_SIZE
    timed_batch_size: int = 4
    num_classes: int = 100
    dtype: str = "fp32"
    device: str = "cpu"
    rank: int = 8
    rounds: int = 5
    image_size: int | None = None
    step: str = EAGER

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 or None, got {self.image_size}")
        if self.step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {self.step!r}")
        if self.step == CAPTURED and not self.on_gpu:
            raise ValueError(f"step: only a card's can be captured, got the device {self.device}")
        if self.step != EAGER and not self.rounds:
            raise ValueError(f"step: one that is {self.step} has to be run, got rounds of 0")

    @property
    def on_gpu(self) -> bool:
        """Whether memory is measured rather than accounted."""
        return self.device.startswith("cuda")

    @property
    def step_batch_size(self) -> int:
        """Images of a timed step."""
        return self.batch_size if self.on_gpu else self.timed_batch_size

    @property
    def has_scores(self) -> bool:
        """Whether the speed of scores is measured too: one table of times, in fp32, is enough."""
        return self.rounds > 0 and self.dtype == "fp32" and self.step == EAGER

    @property
    def is_papers(self) -> bool:
        """Whether this is the paper's model on its images and batch, in whatever precision."""
        is_its_size = self.image_size in (None, PAPER_IMAGE_SIZE)
        is_its_model = self.model == PAPER_MODEL and not self.model_args and is_its_size
        return is_its_model and self.step == EAGER and self.batch_size == PAPER_BATCH_SIZE

    def model_title(self) -> str:
        """The architecture, and what of it is not as timm has it."""
        extra = "".join(f", {name}={value}" for name, value in self.model_args.items())
        return self.model + extra + (f", {self.image_size} pixels" if self.image_size else "")

    def title(self) -> str:
        """What tells one table from another in a machine's results: all but how many rounds."""
        usual = type(self)
        other = "" if self.num_classes == usual.num_classes else f", {self.num_classes} classes"
        other += "" if self.rank == usual.rank else f", rank {self.rank}"
        times = f", times at batch {self.step_batch_size}" if self.rounds else ""
        dtype = self.dtype if self.step == EAGER else f"{self.dtype}, {self.step}"
        return f"{self.model_title()}{other}, {dtype}, batch {self.batch_size}{times}"

    def build(self) -> Any:
        """The plain model, in fp32 on the CPU."""
        source = ModelSource(self.model, dict(self.model_args))
        source = sized_for(source, self.num_classes, self.image_size)
        return build(source, self.num_classes).model

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        """Channels, height, width of what the model takes."""
        form = preprocessing_of(model, size=self.image_size)
        return len(form.mean), form.size, form.size

    def method(self, name: str, model: nn.Module) -> Method:
        """The method of a row, with everybody's budget where it has one."""
        entry = entry_of(name)
        # each shallow prompt makes every block slower: hundreds of them are nobody's
        has_budget = "budget" in entry.options and name != "prompt-shallow"
        has_rank = {"rank", "samples"} <= entry.options
        return Method(
            name, budget_of(model) if has_budget else None, self.rank if has_rank else None
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"model_args": dict(self.model_args)}


def budget_of(model: nn.Module) -> int:
    """Parameters of a LoRA of rank 16 on the fused qkv, 0.69 % of ViT-B/16 as in the paper.

    Of a model without attention they are those of `lora-16`; where that has no place, the default
    share of the backbone.
    """
    backbone = backbone_numel(model)
    try:
        matrices = lora_matrices(model, rank=LORA_RANK).values()
    except ValueError:
        return int(DEFAULT_BUDGET * backbone)
    return min(sum(LORA_RANK * sum(what.shape[:2]) for what in matrices), backbone)
