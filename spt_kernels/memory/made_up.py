"""Made-up scores of a model, which know from a rehearsed forward what can be tuned how."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..methods import Method, make_plan
from ..methods.matrices import block_matrices, lora_matrices
from ..model import HeadPatterns
from ..plan import Plan
from ..sensitivity import Sensitivity, skewed_sensitivity, uncalled_weights
from .batch import batch_form, empty_batch
from .step import forward_of, on_its_own
from .twin import fake_copy

_LORA_HOMES = ("plain_lora", "peft_lora")  # methods without a plan


def made_up_plan(
    model: nn.Module, method: Method, image_shape: Sequence[int] | Mapping[str, Tensor]
) -> Plan | None:
    """What `method` trains of a model, chosen by made-up scores where it chooses by any.

    Raises:
        ValueError: as `make_plan` and `check_called`.
    """
    if method.is_sensitivity_aware:
        scores = made_up_sensitivity(model, image_shape, head=method.head)
        return make_plan(model, method, scores)
    plan = make_plan(model, method)
    if puts_modules(method):
        check_called(model, method, plan, uncalled_of(model, image_shape))
    return plan


def made_up_sensitivity(
    model: nn.Module,
    image_shape: Sequence[int] | Mapping[str, Tensor],
    *,
    head: HeadPatterns | None = None,
) -> Sensitivity:
    """Scores as skewed as measured ones, for a model and the images that it takes.

    Args:
        model: plain, not changed; its parameters may be on the meta device.
        image_shape: of one input, `(3, height, width)`; or a batch that is a mapping, as
            `estimate_memory` has it.
        head: as `head_names` has it: by name, unless it is given.

    Raises:
        ValueError: the model has nothing to tune, or cannot take such images.
    """
    return skewed_sensitivity(model, uncalled_of(model, image_shape), head=head)


@on_its_own()
def uncalled_of(
    model: nn.Module, image_shape: Sequence[int] | Mapping[str, Tensor]
) -> frozenset[str]:
    """Weights that the model reads itself, as BEiT and Swin V2 do with `qkv`, or not at all.

    A forward on fake tensors shows them: `measure_sensitivity` finds the same on real images.
    Arguments and errors are those of `made_up_sensitivity`.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    twin, _alive = fake_copy(model, fakes, torch.float32)  # in whatever precision it is
    twin.eval()
    is_named = isinstance(image_shape, Mapping)
    form = batch_form(image_shape if is_named else (2, *image_shape), None)
    with fakes:
        batch = empty_batch(form, torch.float32)
        return uncalled_weights(twin, lambda: forward_of(twin, batch))


def puts_modules(method: Method) -> bool:
    """Whether it puts a LoRA on matrices that no measured scores have chosen."""
    of_lora = method.entry.structured is not None or method.entry.home in _LORA_HOMES
    return of_lora and not method.is_sensitivity_aware


def check_called(
    model: nn.Module, method: Method, plan: Plan | None, uncalled: Collection[str]
) -> None:
    """Refuse a method that would put a module where the model never calls one.

    Raises:
        ValueError: it would.
    """
    names = [] if plan is None else list(plan.structured)
    if method.entry.home in _LORA_HOMES:
        chosen = block_matrices if method.name == "peft-lora-all" else lora_matrices
        names = [f"{name}.weight" for name in chosen(model)]
    blocked = next((name for name in names if name in uncalled), None)
    if blocked is not None:
        raise ValueError(
            f"method: nothing can stand for {blocked.removesuffix('.weight')}, as the model never "
            "calls it but reads its weight (BEiT, EVA and Swin V2 do); spt-* train entries of it"
        )
