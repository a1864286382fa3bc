"""Superposition in torchtitan 0.3.0: its Llama 3 debug model, its trainer and FSDP2.

    scripts/setup_torchtitan.sh
    PYTHONPATH=.:.venv/torchtitan .venv/bin/torchrun --nproc-per-node 2 \\
        examples/torchtitan/train.py TEXT [--bag-size 4] [--steps 300] [--output FOLDER]

What superposition adds to a torchtitan configuration is an embedding, a loss and a data loader;
docs/other-stacks.md says what does not work with it. Text is read byte by byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if not torch.cuda.is_available():
    from examples.torchtitan import on_cpu

    on_cpu.activate()

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import BaseLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import TrainingConfig
from torchtitan.models.common import Embedding, ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import init_logger
from torchtitan.trainer import Trainer

from megatron_tst import (
    BagDataset,
    BatchSizes,
    MultiHotCrossEntropyLoss,
    SuperpositionConfig,
    SuperpositionSchedule,
    bag_embedding,
)
from megatron_tst.data.bag_dataset import ArraySource


class BagEmbedding(Embedding):
    """torchtitan's embedding, which averages over bags of tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [b, l], or bags of them [b, l, s] -> [b, l, h]."""
        if input.dim() == 2:
            return super().forward(input)
        if self.tp_group is not None:
            raise ValueError("bags are embedded without tensor parallelism: set its degree to 1.")
        weight = self.weight
        # Under FSDP the weight is whole while the model runs.
        return bag_embedding(weight.to_local() if isinstance(weight, DTensor) else weight, input)


class MultiHotLoss(BaseLoss):
    """The loss of both phases: the sum over the positions, in the units that torchtitan counts."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        target_weights: tuple[float, ...] | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.loss = MultiHotCrossEntropyLoss(config.target_weights, reduction="sum")
        self.fn = self._sum
        self._maybe_compile(compile_config)

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        # torchtitan divides by the number of targets: those of a bag count as one.
        targets = labels.shape[-1] if labels.dim() == 3 else 1
        return self.loss.to(logits.device)(logits, labels) * targets


class BagDataLoader(BaseDataLoader):
    """Gives each rank its part of every step, and goes on where a checkpoint was written."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        schedule: SuperpositionSchedule

    def __init__(
        self, config: Config, *, dp_rank: int, dp_world_size: int, local_batch_size: int, **_: Any
    ) -> None:
        assert config.dataset_path is not None
        text = np.memmap(config.dataset_path, dtype=np.uint8, mode="r")
        self.dataset = BagDataset(ArraySource(text), config.schedule)
        self.part = dp_rank, dp_world_size
        self.local_batch_size = local_batch_size
        self.step = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Micro-batches of the steps that are left."""
        while self.step < self.dataset.schedule.total_steps:
            batch = self.dataset.batch(self.step, *self.part)
            self.step += 1
            parts = (batch[name].split(self.local_batch_size) for name in ("tokens", "labels"))
            for tokens, labels in zip(*parts, strict=True):
                yield {"input": tokens}, labels

    def state_dict(self) -> dict[str, Any]:
        """The steps that were read."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind them."""
        self.step = state_dict.get("step", 0)


class Bytes(BaseTokenizer):
    """A token is a byte of the text."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


def superposed(text: Path, output: Path, schedule: SuperpositionSchedule) -> Trainer.Config:
    """A configuration of torchtitan's own model with the three parts that superposition adds."""
    spec = model_registry("debugmodel")
    for layer in spec.model.layers:
        # Causal over the whole sequence, as Megatron's default; the others want documents' borders.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    plain = spec.model.tok_embeddings
    spec.model.tok_embeddings = BagEmbedding.Config(
        num_embeddings=plain.num_embeddings,
        embedding_dim=plain.embedding_dim,
        param_init=plain.param_init,
    )
    batch_size = schedule.batch_sizes.size_at(0)
    return Trainer.Config(
        model_spec=spec,
        dump_folder=str(output),
        tokenizer=Bytes.Config(),
        dataloader=BagDataLoader.Config(dataset_path=str(text), schedule=schedule),
        loss=MultiHotLoss.Config(target_weights=schedule.config.target_weights()),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.2),
        training=TrainingConfig(
            local_batch_size=4,
            global_batch_size=batch_size,
            seq_len=schedule.sequence_length,
            steps=schedule.total_steps,
            # A graph of one phase would be replayed with the shapes of the other.
            disable_cuda_graphs=True,
        ),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=max(schedule.total_steps // 2, 1), last_save_model_only=False
        ),
    )


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/torchtitan"))
    parser.add_argument("--bag-size", type=int, default=4)
    parser.add_argument("--step-ratio", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    schedule = SuperpositionSchedule(
        SuperpositionConfig(bag_size=args.bag_size, step_ratio=args.step_ratio),
        total_steps=args.steps,
        batch_sizes=BatchSizes.constant(8),
        sequence_length=args.length,
    )
    init_logger()
    config = superposed(args.text, args.output, schedule)
    is_on_cpu = not torch.cuda.is_available()
    if is_on_cpu:
        config.training = replace(config.training, mixed_precision_param="float32")
    trainer = config.build()
    if is_on_cpu:
        on_cpu.reduce_over_gloo(trainer.model_parts[0])
    try:
        trainer.train()
    finally:
        trainer.close()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
