"""`OffloadWords`: what is kept on the host, in one line of text, as a command or a file has it."""

from __future__ import annotations

from dataclasses import dataclass

WHAT = ("frozen", "forward-only", "nothing")  # of the weights
_NOTHING, _STATE = "nothing", "state"


@dataclass(frozen=True)
class OffloadWords:
    """Frozen weights, the state of the optimizer, or both.

    `"frozen"`, `"forward-only"`, `"state"`, `"frozen,state"` and `"nothing"` are such lines.

    Attributes:
        weights: what of them, as `offload` has it.
        state: whether that of the optimizer, as `OffloadedAdamW` keeps it.
    """

    weights: str = _NOTHING
    state: bool = False

    @classmethod
    def parse(cls, text: str | None) -> OffloadWords:
        """Read a line; None is nothing.

        Raises:
            ValueError: it is none.
        """
        if text is None or text.strip() == _NOTHING:
            return cls()
        words = text.replace(" ", "").split(",")
        weights = [word for word in words if word != _STATE]
        is_doubled = len(weights) > 1 or words.count(_STATE) > 1
        if is_doubled or not set(weights) <= {*WHAT} - {_NOTHING}:
            raise ValueError(
                "offload: expected frozen or forward-only for weights, state for the optimizer's, "
                f"one of each with a comma between, or nothing, got {text!r}"
            )
        return cls(weights[0] if weights else _NOTHING, _STATE in words)

    def __bool__(self) -> bool:
        return self != OffloadWords()
