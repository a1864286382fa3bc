"""Bag embedding: the mean of the embeddings of the s tokens folded into one latent position."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.collectives import (
    group_size,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
    vocabulary_start,
)
from megatron_tst.ops.kernels.launch import Implementation, uses_triton
from megatron_tst.ops.native_embedding import NativeBagMean, uses_native
from megatron_tst.ops.targets import as_ids
from megatron_tst.ops.torch_embedding import BagMean, SparseBagMean


def bag_embedding(
    weight_shard: Tensor,
    token_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    implementation: Implementation = "auto",
    accumulate_into_main_grad: bool = False,
) -> Tensor:
    """Average the embeddings of each bag: ``e'[b, j] = (1/s) * sum_i E[token_bags[b, j, i]]``.

    Each rank averages its own vocabulary rows, accumulating in float32 (float64 for a float64
    weight), casts to the weight's dtype, and then takes part in exactly one collective: an
    all-reduce of [b, l, h], or a reduce-scatter of [l, b, h] along l. Its size does not depend on
    s, and no [b, l, s, h] tensor is ever built.

    The weight gradient adds ``grad / s`` once for each occurrence of a token, in the same
    accumulation dtype and in a fixed order, so that it is reproducible bit for bit. A bag size
    of 1 gives the bits of the host's embedding, whose kernel accumulates gradients its own way.

    Args:
        weight_shard: [v, h], this rank's contiguous vocabulary rows.
        token_bags: [b, l, s] integers, global token ids, the same on every rank of the group.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        sequence_parallel: return this rank's slice of the latent positions.
        ignore_index: negative id of places that hold no token; the mean is that of the others, and
            zero where a bag has no others. ``None`` when every place holds one.
        implementation: ``torch``, ``triton``, or ``auto``: Triton on CUDA, where it is installed;
            the kernels of ``megatron_tst.ops.native`` on a CPU, where they can be compiled.
        accumulate_into_main_grad: let the Triton kernels add the rows of the weight's gradient that
            are not zero to ``weight.main_grad``, unrounded, where Megatron's DDP has put one:
            ``gradient_accumulation_fusion``. Not for a weight that the output layer shares
            (``zero_out_wgrad``), whose gradient Megatron's hook adds whole anyhow.

    Returns:
        [b, l, h] in the weight's dtype, the same on every rank; under sequence parallelism
        [l / tp, b, h], local to the rank.

    Raises:
        ValueError: wrong shapes, ids that are no integers, l not divisible by the group size under
            sequence parallelism, or (checked on the CPU only, as it would stall a GPU) an id
            outside the vocabulary.

    Source: arXiv 2605.06546, input superposition; ``VocabParallelEmbedding`` in
    ``megatron/core/tensor_parallel/layers.py`` for the parallel layout.
    """
    token_bags = as_ids("token_bags", token_bags)
    _validate(token_bags, tp_group, sequence_parallel, ignore_index)
    rows, ranks = weight_shard.shape[0], group_size(tp_group)
    shard = Shard(rows, ranks, vocabulary_start(rows, tp_group), ignore_index)
    if token_bags.shape[-1] == 1:
        partial = _single_token_embedding(weight_shard, token_bags, shard)
    elif torch.compiler.is_compiling():
        from megatron_tst.ops.compiled import bag_mean

        partial = bag_mean(weight_shard, token_bags, [*shard[:3]], ignore_index, implementation)
    else:
        places = shard.places_of(token_bags)
        function = function_for(implementation, weight_shard, token_bags, places[2])
        if accumulate_into_main_grad and function is _FusedBagMean and _has_own_sum(weight_shard):
            function = _FusedBagMeanIntoMainGrad
        partial = function.apply(weight_shard, *places)
    if sequence_parallel:
        return reduce_scatter_to_sequence_parallel(partial.transpose(0, 1).contiguous(), tp_group)
    return reduce_from_tensor_parallel(partial, tp_group)


def _validate(
    token_bags: Tensor,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
    ignore_index: int | None,
) -> None:
    if token_bags.dim() != 3 or token_bags.shape[-1] == 0:
        raise ValueError(
            f"token_bags has shape {tuple(token_bags.shape)}: pass [b, l, s] with s >= 1; "
            "plain [b, l] tokens belong to the host's embedding."
        )
    if ignore_index is not None and ignore_index >= 0:
        raise ValueError(
            f"ignore_index is {ignore_index}, which is a token of the vocabulary: pass a negative "
            "one, or None where every place holds a token."
        )
    tp_size = group_size(tp_group)
    if sequence_parallel and token_bags.shape[1] % tp_size:
        raise UsageError(
            f"latent length {token_bags.shape[1]} is not divisible by the tensor-parallel size "
            f"{tp_size}: sequence parallelism needs equal slices; change --seq-length."
        )


class Shard(NamedTuple):
    """The rows of the vocabulary that are here.

    Attributes:
        rows: how many (v).
        ranks: that have as many each.
        first: id of the first.
        ignore_index: id of places that hold no token; None where all hold one.
    """

    rows: int
    ranks: int
    first: int
    ignore_index: int | None

    def places_of(self, token_bags: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Row of each token, where there is none, and tokens of each bag.

        Args:
            token_bags: [b, l, s].

        Returns:
            [b, l, s] int64; [b, l, s] bool, None where all have a row; [b, l, 1], None where all
            bags are full.

        Raises:
            ValueError: an id outside the vocabulary; checked on the CPU only, and not while
                ``torch.compile`` traces.
        """
        is_absent = None if self.ignore_index is None else token_bags == self.ignore_index
        if token_bags.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(token_bags, is_absent)
        if self.ranks == 1 and is_absent is None:
            return token_bags, None, None
        # An id that holds no token is negative, so it is outside of all shards.
        shifted = token_bags - self.first
        outside = (shifted < 0) | (shifted >= self.rows)
        sizes = None if is_absent is None else (~is_absent).sum(-1, keepdim=True).clamp_(min=1)
        # These tokens add zeros somewhere; spread over the shard they make no hot row, which would
        # serialise the gradient kernel.
        return shifted.remainder_(self.rows), outside, sizes

    def _check(self, token_bags: Tensor, is_absent: Tensor | None) -> None:
        if token_bags.numel() == 0:
            return
        present = token_bags if is_absent is None else token_bags.masked_fill(is_absent, 0)
        lowest, highest = (int(bound) for bound in present.aminmax())
        if lowest >= 0 and highest < self.rows * self.ranks:
            return
        remedy = (
            f"pass ignore_index={lowest}, and not {self.ignore_index}, if it stands for no token."
            if lowest < 0
            else "the data and the model use different tokenizers."
        )
        raise UsageError(
            f"token_bags holds ids from {lowest} to {highest}, outside the padded vocabulary of "
            f"{self.rows * self.ranks}: {remedy}"
        )


def _single_token_embedding(weight: Tensor, bags: Tensor, shard: Shard) -> Tensor:
    ids, outside, _ = shard.places_of(bags)
    rows = F.embedding(ids.squeeze(-1), weight)
    return rows if outside is None else rows.masked_fill(outside, 0)


def function_for(
    implementation: Implementation, tensor: Tensor, bags: Tensor, sizes: Tensor | None
) -> type[torch.autograd.Function]:
    """What averages rows of this tensor over bags, or has a gradient as this tensor."""
    if uses_triton(implementation, tensor):
        return _FusedBagMean
    if uses_native(implementation, tensor):
        return NativeBagMean
    if tensor.device.type == "cpu" and sizes is None and bags.shape[-1].bit_count() == 1:
        return SparseBagMean
    return BagMean


class _FusedBagMean(torch.autograd.Function):
    """As ``BagMean``, by Triton kernels: one pass over the rows of a bag each way."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        from megatron_tst.ops.kernels.bag_embedding import bag_mean

        ctx.save_for_backward(bags, outside, sizes)
        ctx.shard_size = weight.shape[0]
        result = bag_mean(weight, *_by_bag(bags, outside, sizes))
        return result.view(*bags.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        from megatron_tst.ops.kernels.bag_embedding import bag_mean_backward

        operands = _by_bag(*ctx.saved_tensors)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        return bag_mean_backward(grad, *operands, ctx.shard_size), None, None, None


class _FusedBagMeanIntoMainGrad(_FusedBagMean):
    """As ``_FusedBagMean``, with the gradient in the weight's ``main_grad``."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bags: Tensor, outside: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        ctx.weight = weight
        return _FusedBagMean.forward(ctx, weight, bags, outside, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        from megatron_tst.ops.kernels.bag_embedding import bag_mean_backward

        weight, grad = ctx.weight, grad_output.reshape(-1, grad_output.shape[-1])
        bag_mean_backward(grad, *_by_bag(*ctx.saved_tensors), len(weight), add_to=weight.main_grad)
        # As the host's linear layers: its hooks want a gradient and do not read it.
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight), None, None, None


def _has_own_sum(weight: Any) -> bool:
    """Whether Megatron's DDP sums this weight's gradients, and its layers may add to the sum."""
    is_summed = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
    is_sharded = hasattr(weight, "__fsdp_param__")
    return is_summed and not is_sharded and not getattr(weight, "zero_out_wgrad", False)


def _by_bag(
    bags: Tensor, outside: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows and whether there are none, [n, s], and tokens of each bag, [n]."""
    rows = bags.reshape(-1, bags.shape[-1])
    absent = None if outside is None else outside.reshape(rows.shape)
    return rows, absent, None if sizes is None else sizes.flatten().float()
