"""What of a recipe is left to a given memory: how much is computed at a time, and again."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ...fitting import Fitted, Fitting, card_of
from ...memory import largest_batch
from ...methods import Method
from ...offloading import OffloadWords
from ..job.recipe import Recipe
from ..run.facts import accounted_device, accounted_how
from ..run.setting import Setting

# A card holds the CUDA context, what libraries allocate and holes in the allocator's blocks besides
RESERVED_BYTES = 2**30


def check_memory(setting: Setting) -> None:
    """Refuse a memory that nothing could be made to fit in, before anything is computed.

    Raises:
        ValueError: it is less than what is kept free, or the method trains something else first.
    """
    job = setting.job
    if job.recipe.memory_bytes is None:
        return
    if job.method.is_searched:
        raise ValueError(
            f"memory_bytes: what {job.method.name!r} trains while it searches is not accounted "
            "for; give micro_batch and recompute"
        )
    _limit(setting)


def check_offload(setting: Setting, graph: bool | None) -> None:
    """Refuse to offload what cannot be, before anything is computed.

    Raises:
        ValueError: as it says.
    """
    method, away = setting.job.method, OffloadWords.parse(setting.job.recipe.offload)
    if away and graph:
        raise ValueError(
            "graph: a CUDA graph finds what it reads where it was; leave offload out, or graph"
        )
    if away and method.is_searched:
        raise ValueError(
            f"offload: what {method.name!r} trains while it searches is not offloaded; leave it out"
        )
    if away.state:
        check_has_state(method)


def check_has_state(method: Method) -> None:
    """Refuse to keep on the host what is next to nothing; `ValueError`."""
    if method.entry.holds is not None:
        raise ValueError(
            f"offload: {method.name!r} has next to no state to keep on the host, as it trains "
            "little; leave 'state' out"
        )


def fitted_recipe(setting: Setting, model: nn.Module) -> tuple[Recipe, str]:
    """The recipe with what its memory leaves open, and a line that tells of it.

    Args:
        setting: of the run.
        model: tuned, as it will be trained.

    Raises:
        ValueError: no way fits.
    """
    recipe = setting.job.recipe
    if recipe.memory_bytes is None:
        return recipe, ""
    limit, away = _limit(setting), OffloadWords.parse(recipe.offload)
    fitting = Fitting(
        model,
        setting.form.image_shape,
        setting.images_in_a_step,
        card=card_of(),
        captured=setting.device.type == "cuda" and setting.processes.size == 1 and not away,
        state_on_host=away.state,
        **accounted_how(recipe, setting.device),
    )
    way = fitting.fastest(limit)
    if way is None:
        least = fitting.least()
        raise ValueError(
            f"memory_bytes: no step fits in {_gib(limit)}; the least is {_gib(least.peak_bytes)}, "
            f"{_told(least)}" + ("" if recipe.amp == "bf16" else "; amp='bf16' needs less")
        )
    chosen = replace(
        recipe,
        memory_bytes=None,
        micro_batch=way.micro_batch if way.parts > 1 else None,
        recompute=way.recompute or None,
    )
    return chosen, f"in {_gib(limit)}: {_told(way)}, {_gib(way.peak_bytes)} accounted"


def samples_at_once(setting: Setting) -> int:
    """How many samples a measurement takes at a time: of a batch what its memory allows.

    A measurement keeps what a step of full tuning keeps; its scores take the place of gradients,
    which all samples are added to.
    """
    recipe = setting.job.recipe
    if recipe.memory_bytes is None:
        return recipe.images_at_once()
    limit = _limit(setting)
    found = largest_batch(
        setting.base.model,
        setting.form.image_shape,
        limit,
        method="full",
        optimizer="none",
        accumulate=2,
        device=accounted_device(setting.device),
    )
    if not found:
        raise ValueError(
            f"memory_bytes: sensitivity cannot be measured in {_gib(limit)}, one sample takes "
            f"{_gib(found.estimate.peak_bytes)}; measure it elsewhere and give "
            "the file (`sensitivity`)"
        )
    return min(recipe.images_at_once(), found.batch)


def _limit(setting: Setting) -> int:
    whole = setting.job.recipe.memory_bytes
    assert whole is not None
    reserved = RESERVED_BYTES if setting.device.type == "cuda" else 0
    if whole <= reserved:
        raise ValueError(
            f"memory_bytes: expected more than the {_gib(reserved)} that a card needs besides, got "
            f"{whole:,}"
        )
    return whole - reserved


def _told(way: Fitted) -> str:
    some = "1 image" if way.micro_batch == 1 else f"{way.micro_batch} images"
    images = "all images" if way.parts == 1 else some
    again = f", {way.recompute} computed again" if way.recompute else ""
    return f"{images} at a time{again}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.2f} MiB"
