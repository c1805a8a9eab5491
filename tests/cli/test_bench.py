"""`spt-kernels bench` beyond its table: a card's rates, other kinds of steps, what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from spt_kernels.cli.app import run
from spt_kernels.costs import CostRow, CostSetting, table7
from spt_kernels.costs.row import Spread
from tests.card.pretend import pretended_card


def complaint_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "--device", "cpu"], "--device: rates are a GPU's, expected cuda or cuda:N, got"),
        (["tune", "--dtype", "bf16"], "--dtype: goes with table7, not with tune"),
        (["tune", "-o", "x"], "--output: goes with table7"),
        (["tabel7"], "WHAT: expected table7 or tune, got 'tabel7'"),
        (["--resume"], "--resume: name the folder with --output"),
        (["--step", "captured", "--device", "cpu"], "step: only a card's can be captured"),
        (["--step", "compiled", "--rounds", "0"], "step: one that is compiled has to be run"),
        (["--step", "quick"], "step must be one of eager, compiled, captured"),
    ],
)
def test_a_mistake_costs_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint_of(arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_are_no_rates(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no GPU here" in complaint_of(["tune"], capsys)


def test_tune_shows_and_stores_what_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from spt_kernels.costs import way_times
    from spt_kernels.gradient_ways.gradient_cost import RATES
    from spt_kernels.gradient_ways.stored_rates import VARIABLE, rates_on, read_rates
    from tests.costs.planted import CPU, TOKENS, planted_clock

    planted = replace(RATES[90], tf32_gain=4.0)
    clock, time_ways, time_tf32 = planted_clock(planted), way_times.time_ways, way_times.time_tf32
    monkeypatch.setattr(way_times, "time_ways", lambda _: time_ways(CPU, clock, TOKENS))
    monkeypatch.setattr(way_times, "time_tf32", lambda _: time_tf32(CPU, clock, TOKENS))
    monkeypatch.setenv(VARIABLE, "/proc/rates.json")
    with pretended_card():
        assert "rates: cannot write to /proc (" in complaint_of(["tune"], capsys)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new" / "rates.json"))
    rates_on.cache_clear()
    with pretended_card():
        assert run(["bench", "tune", "--quiet"]) == 0
        chosen_by = rates_on(torch.device("cuda:0"))
    rates_on.cache_clear()
    stored = read_rates(tmp_path / "new" / "rates.json")["a pretended card"]
    assert stored == chosen_by
    assert asdict(stored)["tf32_gain"] == 4.0
    for found, of in ((stored.narrow, planted.narrow), (stored.fp32, planted.fp32)):
        assert vars(found) == pytest.approx(vars(of), rel=1e-6)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert "the fastest way is taken in 60 of 60 cases; at most 0% is lost" in text
    gathered = next(line.split() for line in text.splitlines() if " gathered " in line)
    assert gathered == ["gathered", "780", "780", "75", "75"]


@pytest.mark.gpu
def test_tune_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spt_kernels.costs import way_times
    from spt_kernels.gradient_ways.stored_rates import VARIABLE, rates_on

    monkeypatch.setattr(way_times, "SHAPES", ((512, 256), (1024, 512)))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "rates.json"))
    assert run(["bench", "tune", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    rates_on.cache_clear()
    assert asdict(rates_on(torch.device("cuda:0"))) == told["rates"]
    rates_on.cache_clear()
    assert len(told["times"]) == 24
    assert all(us > 0 for case in told["times"] for us in case["measured_us"].values())


def test_what_this_commit_has_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(name: str, setting: CostSetting) -> dict:
        measured.append(name)
        if name == "linear" and len(measured) == 2:
            return {"error": "its process failed"}
        time = Spread(1.0, 1.0, 1.0)
        return asdict(CostRow(name, 5, 0.1, 100, tuning_peak_bytes=200, step=time, operators=9))

    monkeypatch.setattr(table7, "_in_a_process", measure)
    sizes = ["--rounds", "2", "--dtype", "bf16", "-m", "vit_tiny_patch16_224"]
    arguments = ["bench", "-o", str(tmp_path), "--resume", "--quiet", *sizes, "--methods"]
    assert run([*arguments, "full,linear"]) == 0
    assert "linear: left out" in capsys.readouterr().out
    assert run([*arguments, "linear,full"]) == 0
    assert run([*arguments, "bias"]) == 0
    assert measured == ["full", "linear", "linear", "bias"]
    (path,) = tmp_path.glob("*.json")

    def rows() -> list[str]:
        (table,) = json.loads(path.read_text())["tables"].values()
        return [row["method"] for row in table["rows"]]

    assert rows() == ["full", "linear", "bias"]
    # an earlier commit's are measured again, as are those of other rounds
    path.write_text(path.read_text().replace('"commit": "', '"commit": "0'))
    assert run([*arguments, "full"]) == 0
    assert rows() == ["full"]
    assert run([*arguments, "bias", "--rounds", "1"]) == 0
    assert rows() == ["bias"]
