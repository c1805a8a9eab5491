"""Which tensors of a file are those of a model: found by the model's own names, fitted by timm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...errors import needed
from ...model import head_names
from ...model.parameter_info import describe
from .timm_filter import NOT_ITS_FORM, Translation

with needed("reading weights"):
    from timm.models import adapt_input_conv

_AVERAGED = {"ema", "teacher"}  # what is published, where a file holds what trained it as well


@dataclass(frozen=True)
class WeightMatch:
    """What of a file goes into a model.

    Attributes:
        state: the model's own names and shapes; without the head where it does not fit.
        head_fits: whether the file's head is for the same classes.
        notes: what was found where, changed, and left out, for people to read.
    """

    state: dict[str, Tensor]
    head_fits: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Group:
    """Tensors of one place in the file: those under a prefix, and the names of the others."""

    where: str
    prefix: str
    inside: dict[str, Tensor]
    outside: tuple[str, ...]


def match_weights(
    model: nn.Module,
    groups: Mapping[str, Mapping[str, Tensor]],
    translation: Callable[[], Translation | None],
) -> WeightMatch:
    """Find a model's weights in what `read_state_dicts` found, under whatever prefix they lie.

    Where several groups fit as well, an average (`ema`, a teacher) is taken before what it is the
    average of, and else what comes first, as the query encoder of a contrastive model does.

    Args:
        model: with values, which a head of other classes keeps.
        groups: place in the file -> name -> tensor.
        translation: called for timm's, where names or shapes are not the model's own.

    Raises:
        ValueError: the file is of another model; it says what is missing, other, or too much.
    """
    own = model.state_dict()
    head = set(head_names(model))
    body = {name: tensor for name, tensor in own.items() if name not in head}
    group = _fullest(groups, body)
    found: dict[str, Tensor] = {}
    if group is not None and 2 * len(group.inside.keys() & body.keys()) >= len(body):
        found = _fit(model, group, own, head, translation)
    else:  # other names, or another model
        for other in _as_they_are(groups):
            tried = _fit(model, other, own, head, translation)
            if group is None or _n_fitting(tried, body) > _n_fitting(found, body):
                group, found = other, tried
    if group is None or not found:
        raise ValueError(f"it has none of the model's tensors, as {next(iter(body))}")
    _check(model, group, found, body, head)
    fits = all(n in found and found[n].shape == own[n].shape for n in head)
    state = {name: t for name, t in found.items() if name in (own if fits else body)}
    return WeightMatch(state, fits, tuple(_notes(group, found, own, head)))


def _fullest(
    groups: Mapping[str, Mapping[str, Tensor]], body: Mapping[str, Tensor]
) -> _Group | None:
    """The place and prefix with the most names of the model."""
    best: tuple[int, bool] = (0, False)
    chosen = None
    for where, tensors in groups.items():
        for prefix, count in Counter(_prefixes(tensors, body)).items():
            words = set(re.split(r"[^a-z]+", f"{where}.{prefix}".lower()))
            rank = (count, bool(words & _AVERAGED))
            if rank > best:
                best, chosen = rank, _under(where, prefix, tensors)
    return chosen


def _prefixes(names: Mapping[str, Tensor], body: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before a name of the model, for each name that ends in one."""
    for name in names:
        start = 0
        while True:
            if name[start:] in body:
                yield name[:start]
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1


def _under(where: str, prefix: str, tensors: Mapping[str, Tensor]) -> _Group:
    n = len(prefix)
    return _Group(
        where,
        prefix,
        {name[n:]: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        tuple(name for name in tensors if not name.startswith(prefix)),
    )


def _as_they_are(groups: Mapping[str, Mapping[str, Tensor]]) -> Iterator[_Group]:
    """The groups whole, or without a prefix that is all names', for a translation to know."""
    for where, tensors in groups.items():
        yield _under(where, "", tensors)
        first = next(iter(tensors)).partition(".")[0] + "."
        if all(name.startswith(first) for name in tensors):
            yield _under(where, first, tensors)


def _fit(
    model: nn.Module,
    group: _Group,
    own: Mapping[str, Tensor],
    head: set[str],
    translation: Callable[[], Translation | None],
) -> dict[str, Tensor]:
    """The tensors of a group in the model's names and shapes, as far as they can be.

    A head of other classes is left out.
    """
    body = {name: tensor for name, tensor in own.items() if name not in head}
    places = _head_places(model, head)
    given = _adapt_input(model, group.inside, own)
    best, is_lent = given, False
    if _n_fitting(given, body) < len(body) and (translate := translation()) is not None:
        # older timm tells its own names from others' by the head, so the model's is lent
        lent = {n: t for n, t in given.items() if n in own or not n.startswith(places)}
        lent |= {name: own[name] for name in head}
        made = [
            (_translated(model, state, own, translate), state is lent) for state in (given, lent)
        ]
        best, is_lent = max((*made, (given, False)), key=lambda pair: _n_fitting(pair[0], body))
    if not is_lent and all(n in best and best[n].shape == own[n].shape for n in head):
        return best
    return {n: t for n, t in best.items() if n in body or not (n in head or n.startswith(places))}


def _translated(
    model: nn.Module,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    translate: Translation,
) -> dict[str, Tensor]:
    """What timm makes of `state`, nothing where it is of a form that timm does not know."""
    try:
        return _adapt_input(model, dict(translate(dict(state), model)), own)
    except NOT_ITS_FORM:
        return {}


def _head_places(model: nn.Module, head: set[str]) -> tuple[str, ...]:
    """What the names of a head begin with; of a model built for features, as its family has it."""
    places = {name.rpartition(".")[0] for name in head}
    if not places:
        config = getattr(model, "pretrained_cfg", None) or {}
        named = config.get("classifier") or ()
        places = {named} if isinstance(named, str) else set(named)
    return tuple(f"{place}." for place in places - {""})


def _adapt_input(
    model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with the first convolutions made for the model's number of channels."""
    adapted = dict(state)
    config = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("first_conv") or ()
    channels = getattr(model, "in_chans", None)
    for place in (named,) if isinstance(named, str) else named:
        weight, like = (tensors.get(f"{place}.weight") for tensors in (adapted, own))
        if weight is None or like is None or weight.ndim != 4 or like.ndim != 4:
            continue
        if weight.shape[1] == like.shape[1]:
            continue
        own_channels = channels or like.shape[1]
        per_channel = max(like.shape[1] // own_channels, 1)  # a stem may fold pixels into channels
        base = weight.shape[1] // per_channel
        # timm's default is 3, which is all that its older versions know
        more = {} if base == 3 else {"base_chans": base}
        adapted[f"{place}.weight"] = adapt_input_conv(own_channels, weight, **more)
    return adapted


def _n_fitting(state: Mapping[str, Tensor], body: Mapping[str, Tensor]) -> int:
    return sum(name in state and state[name].shape == t.shape for name, t in body.items())


def _check(
    model: nn.Module,
    group: _Group,
    found: Mapping[str, Tensor],
    body: Mapping[str, Tensor],
    head: set[str],
) -> None:
    absent = {n for n, t in body.items() if n not in found and t.is_floating_point()}
    spared = _final_norms(model, found) if absent else set()
    missing = [n for n in body if n in absent and n.rpartition(".")[0] not in spared]
    other = [n for n in body if n in found and found[n].shape != body[n].shape]
    roots = {name.partition(".")[0] for name in body}
    beyond = [n for n, t in _left_over(found, body, head).items() if n.partition(".")[0] in roots]
    faults = []
    if other:
        n = other[0]
        came = group.inside.get(n, found[n])  # not what a translation made of it in vain
        shapes = f"{n} is {tuple(came.shape)}, the model's is {tuple(body[n].shape)}"
        faults.append(f"{shapes}{_and_more(other)}")
    faults += [f"it lacks {_listed(missing)}"] if missing else []
    faults += [f"it has, beyond the model, {_listed(beyond)}"] if beyond else []
    if faults:
        n_fitting = _n_fitting(found, body)
        share = f"{n_fitting} of the model's {len(body)} tensors fit"
        raise ValueError(f"{'; '.join(faults)} ({share})")


def _left_over(
    found: Mapping[str, Tensor], body: Mapping[str, Tensor], head: set[str]
) -> dict[str, Tensor]:
    # integers are counters and tables that follow from the architecture
    known = body.keys() | head
    return {n: t for n, t in found.items() if n not in known and t.is_floating_point()}


def _final_norms(model: nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """Norms outside the blocks that the file has nothing of: pre-training may go without."""
    norms = {
        name.rpartition(".")[0] for name, what in describe(model).items() if what.kind == "norm"
    }
    return {
        place
        for place in norms
        if not re.search(r"\.\d+(\.|$)", place)
        and not any(other.startswith(f"{place}.") for other in found)
    }


def _notes(
    group: _Group, found: Mapping[str, Tensor], own: Mapping[str, Tensor], head: set[str]
) -> Iterator[str]:
    if group.where:
        yield f"taken from {group.where!r}"
    if group.prefix:
        yield f"names under {group.prefix!r}"
    for name, tensor in found.items():
        raw = group.inside.get(name)
        if name in own and name not in head and raw is not None and raw.shape != tensor.shape:
            yield f"{name} adapted from {tuple(raw.shape)} to {tuple(tensor.shape)}"
    if any(n in group.inside and group.inside[n].shape != own[n].shape for n in head):
        yield "the head left out, as it is for other classes"
    missing = [n for n, t in own.items() if n not in found and n not in head]
    missing = [n for n in missing if own[n].is_floating_point()]
    if missing:
        yield f"not in it, so as initialised: {_listed(missing)}"
    body = {name: tensor for name, tensor in own.items() if name not in head}
    left = [*_left_over(found, body, head), *group.outside]
    if left:
        yield f"left out: {_grouped(left)}"


def _listed(names: list[str]) -> str:
    return f"{names[0]}{_and_more(names)}"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _grouped(names: list[str]) -> str:
    """Names by what they begin with, up to their first number, as `decoder_blocks.* (96)`."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        stop = next((i for i, part in enumerate(parts) if part.isdigit()), 2)
        counts[".".join(parts[:stop]) + (".*" if stop < len(parts) else "")] += 1
    shown = [f"{start} ({n})" if n > 1 else start for start, n in counts.most_common(6)]
    return ", ".join(shown) + (" …" if len(counts) > 6 else "")
