"""An allocation tells what the plan does with each cell."""

from __future__ import annotations

from spt_kernels.plan import allocate
from spt_kernels.plots import allocation
from spt_kernels.plots.numbers import csv_of

from .made_up import A, plan, scores


def test_every_cell_of_a_plan_of_entries() -> None:
    made = allocation(plan(A))
    assert (made.blocks, made.module, made.trained) == (("blocks.0", "blocks.1", ""), None, 10)
    assert made.operations == ("q", "k", "v", "fc1", "bias", "norm")
    rows = {(row["block"], row["operation"]): row for row in made.rows()}
    assert rows["blocks.0", "k"] == {
        "block": "blocks.0",
        "operation": "k",
        "parameters": 16,
        "selected": 4,
        "entries": 4,
        "module": None,
        "module_parameters": 0,
    }
    assert ("blocks.1", "q") not in rows
    assert csv_of(made).count("\n") == 1 + len(rows)


def test_a_module_stands_for_its_entries() -> None:
    measured = scores({"blocks.1.mlp.fc1.weight": list(range(20)), "norm.weight": [0, 1]})
    made = allocation(allocate(measured, 15, "lora", rank=1))
    [row] = [row for row in made.to_json()["cells"] if row["module"]]
    assert (row["operation"], row["module"], row["entries"]) == ("fc1", "LoRA", 0)
    assert (row["selected"] >= 12, row["module_parameters"]) == (True, 12)  # 1 · (4 + 8)
