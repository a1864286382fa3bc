"""Embedding and output layer of a superposed model: what is mixed into those that it has."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from megatron_tst.common.errors import UsageError
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.kernels.launch import Implementation
from megatron_tst.ops.targets import IGNORE_INDEX
from megatron_tst.settings.config import SuperpositionConfig


class Bag(nn.Module):
    """Mixed into the class of an embedding: averages over bags of tokens.

    An embedding that computes as ``VocabParallelEmbedding`` is averaged as one product. One with a
    forward of its own embeds every token of the bags by it.

    Attributes:
        ignore_index: id of places of a bag that hold no token; None where all hold one.
        implementation: of the average, as ``bag_embedding`` takes it.
    """

    ignore_index: int | None = None
    implementation: Implementation = "auto"

    def forward(self, input_: Tensor) -> Tensor:
        """Embeds tokens, or averages the embeddings of bags of tokens.

        Args:
            input_: token ids, [b, l], or bags of them, [b, l, s]; int64, the same on every
                tensor-parallel rank.

        Returns:
            [b, l, h]; [l/tp, b, h] where the embedding reduce-scatters for sequence parallelism.
        """
        embed = super().forward
        layer: Any = self
        if input_.dim() == 2:
            # With CUDA graphs the host never resets the mark that bags have left, and would take
            # the gradient of these tokens for added.
            if torch.is_grad_enabled() and _fuses_accumulation(layer):
                layer.weight.grad_added_to_main_grad = False
            return cast(Tensor, embed(input_))
        if has_own_forward(layer, VocabParallelEmbedding):
            return _mean_of_embedded(layer, embed, input_)
        return bag_embedding(
            layer.weight,
            input_,
            tp_group=layer.tp_group,
            sequence_parallel=layer.reduce_scatter_embeddings,
            ignore_index=self.ignore_index,
            implementation=self.implementation,
            accumulate_into_main_grad=_fuses_accumulation(layer),
        )


class LeftToTheLoss(nn.Module):
    """Mixed into the class of an output layer: can leave its product to the loss.

    Attributes:
        is_left_to_the_loss: return the input in place of the logits.
    """

    is_left_to_the_loss: bool = False

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [l, b, v] of hidden states [l, b, h], or these as they are, and no bias."""
        if self.is_left_to_the_loss:
            return input_, None
        return cast(
            tuple[Tensor, Tensor | None], super().forward(input_, weight, runtime_gather_output)
        )


def superpose_embedding(embedding: nn.Module, superposition: SuperpositionConfig) -> None:
    """Lets an embedding read bags, in place; parameters and its own forward stay.

    Raises:
        UsageError: its rows are not whole outside of its forward.
    """
    _refuse_weight_shards(embedding)
    layer: Any = mix_in(embedding, Bag)
    if superposition.aligns_documents:
        layer.ignore_index = IGNORE_INDEX
    layer.implementation = superposition.implementation


def leave_product_to_the_loss(output_layer: nn.Module) -> None:
    """Lets an output layer leave its product to the loss, in place.

    Raises:
        UsageError: the layer has a forward of its own, as those of Transformer Engine, which the
            loss would not compute, or its rows are not whole outside of it.
    """
    _refuse_weight_shards(output_layer)
    if has_own_forward(output_layer, ColumnParallelLinear):
        raise UsageError(
            f"--tst-loss-impl linear computes the product of the output layer by itself, and "
            f"{type(output_layer).__name__} has a forward of its own: use --tst-loss-impl auto."
        )
    mix_in(output_layer, LeftToTheLoss)


def _refuse_weight_shards(layer: nn.Module) -> None:
    shards = getattr(layer, "gtp_remat_size", 1)
    if shards > 1:
        raise UsageError(
            f"--tensor-parallel-num-weight-shards cuts the rows of {type(layer).__name__} into "
            f"{shards} more shards, which only its own forward gathers: remove it."
        )


def _fuses_accumulation(layer: Any) -> bool:
    """Whether layers add to the sum of their gradients by themselves."""
    config = getattr(layer, "config", None)
    return bool(getattr(config, "gradient_accumulation_fusion", False))


def has_own_forward(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module computes anything else than ``known`` does, mixins aside."""
    if "forward" in vars(module):
        return True
    classes = [c for c in type(module).__mro__ if "forward" in vars(c)]
    return next(c for c in classes if c not in (Bag, LeftToTheLoss)) is not known


def mix_in(module: nn.Module, mixin: Any) -> nn.Module:
    """Puts a class before that of a module, in place and once; returns the module."""
    if not isinstance(module, mixin):
        found: Any = type(module)
        module.__class__ = _mixed(mixin, found)
    return module


@functools.cache
def _mixed(mixin: Any, found: Any) -> type[nn.Module]:
    return type(f"{mixin.__name__}{found.__name__}", (mixin, found), {})


def _mean_of_embedded(layer: Any, embed: Any, bags: Tensor) -> Tensor:
    """Means [b, l, h] or [l/tp, b, h] over bags [b, l, s] of what ``embed`` makes of a token."""
    batch, length, size = bags.shape
    present = torch.ones_like(bags, dtype=torch.bool)
    if layer.ignore_index is not None:
        present = bags != layer.ignore_index
    embedded = embed(bags.masked_fill(~present, 0).view(batch, length * size))
    wide = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    shares = present.to(wide.dtype)
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
    if not getattr(layer, "reduce_scatter_embeddings", False):
        folded = wide.unflatten(1, (length, size))
        return torch.einsum("blsh,bls->blh", folded, shares).to(embedded.dtype)
    # This rank has an equal part of the positions, whole bags of them.
    folded = wide.unflatten(0, (-1, size))
    own = shares.transpose(0, 1).chunk(layer.tp_group.size())[layer.tp_group.rank()]
    return torch.einsum("lsbh,lbs->lbh", folded, own).to(embedded.dtype)
