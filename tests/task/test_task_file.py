"""The task file: round trips, size, every kind of damage, and what a killed writer leaves."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_kernels.errors import DeltaFormatError
from spt_kernels.files import container
from spt_kernels.model import ParameterInfo, RowBlock
from spt_kernels.plan import AdapterSpec, LoraSpec, Plan
from spt_kernels.task.file.fingerprint import Fingerprint
from spt_kernels.task.file.format import TaskFile, decode, encode, read, structured_shapes, write
from spt_kernels.task.file.positions import encode_positions

QKV, FC = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"


def make_info(shape: tuple[int, ...], *operations: str) -> ParameterInfo:
    step = shape[0] // len(operations)
    blocks = tuple(RowBlock(o, i * step, (i + 1) * step) for i, o in enumerate(operations))
    kind = "linear" if len(shape) == 2 else "bias"
    return ParameterInfo(kind=kind, shape=shape, row_blocks=blocks, groups=1, block="blocks.0")


def make_task(
    dtype: torch.dtype = torch.float32,
    *,
    spec: LoraSpec | AdapterSpec | None = None,
    seed: int = 0,
) -> TaskFile:
    """A small task of each kind of content: sparse in two tensors, structured rows, a head."""
    generator = torch.Generator().manual_seed(seed)
    spec = spec or LoraSpec(rank=1, rows=((0, 2), (4, 6)), in_features=4)
    info = {QKV: make_info((6, 4), "q", "k", "v"), FC: make_info((5, 4), "fc1")}
    unstructured = {QKV: torch.tensor([8, 9, 15]), FC: torch.tensor([0, 7])}
    plan = Plan(unstructured, {QKV: spec}, info, head=("head.weight", "head.bias"))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return TaskFile(
        model_name="tiny",
        plan=plan,
        base={name: Fingerprint.of(torch.zeros(info[name].shape)) for name in info},
        values={name: random(len(p)) for name, p in unstructured.items()},
        structured={QKV: {n: random(*shape) for n, shape in structured_shapes(spec).items()}},
        dense={"head.weight": random(3, 4), "head.bias": random(3)},
        buffers={"norm.mean": random(2), "norm.calls": torch.tensor(3), "on": torch.tensor([True])},
        metadata={"classes": ["a", "b", "c"], "mine": [1, {"two": None}]},
        recast={FC: Fingerprint.of(torch.zeros(5, 4, dtype=torch.float64))},
    )


def assert_same(task: TaskFile, other: TaskFile) -> None:
    assert other.model_name == task.model_name
    assert other.plan.to_json() == task.plan.to_json()
    assert other.base == task.base
    assert other.recast == task.recast
    assert other.metadata == task.metadata
    pairs = [
        (task.buffers, other.buffers),
        (task.plan.unstructured, other.plan.unstructured),
        (task.values, other.values),
        (task.dense, other.dense),
        *((task.structured[name], other.structured[name]) for name in task.structured),
    ]
    assert task.structured.keys() == other.structured.keys()
    for expected, actual in pairs:
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor)


@pytest.fixture(scope="module")
def small_file() -> bytes:
    return encode(make_task())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_round_trip(dtype: torch.dtype, kind: str) -> None:
    spec = AdapterSpec(rank=2, rows=((0, 2), (4, 6))) if kind == "adapter" else None
    task = make_task(dtype, spec=spec)
    file = encode(task)
    assert_same(task, decode(file))
    assert encode(decode(file)) == file
    assert encode(make_task(dtype, spec=spec)) == file


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, 299), max_size=40).map(sorted),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trip_of_any_positions(positions: list[int], seed: int, dtype: torch.dtype) -> None:
    info = {FC: make_info((30, 10), "fc1")}
    plan = Plan({FC: torch.tensor(positions, dtype=torch.int64)}, {}, info)
    torch.manual_seed(seed)
    values = torch.randn(len(positions)).to(dtype)
    base = {FC: Fingerprint.of(torch.zeros(30, 10))}
    task = TaskFile("any", plan, base, {FC: values}, {}, {})
    assert_same(task, decode(encode(task)))


def test_the_safetensors_library_reads_it(tmp_path: Path, small_file: bytes) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(small_file)
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert metadata["format"] == "spt_kernels.task"
    assert json.loads(metadata["task"])["model_name"] == "tiny"
    expected = make_task()
    assert torch.equal(tensors["dense/head.weight"], expected.dense["head.weight"])
    assert torch.equal(tensors[f"unstructured/{QKV}/values"], expected.values[QKV])
    assert tensors[f"unstructured/{QKV}/positions"].tolist() == [8, 0, 5]  # gaps of 8, 9, 15


def test_every_flipped_bit_is_noticed(small_file: bytes) -> None:
    for i in range(len(small_file)):
        for bit in range(8):
            damaged = bytearray(small_file)
            damaged[i] ^= 1 << bit
            with pytest.raises(DeltaFormatError):
                decode(bytes(damaged))


def test_every_cut_is_noticed(small_file: bytes) -> None:
    for length in range(len(small_file)):
        with pytest.raises(DeltaFormatError, match="cut"):
            decode(small_file[:length])
    with pytest.raises(DeltaFormatError, match="damaged"):
        decode(small_file + b"\0")


@pytest.mark.parametrize("n_header", [2**63, 2**40, 2**24 + 8], ids=["2^63", "2^40", "16MiB+8"])
def test_a_hostile_header_length_allocates_nothing(small_file: bytes, n_header: int) -> None:
    with pytest.raises(DeltaFormatError, match="header of"):
        decode(n_header.to_bytes(8, "little") + small_file[8:])


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"PK\x03\x04" * 50], ids=["empty", "2B", "zip"])
def test_another_kind_of_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(data)
    with pytest.raises(
        DeltaFormatError, match=r"load the task .*other\.safetensors: its .* another kind of file"
    ):
        read(path)


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")


def rewritten(file: bytes, **changes: object) -> bytes:
    """The file with metadata or tensors replaced and a *valid* checksum: damage with intent."""
    metadata, tensors = container.unpack(file)
    document = json.loads(metadata["task"])
    for key, value in changes.items():
        if key in ("format", "format_version"):
            metadata[key] = str(value)
        elif key == "document":
            assert callable(value)
            value(document)
        elif key == "tensors":
            assert callable(value)
            value(tensors)
    metadata["task"] = json.dumps(document)
    return container.pack(metadata, tensors)


def test_a_newer_format_says_upgrade(small_file: bytes) -> None:
    with pytest.raises(DeltaFormatError, match=r"version 4, .* reads versions 2 to 3: upgrade"):
        decode(rewritten(small_file, format_version=4))
    with pytest.raises(DeltaFormatError, match=r"version 1, .* versions 2 to 3: make the task"):
        decode(rewritten(small_file, format_version=1))


@pytest.mark.parametrize("version", ["", "0", "-1", "1.5", "x", "9" * 40], ids=repr)
def test_a_version_that_is_none(small_file: bytes, version: str) -> None:
    with pytest.raises(DeltaFormatError, match="expected a format version"):
        decode(rewritten(small_file, format_version=version))


V, P = f"unstructured/{FC}/values", f"unstructured/{FC}/positions"
A = f"structured/{QKV}/lora_a"
BAD_TENSORS = {
    "nan": ({V: torch.tensor([1.0, float("nan")])}, "holds NaN"),
    "infinite-head": ({"dense/head.bias": torch.full((3,), float("inf"))}, "holds NaN or infinite"),
    "integer-values": ({V: torch.zeros(2, dtype=torch.uint8)}, "expected floating-point"),
    "2d-values": ({V: torch.zeros(1, 2)}, r"expected shape \[2\], got \[1, 2\]"),
    "too-many-values": ({V: torch.zeros(3)}, "expected 3 positions, got 2"),
    "out-of-range": ({P: encode_positions(torch.tensor([0, 20]))}, "20 is out of range for 20"),
    "inside-structured": (
        {f"unstructured/{QKV}/positions": encode_positions(torch.tensor([1, 9, 15]))},
        "positions in rows that are structured",
    ),
    "positions-as-floats": ({P: torch.zeros(2)}, "unexpected tensor"),
    "no-values": ({V: None}, "lacks its positions or its values"),
    "no-tensor": ({V: None, P: None}, ""),
    "lora-shape": ({A: torch.zeros(2, 5)}, r"expected shape \[2, 4\], got \[2, 5\]"),
    "no-lora-a": ({A: None}, "expected .*lora_a"),
    "another-lora": ({"structured/x/lora_a": torch.zeros(2)}, "structured module"),
    "no-head": ({"dense/head.bias": None}, "head.bias: a parameter of the head is missing"),
    "nan-buffer": ({"buffers/x": torch.tensor([float("nan")])}, "buffers/x: holds NaN"),
    "buffer-is-parameter": ({"buffers/head.bias": torch.zeros(3)}, "a parameter and as a buffer"),
    "unknown-group": ({"extra/x": torch.zeros(1)}, "unexpected tensor 'extra/x'"),
    "unknown-parameter": (
        {"unstructured/x/values": torch.zeros(1), "unstructured/x/positions": P},
        "does not describe",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(small_file: bytes, case: str) -> None:
    changes, message = BAD_TENSORS[case]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in changes.items():
            if tensor is None:
                del tensors[key]
            else:
                tensors[key] = tensors[tensor] if isinstance(tensor, str) else tensor

    if case == "no-tensor":  # one parameter fewer is a smaller task, and a valid one
        assert FC not in decode(rewritten(small_file, tensors=change)).values
        return
    with pytest.raises(DeltaFormatError, match=message):
        decode(rewritten(small_file, tensors=change), "x")


BAD_DOCUMENTS = {
    "no-plan": lambda d: d.pop("plan"),
    "no-base": lambda d: d["base"].pop(FC),
    "base-shape": lambda d: d["base"][FC].update(shape=[4, 5]),
    "base-is-list": lambda d: d.update(base=[]),
    "base-entry": lambda d: d["base"].update({FC: 3}),
    "recast-is-list": lambda d: d.update(recast=[]),
    "recast-of-nothing": lambda d: d.update(recast={"x": d["base"][FC]}),
    "recast-shape": lambda d: d.update(recast={FC: d["base"][QKV]}),
    "metadata-is-text": lambda d: d.update(metadata="x"),
    "name-is-number": lambda d: d.update(model_name=3),
    "plan-is-empty": lambda d: d.update(plan={}),
    "no-info": lambda d: d["plan"].update(info={}),
    "shape-is-huge": lambda d: d["plan"]["info"][FC].update(shape=[2**40, 2**40]),
    "shape-is-text": lambda d: d["plan"]["info"][FC].update(shape="5x4"),
    "shape-is-flat": lambda d: d["plan"]["info"][QKV].update(shape=[24]),
    "shape-is-empty": lambda d: d["plan"]["info"][QKV].update(shape=[0, 0]),
    "rank-is-negative": lambda d: d["plan"]["structured"][QKV].update(rank=-1),
    "rank-is-float": lambda d: d["plan"]["structured"][QKV].update(rank=1.0),
    "rank-is-text": lambda d: d["plan"]["structured"][QKV].update(rank="1"),
    "rows-overlap": lambda d: d["plan"]["structured"][QKV].update(rows=[[0, 3], [2, 6]]),
    "rows-outside": lambda d: d["plan"]["structured"][QKV].update(rows=[[0, 60]]),
    "rows-are-pairs": lambda d: d["plan"]["structured"][QKV].update(rows=[1, 2]),
    "scale-is-text": lambda d: d["plan"]["structured"][QKV].update(scale="1"),
    "scale-is-infinite": lambda d: d["plan"]["structured"][QKV].update(scale=1e999),
    "dropout-is-2": lambda d: d["plan"]["structured"][QKV].update(dropout=2),
    "spec-is-unknown": lambda d: d["plan"]["structured"][QKV].update(kind="other"),
    "spec-is-gone": lambda d: d["plan"]["structured"].clear(),
    "budget-is-text": lambda d: d["plan"].update(budget="many"),
    "budget-is-exceeded": lambda d: d["plan"].update(budget=1),
    "unknown-field": lambda d: d["plan"].update(surprise=1),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_descriptions(small_file: bytes, case: str) -> None:
    with pytest.raises(DeltaFormatError, match=r"^cannot load the task x: "):
        decode(rewritten(small_file, document=BAD_DOCUMENTS[case]), "x")


NASTY = (None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", [], [[]], {}, [{}])


def test_any_value_anywhere_in_the_description(small_file: bytes) -> None:
    """Each node of the JSON replaced by each nasty value: a valid task, or one clear error."""
    metadata, tensors = container.unpack(small_file)
    refused = 0
    for path in paths_of(json.loads(metadata["task"])):
        for value in NASTY:
            document = json.loads(metadata["task"])
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            file = container.pack({**metadata, "task": json.dumps(document)}, tensors)
            try:
                task = decode(file)
            except DeltaFormatError:
                refused += 1
            else:
                assert task.values.keys() == task.plan.unstructured.keys()
    assert refused > 700


def paths_of(node: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where each node of a JSON document is, except the root."""
    found = [path] if path else []
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            found += paths_of(child, (*path, key))
    return found


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "12 bytes expected at 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "8 bytes expected at 0"),
        ({"dtype": "F32", "shape": [2**45], "data_offsets": [0, 2**47]}, "got 0..1407"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}, "expected sizes"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "expected sizes"),
        ({"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}, "expected sizes"),
        ({"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}, "expected sizes"),
        ({"dtype": "I16", "shape": [4], "data_offsets": [0, 8]}, "expected a dtype"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "expected a dtype"),
        ({"shape": [2]}, "expected dtype, shape and data_offsets"),
        ([], "expected dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "expected 4 bytes of tensors"),
    ],
    ids=range(12),
)
def test_bad_tensor_entries(entry: object, message: str) -> None:
    header = {"__metadata__": {"checksum": "0" * 64}, "x": entry}
    text = json.dumps(header, separators=(",", ":")).encode()
    file = bytearray(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    file[container._DIGITS] = container._checksum(file)
    with pytest.raises(DeltaFormatError, match=message):
        decode(bytes(file))


def test_making_a_task_checks_it() -> None:
    task = make_task()
    with pytest.raises(ValueError, match="holds NaN"):
        replace(task, dense={**task.dense, "head.bias": torch.tensor([float("nan")] * 3)})


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 6.1), (torch.bfloat16, 4.1)], ids=str)
@pytest.mark.parametrize("layout", ["uniform", "clustered"])
def test_bytes_per_value_of_a_vit_b(dtype: torch.dtype, limit: float, layout: str) -> None:
    """0.4M values over 48 matrices and 48 vectors of a ViT-B/16, spread as sensitivity is."""
    info, unstructured = vit_b_positions(400_000, clustered=layout == "clustered")
    plan = Plan(unstructured, {}, info)
    values = {name: torch.zeros(p.numel(), dtype=dtype) for name, p in unstructured.items()}
    base = {n: Fingerprint("float32", tuple(info[n].shape), "0" * 32) for n in unstructured}
    file = encode(TaskFile("vit_base_patch16_224", plan, base, values, {}, {}))
    without_header = len(file) - 8 - int.from_bytes(file[:8], "little")
    bytes_per_value = without_header / plan.num_unstructured
    print(f"{layout} {dtype}: {bytes_per_value:.3f} bytes per value, {len(file)} bytes in all")
    assert bytes_per_value <= limit
    assert len(file) - without_header < 100_000


@functools.cache
def vit_b_positions(
    nnz: int, *, clustered: bool
) -> tuple[dict[str, ParameterInfo], dict[str, torch.Tensor]]:
    """Random positions over a ViT-B/16: uniform, or in few rows and columns of a few matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(12):
        shapes[f"blocks.{i}.attn.qkv.weight"] = (2304, 768)
        shapes[f"blocks.{i}.attn.proj.weight"] = (768, 768)
        shapes[f"blocks.{i}.mlp.fc1.weight"] = (3072, 768)
        shapes[f"blocks.{i}.mlp.fc2.weight"] = (768, 3072)
        for vector in ("norm1.weight", "norm1.bias", "attn.proj.bias", "mlp.fc2.bias"):
            shapes[f"blocks.{i}.{vector}"] = (768,)
    info = {name: make_info(shape, "x") for name, shape in shapes.items()}
    share = {name: torch.rand((), generator=generator).item() ** 6 for name in shapes}
    numel = {name: info[name].numel for name in shapes}
    if not clustered:
        share = dict.fromkeys(shapes, 1.0)
    total = sum(share[name] * numel[name] for name in shapes)
    unstructured = {}
    for name, shape in shapes.items():
        count = min(numel[name], round(nnz * share[name] * numel[name] / total))
        score = torch.rand(shape, generator=generator)
        if clustered and len(shape) == 2:
            # sensitivity is close to a product of a row and a column factor, both heavy-tailed
            score *= torch.rand(shape[0], 1, generator=generator) ** 4
            score *= torch.rand(1, shape[1], generator=generator) ** 4
        unstructured[name] = score.flatten().topk(count).indices.sort().values
    return info, unstructured


class TestWriting:
    def test_returns_the_number_of_bytes_and_follows_the_umask(self, tmp_path: Path) -> None:
        path = tmp_path / "task.safetensors"
        assert write(make_task(), path) == path.stat().st_size
        beside = tmp_path / "beside"
        beside.write_bytes(b"")
        assert path.stat().st_mode == beside.stat().st_mode
        assert_same(make_task(), read(path))

    def test_a_private_file_stays_private(self, tmp_path: Path) -> None:
        path = tmp_path / "task.safetensors"
        write(make_task(seed=1), path)
        path.chmod(0o600)
        write(make_task(seed=2), path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert_same(make_task(seed=2), read(path))

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        target, link = tmp_path / "task.safetensors", tmp_path / "latest.safetensors"
        write(make_task(seed=1), target)
        link.symlink_to(target)
        write(make_task(seed=2), link)
        assert link.is_symlink()
        assert_same(make_task(seed=2), read(target))

    @pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
    def test_a_failing_disk_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        path = tmp_path / "task.safetensors"
        write(make_task(seed=1), path)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if failing == "write":
            real_open = open

            def open_full(*arguments: object, **keywords: object) -> object:
                file = real_open(*arguments, **keywords)  # type: ignore[call-overload]
                proxy = type("Full", (), {"__enter__": lambda s: s, "__exit__": lambda *_: None})()
                proxy.write = full
                file.close()
                return proxy

            monkeypatch.setattr("spt_kernels.files.atomic.open", open_full, raising=False)
        else:
            monkeypatch.setattr(os, failing, full)
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            write(make_task(seed=2), path)
        monkeypatch.undo()
        assert_same(make_task(seed=1), read(path))
        assert os.listdir(tmp_path) == ["task.safetensors"]

    def test_a_real_limit_on_file_size_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "task.safetensors"
        write(make_task(seed=1), path)
        script = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            f"from spt_kernels.files.atomic import write_atomically;"
            f"write_atomically({str(path)!r}, b'x' * 5000)"
        )
        result = run_python(script)
        result.wait(60)
        assert f"OSError: [Errno 27] File too large: '{path}'".encode() in result.stderr.read()
        assert_same(make_task(seed=1), read(path))
        assert os.listdir(tmp_path) == ["task.safetensors"]

    def test_a_kill_while_saving_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "task.safetensors"
        write(make_task(seed=1), path)
        script = (
            "import os, time;"
            "os.fsync = lambda _: (print('written', flush=True), time.sleep(60));"
            f"from spt_kernels.files.atomic import write_atomically;"
            f"write_atomically({str(path)!r}, b'x' * 5000)"
        )
        process = run_python(script)
        assert (
            process.stdout.readline() == b"written\n"
        )  # killed with everything but the rename done
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert_same(make_task(seed=1), read(path))
        write(make_task(seed=2), path)
        assert_same(make_task(seed=2), read(path))

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "none" / "task.safetensors"
        with pytest.raises(FileNotFoundError, match="no such folder") as caught:
            write(make_task(), path)
        assert caught.value.filename == str(path)

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError):
            write(make_task(), tmp_path)


def run_python(script: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
