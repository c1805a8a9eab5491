"""The class of a tuned module: the one that it had, below the one that tunes it.

A module is tuned where it is. It changes its class, and stays the object that it was: of its own
type, with its attributes, methods, hooks and submodules, wherever it is known. `plain_again` gives
it its class back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# What a tuner shows for convenience gives way to attributes of the same name that the layer has
_GIVES_WAY = ("plain", "spec", "update")
_DELTA_NAMES = ("delta", "index", "original")
_DICTIONARIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Shown:
    """A property that lets an attribute of the instance go first, be it a submodule or a buffer."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        name = self._read.__name__
        for names in ("_parameters", "_buffers", "_modules"):
            if name in module.__dict__[names]:
                return module.__dict__[names][name]
        return self._read(module)


def tuned_class(tuner: Any, module: nn.Module, reads: tuple[str, ...] = ()) -> type[nn.Module]:
    """The class that a module has once it is tuned, made once for all that have the same.

    Args:
        tuner: subclass of `DeltaHolder`; says how the module is tuned.
        module: plain, or tuned already in a way that `tuner` goes on with.
        reads: parameters that are to be read through `tuner.reader`.

    Raises:
        TypeError: no subclass can be made of the module's class.
    """
    plain: Any = plain_class(module)
    # a layer that has one of these names already: its delta is `weight_delta`
    if is_tuned(module):
        prefixed = not type(module)._main_parameter  # type: ignore[attr-defined]
    else:
        prefixed = bool(tuner._main_parameter) and any(hasattr(module, n) for n in _DELTA_NAMES)
    return _made(tuner, plain, reads, prefixed)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module apart from its being tuned."""
    return getattr(type(module), "_plain_class", None) or type(module)


def is_tuned(module: nn.Module) -> bool:
    """Whether a module has a tuned class."""
    return getattr(type(module), "_plain_class", None) is not None


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module a tuned class.

    Raises:
        TypeError: its own class does not allow that.
    """
    try:
        module.__class__ = cls
    except TypeError as error:
        raise TypeError(f"a {type(module).__name__} cannot be tuned: {error}") from error


def share_contents(tuned: nn.Module, plain: nn.Module) -> None:
    """Fill a new module with what another one has: parameters, buffers, hooks and attributes.

    Hooks that are put on either of them later run on both.
    """
    tuned.__dict__.update(vars(plain))
    for name in _DICTIONARIES:
        tuned.__dict__[name] = vars(plain)[name].copy()


def plain_twin(module: Any, added: Iterable[str]) -> nn.Module:
    """A module of the plain class with the same parameters, buffers and children, for reading.

    Args:
        module: tuned.
        added: names of what tuning has added to it.
    """
    twin: Any = object.__new__(plain_class(module))
    share_contents(twin, module)
    taken_out(twin, added)
    return twin  # type: ignore[no-any-return]


def plain_again(module: Any, added: Iterable[str]) -> None:
    """Give a module its own class back, without what tuning has added; values stay as they are."""
    taken_out(module, added)
    module.__class__ = plain_class(module)


def taken_out(module: nn.Module, added: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove what tuning has added to a module: attributes, and parameters, as they were there."""
    own = vars(module)
    names = (*added, *[name for name in own if name.startswith("_spt_")])
    attributes = {name: own.pop(name) for name in names if name in own}
    parameters = own["_parameters"]
    return attributes, {name: parameters.pop(name) for name in names if name in parameters}


def made_from(cls: Any) -> Any:
    """What `made_again` makes a tuned class of, in another process too."""
    cls = getattr(cls, "_spt_kind", cls)  # of a layer that is watched
    return getattr(cls, "_spt_made_of", cls)


def made_again(made_of: Any) -> type[nn.Module]:
    """The class that `made_from` was given."""
    return _made(*made_of) if isinstance(made_of, tuple) else made_of


@functools.cache
def _made(tuner: Any, plain: Any, reads: tuple[str, ...], prefixed: bool) -> type[nn.Module]:
    if tuner._plain_class is plain and not reads and not prefixed:
        return tuner  # type: ignore[no-any-return]
    name, module, qualname = tuner.name_for(plain)
    members: dict[str, Any] = {each: tuner.reader(each) for each in reads}
    for each in _GIVES_WAY:
        if hasattr(plain, each):
            members[each] = inspect.getattr_static(plain, each)
    members |= {
        "_plain_class": plain,
        "_spt_reads": reads,
        "_spt_made_of": (tuner, plain, reads, prefixed),
        "__reduce_ex__": _reduce,
        "__module__": module,
        "__qualname__": qualname,
        "__doc__": plain.__doc__ if module == plain.__module__ else tuner.__doc__,
    }
    if prefixed:
        members |= {"_main_parameter": "", "_main_delta": f"{tuner._main_parameter}_delta"}
    try:
        return type(name, (tuner, plain), members)
    except TypeError as error:
        raise TypeError(f"a {plain.__name__} cannot be tuned: {error}") from error


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    # a class made at run time cannot be found again by its name
    return _empty, module._spt_made_of, module.__getstate__()


def _empty(*made_of: Any) -> nn.Module:
    return object.__new__(_made(*made_of))
