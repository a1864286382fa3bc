"""Megatron's language models with superposed inputs and targets.

The model follows the shape of what it is given: three-dimensional tokens or labels are bags and
take the paths below; two-dimensional ones take upstream's. No parameter is added, so a checkpoint
does not tell the phases apart.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tst.common.errors import UsageError
from megatron_tst.model.layers import leave_product_to_the_loss, superpose_embedding
from megatron_tst.model.multi_token import superpose_multi_token
from megatron_tst.model.offset_loss import OffsetLossMeter
from megatron_tst.ops.cross_entropy import (
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_by_offset,
    per_target_cross_entropy,
)
from megatron_tst.ops.kernels.launch import uses_triton
from megatron_tst.ops.linear_cross_entropy import (
    linear_multi_hot_cross_entropy,
    linear_multi_hot_cross_entropy_by_offset,
)
from megatron_tst.ops.objectives import superposition_loss
from megatron_tst.settings.config import SuperpositionConfig


class SuperpositionModel(LanguageModule):
    """What both models add to upstream's: an embedding of bags and a loss over bags of targets.

    Args:
        *args: passed to the model of upstream.
        superposition: settings of phase 1; its ``loss_impl`` is that of all phases.
        **kwargs: passed to the model of upstream.

    Attributes:
        offset_loss_meter: collects the losses by offset in the bag; None where nobody wants them.
        expected_gradient: one number, the gradient that the backward will bring for each loss of
            the next forward that counts; None where it is not known.
        sums_up_losses: who calls the model adds all losses up, so that they have one gradient.
    """

    superposition: SuperpositionConfig
    offset_loss_meter: OffsetLossMeter | None = None
    expected_gradient: Tensor | None = None
    sums_up_losses: bool = False
    _weights: Tensor | None = None

    def __init__(self, *args: Any, superposition: SuperpositionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._superpose(superposition)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs upstream's forward pass; without ``labels``, given by name, it returns logits."""
        if self.post_process and self.superposition.loss_impl == "linear":
            self.output_layer.is_left_to_the_loss = kwargs.get("labels") is not None
        return cast(Tensor, super().forward(*args, **kwargs))

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Computes the loss of each latent position.

        Args:
            labels: next tokens, [b, l], or next bags, [b, l, s]; int64, -100 where a target of a
                bag does not count.
            logits: [l, b, v], local to a tensor-parallel rank. With ``linear`` the hidden states
                that they would be made from. The backward pass overwrites them, or the forward
                where the gradient is known, unless the loss is Megatron's.

        Returns:
            [b, l], float32.
        """
        is_linear = self.superposition.loss_impl == "linear"
        if labels.dim() == 2 and not is_linear and self._leaves_plain_targets(logits):
            return cast(Tensor, super().compute_language_model_loss(labels, logits))
        bags = labels if labels.dim() == 3 else labels.unsqueeze(-1)
        targets = bags.transpose(0, 1).contiguous()
        loss = self._linear_loss(logits, targets) if is_linear else self._loss(logits, targets)
        return loss.transpose(0, 1).contiguous()

    def _leaves_plain_targets(self, logits: Tensor) -> bool:
        """Whether the loss of single targets is Megatron's own."""
        if self.superposition.loss_impl != "auto":
            return self.superposition.loss_impl == "host"
        return self.config.cross_entropy_loss_fusion or not uses_triton("auto", logits)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        is_plain = targets.shape[-1] == 1
        weights = None if is_plain else self._target_weights(targets)
        if self.superposition.objective != "mce" and not is_plain:
            if self.offset_loss_meter is not None:
                losses = per_target_cross_entropy(logits, targets, self.tp_group)
                self.offset_loss_meter.add(losses, targets)
            objective = self.superposition.objective
            return superposition_loss(logits, targets, objective, weights, self.tp_group)
        # Nobody else reads what the output layer returns.
        settings: dict[str, Any] = {
            "tp_group": self.tp_group,
            "reuse_logits": True,
            "implementation": self.superposition.implementation,
            "expected_gradient": self.expected_gradient,
        }
        if self.offset_loss_meter is None:
            return multi_hot_cross_entropy(logits, targets, weights, **settings)
        loss, by_offset = multi_hot_cross_entropy_by_offset(logits, targets, weights, **settings)
        self.offset_loss_meter.add(by_offset, targets)
        return loss

    def _linear_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        layer = self.output_layer
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else layer.weight
        weights = self._target_weights(targets) if targets.shape[-1] > 1 else None
        settings: dict[str, Any] = {
            "tp_group": self.tp_group,
            "sequence_parallel": layer.sequence_parallel,
            # On a CPU the hook of Megatron's DDP would add it after a rounding.
            "accumulate_into_main_grad": layer.gradient_accumulation_fusion or not hidden.is_cuda,
            "uniform_gradient": self.sums_up_losses,
            "expected_gradient": self.expected_gradient if self.sums_up_losses else None,
        }
        if self.offset_loss_meter is None:
            return linear_multi_hot_cross_entropy(hidden, weight, targets, weights, **settings)
        loss, by_offset = linear_multi_hot_cross_entropy_by_offset(
            hidden, weight, targets, weights, **settings
        )
        self.offset_loss_meter.add(by_offset, targets)
        return loss

    def _target_weights(self, targets: Tensor) -> Tensor | None:
        if self.superposition.target_weighting == "uniform":
            return None
        device, bag_size = targets.device, targets.shape[-1]
        # A plain attribute: a buffer would be cast to bf16 with the model.
        if self._weights is None or (self._weights.device, len(self._weights)) != (
            device,
            bag_size,
        ):
            weights = self.superposition.target_weights(bag_size)
            self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        return self._weights

    def _superpose(self, superposition: SuperpositionConfig) -> None:
        self.superposition = superposition
        if self.post_process and superposition.loss_impl == "linear":
            leave_product_to_the_loss(self.output_layer)
        predicts_several = getattr(self, "mtp_process", False)
        if (self.pre_process or predicts_several) and superposition.enabled:
            superpose_embedding(self.embedding.word_embeddings, superposition)
        if predicts_several:
            superpose_multi_token(self)


class SuperpositionGPTModel(SuperpositionModel, GPTModel):
    """GPTModel whose embedding reads bags of tokens and whose loss takes bags of targets."""


class SuperpositionHybridModel(SuperpositionModel, HybridModel):
    """HybridModel whose embedding reads bags of tokens and whose loss takes bags of targets."""


_SUPERPOSED: dict[type, type[SuperpositionModel]] = {
    GPTModel: SuperpositionGPTModel,
    HybridModel: SuperpositionHybridModel,
}


def superpose_built_models(
    models: list[MegatronModule], superposition: SuperpositionConfig
) -> list[MegatronModule]:
    """Turns the pipeline chunks that upstream's builder made into superposition models, in place.

    A pre-wrap hook for Megatron's model configurations: upstream's builders name their model class
    themselves and offer this hook to change the result before it is wrapped. Only classes change;
    parameters, their initial values and the random state stay as built.

    Raises:
        UsageError: a model that is neither a GPTModel nor a HybridModel.

    Args:
        models: built chunks of this rank.
        superposition: settings of phase 1.
    """
    for model in models:
        superposed = _SUPERPOSED.get(type(model))
        if superposed is None:
            raise UsageError(
                f"Token superposition supports GPTModel and HybridModel, not "
                f"{type(model).__name__}: remove the options that select it, or use "
                "--tst-bag-size 1."
            )
        model.__class__ = superposed
        cast(SuperpositionModel, model)._superpose(superposition)
    return models
