"""`SparseAdamW` on a pretended card: what a step asks of the host, and that it is a CPU's step."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.interpreter import GridExecutor

from spt_kernels.optim.prepared_step import PreparedStep
from tests.card import on_card
from tests.card.on_card import CARD, Pretence
from tests.card.pretend import pretended_card
from tests.optim.runs import Run, assert_close, scale_of, scheduled

# what a prepared step is: nothing that PyTorch dispatches, nothing that is waited for
STEP = {"adamw_numbers_kernel": 1, "sparse_adamw_kernel": 1, "waits": 0}


@pytest.fixture
def pretence() -> Iterator[type[Pretence]]:
    with pretended_card() as pretence:
        yield pretence


@pytest.fixture
def host(
    pretence: type[Pretence], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], object]], dict[str, int]]:
    """Counts what a call asks of the host: operators, launches of kernels of ours, waits."""
    seen: Counter[str] = Counter()
    run, launch = on_card.run, GridExecutor.__call__

    def counted_run(func: Any, *others: Any) -> Any:
        if func.namespace != "profiler":  # PyTorch's, around the step of any optimizer
            seen[str(func)] += 1
        return run(func, *others)

    def counted_launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        seen[executor.fn.__name__] += 1
        launch(executor, *args, **kwargs)

    monkeypatch.setattr(on_card, "run", counted_run)
    monkeypatch.setattr(GridExecutor, "__call__", counted_launch)

    def count(call: Callable[[], object]) -> dict[str, int]:
        seen.clear()
        before = pretence.waits
        call()
        return dict(seen) | {"waits": pretence.waits - before}

    return count


def test_a_step_is_two_launches(host: Any) -> None:
    run = Run("cuda").steps(2)
    assert host(run.optimizer.step) == STEP


def test_gradients_at_other_addresses_are_one_small_copy(host: Any) -> None:
    run = Run("cuda").steps(2)
    run.new_grads()
    seen = host(run.optimizer.step)
    assert seen.items() >= (STEP | {"aten.copy_.default": 1}).items()
    assert sum(seen.values()) <= 6
    assert host(run.optimizer.step) == STEP


def test_a_schedule_is_one_small_copy(host: Any) -> None:
    run = Run("cuda").steps(2)
    step = scheduled(run)
    step()
    seen = host(step)
    assert seen.items() >= (STEP | {"aten.copy_.default": 1}).items()
    assert sum(seen.values()) <= 6


def test_a_learning_rate_on_the_card_is_none(host: Any) -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours, expected = Run("cuda", lr=lr, capturable=True).steps(2), Run("cpu").steps(2)
    step, other = scheduled(ours), scheduled(expected)
    for run in (ours, expected):
        run.new_grads()
    ours.optimizer.step()
    expected.optimizer.step()
    for _ in range(3):
        seen = host(step)
        other()
        assert seen.items() >= STEP.items()
        assert "aten.copy_.default" not in seen
    assert_close(ours, expected)


def test_overflows_are_skipped_without_a_wait(host: Any) -> None:
    ours, expected = Run("cuda"), Run("cpu")
    for found in (1.0, 0.0, 0.0, 1.0, 0.0):
        for run in (ours, expected):
            run.new_grads(float("inf") if found else 8.0)
            scale_of(run, found)
        waits = host(ours.optimizer.step)["waits"]
        expected.optimizer.step()
        assert waits == 0
    assert_close(ours, expected)
    for one, other in zip(ours.params, expected.params, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad)  # both left unscaled
    assert all(float(state["step"]) == 3 for state in ours.optimizer.state.values())


def test_what_a_skipped_step_does_not_write_is_written_all_the_same() -> None:
    with pretended_card():
        run = Run("cuda").steps(2)
        layer = run.model[0]
        for _ in range(2):
            with torch.no_grad():
                layer.delta.add_(0.5)
            run.new_grads(float("inf"))
            scale_of(run, 1.0)
            run.optimizer.step()
            summed = layer.original + layer.delta.detach()
            assert torch.equal(layer.weight.view(-1)[layer.index.long()], summed)


def test_a_head_in_16_bits_is_torchs_own_launch(host: Any) -> None:
    ours, expected = (Run(device, torch.bfloat16).steps(3) for device in ("cuda", "cpu"))
    assert_close(ours, expected)
    seen = host(ours.optimizer.step)
    assert seen == STEP | {"aten._foreach_add_.Scalar": 2, "aten._fused_adamw_.default": 2}
    before = [p.detach().clone() for p in ours.params]
    ours.new_grads(float("inf"))
    scale_of(ours, 1.0)
    assert "aten._local_scalar_dense.default" not in host(ours.optimizer.step)
    for was, now in zip(before, ours.params, strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_are_those_of_the_op(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    with pretended_card():
        for is_prepared in (True, False):
            for scale in (1.0, 8.0):
                run = Run("cuda", dtype, torch.float32, stochastic_rounding=True)
                for _ in range(4):
                    run.new_grads(scale)
                    if scale != 1:
                        scale_of(run, 0.0)
                    run.optimizer.step()
                assert (run.optimizer._prepared is not None) == is_prepared
                runs.append(run.state())
            monkeypatch.setattr(PreparedStep, "of", lambda *_: None)
    for other in runs[1:]:
        for found, expected in zip(runs[0], other, strict=True):
            assert torch.equal(found, expected)


def test_steps_are_counted_on_the_card_whatever_the_state_came_from(host: Any) -> None:
    run, cpu = Run("cuda"), Run("cpu").steps(2)
    run.optimizer.load_state_dict(cpu.optimizer.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(run.params, cpu.params, strict=True):
            ours.copy_(theirs)
    for one in (run, cpu):
        one.generator.manual_seed(5)
        one.steps(2)
    assert all(state["step"].device == CARD for state in run.optimizer.state.values())
    assert host(run.optimizer.step) == STEP
    cpu.optimizer.step()
    assert_close(run, cpu)


def test_a_changed_capturable_is_noticed(host: Any) -> None:
    run = Run("cuda").steps(2)
    for group in run.optimizer.param_groups:
        group["capturable"] = True
    assert host(run.optimizer.step) != STEP  # prepared anew, with what a capture needs
    run.optimizer.step()
    assert host(run.optimizer.step) == STEP


GRAPH = {"capturable": True, "stochastic_rounding": True}


class Graph:
    """What a CUDA graph keeps of a call: launches with their arguments, nothing of it run yet."""

    def __init__(self, call: Callable[[], object], host: Any) -> None:
        self.launches: list[tuple[Any, ...]] = []

        def keep(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches.append((executor, *args))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(GridExecutor, "__call__", keep)
            self.operators = {n for n in host(call) if n.startswith("aten")}

    def replay(self) -> None:
        for executor, *arguments in self.launches:
            executor(*arguments)


def test_a_captured_step_is_a_step_whatever_happens_between_replays(host: Any) -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours, eager = (  # the head's step is torch's in 16 bits, which this graph cannot hold
        Run("cuda", torch.bfloat16, torch.float32, lr=rate, **GRAPH) for rate in (lr, 1e-2)
    )
    for run in (ours, eager):
        run.steps(1).new_grads()
    static = [[param.grad for param in run.params] for run in (ours, eager)]

    graph = Graph(ours.optimizer.step, host)
    assert not any("copy" in name or "clone" in name for name in graph.operators)
    for n, now in enumerate((1e-2, 5e-3, 0.1)):
        lr.fill_(now)
        for group in eager.optimizer.param_groups:
            group["lr"] = float(lr.cpu())
        graph.replay()
        eager.optimizer.step()
        for run, grads in zip((ours, eager), static, strict=True):
            run.new_grads()  # a ragged last batch, say, goes the eager way
            run.optimizer.step()
            if n == 1:  # prepared anew, on tables of its own
                run.optimizer.add_param_group(
                    {"params": [nn.Parameter(torch.ones(3, device="cuda"))]}
                )
                run.optimizer.step()
                run.optimizer.step()
            for param, grad in zip(run.params, grads, strict=True):
                param.grad = grad
    for found, expected in zip(ours.state(), eager.state(), strict=True):
        assert torch.equal(found, expected)
    assert ours.optimizer.state[ours.params[0]]["step"].cpu() == 1 + 2 * 3 + 2


def test_tables_of_a_captured_step_live_as_long_as_the_optimizer(host: Any) -> None:
    run = Run("cuda", capturable=True).steps(1)
    prepared = weakref.ref(run.optimizer._prepared)
    Graph(run.optimizer.step, host)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.steps(1)
    assert run.optimizer._prepared is not prepared()
    gc.collect()
    assert prepared() is not None
    pickle.dumps(run.optimizer.state_dict())
    del run
    gc.collect()
    assert prepared() is None


def test_a_capture_without_capturable_is_refused(host: Any) -> None:
    run = Run("cuda").steps(2)
    with pytest.raises(RuntimeError, match="capturable=True"):
        Graph(run.optimizer.step, host)


def test_a_capture_before_any_step_is_refused(host: Any) -> None:
    run = Run("cuda", capturable=True)
    run.new_grads()
    with pytest.raises(RuntimeError, match="take a step before"):
        Graph(run.optimizer.step, host)


def test_nothing_is_prepared_in_memory_of_a_graph(host: Any) -> None:
    run = Run("cuda", capturable=True).steps(1)
    run.params[0].grad = None  # not what was prepared
    Graph(run.optimizer.step, host)
    assert run.optimizer._prepared is None
    run.steps(2)
    run.new_grads()
    assert host(run.optimizer.step).items() >= STEP.items()
