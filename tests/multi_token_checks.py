"""Multi-token prediction on bags against float64 in plain torch, loss and every gradient.

Run by ``tests/integration/test_multi_token.py``, in a process where the platform is on.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cpu_layers import VOCABULARY, initialise, layer_config, local_spec

LENGTH, BATCH, BAG, DEPTHS, FACTOR = 11, 2, 3, 2, 0.7
HEADS, GROUPS, SIZE = 4, 2, 16
Weights = dict[str, Tensor]


def main() -> None:
    """Runs the check that the command line names."""
    initialise()
    globals()[sys.argv[1]]()


def _model(is_hybrid: bool = False, loss: Any = "auto", **settings: Any) -> Any:
    """A superposed model of two layers and two depths, with weights far from their start."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from megatron_tst.cpu.hybrid_spec import HYBRID_STACK_SPEC
    from megatron_tst.model.model import SuperpositionGPTModel, SuperpositionHybridModel
    from megatron_tst.settings.config import SuperpositionConfig

    layers = 4 if is_hybrid else 2
    config = layer_config(
        num_layers=layers, mtp_num_layers=DEPTHS, mtp_loss_scaling_factor=FACTOR, **settings
    )
    superposition = SuperpositionConfig(
        bag_size=BAG,
        step_ratio=0.5,
        target_weighting="power-law",
        document_boundary="align",
        loss_impl=loss,
    )
    spec = local_spec(config)
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "position_embedding_type": "rope",
        "superposition": superposition,
    }
    model: Any
    if is_hybrid:
        pattern = "*-*-" + "/*-" * DEPTHS
        model = SuperpositionHybridModel(
            hybrid_stack_spec=HYBRID_STACK_SPEC, hybrid_layer_pattern=pattern, **common
        )
    else:
        ahead = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        model = SuperpositionGPTModel(transformer_layer_spec=spec, mtp_block_spec=ahead, **common)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 10 if parameter.dim() == 1 else noise / 8)
    return model


def _name_in_gpt(name: str) -> str:
    """The name that GPTModel has for a parameter; HybridModel counts halves of a layer."""
    name = re.sub(r"decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{int(m[1]) // 2}", name)
    name = re.sub(r"mtp_model_layer\.layers\.\d+", "mtp_model_layer", name)
    return name.replace("final_norm", "final_layernorm")


def _parameters(model: Any) -> Weights:
    """By the names of GPTModel."""
    if not hasattr(model, "hybrid_layer_pattern"):
        return dict(model.named_parameters())
    return {_name_in_gpt(name): parameter for name, parameter in model.named_parameters()}


def _batch(reads_bags: bool, predicts_bags: bool) -> SimpleNamespace:
    """Tokens and targets; a bag that ends early, one without targets, and a masked position."""
    torch.manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH, BAG if reads_bags else 1))
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH, BAG if predicts_bags else 1))
    mask = torch.ones(BATCH, LENGTH)
    mask[0, 4] = mask[1, LENGTH - 1] = 0
    if predicts_bags:
        labels[0, 3, 1:] = labels[0, 4] = -100
    if reads_bags:
        tokens[1, 2, 2:] = tokens[1, 5] = -100
    return SimpleNamespace(tokens=tokens, labels=labels, mask=mask)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _rotated(x: Tensor) -> Tensor:
    """[b, heads, l, d]."""
    frequencies = 10000 ** (-torch.arange(0, SIZE, 2, dtype=x.dtype) / SIZE)
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), frequencies).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def _layer(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """A layer like Llama's, [b, l, h]."""
    batch, length, _ = x.shape
    qkv = _norm(x, w[f"{prefix}input_layernorm.weight"])
    qkv = qkv @ w[f"{prefix}self_attention.linear_qkv.weight"].T
    groups = qkv.view(batch, length, GROUPS, HEADS // GROUPS + 2, SIZE).permute(0, 2, 3, 1, 4)
    query, key, value = groups.split([HEADS // GROUPS, 1, 1], 2)
    query = _rotated(query.flatten(1, 2))
    key, value = (t.expand(-1, -1, HEADS // GROUPS, -1, -1).flatten(1, 2) for t in (key, value))
    scores = query @ _rotated(key).transpose(-1, -2) / SIZE**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    attended = attended.transpose(1, 2).flatten(2)
    x = x + attended @ w[f"{prefix}self_attention.linear_proj.weight"].T
    gate, up = (
        _norm(x, w[f"{prefix}pre_mlp_layernorm.weight"]) @ w[f"{prefix}mlp.linear_fc1.weight"].T
    ).chunk(2, -1)
    return x + (F.silu(gate) * up) @ w[f"{prefix}mlp.linear_fc2.weight"].T


def _depth(w: Weights, number: int, states: Tensor, embedded: Tensor) -> Tensor:
    prefix = f"mtp.layers.{number}."
    joined = torch.cat(
        (
            _norm(embedded, w[f"{prefix}enorm.weight"]),
            _norm(states, w[f"{prefix}hnorm.weight"]),
        ),
        -1,
    )
    states = _layer(w, f"{prefix}mtp_model_layer.", joined @ w[f"{prefix}eh_proj.weight"].T)
    return _norm(states, w[f"{prefix}final_layernorm.weight"])


def _sums(w: Weights, batch: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Losses of the model itself and of the depths, [1 + depths], and the counts of targets."""
    from megatron_tst.ops.reference import (
        bag_embedding_reference,
        multi_hot_cross_entropy_reference,
        multi_token_losses_reference,
    )

    embedding, output = w["embedding.word_embeddings.weight"], w["output_layer.weight"]
    weights = torch.tensor([1 / i for i in range(1, batch.labels.shape[-1] + 1)])
    states = bag_embedding_reference(embedding, batch.tokens, ignore_index=-100)
    for number in range(2):
        states = _layer(w, f"decoder.layers.{number}.", states)
    states = _norm(states, w["decoder.final_layernorm.weight"])
    main = multi_hot_cross_entropy_reference(states @ output.T, batch.labels, weights)
    depths = [
        lambda states, embedded, number=number: _depth(w, number, states, embedded)
        for number in range(DEPTHS)
    ]
    losses = multi_token_losses_reference(
        states, batch.tokens, batch.labels, batch.mask, depths, embedding, output, weights
    )
    counts = torch.stack([batch.mask[:, k:].sum() for k in range(DEPTHS + 1)])
    return torch.cat(((main * batch.mask).sum().view(1), losses * counts[1:])), counts


def _expected(model: Any, sequences: list[SimpleNamespace]) -> tuple[Tensor, Weights]:
    """Mean losses of the model itself and of the depths, and gradients of both, scaled."""
    w = {n: p.detach().double().requires_grad_() for n, p in _parameters(model).items()}
    factors = {
        "embedding.word_embeddings.weight": model.config.mup_embedding_mult,
        "output_layer.weight": model.config.mup_output_mult,
    }
    scaled = w | {name: w[name] * factor for name, factor in factors.items()}
    totals, counts = zip(*(_sums(scaled, batch) for batch in sequences), strict=True)
    losses = sum(totals) / sum(counts)
    (losses[0] + FACTOR * losses[1:].mean()).backward()
    return losses.detach(), {n: p.grad for n, p in w.items() if p.grad is not None}


def _compare(
    model: Any,
    batch: SimpleNamespace,
    per_token: bool = False,
    documents: tuple[int, ...] | None = None,
) -> None:
    """Requires the losses and gradients of float64, of documents those of each by itself."""
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossAutoScaler,
        MTPLossLoggingHelper,
    )

    MTPLossLoggingHelper.clean_metrics_in_tracker()
    tokens, labels = (
        t if t.shape[-1] == BAG else t.squeeze(-1) for t in (batch.tokens, batch.labels)
    )
    positions = torch.arange(LENGTH).expand(tokens.shape[:2])
    packed = None if documents is None else _packed(documents)
    found = model(
        tokens, positions, None, labels=labels, loss_mask=batch.mask, packed_seq_params=packed
    )
    count = batch.mask.sum()
    # As Megatron's schedules: the sum, whose gradients are divided by the count at the end.
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    found = (found * batch.mask).sum()
    (found if per_token else found / count).backward()

    sequences = [batch] if documents is None else _cut(batch, documents)
    losses, gradients = _expected(model, sequences)
    same: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(found.detach().double() / count, losses[0], **same)
    logged = MTPLossLoggingHelper.tracker["loss_values"].double()
    torch.testing.assert_close(logged, losses[1:], **same)
    parameters = _parameters(model)
    assert gradients.keys() == {n for n, p in parameters.items() if p.grad is not None}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        gradient = parameter.grad.double() / (count if per_token else 1)
        # float32, through four layers and two more.
        limit = 2e-5 * float(gradients[name].abs().max())
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=limit, msg=name)


def _packed(documents: tuple[int, ...]) -> Any:
    """What the layers know of documents of these lengths, as ``packed_documents`` says it."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor((0, *documents)).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(documents),
        max_seqlen_kv=max(documents),
        tokens_per_sample=LENGTH,
    )


def _cut(batch: SimpleNamespace, documents: tuple[int, ...]) -> list[SimpleNamespace]:
    parts = {name: tensor.split(documents, 1) for name, tensor in vars(batch).items()}
    return [
        SimpleNamespace(**dict(zip(parts, cut, strict=True)))
        for cut in zip(*parts.values(), strict=True)
    ]


def check_documents() -> None:
    """The next bags of a document end with it; one is too short for the second depth."""
    for reads_bags, predicts_bags in ((True, True), (False, False)):
        batch = _batch(reads_bags, predicts_bags)
        one = SimpleNamespace(**{name: tensor[:1] for name, tensor in vars(batch).items()})
        _compare(_model(), one, documents=(4, 5, 2))


def check_losses_and_gradients() -> None:
    for reads_bags, predicts_bags in ((True, True), (True, False), (False, True), (False, False)):
        _compare(_model(), _batch(reads_bags, predicts_bags))


def check_hybrid_model() -> None:
    _compare(_model(is_hybrid=True), _batch(True, True))


def check_multipliers_of_mup() -> None:
    """Of embeddings and logits, of the model itself and of the depths."""
    mup: dict[str, Any] = {"use_mup": True, "mup_base_hidden_size": 16, "mup_embedding_mult": 3.0}
    # The power of other models.
    _compare(_model(**mup, mup_attn_scale_power=0.5), _batch(True, True))


def check_loss_of_torch() -> None:
    _compare(_model(loss="torch"), _batch(True, True))


def check_loss_per_token() -> None:
    _compare(_model(calculate_per_token_loss=True), _batch(True, True), per_token=True)
