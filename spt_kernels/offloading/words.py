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
        words = [] if text is None else text.replace(" ", "").split(",")
        weights = [word for word in words if word in WHAT]
        if len(weights) > 1 or not set(words) <= {*WHAT, _STATE} or len(set(words)) < len(words):
            raise ValueError(
                "offload: expected frozen or forward-only, of the weights, state, of the "
                f"optimizer, one of each and a comma, or nothing, got {text!r}"
            )
        return cls(weights[0] if weights else _NOTHING, _STATE in words)

    def __bool__(self) -> bool:
        return self != OffloadWords()
