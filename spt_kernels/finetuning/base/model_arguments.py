"""The arguments of an architecture: which are not the user's to give, and which was wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

# What a constructor raises on arguments that it cannot be built with
FAILURES = (
    *(TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError),
    *(RuntimeError, NotImplementedError),
)

_NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "features_only": "a task needs a score per class, not features",
        "out_indices": "a task needs a score per class, not features",
        "pretrained": "say `pretrained` itself",
        "checkpoint_path": "name the file as `weights`",
    }
)


def check_arguments(args: Mapping[str, Any], num_classes: int) -> None:
    """Refuse arguments that would make another thing than a classifier of `num_classes`.

    Raises:
        ValueError: one is not for the user to give, or another number of classes.
    """
    for name, why in _NOT_HERE.items():
        if args.get(name):
            raise ValueError(f"model_arg: {name}={args[name]!r} cannot be: {why}")
    if args.get("num_classes", num_classes) != num_classes:
        raise ValueError(
            f"model_arg: num_classes={args['num_classes']!r} is not the number of classes, "
            f"{num_classes}; leave it out"
        )


def cannot_be_built(
    name: str,
    args: Mapping[str, Any],
    error: Exception,
    builds: Callable[[Mapping[str, Any]], bool],
) -> ValueError:
    """The error for an architecture that refuses its arguments, naming those at fault.

    Args:
        name: the architecture.
        args: what it was given.
        error: what it raised.
        builds: tells whether it can be built with other arguments.
    """
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if isinstance(error, LookupError):
        reason = f"there is no {reason}"
    if not args:
        return ValueError(f"model: {name} cannot be built: {reason}")
    without = {own: {n: v for n, v in args.items() if n != own} for own in args}
    at_fault = [own for own, rest in without.items() if builds(rest)] or list(args)
    given = ", ".join(f"{own}={args[own]!r}" for own in at_fault)
    return ValueError(f"model_arg: {name} cannot be built with {given}: {reason}")
