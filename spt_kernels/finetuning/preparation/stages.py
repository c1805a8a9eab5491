"""What comes between images and training: nothing, a measuring of sensitivities, or a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...methods import Method, make_plan
from ...plan import Plan
from ...sensitivity import Sensitivity
from ..images.pixels import Batches
from ..run.run import Run
from ..run.setting import Setting
from .fitted import samples_at_once
from .measured import measured_on, measured_once, sensitivity_of
from .possible import check_possible
from .searching import check_search, searched_architecture


@dataclass(frozen=True)
class Decision:
    """What is trained.

    Attributes:
        method: with all that was left open to be found out by the images.
        plan: of a method that takes one.
    """

    method: Method
    plan: Plan | None


def preparation_of(
    setting: Setting, method: Method, plan: Plan | None, given: Sensitivity | None
) -> Callable[[Run[Setting], Batches], Decision]:
    """What decides, with the training images, what is trained.

    Args:
        setting: whose model is plain, and stays so.
        method: told of its head.
        plan: one that has decided already.
        given: sensitivities that need no measuring.

    Raises:
        ValueError: no images would make it possible.
    """
    model = setting.base.model
    if plan is None and given is None and method.is_sensitivity_aware:
        check_possible(method, model)
        return partial(_by_measuring, method)
    if method.is_searched:
        if setting.processes.size > 1:
            raise ValueError(f"method: {method.name!r} searches in one process, not in several")
        check_search(setting, method)
        return partial(_by_searching, method)
    decided = Decision(method, make_plan(model, method, given) if plan is None else plan)
    # of the first: a file may be another one elsewhere
    return lambda run, images: replace(decided, plan=run.processes.from_first(lambda: decided.plan))


def _by_measuring(method: Method, run: Run[Setting], images: Batches) -> Decision:
    """The plan by the sensitivity that was measured into the folder before, or else now."""
    setting = run.setting
    # by rehearsals, where a memory is given
    at_once = run.processes.together(lambda: samples_at_once(setting))
    measured = measured_once(
        run,
        measured_on(setting, at_once),
        lambda: sensitivity_of(setting, images, run.log, at_once),
    )
    model = setting.base.model
    return Decision(method, run.processes.from_first(lambda: make_plan(model, method, measured)))


def _by_searching(method: Method, run: Run[Setting], images: Batches) -> Decision:
    """The method with the architecture that a search finds, or has found before."""
    found = searched_architecture(method, run, images)
    return Decision(replace(method, architecture=found), None)
