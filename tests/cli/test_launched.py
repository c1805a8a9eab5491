"""What a command makes of what a launcher such as torchrun tells it."""

from __future__ import annotations

import pytest

from spt_kernels.cli import app, launched
from spt_kernels.cli.launched import sharing
from spt_kernels.errors import OtherProcessFailed

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_LET_SPEAK_SECONDS", 0.0)
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)


def test_alone_unless_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    assert launched.launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as of a cluster that has started but this process
    assert launched.launched() == (0, 1)
    with sharing("auto") as processes:
        assert processes.size == 1


@pytest.mark.usefixtures("second_of_two")
def test_no_process_takes_the_card_of_another() -> None:
    assert launched.launched() == (1, 2)
    with pytest.raises(ValueError, match="--device: each of 2 processes"), sharing("cuda:1"):
        pass


@pytest.mark.usefixtures("second_of_two")
def test_one_process_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.run(["finetune", "--nonsense"]) == 2
    assert capsys.readouterr().err == "", "the first process says it"
    assert app.run(["finetune", "-o", "nowhere", "--device", "cuda:0"]) == 2
    assert capsys.readouterr().err.startswith("spt-kernels: process 1: --device: each of 2")

    assert app.run(["merge", "nowhere", "-o", "nothing"]) == 2
    assert capsys.readouterr().err == "", "the first process says it"
    monkeypatch.setenv("RANK", "0")
    assert app.run(["merge", "nowhere", "-o", "nothing"]) == 2
    assert (
        "merge runs in one process, and a launcher has started 2: start it"
        in capsys.readouterr().err
    )
    monkeypatch.setenv("RANK", "1")

    def fail(*_: object, **__: object) -> None:
        raise OtherProcessFailed("process 0 cannot go on: no such folder")

    monkeypatch.setattr(app, "make_app", lambda: fail)
    assert app.run([]) == 2
    assert capsys.readouterr().err == "", "the one that failed says it"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "make_app", lambda: interrupted)
    assert app.run([]) == 130
    assert capsys.readouterr().err == "", "the first process says it"
