"""Multi-token prediction on bags: depth k reads the bag k places on and predicts the one behind it.

Megatron's layers, and its scaling, normalisation and log of their losses, serve as they are. Here
bags are shifted by positions where Megatron shifts along the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from megatron.core.transformer import multi_token_prediction
from torch import Tensor, nn

from megatron_tst.model.layers import mix_in
from megatron_tst.upstream.patches import replace


class BagsAhead(nn.Module):
    """Mixed into ``MultiTokenPredictionLayer``: reads the bags behind those of the layer before."""

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Upstream's, for tokens [b, l] and for bags of them, [b, l, s].

        Returns:
            Tokens or bags, shifted to the left by one position, the last one of token 0; what
            upstream returns behind them.
        """
        layer: Any = super()
        if input_ids.dim() == 2:
            return cast(
                tuple[Any, ...],
                layer._get_embeddings(input_ids, position_ids, embedding, *args, **kwargs),
            )

        def embed(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            bags = input_ids.transpose(1, 2).contiguous()
            return embedding(input_ids=bags, position_ids=position_ids)

        offsets_first = input_ids.transpose(1, 2)
        shifted, *others = layer._get_embeddings(
            offsets_first, position_ids, embed, *args, **kwargs
        )
        return shifted.transpose(1, 2), *others


def superpose_multi_token(model: Any) -> None:
    """Lets the depths of a model read and predict bags, in place; idempotent.

    Args:
        model: a GPTModel or HybridModel on the pipeline stage that has these layers, ``mtp``.

    Raises:
        RuntimeError: Megatron's models do not call the loss by the name that is replaced here.
    """
    for layer in model.mtp.layers:
        mix_in(layer, BagsAhead)
    replace("megatron.core.models.gpt.gpt_model:process_mtp_loss", loss_of_depths)
    replace("megatron.core.models.hybrid.hybrid_model:process_mtp_loss", loss_of_depths)


def loss_of_depths(
    *,
    labels: Tensor | None,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    cp_group: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Adds the losses of all depths to the graph: upstream's ``process_mtp_loss``, for bags too.

    Depth k is compared with the targets k positions on: a token, or a bag of them. Upstream scales
    the losses, masks those without targets and logs them. The acceptance rate that it logs counts
    predictions of the first token of a bag.

    Args:
        labels: next tokens [b, l], or next bags [b, l, s].
        compute_language_model_loss: of targets [b, l] or [b, l, s] and logits [l, b, v]; [b, l].
        cp_group: context-parallel ranks.
        **kwargs: what upstream takes beside these.

    Returns:
        The hidden states of the model itself, which carry the losses into the backward pass.
    """
    process = multi_token_prediction.process_mtp_loss
    kwargs["cp_group"] = cp_group
    with _without_meter(compute_language_model_loss):
        if labels is None or labels.dim() == 2:
            kwargs["compute_language_model_loss"] = compute_language_model_loss
            return cast(Tensor, process(labels=labels, **kwargs))
        offsets_first = labels.transpose(1, 2)

        def loss(first_tokens: Tensor, logits: Tensor) -> Tensor:
            nonlocal offsets_first
            # Once for each depth, beside upstream's own shift of the first tokens.
            offsets_first, _ = multi_token_prediction.roll_tensor(
                offsets_first, shifts=-1, dims=-1, cp_group=cp_group
            )
            return compute_language_model_loss(offsets_first.transpose(1, 2), logits)

        kwargs["compute_language_model_loss"] = loss
        return cast(Tensor, process(labels=labels[..., 0], **kwargs))


@contextmanager
def _without_meter(compute_loss: Callable[..., Tensor]) -> Iterator[None]:
    """Keeps the losses of the depths out of the model's loss by offset."""
    model: Any = getattr(compute_loss, "__self__", None)
    meter = getattr(model, "offset_loss_meter", None)
    if meter is not None:
        model.offset_loss_meter = None
    try:
        yield
    finally:
        if meter is not None:
            model.offset_loss_meter = meter
