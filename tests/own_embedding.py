"""Trains a GPTModel whose embedding has a forward of its own, as a script of a user may."""

from __future__ import annotations

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from examples.own_model import pretrain_own_model
from megatron_tst import cpu


class OwnEmbedding(VocabParallelEmbedding):
    """Embeds as upstream does, and counts what it embeds."""

    embedded = 0

    def forward(self, input_: Tensor) -> Tensor:
        """As upstream's."""
        OwnEmbedding.embedded += input_.numel()
        return super().forward(input_)


def main() -> int:
    """Trains as the command line says."""
    cpu.activate()
    tensor_parallel.VocabParallelEmbedding = OwnEmbedding
    code = pretrain_own_model.main()
    print(f"embedded {OwnEmbedding.embedded} tokens", flush=True)
    return code
