"""Superposition in a loop of one's own: a Hugging Face model, PyTorch, no Megatron.

    python examples/plain_torch/train.py TEXT [--bag-size 4] [--step-ratio 0.3] [--steps 300]

Trains a small byte-level Llama on a file of text. What superposition adds to the loop is an
embedding, a loss and a dataset; the model that comes out is an ordinary one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_tst import (
    BagDataset,
    BagEmbedding,
    BatchSizes,
    MultiHotCrossEntropyLoss,
    SuperpositionConfig,
    SuperpositionSchedule,
)
from megatron_tst.data.bag_dataset import ArraySource

LENGTH, BATCH, VOCABULARY = 128, 8, 256


def train(
    model: Any, dataset: BagDataset, learning_rate: Callable[[int], float], weight_decay: float
) -> Iterator[float]:
    """Trains over all steps of the dataset's schedule and yields the loss of each."""
    schedule = dataset.schedule
    embedding = BagEmbedding.from_embedding(model.get_input_embeddings())
    # The weights of the targets of a bag; a single target has none.
    loss_of = MultiHotCrossEntropyLoss(schedule.config.target_weights())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(schedule.total_steps):
        batch = dataset.batch(step)
        logits = model(inputs_embeds=embedding(batch["tokens"])).logits
        loss = loss_of(logits, batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss.detach())


def main() -> None:
    """Trains, and prints a line every ten steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--step-ratio", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=args.bag_size, step_ratio=args.step_ratio),
        total_steps=args.steps,
        batch_sizes=BatchSizes.constant(BATCH),
        sequence_length=LENGTH,
    )
    tokens = np.memmap(args.text, dtype=np.uint8, mode="r")
    dataset = BagDataset(ArraySource(tokens), schedule)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            pad_token_id=None,
        )
    )
    warm_up = max(args.steps // 20, 1)
    losses = train(model, dataset, lambda step: 3e-3 * min((step + 1) / warm_up, 1.0), 0.1)
    for step, loss in enumerate(losses):
        if step % 10 == 0 or schedule.begins_phase(step):
            print(f"step {step:5d}  bag size {schedule.bag_size_at(step)}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
