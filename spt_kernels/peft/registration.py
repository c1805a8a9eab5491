"""The name under which PEFT knows SPT, and the entry in its tables."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "SPT"
PREFIX = "spt_"

# How PEFT lets a method say what of a model is saved, since 0.21
_HOOKS = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")


def peft_type() -> Any:
    """SPT's member of `PeftType`, which PEFT looks its methods up by; made when first asked for.

    PEFT registers methods whose names are in that enumeration, and has no way to add to it: a
    member is made here as the enumeration itself makes one.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Let `get_peft_model` and `from_pretrained` find the two classes.

    Raises:
        ImportError: PEFT is older than what they are written for.
    """
    if not all(hasattr(BaseTuner, hook) for hook in _HOOKS):
        raise ImportError(
            f"spt_kernels.peft needs PEFT 0.21 or newer, got {peft.__version__}: "
            "pip install -U 'spt_kernels[peft]'"
        )
    peft_type()
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix=PREFIX)
