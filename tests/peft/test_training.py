"""The Trainer and accelerate train, save, go on and load the best, as they do with PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import spt_kernels as spt
from spt_kernels.peft import SptConfig

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(IMAGES)]


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=32, image_size=8, patch_size=4, num_labels=3)
    return ViTForImageClassification(config).eval()


def wrapped() -> PeftModel:
    matrices = {n: p for n, p in vit().vit.named_parameters(prefix="vit") if p.ndim == 2}
    found = {name: matrix.detach().abs() for name, matrix in matrices.items()}
    plan = spt.allocate(spt.Sensitivity.from_tensors(found, num_samples=1), 300, rank=1, dropout=0)
    torch.manual_seed(1)
    return get_peft_model(vit(), SptConfig(plan=plan))


def trained(model: PeftModel, folder: Path, *, sparse: bool, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
        seed=0,
        **options,
    )
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2) if sparse else None
    return Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA, optimizers=(optimizer, None)
    )


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("sparse", [True, False], ids=["SparseAdamW", "AdamW"])
def test_the_trainer_saves_and_goes_on(sparse: bool, tmp_path: Path) -> None:
    model = wrapped()
    trained(model, tmp_path, sparse=sparse).train()
    assert not torch.allclose(scores(model), scores(vit()), atol=1e-3)
    half = PeftModel.from_pretrained(vit(), tmp_path / "checkpoint-2")
    assert not torch.equal(scores(half), scores(model))
    again = wrapped()
    trained(again, tmp_path, sparse=sparse).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    torch.testing.assert_close(scores(again), scores(model))


def test_the_trainer_loads_the_best(tmp_path: Path) -> None:
    model = wrapped()
    options: dict[str, Any] = {"eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trained(model, tmp_path, sparse=True, metric_for_best_model="score", **options)
    told = iter([1.0, 0.0])
    trainer.compute_metrics = lambda _: {"score": next(told)}
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert str(best).endswith("checkpoint-2")
    later = PeftModel.from_pretrained(vit(), tmp_path / "checkpoint-4")
    assert not torch.equal(scores(model), scores(later))
    assert torch.equal(scores(model), scores(PeftModel.from_pretrained(vit(), str(best))))
    assert any(p.requires_grad for p in model.parameters())


def test_accelerate(tmp_path: Path) -> None:
    model = wrapped()
    optimizer = spt.SparseAdamW(spt.param_groups(model), lr=1e-2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(DATA, 2))
    prepared.train()
    losses = []
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < sum(losses[:4])
    state = accelerator.get_state_dict(prepared)
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(scores(PeftModel.from_pretrained(vit(), tmp_path)), scores(model))


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 32, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_words_that_peft_adds_belong_to_the_base(tied: bool, tmp_path: Path) -> None:
    """As it adds them by itself where words were added to the model."""
    scored = ("v_proj", "lm_head")
    weights = {n: p.detach().abs() for n, p in llama(tied=tied).named_parameters() if p.ndim == 2}
    weights = {n: p for n, p in weights.items() if any(name in n for name in scored)}
    plan = spt.allocate(spt.Sensitivity.from_tensors(weights, num_samples=1), 60, rank=1)
    model = get_peft_model(llama(tied=tied), SptConfig(plan=plan))
    assert ("lm_head.weight" in {**plan.structured, **plan.unstructured}) is not tied
    tokens = torch.arange(8).view(2, 4)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        same, other = llama(tied=tied), llama(tied=tied)
        other.model.embed_tokens.weight[3] += 1.0
        loaded = PeftModel.from_pretrained(same, tmp_path, is_trainable=True)
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
        again = PeftModel.from_pretrained(other, tmp_path)
        assert torch.equal(again(input_ids=tokens).logits, expected)


def test_a_language_model_generates(tmp_path: Path) -> None:
    weights = {n: p.detach().abs() for n, p in llama().named_parameters() if "layers" in n}
    plan = spt.allocate(spt.Sensitivity.from_tensors(weights, num_samples=1), 400, rank=1)
    model = get_peft_model(llama(), SptConfig(plan=plan, task_type="CAUSAL_LM"))
    tokens = torch.arange(8).view(2, 4)
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    logits = model.eval()(input_ids=tokens).logits
    assert not torch.allclose(logits, llama()(input_ids=tokens).logits, atol=1e-3)
    assert torch.equal(loaded(input_ids=tokens).logits, logits)
    mask = torch.ones_like(tokens)
    told: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    words = loaded.generate(input_ids=tokens, attention_mask=mask, **told)
    merged = loaded.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, attention_mask=mask, **told), words)


def test_names_of_classes_that_a_task_file_brought_are_in_the_folder(tmp_path: Path) -> None:
    names, other = ("rose", "lily", "iris"), vit()
    head = ("classifier.weight", "classifier.bias")
    plan = spt.Plan({}, {}, {}, head=head, head_source="given", model_name="vit")
    tuned = spt.apply(other, plan)
    spt.save_delta(tuned, tmp_path / "task", metadata={"classes": list(names)})
    model = get_peft_model(spt.load_delta(vit(), tmp_path / "task"), SptConfig())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert tuple(loaded.config.id2label.values()) == names
    assert tuple(loaded.unload().config.id2label.values()) == ("LABEL_0", "LABEL_1", "LABEL_2")
