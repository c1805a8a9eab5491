"""A block whose frozen matrices are on the device only while its forward or backward runs."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..layers import SparseDelta
from ..layers.deltas.sparse_delta import write_into
from ..layers.deltas.written_state import WrittenState
from ..layers.running import Running
from ..ops.launching import is_transformed
from .matrix import Matrix
from .pinned_tensors import PinnedTensors
from .schedule import Schedule

Kind = torch.dtype | None  # in which autocast computes; None without it


class Call:
    """One call of a streamed block, from its forward to the end of its backward."""

    __slots__ = ("_block", "in_backward", "kind", "n_inputs", "n_left", "running")

    def __init__(self, block: StreamedBlock, kind: Kind, running: Running) -> None:
        self._block, self.kind = block, kind
        self.running: Running | None = running  # its forward
        self.in_backward = False
        self.n_inputs = self.n_left = 0  # inputs with a gradient, and those whose is still to come

    @property
    def block(self) -> StreamedBlock:
        """Of which it is a call."""
        return self._block

    def begin_backward(self, *_: Any) -> None:
        """A hook before each node that the backward may enter the block by."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._block.name} is offloaded and has first derivatives only "
                "(create_graph=False): bring it back with spt.offload(model, 'nothing')"
            )
        if not self.in_backward:
            self.in_backward, self.n_left = True, self.n_inputs
            self._block.begin_backward(self)

    def leave(self, _: Tensor) -> None:
        """A hook on the gradients of the inputs: after the last of them the block is through."""
        self.n_left -= 1
        if self.n_left == 0:
            self.end_backward()

    def end_backward(self) -> None:
        """Nothing reads the weights any more."""
        if self.in_backward:
            self.in_backward = False
            self._block.drop(self)


class StreamedBlock:
    """The frozen matrices of one block, and the hooks that fetch them and give them back.

    Between its uses a matrix is on the host: the parameter stays the object that it is, its `data`
    are the values there. Under autocast a matrix that autocast would cast is fetched in that dtype:
    half the bytes, the same bits; and what autograd keeps is the buffer that is given back, not a
    cast copy. Where a matrix has a sparse delta, base + delta is written when it is fetched, and
    the optimizer leaves it alone.

    Args:
        name: of the block in the model.
        module: the block.
        matrices: those that are streamed.
        device: where the block computes.
        schedule: of the model.
        side: the stream to copy on, None on a CPU.
        root: what was offloaded, which has the block.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        matrices: list[Matrix],
        device: torch.device,
        schedule: Schedule,
        side: Any,
        root: nn.Module,
    ) -> None:
        self.name, self.matrices = name, matrices
        self.root = weakref.ref(root)
        self.has_backward = False  # of the last forward
        self.device, self._side, self._schedule = device, side, schedule
        self._running: list[Call] = []  # forwards, the innermost last
        self._held: list[Call] = []  # calls that need the values now, in forward or backward
        self._kind: Kind = None  # of the last call
        self._is_cast = [matrix.is_cast for matrix in matrices]
        self._tuned = [n for n, matrix in enumerate(matrices) if matrix.delta is not None]
        tensors = [matrix.parameter.detach() for matrix in matrices]
        self._pinned: dict[Kind, PinnedTensors] = {
            None: PinnedTensors(tensors, [t.dtype for t in tensors], device, side)
        }
        self._versions: dict[Kind, list[int]] = {}  # of the parameters when they were cast
        self._fetched_versions: list[int] = []  # when they were fetched
        # place of a matrix -> which state of its delta the fetched values hold, by kind
        self._written: dict[Kind, dict[int, WrittenState]] = {}
        self._show(self._masters.on_host)
        for _, delta in self.deltas():
            delta.written.is_away = True
        self._hooks: list[Any] = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]
        for owner in dict.fromkeys(matrix.owner for matrix in matrices):
            if owner is not module:
                self._hooks.append(owner.register_forward_pre_hook(self._before_owner))
                self._hooks.append(owner.register_forward_hook(self._after_owner))
            after = functools.partial(self._after_state_dict)  # torch marks it, as no method can be
            self._hooks.append(owner.register_state_dict_post_hook(after))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: the weights of a copy would be on the host, without hooks of its own."""
        raise ValueError(
            "model is offloaded, and a copy of it would have no weights on the device: copy it "
            "before, or bring them back with spt.offload(model, 'nothing')"
        )

    def __reduce__(self) -> NoReturn:
        """Refuse: streams and pinned memory do not go into a file."""
        raise ValueError(
            "model is offloaded and cannot be pickled: save its state_dict(), or bring its weights "
            "back with spt.offload(model, 'nothing')"
        )

    @property
    def nbytes(self) -> int:
        """Of what is streamed, in the parameters' own dtypes."""
        return self._masters.nbytes

    @property
    def host_bytes(self) -> int:
        """Of what is on the host."""
        return sum(pinned.nbytes for pinned in self._pinned.values())

    @property
    def fetched_bytes(self) -> int:
        """How many were copied to the device so far."""
        return sum(pinned.fetched_bytes for pinned in self._pinned.values())

    @property
    def on_host(self) -> list[Tensor]:
        """All tensors that are."""
        return [tensor for pinned in self._pinned.values() for tensor in pinned.on_host]

    @property
    def buffers(self) -> list[Tensor]:
        """What has memory on the device while the block is there."""
        return [pinned.buffer for pinned in self._pinned.values()]

    @property
    def _masters(self) -> PinnedTensors:
        return self._pinned[None]

    def drop(self, call: Call) -> None:
        """A call needs the values no more."""
        if call in self._held:
            self._held.remove(call)
            self.give_up()

    def end_interrupted(self) -> None:
        """Forwards that Ctrl-C has ended, which passes hooks by, need the values no more."""
        for call in [c for c in self._running if c.running is not None and c.running.is_over()]:
            self._running.remove(call)
            self.drop(call)

    def give_up(self) -> None:
        """Give the memory back unless a call needs it."""
        if not self._held:
            if self._shown is not self._masters.on_host:
                self._show(self._masters.on_host)
            for pinned in self._pinned.values():
                pinned.release()

    def fetch_ahead(self) -> bool:
        """Begin to fetch what the next call will need; False if one has it already."""
        if not self._held:
            self._fetched(self._kind)
        return not self._held

    def begin_backward(self, call: Call) -> None:
        """The backward of a call is about to read the values."""
        self._hold(call)
        self._schedule.begin_backward(call)

    def make_ready(self, kind: Kind) -> PinnedTensors:
        """The values as they are fetched where autocast computes in a dtype.

        They are cast once, and again when a parameter was changed in place.
        """
        if kind is None:
            return self._masters
        versions = self._versions_now()
        if self._versions.get(kind) != versions and not self._held:
            host = self._masters.on_host
            pairs = zip(self._is_cast, host, strict=True)
            dtypes = [kind if is_cast else tensor.dtype for is_cast, tensor in pairs]
            with torch.inference_mode(False):  # whoever evaluates first may train afterwards
                self._pinned[kind] = PinnedTensors(host, dtypes, self.device, self._side)
            self._versions[kind] = versions
        return self._pinned[kind]

    def _versions_now(self) -> list[int]:
        """How often each parameter was changed in place."""
        # what has a delta counts as changed at each step, and its base is not
        plain = [m for n, m in enumerate(self.matrices) if n not in self._tuned]
        return [matrix.parameter._version for matrix in plain]

    def values_on(self, device: torch.device) -> list[Tensor]:
        """Copies of all values, without what is trained in them."""
        return [host.to(device, copy=True) for host in self._masters.on_host]

    def end(self, values: list[Tensor] | None = None) -> None:
        """Take the hooks away, and give the parameters these values; None: those on the host."""
        self._held.clear()
        self.give_up()
        self._schedule.end()
        for hook in self._hooks:
            hook.remove()
        for _, delta in self.deltas():
            delta.written.is_away = False
            delta.written.forget()
        if values is not None:
            self._show(values)

    def _kind_now(self) -> Kind:
        device = self.device.type
        if not torch.is_autocast_enabled(device) or not any(self._is_cast):
            return None
        return torch.get_autocast_dtype(device)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self.name} is offloaded, which torch.compile cannot trace: bring it back with "
                "spt.offload(model, 'nothing')"
            )
        if is_transformed():
            raise RuntimeError(
                f"{self.name} is offloaded, where neither transforms of torch.func nor "
                "forward-mode differentiation can follow it: bring it back with "
                "spt.offload(model, 'nothing')"
            )
        self._schedule.end_leftovers(but=self)
        call = Call(self, self._kind_now(), Running(sys._getframe(1)))
        self._running.append(call)
        self._hold(call)
        self._schedule.begin_forward(self)
        if torch.is_grad_enabled():
            for given in _followed((args, kwargs)):
                given.register_hook(call.leave)
                call.n_inputs += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running:
            return  # another hook has failed before ours
        call = self._running.pop()
        call.running = None  # which holds on to what is called
        outputs = list(_followed(output))
        for made in outputs:
            made.grad_fn.register_prehook(call.begin_backward)  # type: ignore[union-attr]
        self.has_backward = bool(outputs) and torch.is_grad_enabled()
        stays = self._schedule.end_forward(self, has_backward=self.has_backward)
        if stays:
            self._held.remove(call)
        else:
            self.drop(call)

    def _before_owner(self, owner: nn.Module, args: Any) -> None:
        if not self._held:
            name = next(matrix.name for matrix in self.matrices if matrix.owner is owner)
            raise RuntimeError(
                f"{name} is offloaded with {self.name}, outside of whose forward it was called"
            )

    def _after_owner(self, owner: nn.Module, args: Any, output: Any) -> None:
        # whoever took the output out of the block may have a backward enter it there
        if self._running:
            for made in _followed(output):
                made.grad_fn.register_prehook(self._running[-1].begin_backward)  # type: ignore[union-attr]

    def _after_state_dict(
        self, owner: nn.Module, state: dict[str, Any], prefix: str, _: Any
    ) -> None:
        """Whole values, even where those of a call are shown, which are rounded under autocast."""
        hosts = self._masters.on_host
        for n, delta in self.deltas():
            if self.matrices[n].owner is owner:
                write_into(delta, hosts[n])
        for matrix, host in zip(self.matrices, hosts, strict=True):
            key = prefix + matrix.local
            if matrix.owner is owner and state.get(key, matrix.parameter) is not matrix.parameter:
                state[key] = host

    def _hold(self, call: Call) -> None:
        """Have the values on the device for a call, until it is dropped."""
        if any(other.kind != call.kind for other in self._held):
            raise RuntimeError(
                f"{self.name} is offloaded and was called under autocast within a call without it, "
                "or the other way round"
            )
        self._check_unmoved()
        pinned = self._fetched(call.kind)
        pinned.wait()
        self._write_deltas(pinned, self._written[call.kind])
        self._show(pinned.on_device)
        self._held.append(call)
        self._kind = call.kind

    def _fetched(self, kind: Kind) -> PinnedTensors:
        pinned, versions = self.make_ready(kind), self._versions_now()
        if not self._held and versions != self._fetched_versions:
            pinned.release()  # fetched ahead of a change
        if pinned.fetch():
            self._written[kind], self._fetched_versions = {}, versions
        if not self._held:
            for other in self._pinned.values():
                if other is not pinned:
                    other.release()
        return pinned

    def _write_deltas(self, pinned: PinnedTensors, written: dict[int, WrittenState]) -> None:
        for n, delta in self.deltas():
            if n not in written or not written[n].matches(delta.delta):
                write_into(delta, pinned.on_device[n])
                delta.written.record(delta.delta)
                written[n] = WrittenState()
                written[n].record(delta.delta)

    def deltas(self) -> Iterator[tuple[int, SparseDelta]]:
        """Place of a matrix -> its sparse delta, of those that have one."""
        for n in self._tuned:
            delta = self.matrices[n].delta
            if delta is not None and delta.index.numel():
                yield n, delta

    def _show(self, tensors: list[Tensor]) -> None:
        """Let these be the values of the parameters."""
        self._shown = tensors
        for matrix, tensor in zip(self.matrices, tensors, strict=True):
            matrix.parameter.data = tensor

    def _check_unmoved(self) -> None:
        for matrix, shown in zip(self.matrices, self._shown, strict=True):
            own = matrix.owner._parameters.get(matrix.local)
            if own is not matrix.parameter or _storage(own) != _storage(shown):
                problem = "was moved, cast or replaced"
            elif own.requires_grad:
                problem = "requires a gradient"
            else:
                continue
            raise RuntimeError(
                f"{matrix.name} is offloaded, and {problem} since: call spt.offload(model, "
                "'nothing') before, and spt.offload again after"
            )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _followed(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module is given or gives that autograd has made.

    Others that require a gradient, as a parameter that is given, would keep their hooks for good.
    """
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            yield leaf
