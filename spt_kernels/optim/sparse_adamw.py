"""The optimizer of a tuned model: AdamW whose step leaves base + delta in the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.sharded import is_sharded
from ..layers.deltas.sparse_delta import leave_to_hook
from ..ops.launching import load_for_capture
from .adamw_step import Member, fits_fused, leave, members_of, step_entries, step_rest, unscale
from .groups import check_no_amsgrad, check_not_negative
from .prepared_step import PreparedStep


class SparseAdamW(Optimizer):
    """AdamW for deltas and for whatever else is trained, all of it at once.

    The update is that of `torch.optim.AdamW`, and so are the state and its names: state dicts move
    freely between the two. A step also writes base + delta into the weights, which saves a pass,
    and can round it stochastically. Parameters that are not fp32 and contiguous are updated by
    torch's own functional AdamW.

    On CUDA nothing of a step is waited for. Steps are counted on the device, as torch's fused AdamW
    counts them, and so a step whose gradients `torch.amp.GradScaler` finds to have overflowed is
    skipped there, not counted, and draws no random bits; gradients are unscaled in the same launch.

    With `capturable=True` a step can be part of a CUDA graph, under these terms:

    - One step has been taken before, on the gradients' shapes and devices that the graph has.
    - A replay reads the gradients from where they were, counts on, and rounds by other random bits.
    - A learning rate that is a scalar tensor on the device, fp32 or fp64, is read by each replay:
      schedulers of torch fill it in place between replays. Every other number of a group is part
      of the graph, and so is a learning rate that is a number or a tensor on the CPU.
    - `grad_scale` and `found_inf`, which GradScaler sets, are read from where they were.
    - Steps outside the graph may come between replays, on any gradients. After
      `load_state_dict`, `add_param_group`, other weights or a move of the model the graph goes on
      with the tensors that it was captured with: capture another.
    - The optimizer outlives the graph, which uses its tables.

    Args:
        params: parameters or groups of them, as for any torch optimizer; see `param_groups`.
        lr: learning rate, a number or a scalar tensor.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; on a delta it pulls to the base weights.
        maximize: climb instead of descend.
        capturable: let a CUDA graph hold a step, under the terms above.
        stochastic_rounding: round base + delta into bf16 and fp16 weights at random, without bias,
            instead of to nearest: small updates then survive on average.
        seed: of that randomness. Steps count along, so that a resumed run rounds the same way.

    Raises:
        TypeError: a hyperparameter is no number.
        ValueError: a hyperparameter is out of range.
    """

    # GradScaler then sets `grad_scale` and `found_inf` for the time of a step instead of waiting
    # for the device to say whether the gradients are finite
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        capturable: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be a number or a scalar tensor, got {tuple(lr.shape)}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_not_negative(name, value)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._prepared: PreparedStep | None = None
        self._trained: list[int] = []  # ids of the parameters of the last step
        # whose tables, state and learning rates CUDA graphs go on using
        self._captured: list[tuple[PreparedStep, list[float | Tensor]]] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer does."""
        check_no_amsgrad([param_group], type(self).__name__)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete what a state of torch's AdamW lacks; what is refused leaves all as it is."""
        check_no_amsgrad(state["param_groups"], type(self).__name__)
        super().__setstate__(state)
        self._prepared, self._trained = None, []
        self._captured = self.__dict__.get("_captured", [])
        for group in self.param_groups:
            for key in ("maximize", "capturable", "stochastic_rounding", "seed"):
                group.setdefault(key, self.defaults[key])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: `stochastic_rounding` is set, and FSDP has sharded a delta.
            RuntimeError: a gradient is sparse, or a CUDA graph is being captured and `capturable`
                is not set, or no step has been taken before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if not self._step_as_prepared():
                self._step_in_general()
        return loss

    def _step_in_general(self) -> None:
        """Take the step with everything found anew, and prepare the next one."""
        leave_to_hook(self, None)
        is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._check_capture()
        members = members_of(self)
        entries = [member for member in members if member.is_entry]
        rest = [member for member in members if not member.is_entry]
        unscale(members, getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # not 0 after an overflow
        if found_inf is not None and not all(map(_is_skipped_unseen, members)):
            if found_inf.item():
                for member in members:
                    leave(member.delta)
                return
            found_inf = None
        step_entries(entries, found_inf)
        step_rest(rest, found_inf)
        if is_captured:
            self._prepared, self._trained = None, []  # memory made here is the graph's
        else:
            self._prepare(members)

    def _check_capture(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("a step can be captured in a CUDA graph with capturable=True only")
        params = [param for group in self.param_groups for param in group["params"]]
        if any(param.grad is not None and not self.state.get(param) for param in params):
            raise RuntimeError("take a step before one is captured in a CUDA graph: it makes state")

    def _step_as_prepared(self) -> bool:
        """Take the step the short way; False if something has changed, and nothing is done then."""
        if self._prepared is None:
            return False
        is_captured = self._prepared.on_card and torch.cuda.is_current_stream_capturing()
        if is_captured and not self._prepared.is_capturable:
            return False
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        taken = self._prepared.take(self, grad_scale, found_inf)
        if taken and is_captured:
            rates = [group["lr"] for group in self.param_groups]
            self._captured.append((self._prepared, rates))
        return taken

    def _prepare(self, members: list[Member]) -> None:
        """Keep what this step has found out, unless other parameters take part in every step."""
        trained = [id(member.param) for member in members]
        again = trained == self._trained or not self._trained
        again &= not any(is_sharded(p) for group in self.param_groups for p in group["params"])
        self._trained = trained
        self._prepared = PreparedStep.of(self.param_groups, members) if again else None
        devices = {member.param.device for member in members if member.param.is_cuda}
        if devices and all(group["capturable"] for group in self.param_groups):
            for device in devices:
                load_for_capture(device)


def _is_skipped_unseen(member: Member) -> bool:
    """Whether an overflow skips it without the host having to know."""
    if member.is_entry:
        return member.state["step"].device.type != "cpu" or bool(member.group["capturable"])
    return fits_fused(member)
