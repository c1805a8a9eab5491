"""The optimizer of a tuned model: AdamW whose step leaves base + delta in the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..layers.sparse_delta import leave_to_hook
from .adamw_step import Member, leave, members_of, step_entries, step_rest, unscale
from .groups import check_not_negative
from .prepared_step import PreparedStep


class SparseAdamW(Optimizer):
    """AdamW for deltas and for whatever else is trained, all in one launch per device.

    The update is that of `torch.optim.AdamW`, and so are the state and its names: state dicts move
    freely between the two. A step also writes base + delta into the weights, which saves a pass,
    and can round it stochastically. Parameters that are not fp32 and contiguous are updated by
    torch's own functional AdamW.

    Args:
        params: parameters or groups of them, as for any torch optimizer; see `param_groups`.
        lr: learning rate, a number or a scalar tensor.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; on a delta it pulls to the base weights.
        maximize: climb instead of descend.
        capturable: count steps on the device, so that a step never waits for it and a CUDA graph
            can hold it.
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
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete what a state dict of `torch.optim.AdamW` does not hold."""
        super().__setstate__(state)
        self._prepared, self._trained = None, []
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise ValueError("the state dict has amsgrad=True, which SparseAdamW does not do")
            for key in ("maximize", "capturable", "stochastic_rounding", "seed"):
                group.setdefault(key, self.defaults[key])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph is being captured and `capturable`
                is not set.
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
        capturable = all(group["capturable"] for group in self.param_groups)
        if (
            not capturable
            and torch.cuda.is_available()
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError("a step can be captured in a CUDA graph with capturable=True only")

        members = members_of(self)
        entries = [member for member in members if member.is_entry]
        rest = [member for member in members if not member.is_entry]
        unscale(members, getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # 1 where a gradient overflowed
        if found_inf is not None and (rest or not capturable):
            if found_inf.item():
                for member in members:
                    leave(member.delta)
                return
            found_inf = None
        step_entries(entries, found_inf)
        step_rest(rest)
        self._prepare(members)

    def _step_as_prepared(self) -> bool:
        """Take the step the short way; False if something has changed, and nothing is done then."""
        if self._prepared is None:
            return False
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return False
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        return self._prepared.take(self, grad_scale)

    def _prepare(self, members: list[Member]) -> None:
        """Keep what this step has found out, unless other parameters take part in every step."""
        trained = [id(member.param) for member in members]
        again = trained == self._trained or not self._trained
        self._trained = trained
        self._prepared = PreparedStep.of(self.param_groups, members) if again else None
