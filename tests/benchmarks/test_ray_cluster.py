"""A grid on a Ray cluster of this machine: the same table, and failures told as elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spt_kernels.benchmarks import BenchmarkSetting, run_benchmark
from spt_kernels.errors import MissingExtra
from spt_kernels.finetuning import Method


@pytest.fixture
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    # its nodes import the package from where these tests do
    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    }
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


def test_a_cluster_gives_the_table_that_one_process_gives(
    tmp_path: Path, setting: BenchmarkSetting, cluster: None
) -> None:
    methods = (Method("linear"), Method("spt-unstructured", 10**9))
    some = replace(setting, methods=methods, seeds=(0,))
    here = run_benchmark(some, tmp_path / "here", jobs=0)
    there = run_benchmark(some, tmp_path / "there", ray="local")
    assert there.to_json()["rows"] == here.to_json()["rows"]
    assert there.failed == here.failed
    assert len(there.failed) == 2


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, setting: BenchmarkSetting) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(ValueError, match=r"ray: no cluster at 'auto'"):
        run_benchmark(setting, tmp_path, ray="auto")


def test_without_ray_its_extra_is_named(
    tmp_path: Path, setting: BenchmarkSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "spt_kernels.benchmarks.ray_cluster", raising=False)
    with pytest.raises(MissingExtra, match=r"needs ray: pip install 'spt_kernels\[ray\]'"):
        run_benchmark(setting, tmp_path, ray="local")
