"""How deltas of a BatchNorm follow its parameters into the SyncBatchNorm that takes its place.

`nn.SyncBatchNorm.convert_sync_batchnorm`, and those like it, make new modules and give them the
parameters of the old ones. Without this the deltas would stay behind with modules that nobody has.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .deltas.sparse_delta import owner_of, tag
from .tuned_class import change_class, is_tuned, tuned_class


@functools.cache
def follow_conversions() -> None:
    """From now on, see to it that a SyncBatchNorm takes deltas over with the parameters."""
    register_module_parameter_registration_hook(_take_over)


def _take_over(module: nn.Module, local: str, parameter: Tensor | None) -> None:
    """Called by torch for each parameter that a module is given, before it has it."""
    if parameter is None or not isinstance(module, nn.SyncBatchNorm):
        return
    holder: Any = owner_of(parameter)
    if holder is None or holder is module or local not in holder._spt_states:
        return
    own: Any = module
    reads = tuple(type(own)._spt_reads) if is_tuned(module) else ()
    tuner = type(holder)._spt_made_of[0]
    change_class(own, tuned_class(tuner, own, (*reads, local)))
    delta_name, index_name, original_name = holder.delta_local_names(local)
    own.register_parameter(delta_name, holder._parameters[delta_name])
    for name in (index_name, original_name):
        own.__dict__[name] = holder.__dict__[name]
    own._spt_states[local] = holder._spt_states[local]
    if "_spt_name" in vars(holder):
        own.__dict__["_spt_name"] = vars(holder)["_spt_name"]
    for tagged in (own._parameters[delta_name], parameter):
        tag(tagged, own, anew=True)
