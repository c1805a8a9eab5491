"""NOAH's stages before training: a supernet is trained, and searched by the validation images.

Each leaves in the run's folder what the next one needs, so that a run that is killed goes on from
its last checkpoint or last accuracies, and finds what it would have found.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from random import Random

from torch import nn

from ...methods import Method
from ...methods.noah import limit_of, set_architecture, space_of, supernet
from ...methods.noah_architecture import NoahArchitecture
from ...methods.noah_search import Found, search
from ..device import seed_everything
from ..folder.run_folder import RunFolder
from ..images.pixels import Batches
from ..run.run import Run
from ..run.setting import Setting
from ..training.accuracy import evaluate
from ..training.loop import train

# As published for VTAB-1k, where a supernet has 5e-4, and what was found is trained with 1e-3
SUPERNET_LR_SHARE = 0.5
SUPERNET_WARMUP_EPOCHS = 10.0

_SCORE = "val_accuracy"


def check_search(setting: Setting, method: Method) -> None:
    """Refuse what no supernet can be trained or searched for.

    Raises:
        ValueError: there are no validation images, or the model is no plain ViT, or the budget too
            small.
    """
    if setting.splits.val is None:
        raise ValueError(
            f"val_share: method {method.name!r} searches by validation images, and there are none: "
            "give some, or hold out a share of the training images"
        )
    model = setting.base.model
    space_of(model).check_limit(limit_of(model, method))


def searched_architecture(method: Method, run: Run[Setting], images: Batches) -> NoahArchitecture:
    """The architecture that the run in the folder has found before, or else finds now.

    Args:
        method: `noah`, told of its head.
        run: whose base model stays as it is.
        images: batches of the training images.
    """
    run.claim()  # what was found by a run that is to be overwritten is not ours
    kept = run.folder["architecture"]
    if kept.is_file():
        return NoahArchitecture.load(kept)
    seed_everything(run.setting.job.recipe.seed)
    model = copy.deepcopy(run.setting.base.model).to(run.setting.device)
    model = supernet(model, method).model
    _train_supernet(model, method, run, images)
    found = _search(model, method, run)
    trains = space_of(run.setting.base.model).count(found.best)
    told = {"parameters": trains, _SCORE: found.score, "looked_at": len(found.scores)}
    run.folder.write_json("architecture", {**found.best.to_json(), **told})
    run.log.say(f"found {found.best}")
    return found.best


def _train_supernet(model: nn.Module, method: Method, run: Run[Setting], images: Batches) -> None:
    """Train another architecture at each step; all share their weights."""
    recipe = run.setting.job.recipe
    space = space_of(run.setting.base.model)

    def choose(step: int) -> None:
        # by the number of the step: it does not matter where a run that is resumed was killed
        set_architecture(model, space.sample(Random(f"{recipe.seed} {step}")))

    train(
        model,
        images,
        replace(
            recipe,
            epochs=method.supernet_epochs,
            warmup_epochs=min(SUPERNET_WARMUP_EPOCHS, method.supernet_epochs / 10),
        ),
        lr=SUPERNET_LR_SHARE * recipe.peak_lr(method),
        checkpoint=run.folder["supernet"],
        checkpoint_seconds=run.checkpoint_seconds,
        on_epoch=lambda _: run.note_seconds(),
        graph=False,  # no two steps are the same
        progress=run.log,
        tell=lambda line: run.log.say(f"supernet: {line}"),
        stage="training the supernet",
        before_step=choose,
    )


def _search(model: nn.Module, method: Method, run: Run[Setting]) -> Found:
    """Search by the accuracy on the validation images."""
    setting = run.setting
    val = setting.batches("val", run.log)
    assert val is not None  # check_search has looked

    known = _known(run.folder)
    seen, saved = dict(known), time.monotonic()

    def score(architecture: NoahArchitecture) -> float:
        nonlocal saved
        set_architecture(model, architecture)
        accuracy = evaluate(model, val, amp=setting.job.recipe.amp).top1
        seen[architecture] = accuracy
        if time.monotonic() - saved >= run.checkpoint_seconds:
            _keep(run, seen)
            saved = time.monotonic()
        return accuracy

    def on_generation(number: int, found: Found) -> None:
        _keep(run, {**found.scores, **seen})  # known ones may be of a later generation
        accuracy = f"best val accuracy {100 * found.score:.1f} %"
        run.log.say(f"generation {number} of {method.generations} · {accuracy}")

    space = space_of(setting.base.model)
    run.log.start("searching", (method.generations + 1) * method.population)
    return search(
        space,
        score,
        limit_of(setting.base.model, method),
        generations=method.generations,
        population=method.population,
        seed=setting.job.recipe.seed,
        known=known,
        on_scored=run.log.advance,
        on_generation=on_generation,
    )


def _keep(run: Run[Setting], scores: Mapping[NoahArchitecture, float]) -> None:
    """Write down the scores so far."""
    rows = [{**architecture.to_json(), _SCORE: score} for architecture, score in scores.items()]
    run.folder.write_lines("search", rows)
    run.note_seconds()


def _known(folder: RunFolder) -> dict[NoahArchitecture, float]:
    """The scores of a search that was killed."""
    rows = folder.read_lines("search") if folder["search"].is_file() else []
    return {NoahArchitecture.from_json(row): row[_SCORE] for row in rows}
