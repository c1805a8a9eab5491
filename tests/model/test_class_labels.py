"""What a model says of its classes follows the head that a task brings, and comes back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from spt_kernels.model.class_labels import restore_class_labels, set_class_labels


def labelled(n: int, **more: object) -> SimpleNamespace:
    names = {i: f"old {i}" for i in range(n)}
    return SimpleNamespace(id2label=names, label2id={v: k for k, v in names.items()}, **more)


def host(n: int = 4, **attributes: object) -> nn.Module:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.head = nn.Linear(3, n)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("attribute", ["num_classes", "num_labels"])
def test_counts_follow_and_come_back(attribute: str) -> None:
    model = host()
    setattr(model, attribute, 4)
    setattr(model.inner, attribute, 4)
    said = set_class_labels(model, {"inner.head": (4, 7)})
    assert getattr(model, attribute) == getattr(model.inner, attribute) == 7
    restore_class_labels(model, said)
    assert getattr(model, attribute) == getattr(model.inner, attribute) == 4


@pytest.mark.parametrize("count", [3, 5, True, "4", None, 4.0])
def test_what_counts_something_else_is_left_alone(count: object) -> None:
    model = host(num_classes=count)
    assert set_class_labels(model, {"inner.head": (4, 7)}) == ()
    assert model.num_classes is count


def test_two_heads_of_one_size_count_as_one() -> None:
    model = host(num_classes=4)
    set_class_labels(model, {"inner.head": (4, 7), "inner.head_dist": (4, 7)})
    assert model.num_classes == 7
    model = host(num_classes=4)
    set_class_labels(model, {"inner.head": (4, 7), "other": (4, 9)})
    assert model.num_classes == 4  # which of them it means is anyone's guess
    set_class_labels(model, {"inner.head": (4, 7), "other": (12, 9)})
    assert model.num_classes == 7


def test_names_as_transformers_makes_them() -> None:
    config = labelled(4, problem_type="single_label_classification")
    before = dict(vars(config))
    model = host(config=config, num_labels=4)
    said = set_class_labels(model, {"inner.head": (4, 2)})
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    assert config.problem_type == "single_label_classification"
    assert model.num_labels == 2
    config.problem_type = "anything"  # a loss does such things
    restore_class_labels(model, said)
    assert vars(config) == before
    assert model.num_labels == 4


@pytest.mark.parametrize("n", [4, 2], ids=["as-many", "fewer"])
def test_names_that_the_task_knows(n: int) -> None:
    config = labelled(4)
    names = ["rose", "tulip", "daisy", "iris"][:n]
    said = set_class_labels(host(config=config), {"inner.head": (4, n)}, names)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id["tulip"] == 1
    restore_class_labels(host(config=config), said)
    assert config.id2label[0] == "old 0"


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_a_kind_of_problem_for_another_number_of_outputs(before: int, after: int) -> None:
    config = labelled(before, problem_type="regression")
    said = set_class_labels(host(before, config=config), {"inner.head": (before, after)})
    assert config.problem_type is None
    restore_class_labels(host(config=config), said)
    assert config.problem_type == "regression"


@pytest.mark.parametrize("config", [None, {"num_labels": 4}, SimpleNamespace(id2label=None)])
def test_another_kind_of_config(config: object) -> None:
    assert set_class_labels(host(config=config), {"inner.head": (4, 7)}) == ()
