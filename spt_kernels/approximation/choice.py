"""`Approximation`: what of a backward is approximate, as Python and the command line say it."""

from __future__ import annotations

from dataclasses import dataclass

GELU_BITS = {"2bit": 2, "8bit": 8}
LAYER_NORM = "from-output"

_NOTHING = "nothing"

# as `--approximate` has them -> an argument of `approximate`, and its value
_WORDS = {
    **{f"gelu-{bits}": ("gelu", bits) for bits in GELU_BITS},
    f"layer-norm-{LAYER_NORM}": ("layer_norm", LAYER_NORM),
}


@dataclass(frozen=True)
class Approximation:
    """What `approximate` has done to a model; it leaves this as `model.spt_approximation`.

    Attributes:
        gelu: `"2bit"`, `"8bit"`, or None where activations are exact.
        layer_norm: `"from-output"`, or None where norms are exact.
        activations: names of the modules whose derivative is kept in that many bits, wherever that
            takes less than what the layer behind would have to keep besides.
        norms: names of the modules whose output is kept, of an fp32 input.
    """

    gelu: str | None = None
    layer_norm: str | None = None
    activations: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self.gelu, self.layer_norm)

    def to_json(self) -> dict[str, str | None]:
        """The choice, without the names of modules, for the metadata of a task file."""
        return {"gelu": self.gelu, "layer_norm": self.layer_norm}

    def summary(self) -> str:
        """One line for people."""
        parts = []
        if self.gelu is not None:
            bits = GELU_BITS[self.gelu]
            parts.append(f"derivatives of {len(self.activations)} activations in {bits} bits")
        if self.layer_norm is not None:
            parts.append(f"{len(self.norms)} LayerNorms from their output in 16 bits")
        return f"approximate gradients: {', '.join(parts)}" if parts else "exact gradients"


def check_choice(gelu: str | None, layer_norm: str | None) -> None:
    """Refuse what neither is; `ValueError`."""
    if gelu is not None and gelu not in GELU_BITS:
        raise ValueError(f"gelu: expected '2bit', '8bit' or None, got {gelu!r}")
    if layer_norm not in (None, LAYER_NORM):
        raise ValueError(f"layer_norm: expected {LAYER_NORM!r} or None, got {layer_norm!r}")


def parse_approximation(text: str | None) -> dict[str, str]:
    """`gelu-2bit`, `gelu-8bit,layer-norm-from-output` as arguments of `approximate`.

    Args:
        text: one or two of the words, parted by a comma; None and "nothing" are no approximation.

    Raises:
        ValueError: a word is none of these, or two contradict each other.
    """
    found: dict[str, str] = {}
    is_nothing = text is None or text.strip() == _NOTHING
    for word in [] if text is None or is_nothing else text.split(","):
        argument, value = _WORDS.get(word.strip(), ("", ""))
        if not argument or argument in found:
            raise ValueError(
                f"approximate: expected {', '.join(_WORDS)}, or one for gelu and one for "
                f"layer-norm parted by a comma, got {text!r}"
            )
        found[argument] = value
    return found
