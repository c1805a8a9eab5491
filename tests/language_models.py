"""Tiny transformers models and batches of words that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

N_WORDS = 31
IGNORED = -100


def tiny_llama(*, tied: bool = False, **options: Any) -> nn.Module:
    """A Llama of two blocks: RMSNorm, rotary positions, grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    """A GPT-2 of one block: matrices `[in, out]`, learnt positions, tied words."""
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 16}
    config = GPT2Config(vocab_size=N_WORDS, bos_token_id=1, eos_token_id=2, **shape)
    return GPT2LMHeadModel(config).eval()


def tiny_bert(kind: str = "classes") -> nn.Module:
    """A BERT of one block with three classes or, as `"answers"`, with a first and a last word."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=N_WORDS,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=36,
        num_labels=2 if kind == "answers" else 3,
    )
    made = BertForQuestionAnswering if kind == "answers" else BertForSequenceClassification
    return made(config).eval()


def sentences(n: int = 4, n_words: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Sentences of different lengths, padded; each word is the label of the one before it."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, N_WORDS, (n, n_words), generator=generator)
    lengths = n_words - torch.arange(n) % 4
    mask = (torch.arange(n_words) < lengths[:, None]).long()
    labels = words.masked_fill(mask == 0, IGNORED)
    return {"input_ids": words * mask, "attention_mask": mask, "labels": labels}


def sample(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """One sample of a batch as a batch of its own."""
    return {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
