"""The five lines on models of transformers: measure, allocate, apply, train, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt
from spt_kernels.model import head_names, head_numel

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from tests.language_models import N_WORDS, sentences, tiny_bert, tiny_gpt2, tiny_llama

_TOWER = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
_IMAGES = {**_TOWER, "intermediate_size": 36, "image_size": 8, "patch_size": 4}
_WORDS = {**_TOWER, "intermediate_size": 36, "vocab_size": N_WORDS, "eos_token_id": 2}


def build(name: str, config: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options.setdefault("bos_token_id", 1)
    made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    return made.eval()


def images(size: int = 8, n: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 2, 1, 1])[:n]
    return {"pixel_values": torch.randn(n, 3, size, size, generator=generator), "labels": labels}


def of_pooled(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.pooler_output, labels)


def of_map(output: Any, target: Tensor) -> Tensor:
    return F.mse_loss(output.last_hidden_state.mean((2, 3)), F.one_hot(target, 4).float())


def swin() -> nn.Module:
    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "window_size": 4}
    options = {**shape, "depths": [2, 1], "num_heads": [2, 2], "num_labels": 3}
    return build("SwinForImageClassification", "SwinConfig", **options)


def sam() -> nn.Module:
    options = {**_TOWER, "image_size": 16, "patch_size": 4, "window_size": 2, "mlp_dim": 36}
    options |= {"output_channels": 4, "global_attn_indexes": []}
    # by itself it starts at weights of 1e-10
    return build("SamVisionModel", "SamVisionConfig", **options, initializer_range=0.2)


def dinov2() -> nn.Module:
    options = {**_TOWER, "image_size": 8, "patch_size": 4, "num_labels": 3}
    return build("Dinov2ForImageClassification", "Dinov2Config", **options)


def siglip() -> nn.Module:
    towers = {"vision_config": _IMAGES, "text_config": _WORDS}
    return build("SiglipForImageClassification", "SiglipConfig", **towers, num_labels=3)


def t5() -> nn.Module:
    shape = {"d_model": 24, "d_kv": 8, "d_ff": 36, "num_layers": 1, "num_heads": 3}
    return build(
        "T5ForConditionalGeneration",
        "T5Config",
        **shape,
        vocab_size=N_WORDS,
        decoder_start_token_id=0,
    )


Family = tuple[Callable[[], nn.Module], dict[str, Tensor], Callable[..., Tensor] | None]
FAMILIES: dict[str, Family] = {
    "vit": (
        lambda: build("ViTForImageClassification", "ViTConfig", **_IMAGES, num_labels=3),
        images(),
        None,
    ),
    "swin": (swin, images(16), None),
    "dinov2": (dinov2, images(), None),
    "clip tower": (
        lambda: build("CLIPVisionModel", "CLIPVisionConfig", **_IMAGES),
        images(),
        of_pooled,
    ),
    "siglip": (siglip, images(), None),
    "sam encoder": (sam, images(16), of_map),
    "bert": (tiny_bert, {**sentences(), "labels": torch.tensor([0, 2, 1, 1])}, None),
    "llama": (tiny_llama, sentences(), None),
    "tied llama": (lambda: tiny_llama(tied=True), sentences(), None),
    "t5": (t5, sentences(), None),
}


def loss_of(model: nn.Module, batch: dict[str, Tensor], loss_fn: Any) -> Tensor:
    if loss_fn is None:
        loss: Tensor = model(**batch).loss
        return loss
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return loss_fn(model(**inputs), batch["labels"])  # type: ignore[no-any-return]


def tuned(model: nn.Module, batch: dict[str, Tensor], loss_fn: Any = None, **options: Any) -> Any:
    found = spt.measure_sensitivity(model, [batch], loss_fn, progress=False, **options)
    assert not found.fallback
    return spt.apply(model, spt.allocate(found, budget=500, structured="lora", rank=1))


def trained(model: nn.Module, batch: dict[str, Tensor], loss_fn: Any = None) -> list[Tensor]:
    """The losses before, between and after three steps."""
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = loss_of(model, batch, loss_fn)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        return [*losses, loss_of(model, batch, loss_fn)]


@pytest.mark.parametrize("family", FAMILIES)
def test_five_lines(family: str, tmp_path: Path) -> None:
    make, batch, loss_fn = FAMILIES[family]
    model, base = make(), make()
    tuned(model, batch, loss_fn)
    plan = model.spt_tuning.plan
    assert plan.structured
    assert plan.unstructured
    losses = trained(model, batch, loss_fn)
    after = losses[-1]
    assert after < losses[0]

    spt.save_delta(model, tmp_path / "task.safetensors")
    loaded = spt.load_delta(copy.deepcopy(base), tmp_path / "task.safetensors")
    with torch.no_grad():
        assert torch.equal(loss_of(loaded, batch, loss_fn), after)
        merged = spt.merge(loaded)
        torch.testing.assert_close(loss_of(merged, batch, loss_fn), after, rtol=1e-5, atol=0)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    spt.unload(model)
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_a_language_model_says_words_with_is_no_head() -> None:
    found = spt.measure_sensitivity(tiny_llama(), [sentences()], progress=False)
    assert found.head == ()
    assert "lm_head.weight" in found


def test_tied_words_are_left_alone_or_trained_whole(tmp_path: Path) -> None:
    batch = sentences()
    found = spt.measure_sensitivity(tiny_llama(tied=True), [batch], progress=False)
    assert found.head == ()
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(found)

    model = tuned(tiny_llama(tied=True), batch, head="lm_head")
    assert model.spt_tuning.plan.head == ("model.embed_tokens.weight",)
    trained(model, batch)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    spt.save_delta(model, tmp_path / "task.safetensors")
    loaded = spt.load_delta(tiny_llama(tied=True), tmp_path / "task.safetensors")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)

    included = spt.measure_sensitivity(
        tiny_llama(tied=True), [batch], include=["*embed_tokens*"], progress=False
    )
    plan = spt.allocate(included, budget=0.3)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is shared with lm_head.weight"):
        spt.apply(tiny_llama(tied=True), plan)


def test_transposed_matrices_are_trained_entry_by_entry(tmp_path: Path) -> None:
    batch, base = sentences(), tiny_gpt2()
    model = tuned(tiny_gpt2(), batch)
    assert not model.spt_tuning.plan.structured
    name = "transformer.h.0.mlp.c_fc.weight"
    entries = model.spt_tuning.plan.unstructured[name]
    losses = trained(model, batch)
    assert losses[-1] < losses[0]
    spt.save_delta(model, tmp_path / "task.safetensors")
    loaded = spt.merge(spt.load_delta(tiny_gpt2(), tmp_path / "task.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, losses[-1])
    changed = loaded.get_parameter(name) != base.get_parameter(name)
    assert changed.flatten().nonzero().flatten().tolist() == entries.tolist()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_transformers_give_the_same_gradients(reentrant: bool) -> None:
    batch = sentences()
    model = tuned(tiny_llama(), batch)
    model.train()
    torch.manual_seed(3)  # of LoRA's dropout
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert plain
    model.zero_grad()
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_eager_attention_has_no_fused_one_to_compute_up_to() -> None:
    model = build("ViTModel", "ViTConfig", **_IMAGES)
    assert spt.recompute(model, "qkv")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="no block of ViTModel has a part for 'qkv', as its"):
        spt.recompute(model, "qkv")
    assert spt.recompute(model, ("mlp", "attention"))


def test_the_parts_of_t5_are_no_tables_within_them() -> None:
    model, batch = t5().train(), sentences()
    found = spt.recompute(model, ("mlp", "attention")).modules
    names = {name.rpartition(".")[2] for name in found}
    assert names == {"SelfAttention", "EncDecAttention", "DenseReluDense"}
    grads = []
    for what in (("mlp", "attention"), "nothing"):
        spt.recompute(model, what)
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        model(**batch, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_a_cache_is_not_written_a_second_time() -> None:
    batch, model = sentences(), tiny_llama().train()
    for what in ("block", "attention", "qkv"):
        spt.recompute(model, what)
        with pytest.raises(
            RuntimeError, match=r"layers\.0.* cache .* DynamicCache.*use_cache=False"
        ):
            model(**batch)
        model(**batch, use_cache=False).loss.backward()
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, model(**batch, use_cache=False).loss)


def test_a_language_model_of_16_bits_is_measured_and_generates() -> None:
    batch = sentences()
    fine = spt.measure_sensitivity(tiny_llama(), [batch], progress=False)
    model = tiny_llama().bfloat16()
    coarse = spt.measure_sensitivity(model, [batch], progress=False)
    assert not coarse.fallback
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        ours, truth = coarse[name].flatten(), fine[name].flatten()
        assert torch.corrcoef(torch.stack([ours, truth]))[0, 1] > 0.98, name
    spt.apply(model, spt.allocate(coarse, budget=0.02, structured="lora", rank=2))
    words = {key: batch[key] for key in ("input_ids", "attention_mask")}
    cached, again = (
        model.generate(**words, max_new_tokens=3, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, again)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: tiny_bert("answers"), ("qa_outputs.weight", "qa_outputs.bias")),
        (
            lambda: build(
                "GPT2ForSequenceClassification", "GPT2Config", vocab_size=9, n_embd=8, n_layer=1,
                n_head=2, eos_token_id=2,
            ),
            ("score.weight",),
        ),
    ],
    ids=["answers", "score"],
)  # fmt: skip
def test_heads_are_found_by_the_names_that_they_have_there(
    make: Callable[[], nn.Module], expected: tuple[str, ...]
) -> None:
    model = make()
    assert head_names(model) == expected
    assert spt.methods["linear"](model).in_head == head_numel(model) > 0
    assert all(p.requires_grad == (n in expected) for n, p in model.named_parameters())
