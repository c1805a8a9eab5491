"""The optimizer of a tuned model: AdamW whose step leaves base + delta in the weights."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .ops.sparse_adamw import AdamWEntry, sparse_adamw
from .ops.write_delta import TARGET_DTYPES

if TYPE_CHECKING:
    from .layers import SparseDelta

# Trained tokens and tables have two or more dimensions, yet decay pulls them to no useful place
_NEVER_DECAYED = ("_token", "pos_embed", "_position_bias_table")


def param_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, for any torch optimizer.

    Weight decay is for matrices: the head, LoRA and Adapter. Deltas, biases, norms and other
    vectors, class and position tokens, and whatever the model lists in `no_weight_decay()`, are
    not decayed.

    Args:
        model: tuned or plain; parameters that need no gradient are left out.
        weight_decay: of the first group; the paper's is 1e-4.

    Returns:
        Two groups, by name "decayed" and "not decayed", each ordered by parameter name; one of them
        may be empty.

    Raises:
        TypeError: `model` is no module, or `weight_decay` no number.
        ValueError: nothing is trainable, or `weight_decay` is below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    _check_not_negative("weight_decay", weight_decay)
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if not named:
        raise ValueError("model has no trainable parameters: apply a plan to it first")
    ask = getattr(model, "no_weight_decay", None)
    exempt = set(ask()) if callable(ask) else set()
    decays = {name: p.dim() >= 2 and not _is_exempt(name, exempt) for name, p in named}
    return [
        {
            "name": "decayed",
            "params": [p for name, p in named if decays[name]],
            "weight_decay": weight_decay,
        },
        {
            "name": "not decayed",
            "params": [p for name, p in named if not decays[name]],
            "weight_decay": 0.0,
        },
    ]


def _check_not_negative(name: str, value: Any) -> None:
    if not isinstance(value, (numbers.Real, Tensor)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not float(value) >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _is_exempt(name: str, exempt: set[str]) -> bool:
    leaf = name.rpartition(".")[2]
    return name in exempt or leaf in exempt or leaf.endswith(_NEVER_DECAYED)


@dataclass(frozen=True)
class _Member:
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    delta: SparseDelta | None
    entry_id: int

    @property
    def is_entry(self) -> bool:
        """Whether the fused op takes it; anything else goes through torch's own AdamW."""
        param, mean, square = self.param, self.state["exp_avg"], self.state["exp_avg_sq"]
        return (
            param.dtype == mean.dtype == square.dtype == torch.float32
            and param.is_contiguous()
            and mean.is_contiguous()
            and square.is_contiguous()
            and param.device.type in ("cpu", "cuda")
            and (self.delta is None or self.delta.target.dtype in TARGET_DTYPES)
        )


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
            _check_not_negative(name, value)
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
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete what a state dict of `torch.optim.AdamW` does not hold."""
        super().__setstate__(state)
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise ValueError("the state dict has amsgrad=True, which SparseAdamW does not do")
            for key in ("maximize", "capturable", "stochastic_rounding", "seed"):
                group.setdefault(key, self.defaults[key])

    @torch.no_grad()
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
        capturable = all(group["capturable"] for group in self.param_groups)
        if (
            not capturable
            and torch.cuda.is_available()
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError("a step can be captured in a CUDA graph with capturable=True only")

        members = list(self._members())
        entries: list[_Member] = []
        rest: list[_Member] = []
        for member in members:
            (entries if member.is_entry else rest).append(member)
        _unscale(members, getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # 1 where a gradient overflowed
        if found_inf is not None and (rest or not capturable):
            if found_inf.item():
                for member in members:
                    _leave(member.delta)
                return loss
            found_inf = None
        _step_entries(entries, found_inf)
        _step_rest(rest)
        return loss

    def _members(self) -> Iterable[_Member]:
        from .layers import delta_of

        entry_id = -1
        for group in self.param_groups:
            for param in group["params"]:
                entry_id += 1  # also where there is no gradient: a parameter keeps its random bits
                if param.grad is None:
                    _leave(delta_of(param))
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"SparseAdamW needs dense gradients, got {param.grad.layout} for a "
                        f"parameter of shape {tuple(param.shape)}"
                    )
                state = self.state[param]
                if not state:
                    on_device = param.device if group["capturable"] else "cpu"
                    state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(
                        param, memory_format=torch.preserve_format
                    )
                yield _Member(param, param.grad, state, group, delta_of(param), entry_id)


def _leave(delta: SparseDelta | None) -> None:
    """Keep the hook that follows each step from rounding anew what this step does not touch."""
    if delta is not None and delta.is_fresh:
        delta.mark_written()


def _unscale(members: list[_Member], grad_scale: Tensor | None) -> None:
    if grad_scale is None:
        return
    for device in dict.fromkeys(member.param.device for member in members):
        grads = [member.grad for member in members if member.param.device == device]
        torch._foreach_div_(grads, grad_scale.to(device, non_blocking=True))


def _step_entries(members: list[_Member], found_inf: Tensor | None) -> None:
    """One call of the op for each way of rounding, which is one call as a rule."""
    for device in dict.fromkeys(member.state["step"].device for member in members):
        steps = [m.state["step"] for m in members if m.state["step"].device == device]
        finite = 1 if found_inf is None else 1 - found_inf.to(device, non_blocking=True)
        torch._foreach_add_(steps, finite)
    roundings = dict.fromkeys((m.group["stochastic_rounding"], m.group["seed"]) for m in members)
    for stochastic, seed in roundings:
        chosen = [
            m
            for m in members
            if (m.group["stochastic_rounding"], m.group["seed"]) == (stochastic, seed)
        ]
        entries = [_entry(member, found_inf) for member in chosen]
        sparse_adamw(entries, stochastic_rounding=stochastic, seed=seed)
    for member in members:
        if member.delta is not None:
            member.delta.mark_written()


def _entry(member: _Member, found_inf: Tensor | None) -> AdamWEntry:
    group, delta, step = member.group, member.delta, member.state["step"]
    beta1, beta2 = group["betas"]
    if found_inf is not None:
        step = step * (1 - found_inf.to(step.device, non_blocking=True))  # 0 skips the entry
    return AdamWEntry(
        param=member.param,
        grad=member.grad.contiguous(),
        exp_avg=member.state["exp_avg"],
        exp_avg_sq=member.state["exp_avg_sq"],
        step=step,
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        target=None if delta is None else delta.target,
        index=None if delta is None else delta.index,
        original=None if delta is None else delta.original,
        entry_id=member.entry_id,
    )


def _step_rest(members: list[_Member]) -> None:
    for group_id in dict.fromkeys(id(member.group) for member in members):
        chosen = [member for member in members if id(member.group) == group_id]
        group, states = chosen[0].group, [member.state for member in chosen]
        beta1, beta2 = group["betas"]
        adamw(
            [member.param for member in chosen],
            [member.grad for member in chosen],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            capturable=group["capturable"] and all(s["step"].device.type != "cpu" for s in states),
            has_complex=any(member.param.is_complex() for member in chosen),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
    for member in members:
        if member.delta is not None:
            member.delta.write()
