"""Tasks over bases that torchao and bitsandbytes have quantized, where these are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from bench.quantizers import QUANTIZERS
from spt_kernels.model.quantized import quantized_names
from tests.models import tiny_batch, tiny_vit

IMAGES, LABELS = tiny_batch(6)


def base(dtype: torch.dtype) -> nn.Module:
    return tiny_vit(width=96).to(dtype)


NAMES = ("int8", "int4", "nf4")
# in 16 bits the float model rounds its weights to what the quantized one does not
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}


def quantizer_named(name: str) -> Callable[[nn.Module], nn.Module]:
    if name not in QUANTIZERS:
        pytest.skip(f"what quantizes to {name} is not installed")
    return QUANTIZERS[name]


@pytest.fixture(params=NAMES)
def quantizer(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return quantizer_named(request.param)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    # in training mode: on some CPUs bitsandbytes repacks plain weights in evaluation mode
    return model.train()(IMAGES.to(model.head.weight.dtype)).float()


def train(model: nn.Module) -> dict[str, Tensor]:
    """A few steps; the gradients of the first one."""
    model.train()
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.01)
    first: dict[str, Tensor] = {}
    for _ in range(3):
        optimizer.zero_grad()
        output = model(IMAGES.to(next(model.parameters()).dtype)).float()
        F.cross_entropy(output, LABELS).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        first = first or grads
        optimizer.step()
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_and_trained_as_the_float_model_of_the_same_values(
    quantizer: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    model = quantizer(base(dtype))
    assert len(quantized_names(model)) == 8
    floats = spt.dequantize(quantizer(base(dtype)))
    assert quantized_names(floats) == {}
    batch = IMAGES.to(dtype), LABELS
    scores, expected = (
        spt.measure_sensitivity(each, [batch], progress=False) for each in (model, floats)
    )
    assert scores.info == expected.info
    assert scores.fallback == ()
    plan = spt.allocate(expected, 4000, "lora", rank=2, dropout=0.0)
    found = []
    for each in (model, floats):
        torch.manual_seed(0)
        spt.apply(each, plan)
        found.append(train(each))
    assert found[0].keys() == found[1].keys()
    pairs = [(scores[name], expected[name]) for name in expected]
    pairs += [(found[0][name], found[1][name]) for name in found[1]]
    pairs.append((outputs(model), outputs(floats)))
    for own, truth in pairs:
        assert (own - truth).norm() <= TOLERANCE[dtype] * truth.norm() + 1e-6


def test_saved_loaded_and_unloaded(
    quantizer: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, path = quantizer(base(torch.float32)), tmp_path / "task.safetensors"
    floats = spt.dequantize(quantizer(base(torch.float32)))
    scores = spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)
    spt.apply(model, spt.allocate(scores, 4000, "lora", rank=2))
    train(model)
    spt.save_delta(model, path)
    fresh = quantizer(base(torch.float32))
    before, expected = outputs(fresh), outputs(model.eval())
    spt.load_delta(fresh, path)
    torch.testing.assert_close(fresh.eval()(IMAGES), model.eval()(IMAGES))
    torch.testing.assert_close(copy.deepcopy(fresh)(IMAGES), fresh(IMAGES))
    assert expected.shape == before.shape
    with pytest.raises(spt.BaseModelMismatch, match="expected weights quantized to"):
        spt.load_delta(floats, path)
    spt.load_delta(floats, path, check_base=False)
    torch.testing.assert_close(floats.eval()(IMAGES), fresh(IMAGES), rtol=1e-3, atol=1e-4)
    spt.unload(fresh)
    assert torch.equal(outputs(fresh), before)
    with pytest.raises(ValueError, match=r"cannot merge .*spt\.dequantize\(model\)"):
        spt.merge(model)
    merged = spt.merge(spt.dequantize(model))
    torch.testing.assert_close(merged.eval()(IMAGES), floats(IMAGES), rtol=1e-3, atol=1e-4)
    assert type(merged.blocks[0].mlp.fc1) is nn.Linear


def test_no_float_copy_is_kept(quantizer: Callable[[nn.Module], nn.Module]) -> None:
    model = quantizer(base(torch.float32))
    scores = spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)
    spt.apply(model, spt.allocate(scores, 500, None)).train()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        model(IMAGES[:1])
    linears = [m for m in base(torch.float32).blocks.modules() if isinstance(m, nn.Linear)]
    shapes = {tuple(linear.weight.shape) for linear in linears}
    assert kept
    assert not {shape for shape in map(tuple, kept) if shape in shapes or shape[::-1] in shapes}


@pytest.mark.parametrize(("name", "bytes_each"), [("int8", 1), ("int4", 1), ("nf4", 0.5)])
def test_accounted_memory_counts_what_is_stored(name: str, bytes_each: float) -> None:
    quantizer = quantizer_named(name)

    def estimate(model: nn.Module) -> int:
        return spt.estimate_memory(
            model, (4, 3, 16, 16), method="spt-lora", budget=0.005, device="cpu"
        ).by_category["weights"]

    saved = estimate(base(torch.float32)) - estimate(quantizer(base(torch.float32)))
    linears = [m for m in base(torch.float32).blocks.modules() if isinstance(m, nn.Linear)]
    numel = sum(linear.weight.numel() for linear in linears)
    assert saved == pytest.approx((4 - bytes_each) * numel, rel=0.08)


def test_weights_that_bitsandbytes_has_repacked_are_refused_by_name() -> None:
    model = quantizer_named("nf4")(tiny_vit(width=192, depth=1)).eval()
    with torch.no_grad():
        model(IMAGES)
    if not getattr(model.blocks[0].mlp.fc1.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks weights on CPUs with bf16 units alone")
    with pytest.raises(ValueError, match="was repacked, and rounded again, by a forward"):
        spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)


def test_8_bits_of_bitsandbytes_are_refused_by_name() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_vit(depth=1)
    model.blocks[0].mlp.fc1 = bnb.nn.Linear8bitLt(24, 96, has_fp16_weights=False)
    with pytest.raises(ValueError, match=r"fc1\.weight is of bitsandbytes' Linear8bitLt, which"):
        spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)


def test_quantized_inputs_of_torchao_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_vit(depth=1)
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model.blocks, config)
    with pytest.raises(ValueError, match=r"qkv\.weight is a Int8Tensor with act_quant_kwargs"):
        spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False)


def test_a_language_model_of_transformers() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    words = torch.randint(0, 40, (4, 9))
    batch = {"input_ids": words, "labels": words}

    def llama() -> nn.Module:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    models = llama(), spt.dequantize(llama())
    scores, expected = (spt.measure_sensitivity(m, [batch], progress=False) for m in models)
    assert scores.head == ()
    assert scores.info == expected.info
    plan = spt.allocate(scores, 900, "lora", rank=2, dropout=0.0)
    losses = []
    for model in models:
        torch.manual_seed(0)
        spt.apply(model, plan).train()
        optimizer = spt.SparseAdamW(spt.param_groups(model), lr=0.01)
        for _ in range(3):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_what_transformers_has_quantized_says_so_no_more_once_it_is_floats(
    name: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    quantizer_named(name)
    tower = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**tower, vocab_size=32, intermediate_size=64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "floats")
    if name == "nf4":
        kind = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        kind = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(tmp_path / "floats", quantization_config=kind, device_map="cpu")
    assert quantized_names(model)
    spt.dequantize(model, torch.float32).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    for each in (model, again):
        assert not getattr(each, "is_quantized", False)
        assert not quantized_names(each)
    words = torch.arange(6).view(1, 6)
    assert torch.equal(again(words).logits, model.eval()(words).logits)
    model.to(torch.bfloat16)  # refused of what is quantized
