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
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tst.config import SuperpositionConfig
from megatron_tst.model.cross_entropy import IGNORE_INDEX
from megatron_tst.model.embedding import bag_embedding
from megatron_tst.model.objectives import superposition_loss
from megatron_tst.model.offset_loss import OffsetLossMeter


class BagVocabParallelEmbedding(VocabParallelEmbedding):
    """Vocabulary-parallel embedding that averages over bags of tokens.

    Attributes:
        ignore_index: id of places of a bag that hold no token; None where all hold one.
    """

    ignore_index: int | None = None

    def forward(self, input_: Tensor) -> Tensor:
        """Embeds tokens, or averages the embeddings of bags of tokens.

        Args:
            input_: token ids, [b, l], or bags of them, [b, l, s]; int64, the same on every
                tensor-parallel rank.

        Returns:
            [b, l, h]; [l/tp, b, h] where the embedding reduce-scatters for sequence parallelism.
        """
        if input_.dim() == 2:
            return super().forward(input_)
        return bag_embedding(
            self.weight,
            input_,
            tp_group=self.tp_group,
            sequence_parallel=self.reduce_scatter_embeddings,
            ignore_index=self.ignore_index,
        )


class SuperpositionModel(LanguageModule):
    """What both models add to upstream's: an embedding of bags and a loss over bags of targets.

    Args:
        *args: passed to the model of upstream.
        superposition: settings of phase 1.
        **kwargs: passed to the model of upstream.
    """

    superposition: SuperpositionConfig
    offset_loss_meter: OffsetLossMeter | None = None
    _weights: Tensor | None = None

    def __init__(self, *args: Any, superposition: SuperpositionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._superpose(superposition)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Computes the loss of each latent position.

        Args:
            labels: next tokens, [b, l], or next bags, [b, l, s]; int64, -100 where a target of a
                bag does not count.
            logits: [l, b, v], local to a tensor-parallel rank; not modified when ``labels`` are
                bags.

        Returns:
            [b, l], float32.
        """
        if labels.dim() == 2:
            return cast(Tensor, super().compute_language_model_loss(labels, logits))
        targets = labels.transpose(0, 1).contiguous()
        if self.offset_loss_meter is not None:
            self.offset_loss_meter.add(logits.detach(), targets, self.tp_group)
        loss = superposition_loss(
            logits,
            targets,
            objective=self.superposition.objective,
            target_weights=self._target_weights(logits.device),
            tp_group=self.tp_group,
        )
        return loss.transpose(0, 1).contiguous()

    def _target_weights(self, device: torch.device) -> Tensor | None:
        if self.superposition.target_weighting == "uniform":
            return None
        # A plain attribute: a buffer would be cast to bf16 with the model.
        if self._weights is None or self._weights.device != device:
            weights = self.superposition.target_weights()
            self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        return self._weights

    def _superpose(self, superposition: SuperpositionConfig) -> None:
        self.superposition = superposition
        if self.pre_process:
            embedding = self.embedding.word_embeddings
            embedding.__class__ = BagVocabParallelEmbedding
            if superposition.aligns_documents:
                embedding.ignore_index = IGNORE_INDEX


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
        ValueError: a model that is neither a GPTModel nor a HybridModel.
    """
    for model in models:
        superposed = _SUPERPOSED.get(type(model))
        if superposed is None:
            raise ValueError(
                f"Token superposition supports GPTModel and HybridModel, not "
                f"{type(model).__name__}: remove the options that select it, or use "
                "--tst-bag-size 1."
            )
        model.__class__ = superposed
        cast(SuperpositionModel, model)._superpose(superposition)
    return models
