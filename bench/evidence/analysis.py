"""What results say: means with their standard errors, and paired comparisons with their tests."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from spt_kernels.benchmarks.table import Figure, mean_of

from .contender import Hypothesis, Run, Suite

LEVEL = 0.05  # of every test, and of what an interval leaves out
MIN_PAIRS = 6  # of five, the smallest p of the signed ranks is 0.06
MIN_SEEDS = 5  # of a contrast between groups


def figure(suite: Suite, accuracies: Mapping[Run, float], contender: str, task: str) -> Figure:
    """The accuracy of a contender on a task, over the seeds that are there."""
    runs = (Run(task, contender, seed) for seed in suite.seeds)
    there = {run.seed: accuracies[run] for run in runs if run in accuracies}
    return Figure(there, len(suite.seeds))


def mean_figure(
    suite: Suite, accuracies: Mapping[Run, float], contender: str, tasks: Sequence[str]
) -> Figure:
    """The mean over `tasks`, seed by seed, of the seeds that all of them have."""
    each = [figure(suite, accuracies, contender, task) for task in tasks]
    return mean_of(each, suite.seeds)


@dataclass(frozen=True)
class Comparison:
    """The paired answer to a question, in points of accuracy.

    Attributes:
        hypothesis: the question.
        differences: ours minus theirs: of each task and seed that both have; of a question about a
            group, of each seed, its tasks' mean less that of the others.
        n_planned: how many there are to be.
        p: two-sided, of the test; None with too few differences, or a question of enough.
        adjusted: likewise by Holm over the family.
    """

    hypothesis: Hypothesis
    differences: tuple[float, ...]
    n_planned: int
    p: float | None = None
    adjusted: float | None = None

    @property
    def mean(self) -> float | None:
        """Of the differences."""
        return statistics.fmean(self.differences) if self.differences else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t."""
        return t_interval(self.differences)

    @property
    def verdict(self) -> str:
        """`"open"`, or what the numbers say: `"better"`, `"worse"`, `"no difference"`; of a
        question of enough `"enough"`, `"not enough"`, `"undecided"`.
        """
        interval = self.interval
        if (
            interval is None
            or self.mean is None
            or len(self.differences) < least_of(self.hypothesis)
        ):
            return "open"
        if self.hypothesis.margin is not None:
            if interval[0] > -self.hypothesis.margin:
                return "enough"
            return "not enough" if interval[1] < -self.hypothesis.margin else "undecided"
        if self.adjusted is None or self.adjusted >= LEVEL:
            return "no difference"
        return "better" if self.mean > 0 else "worse"


def compare(
    suite: Suite, accuracies: Mapping[Run, float], groups: Mapping[str, str]
) -> list[Comparison]:
    """Every hypothesis of a suite.

    Args:
        suite: whose.
        accuracies: in 0 to 1, of the runs that are there.
        groups: task -> its group.
    """
    drawn = [_differences(suite, accuracies, groups, own) for own in suite.hypotheses]
    tests = [
        None if own.margin is not None else _test(own, differences)
        for own, (differences, _) in zip(suite.hypotheses, drawn, strict=True)
    ]
    # of those that are open as well: what they will say is asked all the same
    n_tests = sum(own.margin is None for own in suite.hypotheses)
    return [
        Comparison(own, differences, n_planned, p, adjusted)
        for own, (differences, n_planned), p, adjusted in zip(
            suite.hypotheses, drawn, tests, holm(tests, n_tests), strict=True
        )
    ]


def _differences(
    suite: Suite, accuracies: Mapping[Run, float], groups: Mapping[str, str], own: Hypothesis
) -> tuple[tuple[float, ...], int]:
    """The differences in points that are there, and how many there are to be."""
    ours, theirs = suite.contender(own.ours), suite.contender(own.theirs)
    tasks = [task for task in suite.tasks_of(ours) if task in suite.tasks_of(theirs)]

    def difference(task: str, seed: int) -> float:
        """Not a number, where one of the two is missing."""
        ours, theirs = (
            accuracies.get(Run(task, n, seed), math.nan) for n in (own.ours, own.theirs)
        )
        return 100 * (ours - theirs)

    every = [[difference(task, seed) for task in tasks] for seed in suite.seeds]
    if own.group is not None:
        is_inside = [groups[task] == own.group for task in tasks]
        every = [[_contrast(row, is_inside)] for row in every]
    flat = [d for row in every for d in row]
    return tuple(d for d in flat if not math.isnan(d)), len(flat)


def _contrast(values: Sequence[float], is_inside: Sequence[bool]) -> float:
    """The mean of those inside a group less that of the others; no number if any is none."""
    inside, outside = (
        [v for v, own in zip(values, is_inside, strict=True) if own == which]
        for which in (True, False)
    )
    return statistics.fmean(inside) - statistics.fmean(outside)


def _test(own: Hypothesis, differences: Sequence[float]) -> float | None:
    """Wilcoxon's signed-rank test; of the few contrasts of a group Student's t."""
    if len(differences) < least_of(own):
        return None
    if own.group is not None:
        if len(set(differences)) == 1:  # t would divide by a deviation of zero
            return 0.0 if differences[0] else 1.0
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    return signed_rank_p(differences)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact, with ties as well.

    Zeros are left out. Every choice of signs is as likely as any other; the sums of the positive
    ranks are counted over all of them.
    """
    # accuracies are multiples of one image: equal differences are equal but for the last bits
    moved = [d for d in (round(d, 9) for d in differences) if d]
    # tied values share a rank that may be half a number: twice it is whole
    ranks = [round(2 * rank) for rank in stats.rankdata([abs(d) for d in moved])]
    ways = Counter({0: 1})  # sum -> choices of signs that give it
    for rank in ranks:
        ways.update({total + rank: count for total, count in list(ways.items())})
    positive = sum(rank for rank, d in zip(ranks, moved, strict=True) if d > 0)
    extreme = min(positive, sum(ranks) - positive)
    tail = sum(count for total, count in ways.items() if total <= extreme)
    return min(1.0, 2 * tail / 2 ** len(moved))


def least_of(own: Hypothesis) -> int:
    """How many differences an answer needs."""
    return MIN_PAIRS if own.group is None else MIN_SEEDS


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of `values` by Student's t; `None` below two."""
    n = len(values)
    if n < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    mean = statistics.fmean(values)
    return mean - half, mean + half


def holm(tests: Sequence[float | None], n_tests: int) -> list[float | None]:
    """Holm's step-down correction in a family of `n_tests`, of those that are there.

    The smallest is multiplied by `n_tests`, the next by one less, and so on; none is below one
    before it. So a test that is missing counts as if it showed nothing.
    """
    order = sorted((p, place) for place, p in enumerate(tests) if p is not None)
    adjusted: list[float | None] = [None] * len(tests)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (n_tests - rank) * p))
        adjusted[place] = largest
    return adjusted
