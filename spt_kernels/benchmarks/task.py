"""One task of a benchmark: which images options are chosen with, and which the result is of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..finetuning import ImageSource


@dataclass(frozen=True)
class BenchmarkTask:
    """A task, whose test images no choice ever depends on.

    Attributes:
        name: what it is called in files and on the command line, as `caltech101`.
        title: what it is called in tables, as `Caltech101`.
        group: the group whose mean it belongs to, as `Natural`.
        choose: training and validation images; options are chosen with these alone, and test images
            that are in the same folder are not so much as read.
        final: training and test images of the run that is reported.
    """

    name: str
    title: str
    group: str
    choose: ImageSource
    final: ImageSource

    def __post_init__(self) -> None:
        if self.choose.test_list is not None:
            raise ValueError(f"choose: task {self.name!r} would choose with its test images")
        object.__setattr__(self, "choose", replace(self.choose, use_test=False))
