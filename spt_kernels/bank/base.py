"""The base model under a bank: what it was, to the last bit, and whether others have changed it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..model.check import check_trainable_itself
from ..task.base_model import BaseModel
from ..task.file.fingerprint import Fingerprint
from ..task.fit import base_values


class Base:
    """A plain model whose weights a bank writes tasks into.

    Attributes:
        model: the module itself.
        now: what is where in it, by the names of the base.
        modules: module name -> module, as they are in the base.
        fingerprints: name -> fingerprint of a parameter, or floating buffer, in the base.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_trainable_itself(model, "give a bank")
        self.now = BaseModel.of(model)
        if getattr(model, "spt_tuning", None) is not None or self.now.tuned:
            raise ValueError(
                "model is tuned, a bank takes the plain base model: spt.unload(model) first, and "
                "bank.add(name, tuned_model) for the task"
            )
        self.model = model
        self.modules = dict(model.named_modules())
        named = {*self.now.parameters, *self.now.buffers}
        values = base_values(model, self.now, named)
        self.fingerprints: Mapping[str, Fingerprint] = Fingerprint.of_all(
            {name: row for name, row in values.items() if row[0].element_size() <= 8}
        )
        self._whole: dict[str, Tensor] = {}
        self._buffers = {
            name: None if buffer is None else buffer.detach().clone()
            for name, buffer in self.now.buffers.items()
        }
        self._state: list[tuple[int, int]] = []
        self.record()

    def record(self) -> None:
        """Take the weights for ours as they are now: nobody else has changed them."""
        self._state = self._versions()

    def check_unchanged(self) -> None:
        """Raise `ValueError` where somebody else has written, moved or cast a parameter."""
        pairs = zip(self.now.parameters, self._state, self._versions(), strict=True)
        for name, before, after in pairs:
            if before != after:
                raise ValueError(
                    f"{name} was changed, moved or cast behind the bank, which no longer knows its "
                    "base: make the model what it is to be first, then a new bank"
                )

    def remember(self, name: str) -> None:
        """Keep a copy of a parameter that a task replaces whole, once for all tasks.

        The model is without any task then.
        """
        if name not in self._whole:
            self._whole[name] = self.now.parameters[name].detach().clone()

    def whole(self, name: str) -> Tensor:
        """The base values of a parameter that `remember` was called for."""
        return self._whole[name]

    def buffers(self, names: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The base values of buffers."""
        return {name: self._buffers[name] for name in names}

    @property
    def nbytes(self) -> int:
        """Of the copies that the bank keeps of the base, buffers included."""
        kept = [*self._whole.values(), *(b for b in self._buffers.values() if b is not None)]
        return sum(tensor.nbytes for tensor in kept)

    def _versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.now.parameters.values()]
