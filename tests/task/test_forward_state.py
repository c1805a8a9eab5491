"""What forwards change in a model: of the base, so that it comes back, and of the task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import spt_kernels as spt
from spt_kernels.files import container
from spt_kernels.task.file.format import read
from tests.models import tiny_batch
from tests.task.test_delta import assert_same_picture, make_plan, picture


class Watcher(nn.Module):
    """Buffers of every kind that a forward in training mode changes, one that it never does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("largest", torch.full((3,), -torch.inf, dtype=torch.float64))
        self.register_buffer("first", None)
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("minus", torch.full((2, 2), -torch.inf))
        self.register_buffer("table", torch.arange(4))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen[self.calls % 5] = True
            self.largest = torch.maximum(self.largest, images.amax((0, 2, 3)).double())  # anew
            if self.first is None:
                self.first = images[0].mean((1, 2))
        shift = self.bias if self.first is None else self.first + self.bias
        return images + shift[:, None, None]


def residual() -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(BasicBlock, (1, 1, 0, 0), num_classes=5, channels=(4, 8, 8, 8), stem_width=4)
    net.layer3, net.layer4 = nn.Identity(), nn.Identity()
    return net.eval()


def spectral() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten())
    net.narrow = spectral_norm(nn.Linear(64, 8))
    net.fc1, net.head = nn.Linear(8, 8), nn.Linear(8, 5)
    return net.eval()


def watched() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.watcher = Watcher()
    net.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten())
    net.head = nn.Linear(64, 5)
    return net.eval()


def instance() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    net.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), norm, nn.Flatten())
    net.head = nn.Linear(64, 5)
    return net.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": residual,
    "spectral-norm": spectral,
    "any-buffer": watched,
    "instance-norm": instance,
}
every_model = pytest.mark.parametrize("name", MODELS)


def applied(model: nn.Module, seed: int = 0) -> nn.Module:
    # a layer whose weight is computed from others cannot be tuned
    exclude = ["narrow.*"] if hasattr(model, "narrow") else []
    return spt.apply(model, make_plan(model, "unstructured", seed, exclude=exclude))


def trained(name: str, seed: int = 0, plan_seed: int = 0) -> nn.Module:
    model = applied(MODELS[name](), plan_seed)
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.01)
    model.train()
    for step in range(3):
        images, labels = tiny_batch(size=16, seed=10 * seed + step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return model.eval()(tiny_batch(size=16, seed=9)[0])


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@every_model
def test_unload_restores_what_forwards_changed(name: str) -> None:
    model, base = trained(name), MODELS[name]()
    changed = {n for n, b in base.named_buffers() if not torch.equal(b, model.get_buffer(n))}
    assert changed
    assert_same_state(spt.unload(model), base)
    assert torch.equal(scores(model), scores(base))


@every_model
def test_the_task_brings_it_along(name: str, tmp_path: Path) -> None:
    path, again = tmp_path / "task.safetensors", tmp_path / "again.safetensors"
    model, base = trained(name), MODELS[name]()
    spt.save_delta(model, path)
    loaded = spt.load_delta(base, path)
    assert torch.equal(scores(loaded), scores(model))
    for buffer_name, buffer in model.named_buffers():
        if "cache" not in buffer_name:
            assert torch.equal(loaded.get_buffer(buffer_name), buffer), buffer_name
    spt.save_delta(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    assert_same_state(spt.unload(loaded), MODELS[name]())


@every_model
@pytest.mark.parametrize("same", [True, False], ids=["same-structure", "another"])
def test_it_is_swapped_with_the_task(name: str, same: bool, tmp_path: Path) -> None:
    first, second = (trained(name, seed, 0 if same else seed) for seed in (0, 1))
    model = MODELS[name]()
    still = applied(MODELS[name]())  # a task that no forward in training mode has been in
    tuned = [first, second, still]
    for i, one in enumerate(tuned):
        spt.save_delta(one, tmp_path / str(i))
    for i in (0, 1, 2, 0, 2, 1):
        spt.load_delta(model, tmp_path / str(i))
        assert_same_state(model, tuned[i])
    assert_same_state(spt.unload(model), MODELS[name]())


@every_model
def test_merge_keeps_it(name: str) -> None:
    model = trained(name)
    expected = {n: b.clone() for n, b in model.named_buffers()}
    before = scores(model)
    spt.merge(model)
    for buffer_name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[buffer_name]), buffer_name
    torch.testing.assert_close(scores(model), before)


def test_what_did_not_change_is_not_written(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", trained("any-buffer")
    spt.save_delta(model, path)
    expected = {"calls", "seen", "largest", "first"}
    norm = {f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert read(path).buffers.keys() == {f"watcher.{name}" for name in expected} | norm
    for module in model.modules():
        module.eval()  # statistics as they are, as fine-tuning often leaves them
    still = applied(residual())
    spt.save_delta(still, path)
    assert not read(path).buffers
    assert not any(key.startswith("buffers") for key in container.unpack(path.read_bytes())[1])


def test_statistics_stay_small_and_exact(tmp_path: Path) -> None:
    path, half, model = tmp_path / "a", tmp_path / "b", trained("batch-norm")
    spt.save_delta(model, path)
    spt.save_delta(model, half, torch.bfloat16)  # which rounds what was trained
    sizes = [tensor.nbytes for tensor in read(path).buffers.values()]
    assert sum(sizes) == sum(b.nbytes for b in model.buffers())
    for name, buffer in read(half).buffers.items():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_a_base_with_other_statistics_is_another_base(tmp_path: Path) -> None:
    """Where the task leaves them as they are, it was trained on them."""
    path = tmp_path / "task.safetensors"
    spt.save_delta(applied(residual()), path)
    other = residual()
    other.bn1.running_mean[1] += 1e-3
    other.bn1.num_batches_tracked += 7  # of no consequence
    before = picture(other)
    with pytest.raises(spt.BaseModelMismatch, match=r"bn1\.running_mean: the weights differ"):
        spt.load_delta(other, path)
    assert_same_picture(other, before)
    other.bn1.running_mean.copy_(residual().bn1.running_mean)
    spt.load_delta(other, path)
    spt.save_delta(trained("batch-norm"), path)
    other = residual()
    other.bn1.running_mean[1] += 1e-3  # the task brings its own
    spt.load_delta(other, path)


def older(file: bytes) -> bytes:
    """The file as format version 2 was: floating buffers all among the dense, no others."""
    metadata, tensors = container.unpack(file)
    document = json.loads(metadata["task"])
    names = {key.removeprefix("buffers/") for key in tensors if key.startswith("buffers/")}
    document["base"] = {n: e for n, e in document["base"].items() if "running" not in n}
    for name in names:
        tensor = tensors.pop(f"buffers/{name}")
        if tensor.is_floating_point():
            tensors[f"dense/{name}"] = tensor
    metadata |= {"format_version": "2", "task": json.dumps(document)}
    return container.pack(metadata, tensors)


def test_a_file_of_format_version_2(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", trained("batch-norm")
    spt.save_delta(model, path)
    path.write_bytes(older(path.read_bytes()))
    assert "bn1.running_mean" in read(path).dense
    assert not read(path).buffers
    loaded = residual()
    for _ in range(2):  # onto the plain model, and in place of itself
        spt.load_delta(loaded, path)
        assert torch.equal(scores(loaded), scores(model))
    newer = tmp_path / "newer.safetensors"
    spt.save_delta(loaded, newer)
    assert "bn1.running_mean" in read(newer).buffers
    assert_same_state(spt.unload(loaded), residual())


WRONG = {
    "no-such": ({"nowhere": torch.zeros(2)}, "the model has no buffer nowhere"),
    "shape": ({"bn1.running_mean": torch.zeros(5)}, r"running_mean: expected shape \[5\], got"),
    "kind": ({"bn1.num_batches_tracked": torch.tensor(1.5)}, "tracked: expected torch.float32"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("state", ["plain", "tuned"])
def test_buffers_that_do_not_fit_are_refused(case: str, state: str, tmp_path: Path) -> None:
    path, (tensors, message) = tmp_path / "task.safetensors", WRONG[case]
    spt.save_delta(applied(residual()), path)
    metadata, own = container.unpack(path.read_bytes())
    own |= {f"buffers/{name}": tensor for name, tensor in tensors.items()}
    path.write_bytes(container.pack(metadata, own))
    model = trained("batch-norm") if state == "tuned" else residual()
    before = picture(model)
    with pytest.raises(spt.BaseModelMismatch, match=message):
        spt.load_delta(model, path)
    assert_same_picture(model, before)


def test_statistics_that_diverged_are_not_saved(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", trained("batch-norm")
    model.bn1.running_var[0] = torch.nan
    with pytest.raises(ValueError, match=r"bn1\.running_var holds NaN or infinite"):
        spt.save_delta(model, path)
    assert_same_state(spt.unload(model), residual())


def test_a_model_cast_after_apply(tmp_path: Path) -> None:
    path, model = tmp_path / "task.safetensors", applied(residual()).bfloat16()
    spt.save_delta(model, path)
    assert not read(path).buffers  # rounded by the cast, not by a forward
    spt.load_delta(residual(), path)
    spt.load_delta(residual().bfloat16(), path)
    assert_same_state(spt.unload(model), residual().bfloat16())
