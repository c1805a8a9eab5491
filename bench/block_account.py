"""What one block of a ViT keeps for the backward and copies on the way, storage by storage.

`python -m bench.block_account` prints it for each method and precision beside what there must be,
and writes bench/results/memory/blocks.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from spt_kernels.memory import DTYPES, made_up_plan
from spt_kernels.memory.cuda import AsOnCuda, run_backward
from spt_kernels.memory.twin import fake_copy
from spt_kernels.methods import Method, tune

from .markdown import markdown

MODEL, DEPTH, BATCH, BLOCK = "vit_base_patch16_224", 2, 4, "blocks.1"
FROZEN = "plain frozen"
METHODS = (FROZEN, "lora", "spt-lora", "spt-unstructured", "spt-adapter", "adapter-8", "lora-16")
RESULTS = Path(__file__).parent / "results" / "memory" / "blocks.json"
SMALLEST = 64  # bytes, below which a storage is not written down

# What gives its input's values in other memory
COPIES = frozenset(
    {"_to_copy", "clone", "copy_", "cat", "stack", "contiguous", "index_select"}
    | {"slice_backward", "select_backward", "constant_pad_nd", "new_zeros"}
)


@dataclass(frozen=True)
class Item:
    """A storage.

    Attributes:
        made_by: module in the block, and operator; of the backward the operator alone.
        bytes: of a token, or where it has none, as a weight, of the whole.
        is_weight: whether it is made of a weight alone, and as large whatever the batch.
        kept_by: autograd nodes that hold it for the backward, and as what.
    """

    made_by: str
    bytes: float
    is_weight: bool = False
    kept_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Account:
    """Of one block: what it leaves for the backward, and what is copied in either direction."""

    kept: tuple[Item, ...]
    copied_forward: tuple[Item, ...]
    copied_backward: tuple[Item, ...]

    @property
    def kept_per_token(self) -> float:
        """Bytes of all that grows with the batch."""
        return sum(item.bytes for item in self.kept if not item.is_weight)

    @property
    def kept_of_weights(self) -> float:
        """Bytes of the rest."""
        return sum(item.bytes for item in self.kept if item.is_weight)


def needed(width: int, heads: int, dtype: str) -> dict[str, int]:
    """Bytes of a token that the backward of a block with flash attention must find, as it is."""
    element = 4 if dtype == "fp32" else 2
    stream = 2 if dtype == "bf16" else 4
    return {
        "inputs of two LayerNorms": 2 * width * stream,
        "mean and deviation of their rows": 2 * 2 * stream,
        "q, k and v": 3 * width * element,
        "output of attention": width * element,
        "softmax statistics": 4 * heads,
        "output of fc1": 4 * width * element,
    }


class Watch(TorchDispatchMode):
    """Notes every storage that an operation makes, by the module that is called."""

    def __init__(self, model: nn.Module, block: str, counted: type[Tensor]) -> None:
        super().__init__()
        self.made: dict[int, tuple[str, str, int, bool]] = {}  # address -> module, operator, ...
        self.copies: dict[str, list[tuple[str, str, int, bool]]] = {"forward": [], "backward": []}
        self.phase, self._counted, self._alive = "forward", counted, [""]
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._held: list[Tensor] = []  # so that no address is used twice
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave)
        whole = model.get_submodule(block)
        whole.register_forward_pre_hook(lambda _, inputs: self._until(inputs[0]))
        whole.register_forward_hook(lambda _, inputs, output: self._since(output))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, self._counted)]
        known = {t.untyped_storage()._cdata for t in given}
        of_weight = bool(known) and known <= self._weights
        name = func._schema.name.removeprefix("aten::")
        for tensor in tree_iter(result):
            if not isinstance(tensor, self._counted):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in known and name != "copy_":
                continue
            entry = (self._alive[-1], name, storage.nbytes(), of_weight)
            if self.phase == "forward":
                self.made[storage._cdata] = entry
                self._held.append(tensor.detach())
            if name in COPIES:
                self.copies[self.phase].append(entry)
        return result

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self._alive.append(name)

    def _leave(self, *_: object) -> None:
        self._alive.pop()

    def _since(self, output: Tensor) -> None:
        output.register_hook(lambda _: self._alive.append(BLOCK))

    def _until(self, input: Tensor) -> None:
        input.register_hook(lambda _: self._alive.append(""))


def account(
    method: str,
    dtype: str = "fp32",
    *,
    make: Callable[[], nn.Module] | None = None,
    size: int = 224,
    device: str = "cuda",
    is_real: bool = False,
) -> Account:
    """Take one step of a model of few blocks, and tell what the last one keeps and copies.

    Args:
        method: one of `spt_kernels.methods`, or `FROZEN` for plain blocks that train nothing and
            pass a gradient on.
        dtype: as `estimate_memory` has it.
        make: the model, whose last block is `blocks.1`; a ViT-B/16 by default.
        size: side of its images.
        device: as which the step computes, `"cuda"` or `"cpu"`.
        is_real: with values, on the CPU, in place of fake tensors.
    """
    model = make() if make is not None else timm.create_model(MODEL, num_classes=100, depth=DEPTH)
    plan = None if method == FROZEN else made_up_plan(model, Method(method), (3, size, size))
    fakes: Any = contextlib.nullcontext() if is_real else FakeTensorMode(allow_non_fake_inputs=True)
    weights = torch.bfloat16 if dtype == "bf16" else None
    twin: Any = model.to(weights) if is_real else fake_copy(model, fakes, weights)[0]
    if method == FROZEN:
        twin.requires_grad_(False)
    else:
        twin = tune(twin, Method(method), plan).model
        twin = twin if is_real else fake_copy(twin, fakes)[0]
    twin.pos_embed.requires_grad_(True)  # so that a gradient passes through every block
    watch = Watch(twin.train(), BLOCK, Tensor if is_real else FakeTensor)
    as_on_cuda = AsOnCuda() if device == "cuda" else contextlib.nullcontext()
    with fakes, as_on_cuda, watch:
        images = torch.zeros(BATCH, 3, size, size, dtype=weights)
        target = torch.zeros(BATCH, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16-autocast"):
            loss = F.cross_entropy(twin(images), target)
        holders = _holders(loss)
        watch.phase = "backward"
        run_backward(loss)
    rows = BATCH * (1 + twin.patch_embed.num_patches)
    kept = [
        _item(*watch.made[address], rows, tuple(names))
        for address, names in holders.items()
        if address in watch.made and _is_inside(watch.made[address][0])
    ]
    copied = {
        phase: tuple(_item(*entry, rows) for entry in entries if _is_inside(entry[0]))
        for phase, entries in watch.copies.items()
    }
    return Account(tuple(kept), copied["forward"], copied["backward"])


def _is_inside(module: str) -> bool:
    return f"{module}.".startswith(f"{BLOCK}.")


def _item(
    module: str, operator: str, size: int, is_weight: bool, rows: int, kept_by: tuple[str, ...] = ()
) -> Item:
    where = module.removeprefix(BLOCK).removeprefix(".")
    made_by = f"{where} {operator}".strip()
    return Item(made_by, size if is_weight else size / rows, is_weight, kept_by)


def _holders(loss: Tensor) -> dict[int, list[str]]:
    """Address of a storage -> the nodes of the graph that save it."""
    found: dict[int, list[str]] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
        for name, tensor in _saved(node):
            found.setdefault(tensor.untyped_storage()._cdata, []).append(f"{node.name()} {name}")
    return found


def _saved(node: Any) -> Iterator[tuple[str, Tensor]]:
    names = [name for name in dir(node) if name.startswith("_saved_")]
    values = [(name.removeprefix("_saved_"), getattr(node, name)) for name in names]
    values.append(("", getattr(node, "saved_tensors", ())))
    for name, value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                yield name, tensor


# ---- tables


def summary(accounts: dict[tuple[str, str], Account]) -> str:
    """One row for each method, one column for each precision."""
    dtypes = list(dict.fromkeys(dtype for _, dtype in accounts))
    must = {dtype: sum(needed(768, 12, dtype).values()) for dtype in dtypes}
    rows = [("what the backward must find", *(f"{must[dtype]:,}" for dtype in dtypes))]
    for method in dict.fromkeys(method for method, _ in accounts):
        own = [accounts[method, dtype] for dtype in dtypes]
        cells = [
            f"{a.kept_per_token:,.0f}"
            + (f" + {a.kept_of_weights / 1e6:.1f} MB of weights" if a.kept_of_weights > 1e5 else "")
            for a in own
        ]
        rows.append((method, *cells))
    return markdown(("kept by a block, bytes a token", *dtypes), rows)


def listing(found: Account) -> str:
    """Every storage that is kept, then every copy, of one block."""
    rows = [(item.made_by, _size(item), ", ".join(item.kept_by)) for item in found.kept]
    parts = [markdown(("kept: made by", "bytes", "by"), rows)]
    for title, items in (
        ("forward", found.copied_forward),
        ("backward", found.copied_backward),
    ):
        copies = [(i.made_by, _size(i)) for i in items if i.bytes >= SMALLEST]
        parts.append(markdown((f"copied in the {title}", "bytes"), copies))
    return "\n\n".join(parts)


def _size(item: Item) -> str:
    return f"{item.bytes / 1e6:.2f} MB" if item.is_weight else f"{item.bytes:,.0f} a token"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is asked for; write the file where nothing less than all of it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", help="every storage of this one alone")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = parser.parse_args(arguments)
    dtypes = DTYPES if chosen.dtype is None else (chosen.dtype,)
    methods = METHODS if chosen.method is None else (chosen.method,)
    accounts = {(m, d): account(m, d, device=chosen.device) for m in methods for d in dtypes}
    print(f"a block of {MODEL}, as on {chosen.device} (accounted)\n")
    print(summary(accounts))
    if chosen.method is not None:
        for (method, dtype), found in accounts.items():
            print(f"\n## {method}, {dtype}\n\n{listing(found)}")
    elif chosen.dtype is None and chosen.device == "cuda":
        _write(accounts)


def _write(accounts: dict[tuple[str, str], Account]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    versions = {name: version(name) for name in ("torch", "timm")}
    rows = [
        {
            "method": method,
            "dtype": dtype,
            "kept_per_token": found.kept_per_token,
            "kept_of_weights": found.kept_of_weights,
            "kept": [[i.made_by, i.bytes, i.is_weight] for i in found.kept if i.bytes >= SMALLEST],
        }
        for (method, dtype), found in accounts.items()
    ]
    document = {"model": MODEL, "commit": commit, "versions": versions, "rows": rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
