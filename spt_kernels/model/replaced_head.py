"""A head of another number of classes in the place of the model's own, which comes back whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from .class_labels import Said, restore_class_labels, set_class_labels
from .plain_layer import runs_as_linear


@dataclass(frozen=True)
class ReplacedHead:
    """What stood where a task's own head stands now.

    Attributes:
        modules: module name -> the model's own module.
        said: what the model said of its classes.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    said: tuple[Said, ...] = ()


def head_problem(
    model: nn.Module, head: Mapping[str, Tensor], elsewhere: Collection[str]
) -> str | None:
    """Why a task's head cannot be put on the model; None if it can.

    Args:
        model: plain or tuned.
        head: parameter name -> values.
        elsewhere: names of parameters that the task may hold otherwise: of a head with a sparse
            bias, `head` has the weight alone.
    """
    for name, tensors in misfits(partial(_plain_module, model), head, elsewhere).items():
        module = _plain_module(model, name)
        if module is None:
            return f"{name}: the model has no such module for the task's head"
        if not (runs_as_linear(module) or isinstance(module, nn.Identity)):
            return (
                f"{name}: expected a plain Linear to put the task's head in the place of, got "
                f"{type(module).__name__}: build the model with as many classes as the task has"
            )
        weight, bias = tensors.get("weight"), tensors.get("bias")
        width = _width(model, module)
        if weight is None or weight.ndim != 2 or not tensors.keys() <= {"weight", "bias"}:
            return f"{name}: expected the weight and bias of a Linear, got {sorted(tensors)}"
        if width is not None and weight.shape[1] != width:
            expected, got = ["classes", width], list(weight.shape)
            return f"{name}.weight: expected shape [classes, {expected[1]}], the task's is {got}"
        if bias is not None and bias.shape != weight.shape[:1]:
            return f"{name}.bias: expected shape [{len(weight)}], the task's is {list(bias.shape)}"
    return None


def fit_head(
    model: nn.Module, head: Mapping[str, Tensor], elsewhere: Collection[str]
) -> ReplacedHead:
    """Replace the modules of the head whose shapes differ; their values are still to be set.

    What the model says of its classes is for `name_classes`.
    """
    made: dict[str, nn.Module] = {}
    for name, tensors in misfits(partial(_plain_module, model), head, elsewhere).items():
        own = model.get_submodule(name)
        like = next(iter([*own.parameters(), *model.parameters()]))
        n_classes, width = tensors["weight"].shape
        where = {"device": like.device, "dtype": like.dtype}
        new = nn.utils.skip_init(nn.Linear, width, n_classes, bias="bias" in tensors, **where)
        made[name] = new.train(own.training)
    replaced = {name: model.get_submodule(name) for name in made}
    for name, new in made.items():  # all are there: memory may have run out before
        _put(model, name, new)
    return ReplacedHead(replaced)


def name_classes(
    model: nn.Module, replaced: ReplacedHead, head: Mapping[str, Tensor], names: Sequence[str]
) -> ReplacedHead:
    """Let a model say of its classes what its head has by now, instead of what it says now.

    Args:
        model: with its own head, or with a task's in its place.
        replaced: what stood there.
        head: parameter name -> values of the head that the model has.
        names: of the classes, if they are known.

    Returns:
        `replaced`, with what the model had said of its own head.
    """
    restore_class_labels(model, replaced.said)
    rows = {}
    for name, tensor in head.items():
        module_name, _, local = name.rpartition(".")
        if local == "weight" and tensor.ndim > 1:
            own = replaced.modules.get(module_name)
            before = len(tensor) if own is None else _n_rows(own)
            rows[module_name] = before, len(tensor)
    return replace(replaced, said=set_class_labels(model, rows, names))


def restore_head(model: nn.Module, replaced: ReplacedHead) -> None:
    """Put the model's own head back, on the device and in the dtype that the model has by now."""
    put_heads(model, replaced.modules)
    restore_class_labels(model, replaced.said)


def put_heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules where others are, on their devices and in their dtypes; returns the others."""
    others = {}
    for name, own in modules.items():
        current = others[name] = model.get_submodule(name)
        now = next(iter([*current.parameters(), *model.parameters()]))
        own.to(device=now.device, dtype=now.dtype).train(current.training)
        _put(model, name, own)
    return others


def _n_rows(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else len(weight)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, module)


def misfits(
    module_of: Callable[[str], nn.Module | None],
    head: Mapping[str, Tensor],
    elsewhere: Collection[str],
) -> dict[str, dict[str, Tensor]]:
    """Module name -> local name -> values, for the modules of the head that cannot take them.

    Args:
        module_of: the plain module of a name; None where there is none.
        head: parameter name -> values.
        elsewhere: as `head_problem` has it.
    """
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in head.items():
        module_name, _, local = name.rpartition(".")
        by_module.setdefault(module_name, {})[local] = tensor
    found = {}
    for module_name, tensors in by_module.items():
        dotted = f"{module_name}." if module_name else ""
        module = module_of(module_name)
        own = {} if module is None else module._parameters
        shapes = {local: p.shape for local, p in own.items() if p is not None}
        if module is not None and next(module.children(), None) is not None:
            # of a block or the model itself: a class token that counts as head is not all it has
            shapes = {local: shape for local, shape in shapes.items() if local in tensors}
        here = {local: shape for local, shape in shapes.items() if dotted + local not in elsewhere}
        if here != {local: tensor.shape for local, tensor in tensors.items()}:
            found[module_name] = tensors
    return found


def _plain_module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module.plain if hasattr(module, "sparse_deltas") else module  # type: ignore[return-value]


def _width(model: nn.Module, module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    return width if isinstance(width, int) else None
