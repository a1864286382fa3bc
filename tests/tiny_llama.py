"""Small random Llama models in Hugging Face folders, for the tests of what is done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_tst.corpus.tokenizer import byte_tokenizer
from megatron_tst.evaluation.folder import LoadedModel

CONTEXT = 64
CPU = torch.device("cpu")


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a byte-level model in float32 whose predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    model.save_pretrained(folder)
    byte_tokenizer().save_files(folder)
    return folder


def log_probabilities(loaded: LoadedModel, tokens: list[int]) -> list[float]:
    """Of each token but the first, from all before it, in one pass."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]].tolist()
