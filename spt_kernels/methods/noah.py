"""Prompts, Adapters and LoRA at once, of sizes that a search finds (NOAH, Zhang et al., 2022).

What is searched is an architecture: for each block how many prompts it gets, how wide an Adapter
and LoRA of which rank, 0 for none. `tune` makes a model train one. `supernet` makes it hold all of
them, sharing weights: `set_architecture` chooses the one that it is, `cut` leaves that alone.
`noah_search.search` finds the best one by a score, and `spt_kernels.finetuning` does it all on
images: trains a supernet, searches by the validation images, trains what was found afresh.

Prompts leave after their block. In the published code the last ones stay through blocks without
any; in the architectures that were published for VTAB-1k every block has prompts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..files import checked_file
from ..model import backbone_numel
from .matrices import folding
from .method import Method
from .noah_architecture import NoahArchitecture
from .noah_layers import SharedAdapter, SharedLora, SharedModule, SharedPrompts
from .noah_space import NoahSpace
from .prompt_places import PlainVit
from .tunable import Tunable, counted, freeze_backbone

# the published limit of 0.64M parameters, and what it is a share of: the backbone of ViT-B/16
PUBLISHED_LIMIT, PUBLISHED_BACKBONE = 640_000, 85_798_656


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Give every block the modules of the method's architecture, and train these and the head.

    Where the method has none, all blocks get prompts, an Adapter and a LoRA of one size, the
    largest that keeps within its budget (`limit_of`): that stands for what a search would find
    where only the cost is asked for.

    Raises:
        ValueError: the model is no plain ViT, or has another number of blocks than the
            architecture, or that trains more than the budget, or the budget is too small.
    """
    space, limit = space_of(model), limit_of(model, method)
    architecture = method.architecture or _largest_uniform(space, limit)
    _check_depth(space.depth, architecture)
    count = space.count(architecture)
    if method.budget is not None and count > limit:
        raise ValueError(f"budget: the architecture trains {count:,}, got {limit:,}")
    _put_modules(model, method, architecture)
    return _tunable(model, architecture, head=method.head)


def supernet(model: nn.Module, method: Method) -> Tunable:
    """Make a plain model, in place, hold every architecture at once, the largest at first.

    All share weights: a module of some size is the first rows of the largest.

    Raises:
        ValueError: the model is no plain ViT, or nothing is within the method's budget.
    """
    space = space_of(model)
    space.check_limit(limit_of(model, method))
    _put_modules(model, method, space.largest)
    vars(model)["spt_method"] = method.name  # tuned: nothing else may tune it
    return _tunable(model, space.largest, head=method.head)


def set_architecture(model: nn.Module, architecture: NoahArchitecture) -> None:
    """Let a model that `supernet` made be one of the architectures that it holds.

    Raises:
        ValueError: it does not hold that one, or is no supernet; it is then as it was.
    """
    blocks = [_modules_of(block) for block in getattr(model, "blocks", ())]
    _check_depth(len(blocks), architecture)
    chosen = []
    for block, sizes in zip(blocks, architecture.by_block, strict=True):
        for module, size in zip(block.shared, sizes, strict=True):
            if module is not None:
                module.check_size(size)
                chosen.append((module, size))
            elif size:
                raise ValueError(
                    f"architecture: expected none where the model has none, got {size}"
                )
    for module, size in chosen:
        module.size = size


def cut(supernet: Tunable, architecture: NoahArchitecture) -> Tunable:
    """Leave of a supernet, in place, the modules of one architecture, with what they have learnt.

    The model is then as `tune` makes one of this architecture, and computes what the supernet did
    when it was set to it. An optimizer has to be made anew.

    Raises:
        ValueError: as `set_architecture`.
    """
    model: Any = supernet.model
    set_architecture(model, architecture)
    for number, block in enumerate(model.blocks):
        modules = _modules_of(block)
        for module in modules.shared:
            if module is not None:
                module.cut()
        if modules.adapter is not None and not modules.adapter.size:
            modules.block.drop_path2 = modules.adapter.before
        if modules.lora is not None and not modules.lora.size:
            modules.block.attn.qkv = modules.lora.base
        if modules.prompts is not None and not modules.prompts.size:
            model.blocks[number] = modules.block
    return _tunable(model, architecture, in_head=supernet.in_head)


def space_of(model: nn.Module) -> NoahSpace:
    """What can be searched of a plain ViT.

    Raises:
        ValueError: the model is none: it has no blocks with attention's fused q, k, v and a branch
            of an MLP, or it ties its tokens to their places, so that there can be no more of them.
    """
    vit = PlainVit.of(model)
    blocks: list[Any] = [] if vit is None else list(vit.blocks)
    attentions = [getattr(block, "attn", None) for block in blocks]
    qkvs = [getattr(attention, "qkv", None) for attention in attentions]
    is_whole = all(isinstance(qkv, nn.Linear) for qkv in qkvs) and all(
        isinstance(getattr(block, "drop_path2", None), nn.Module) for block in blocks
    )
    tie = None if vit is None else vit.tie
    # with one, attention reads the weight of qkv in place of calling it
    if tie is None and any(getattr(own, "q_bias", None) is not None for own in attentions):
        tie = "q_bias"
    if vit is None or not blocks or not is_whole or tie is not None:
        but = "" if tie is None else f", and no {tie}"
        raise ValueError(
            "method: NOAH needs a plain ViT: embed_dim, num_prefix_tokens, blocks with attn.qkv "
            f"and drop_path2{but}; got {type(model).__name__}"
        )
    rows: int = qkvs[0].out_features  # type: ignore[union-attr]
    return NoahSpace(len(blocks), vit.width, rows)


def limit_of(model: nn.Module, method: Method) -> int:
    """The most parameters of an architecture: the budget.

    Without one it is the published limit of 0.64M for ViT-B/16, and of another backbone the same
    share, 0.75 %.
    """
    backbone = backbone_numel(model, method.head)
    if method.budget is None:
        return PUBLISHED_LIMIT * backbone // PUBLISHED_BACKBONE
    return method.count(backbone)


def architecture_in(path: str | os.PathLike[str]) -> NoahArchitecture:
    """The architecture of what `Tunable.save` wrote.

    Raises:
        DeltaFormatError: the file is damaged, or another kind of file.
        ValueError: it is of another method.
    """
    tuned_as = checked_file.read(path, "trained", lambda document, _: document.get("tuned_as", {}))
    return NoahArchitecture.from_json(tuned_as.get("architecture"))


@dataclass(frozen=True)
class _Modules:
    """A block, and what it was given."""

    block: Any
    prompts: SharedPrompts | None
    adapter: SharedAdapter | None
    lora: SharedLora | None

    @property
    def shared(self) -> tuple[SharedModule | None, ...]:
        """In the order of an architecture's fields."""
        return self.prompts, self.adapter, self.lora


def _modules_of(block: Any) -> _Modules:
    prompts = block if isinstance(block, SharedPrompts) else None
    plain: Any = block if prompts is None else prompts.block
    adapter, lora = getattr(plain, "drop_path2", None), getattr(plain, "attn", None)
    lora = getattr(lora, "qkv", None)
    return _Modules(
        plain,
        prompts,
        adapter if isinstance(adapter, SharedAdapter) else None,
        lora if isinstance(lora, SharedLora) else None,
    )


def _put_modules(model: Any, method: Method, architecture: NoahArchitecture) -> None:
    """Freeze the backbone, and give each block its modules."""
    freeze_backbone(model, method.head)
    pairs = zip(model.blocks, architecture.by_block, strict=True)
    for number, (block, (prompts, adapter, lora)) in enumerate(pairs):
        qkv = block.attn.qkv
        if adapter:
            block.drop_path2 = SharedAdapter(
                block.drop_path2, adapter, model.embed_dim, method.dropout, like=qkv
            )
        if lora:
            block.attn.qkv = SharedLora(qkv, lora, method.dropout)
        if prompts:
            model.blocks[number] = SharedPrompts(
                block, prompts, model.embed_dim, model.num_prefix_tokens, method.dropout
            )


def _tunable(model: nn.Module, architecture: NoahArchitecture, **head: Any) -> Tunable:
    """LoRA alone folds into the plain model."""
    loras = [f"blocks.{n}.attn.qkv" for n, rank in enumerate(architecture.loras) if rank]
    can_fold = not any(architecture.prompts) and not any(architecture.adapters)
    tunable = counted(model, folding(loras) if can_fold else None, **head)
    return replace(tunable, tuned_as={"architecture": architecture.to_json()})


def _largest_uniform(space: NoahSpace, limit: int) -> NoahArchitecture:
    one, two = (space.count(NoahArchitecture.uniform(size, space.depth)) for size in (1, 2))
    if limit < one:
        raise ValueError(
            f"budget: a prompt, and an Adapter and a LoRA of rank 1 in each block train {one:,}, "
            f"got {limit:,}"
        )
    size = 1 + (limit - one) // (two - one)
    return NoahArchitecture.uniform(min(size, space.width), space.depth)


def _check_depth(blocks: int, architecture: NoahArchitecture) -> None:
    if blocks != architecture.depth:
        raise ValueError(f"architecture: the model has {blocks} blocks, got {architecture.depth}")
