"""`SptConfig`: what PEFT's users give, save and load to say what SPT trains."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig, TaskType

from ..plan import Plan
from .registration import peft_type

PLAN_FILE = "spt_plan.safetensors"

# PEFT's classes for these put a copy in the place of the classifier; a plan trains the head itself
_WRAPPED_HEADS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "repo_type")


@dataclass
class SptConfig(PeftConfig):
    """What SPT trains of a model, for `get_peft_model`.

    A folder that it is saved in has `adapter_config.json` and, as `Plan.save` writes it, the plan
    in `spt_plan.safetensors`.

    Attributes:
        plan: a `Plan`, as `allocate` makes it of a sensitivity and a budget, or the path of one
            that was saved; it is a `Plan` afterwards. None for a model that is tuned already, by
            `spt_kernels.apply` or `load_delta`: PEFT takes it over with its task.
        modules_to_save: names of modules, or their endings, which are trained whole besides the
            plan and its head.

    Raises:
        TypeError: `plan` is something else, or `modules_to_save` no sequence of strings.
        ValueError: `task_type` is one whose PEFT class wraps the classifier; leave it out.
        DeltaFormatError: the file is no plan.
        OSError: it cannot be read.
    """

    plan: Plan | str | os.PathLike[str] | None = field(
        default=None, metadata={"help": "What is trained: a Plan, or the path of a saved one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole besides the plan and its head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.is_read = False  # whether it came from a folder, with trained weights beside it
        if self.task_type in _WRAPPED_HEADS:
            raise ValueError(
                f"task_type: PEFT's class for {TaskType(self.task_type).value} puts a copy in the "
                "place of the classifier, which a plan trains itself as its head: leave it out"
            )
        names = self.modules_to_save
        if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
            raise TypeError(f"modules_to_save must be a list of names, got {names!r}")
        self.modules_to_save = None if names is None else list(names)
        if isinstance(self.plan, (str, os.PathLike)):
            self.plan = Plan.load(self.plan)
        if not isinstance(self.plan, (Plan, type(None))):
            raise TypeError(
                f"plan must be a Plan or the path of one, got {type(self.plan).__name__}: "
                "spt_kernels.allocate makes one of a Sensitivity"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the plan, ready for `json.dumps`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`, and the plan beside it; arguments as PEFT's."""
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        if isinstance(self.plan, Plan):
            self.plan.save(Path(save_directory) / PLAN_FILE)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> SptConfig:
        """Read what `save_pretrained` wrote, from a folder or the hub; arguments as PEFT's."""
        source = os.fspath(pretrained_model_name_or_path)
        of_hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
        path = Path(source, subfolder or "", PLAN_FILE)
        if not path.parent.is_dir():
            path = Path(hf_hub_download(source, PLAN_FILE, subfolder=subfolder, **of_hub))
        plan = Plan.load(path)
        config: SptConfig = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        config.plan, config.is_read = plan, True
        return config
