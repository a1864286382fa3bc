"""Embeddings and output layers that superposition does not take over."""

from __future__ import annotations

from argparse import Namespace

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from torch import nn

from megatron_tst.model.layers import leave_product_to_the_loss, superpose_embedding
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.model_conflicts import _with_weight_shards


def with_weight_shards(layer: type[nn.Module]) -> nn.Module:
    """A layer whose rows are cut once more, which takes process groups to build as a whole."""
    built = layer.__new__(layer)
    nn.Module.__init__(built)
    built.gtp_remat_size = 2  # type: ignore[assignment]
    return built


def test_rows_that_are_cut_once_more_are_refused() -> None:
    embedding = with_weight_shards(VocabParallelEmbedding)
    with pytest.raises(ValueError, match="cuts the rows of VocabParallelEmbedding into 2 more"):
        superpose_embedding(embedding, SuperpositionConfig(bag_size=4, step_ratio=0.3))
    head = with_weight_shards(ColumnParallelLinear)
    with pytest.raises(ValueError, match="cuts the rows of ColumnParallelLinear into 2 more"):
        leave_product_to_the_loss(head)
    assert (type(embedding), type(head)) == (VocabParallelEmbedding, ColumnParallelLinear)


@pytest.mark.parametrize(
    ("bag_size", "setting"), [(4, "--tst-bag-size 4"), (1, "--tst-loss-impl linear")]
)
def test_weight_shards_are_refused_by_their_flag(bag_size: int, setting: str) -> None:
    args = Namespace(
        tst_bag_size=bag_size,
        tst_schedule=None,
        tst_bag_sizes=None,
        tensor_parallel_num_weight_shards=4,
        tensor_model_parallel_size=2,
    )
    (message,) = _with_weight_shards(args)
    assert message.startswith("--tensor-parallel-num-weight-shards 4 with --tensor-model-")
    assert f"does not work with {setting}: " in message
    args.tensor_parallel_num_weight_shards = 2
    assert not list(_with_weight_shards(args))


def test_an_output_layer_of_another_kind_keeps_its_class() -> None:
    """Transformer Engine's is none of Megatron's own either."""
    head = nn.Linear(4, 8)
    with pytest.raises(ValueError, match="and Linear has a forward of its own: use --tst-loss"):
        leave_product_to_the_loss(head)
    assert type(head) is nn.Linear
