"""Superposition in the Trainer of Hugging Face transformers.

    python examples/hf_trainer/train.py TEXT OUTPUT [--bag-size 4] [--step-ratio 0.3] [--steps 300]

Trains a small byte-level Llama on a file of text and saves it as an ordinary folder. What
superposition adds is a subclass of Trainer: it embeds bags, computes their loss, and reads the
samples in their order.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from megatron_tst import (
    BagDataset,
    BagEmbedding,
    BatchSizes,
    MultiHotCrossEntropyLoss,
    SuperpositionConfig,
    SuperpositionSchedule,
)
from megatron_tst.data.bag_dataset import ArraySource

LENGTH, VOCABULARY = 128, 256


class SuperpositionTrainer(Trainer):
    """A Trainer over a BagDataset, whose schedule says how long and in which batches it trains.

    Args:
        model: a causal language model that takes ``inputs_embeds``.
        args: its batches must be those of the schedule.
        train_dataset: the samples of the run.
        **kwargs: as for ``Trainer``.

    Raises:
        ValueError: the arguments train in other batches or steps than the dataset holds, or shard
            the model.
    """

    def __init__(
        self, model: Any, args: TrainingArguments, train_dataset: BagDataset, **kwargs: Any
    ) -> None:
        schedule = train_dataset.schedule
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if schedule.batch_sizes != BatchSizes.constant(batch):
            raise ValueError(
                f"the arguments make batches of {batch} sequences (per_device_train_batch_size, "
                f"gradient_accumulation_steps and {args.world_size} devices), and the schedule has "
                f"{schedule.batch_sizes}: make them equal."
            )
        if args.max_steps != schedule.total_steps:
            raise ValueError(
                f"max_steps is {args.max_steps}, and the schedule has {schedule.total_steps} "
                "steps: make them equal."
            )
        # Entries of a batch are not arguments of the model, and their order is the dataset's.
        args.remove_unused_columns, args.train_sampling_strategy = False, "sequential"
        self.loss_of = MultiHotCrossEntropyLoss(schedule.config.target_weights())
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed have the weight of the embedding whole only inside of the "
                "model: use one device or data parallelism (DDP)."
            )
        # The Trainer divides by the number of micro-batches: this loss is a mean.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The loss of bags, or of tokens, by the shape of the batch."""
        whole = self.accelerator.unwrap_model(model)
        embedding = BagEmbedding.from_embedding(whole.get_input_embeddings())
        outputs = model(inputs_embeds=embedding(inputs["tokens"]))
        loss = self.loss_of.to(outputs.logits.device)(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    """Trains, and saves the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--step-ratio", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    arguments = TrainingArguments(
        str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        warmup_steps=max(args.steps // 20, 1),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(args.steps // 30, 1),
        save_steps=max(args.steps // 2, 1),
        report_to=[],
    )
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=args.bag_size, step_ratio=args.step_ratio),
        total_steps=args.steps,
        batch_sizes=BatchSizes.constant(8 * arguments.world_size),
        sequence_length=LENGTH,
    )
    dataset = BagDataset(ArraySource(np.memmap(args.text, dtype=np.uint8, mode="r")), schedule)
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
    trainer = SuperpositionTrainer(model, arguments, dataset)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
