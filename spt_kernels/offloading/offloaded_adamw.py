"""`OffloadedAdamW`: AdamW whose running means are on the host between steps, for whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..optim.groups import check_no_amsgrad
from .pinned_tensors import PinnedTensors

_MEANS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Parameters of one group whose means are fetched together: `pinned` has them pair by pair."""

    group: dict[str, Any]
    params: list[Tensor]
    pinned: PinnedTensors

    @property
    def means(self) -> list[tuple[Tensor, Tensor]]:
        """On the device, while they are there."""
        tensors = self.pinned.on_device
        return list(zip(tensors[::2], tensors[1::2], strict=True))


class LoadedMean:
    """A mean of a state dict, hidden from torch, which would put it on the device of its parameter.

    Args:
        value: of the mean, anywhere.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def for_parameter(self, param: Tensor) -> Tensor:
        """In the dtype that torch would give it."""
        return self._value.to(param.dtype) if param.is_floating_point() else self._value


class OffloadedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose state is in pinned memory of the host between steps; the same bits.

    AdamW keeps two numbers for each that it trains. Where that is much of a model (`full`,
    `partial-K`) they need twice its memory; of sparse deltas and LoRA it is next to nothing, and
    `SparseAdamW` takes less time. A step goes through the parameters by pieces: the means of the
    next come from the host while those of one are updated, and those of the one before go back; so
    that the device holds three pieces at most. On a card a step ends when the last one is back.

    Every piece is updated by torch's own AdamW with the options of its group. The state of all
    parameters is made at once, zeros, where AdamW makes it in the first step.

    Args:
        params: as any optimizer takes them, dense, on the device where they are trained.
        lr: learning rate.
        betas: decays of the running means.
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: climb instead of descend.
        foreach: as `torch.optim.AdamW` has it.
        fused: likewise.
        piece_bytes: of the means in a piece; that of a large parameter may have more.

    Raises:
        TypeError: `piece_bytes` is no whole number.
        ValueError: `piece_bytes` is below 1, or what `torch.optim.AdamW` refuses.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        piece_bytes: int = 2**26,
    ) -> None:
        if not isinstance(piece_bytes, int) or isinstance(piece_bytes, bool):
            raise TypeError(f"piece_bytes must be a whole number, got {piece_bytes!r}")
        if piece_bytes < 1:
            raise ValueError(f"piece_bytes must be at least 1, got {piece_bytes}")
        self._piece_bytes = piece_bytes
        self._pieces: list[Piece] = []
        self._sides: dict[torch.device, Any] = {}  # device -> the stream to copy on
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused
        )

    @property
    def host_bytes(self) -> int:
        """What is on the host."""
        return sum(piece.pinned.nbytes for piece in self._pieces)

    @property
    def fetched_bytes(self) -> int:
        """How many were copied to the device so far; as many went back."""
        return sum(piece.pinned.fetched_bytes for piece in self._pieces)

    @property
    def on_host(self) -> list[Tensor]:
        """All tensors that are."""
        return [tensor for piece in self._pieces for tensor in piece.pinned.on_host]

    @property
    def buffers(self) -> list[Tensor]:
        """What has memory on the device while a piece is there."""
        return [piece.pinned.buffer for piece in self._pieces]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer does; the state of the parameters is made at once."""
        check_no_amsgrad([param_group], type(self).__name__)
        super().add_param_group(param_group)
        self._put_on_host(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer does; on the device there need be no room for the means meanwhile."""
        states = {
            key: {n: LoadedMean(v) if n in _MEANS else v for n, v in state.items()}
            for key, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})

    def __getstate__(self) -> dict[str, Any]:
        """As any optimizer does."""
        return {**super().__getstate__(), "_piece_bytes": self._piece_bytes}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put on the host what was loaded; what is refused leaves all as it is."""
        check_no_amsgrad(state["param_groups"], type(self).__name__)
        super().__setstate__(state)
        self._pieces, self._sides = [], {}
        for group in self.param_groups:
            self._put_on_host(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or parameters have been moved to another device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = [p for p in self._pieces if any(param.grad is not None for param in p.params)]
        self._check(pieces)
        for n, piece in enumerate(pieces):
            for needed in pieces[n : n + 2]:  # the next one comes while this one is updated
                needed.pinned.fetch()
            piece.pinned.wait()
            self._update(piece)
            piece.pinned.put_back()
            for over in pieces[max(0, n - 1) : n]:
                over.pinned.release()
        for last in pieces[-1:]:
            last.pinned.release()
        for side in self._sides.values():
            if side is not None:
                side.synchronize()  # whoever reads the state on the host finds it
        return loss

    def _update(self, piece: Piece) -> None:
        chosen = [
            (param, param.grad, *means, self.state[param]["step"])
            for param, means in zip(piece.params, piece.means, strict=True)
            if param.grad is not None
        ]
        params, grads, averages, squares, steps = (
            list(column) for column in zip(*chosen, strict=True)
        )
        group = piece.group
        beta1, beta2 = group["betas"]
        adamw(
            *(params, grads, averages, squares, [], steps),
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=any(map(torch.is_complex, params)),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _put_on_host(self, group: dict[str, Any]) -> None:
        """Make the state of a group's parameters, or take that which there is, piece by piece."""
        for params in self._portions(group["params"]):
            device = params[0].device
            if device not in self._sides:
                self._sides[device] = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            means = list(chain.from_iterable(self._means_of(p, group) for p in params))
            dtypes = [mean.dtype for mean in means]
            pinned = PinnedTensors(means, dtypes, device, self._sides[device])
            held = zip(pinned.on_host[::2], pinned.on_host[1::2], strict=True)
            for param, pair in zip(params, held, strict=True):
                self.state[param] |= dict(zip(_MEANS, pair, strict=True))
            self._pieces.append(Piece(group, params, pinned))

    def _portions(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Parameters that lie side by side, on one device, whose means are no more than a piece."""
        portions: list[list[Tensor]] = []
        left = 0
        for param in params:
            left -= 2 * param.nbytes
            if not portions or left < 0 or param.device != portions[-1][-1].device:
                portions.append([])
                left = self._piece_bytes - 2 * param.nbytes
            portions[-1].append(param)
        return portions

    def _means_of(self, param: Tensor, group: dict[str, Any]) -> list[Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device if group["fused"] else "cpu")
        return [_mean_of(param, state.get(name)) for name in _MEANS]

    def _check(self, pieces: list[Piece]) -> None:
        for param in chain.from_iterable(piece.params for piece in pieces):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"OffloadedAdamW needs dense gradients, got {param.grad.layout} for a "
                    f"parameter of shape {tuple(param.shape)}"
                )
        for piece in pieces:
            home = piece.pinned.buffer.device
            if any(param.device != home for param in piece.params):
                raise RuntimeError(
                    f"OffloadedAdamW was made when its parameters were on {home}, and they are on "
                    f"{piece.params[0].device}: make it after they are moved"
                )


def _mean_of(param: Tensor, held: Tensor | LoadedMean | None) -> Tensor:
    if held is None:
        return torch.zeros_like(param, device="cpu", memory_format=torch.preserve_format)
    return held.for_parameter(param) if isinstance(held, LoadedMean) else held
