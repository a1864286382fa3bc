"""Which Hugging Face weights lie in which slice of which Megatron tensor, and how to cut and join.

The unit is one layer, or one expert of a layer: nothing here needs the tensor that stacks them.
Both sides rotate the two halves of a head, and both store a linear layer as [out, in], so that
weights are split and renamed, never permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tst.checkpoint.hf_shapes import ModelShape
from megatron_tst.common.errors import UsageError

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "encoder.", "adapter.")
MULTI_TOKEN_PREFIX = "mtp."
"""Of the layers of multi-token prediction, which the model itself does without."""
_LAYERS = "decoder.layers."
_QKV = "self_attention.linear_qkv.weight"
# The second norm of a layer goes by the name that Transformer Engine has where it fuses norm and
# linear layer. Experts take a norm of its own there; Megatron's local modules keep the name.
FUSED_NORM = "mlp.linear_fc1.layer_norm_weight"
SEPARATE_NORM = "pre_mlp_layernorm.weight"
_EXPERT_BIAS = "mlp.router.expert_bias"


@dataclass(frozen=True)
class KeyLayout:
    """How a torch_dist checkpoint names the weights of its layers.

    Attributes:
        hybrid: the model is a ``HybridModel``, which counts attention and MLP as a layer each.
        stacked: the layers of a kind share a key and are stacked in dimension 0. Without, the
            number of the layer is part of the key, as always in a ``HybridModel``.
        fused_norm: the norm before the experts is named as if it were fused with a linear layer,
            as by ``GPTModel`` of local modules. Dense models always name it so.
    """

    hybrid: bool = False
    stacked: bool = True
    fused_norm: bool = True

    def __post_init__(self) -> None:
        assert not (self.hybrid and self.stacked)


def find_layout(keys: Collection[str]) -> KeyLayout:
    """The layout of a checkpoint with these keys; of other models, one that does not fit them."""
    stacked = _LAYERS + _QKV in keys
    return KeyLayout(
        hybrid="decoder.final_norm.weight" in keys and not stacked,
        stacked=stacked,
        fused_norm=not any(key.endswith(SEPARATE_NORM) for key in keys),
    )


@dataclass(frozen=True)
class MegatronSlice:
    """A part of a Megatron tensor that is converted at a time: one layer, or one of its experts.

    Attributes:
        key: of the tensor in a torch_dist checkpoint.
        index: the layer and the expert, as far as the tensor stacks them; often empty.
        size: shape of ``tensor[index]``.
        names: the Hugging Face weights that it is made from.
    """

    key: str
    index: tuple[int, ...]
    size: tuple[int, ...]
    names: tuple[str, ...]
    _shape: ModelShape = field(repr=False)
    _cut: _Cut = field(repr=False)

    @property
    def keeps_dtype(self) -> bool:
        """Whether both sides keep it in fp32 whatever the dtype of the model is."""
        return self.key.endswith(_EXPERT_BIAS)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The Hugging Face weights by name; views of ``weight`` where the layout allows it.

        Args:
            weight: ``tensor[index]``, of any dtype, on any device.
        """
        assert weight.shape == self.size
        return dict(zip(self.names, self._cut.split(self._shape, weight), strict=True))

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`: ``tensor[index]`` from the weights in order of ``names``.

        Rows of the vocabulary that only pad it are zero.
        """
        assert len(weights) == len(self.names)
        joined = self._cut.join(self._shape, weights)
        assert joined.shape == self.size
        return joined

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face weights by name."""
        parts = self.split(torch.empty(self.size, device="meta"))
        return {name: tuple(part.shape) for name, part in parts.items()}


def weight_slices(shape: ModelShape, layout: KeyLayout) -> tuple[MegatronSlice, ...]:
    """Every weight of a model, in the order in which the model uses them."""
    hidden, rows = (shape.hidden,), (shape.padded_vocabulary, shape.hidden)
    embedding = _Rule("embedding.word_embeddings", ("model.embed_tokens",), rows, _VOCABULARY)
    norm_key = "decoder.final_norm" if layout.hybrid else "decoder.final_layernorm"
    outer = [_Rule(norm_key, ("model.norm",), hidden)]
    if not shape.tied:
        outer.append(_Rule("output_layer", ("lm_head",), rows, _VOCABULARY))
    slices = [_outer_slice(shape, embedding)]
    for layer in range(shape.layers):
        for half, rules in enumerate((_attention_rules(shape), _mlp_rules(shape, layout, layer))):
            for rule in rules:
                slices += _layer_slices(shape, layout, rule, layer, half)
    return (*slices, *(_outer_slice(shape, rule) for rule in outer))


def stored_shapes(slices: Sequence[MegatronSlice]) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that the slices are parts of."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in slices:
        # The last index of a tensor comes last.
        shapes[part.key] = (*(index + 1 for index in part.index), *part.size)
    return shapes


def check_stored_shapes(
    shape: ModelShape, layout: KeyLayout, stored: dict[str, tuple[int, ...]]
) -> None:
    """Compares the tensors of a checkpoint with the ones that the model consists of.

    Args:
        shape: sizes of the model.
        layout: of the checkpoint.
        stored: shape of every tensor of the checkpoint by key, optimizer state included.

    Raises:
        UsageError: naming a weight that is missing, not known, or of another shape.
    """
    expected = stored_shapes(weight_slices(shape, layout))
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise UsageError(
            f"the checkpoint has no {listed(missing)}: it does not hold the {shape.architecture} "
            "model that its training arguments describe."
        )
    unknown = sorted(
        key
        for key in stored
        if key.startswith(_MODEL_PREFIXES)
        and key not in expected
        and not key.endswith("._extra_state")
        # Written under both names, the norm before the experts suits both kinds of modules.
        and not (shape.experts and key.endswith(FUSED_NORM))
    )
    if unknown:
        raise UsageError(
            f"the checkpoint has {listed(unknown)}, which {shape.architecture} has no place for: "
            "it cannot be exported without changing the model."
        )
    for key, size in expected.items():
        if tuple(stored[key]) != size:
            raise UsageError(
                f"{key} has shape {list(stored[key])} in the checkpoint and its training arguments "
                f"give {list(size)}: the folder mixes two models."
            )


def listed(keys: Sequence[str]) -> str:
    """Some names for a message, not all if they are many."""
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ", ".join(keys[:8]) + more


@dataclass(frozen=True)
class _Cut:
    """How one Megatron weight is taken apart and put together."""

    split: Callable[[ModelShape, Tensor], Sequence[Tensor]]
    join: Callable[[ModelShape, Sequence[Tensor]], Tensor]


def _split_qkv(shape: ModelShape, weight: Tensor) -> Sequence[Tensor]:
    """Takes apart [G(q+2)d, ...]: for each group q query heads, a key head and a value head."""
    queries, columns = shape.heads // shape.kv_heads, weight.shape[1:]
    groups = weight.view(shape.kv_heads, queries + 2, shape.head_dim, *columns)
    parts = groups.split([queries, 1, 1], dim=1)
    return [part.reshape(-1, *columns) for part in parts]


def _join_qkv(shape: ModelShape, weights: Sequence[Tensor]) -> Tensor:
    columns = weights[0].shape[1:]
    groups = [part.view(shape.kv_heads, -1, shape.head_dim, *columns) for part in weights]
    return torch.cat(groups, dim=1).view(-1, *columns)


def _pad_vocabulary(shape: ModelShape, weights: Sequence[Tensor]) -> Tensor:
    [weight] = weights
    if shape.padded_vocabulary == shape.vocabulary:
        # Not a copy of what may be the largest weight.
        return weight
    padding = weight.new_zeros(shape.padded_vocabulary - shape.vocabulary, shape.hidden)
    return torch.cat([weight, padding])


_WHOLE = _Cut(lambda shape, weight: [weight], lambda shape, weights: weights[0])
_VOCABULARY = _Cut(lambda shape, weight: [weight[: shape.vocabulary]], _pad_vocabulary)
_QUERY_KEY_VALUE = _Cut(_split_qkv, _join_qkv)
_GATE_AND_UP = _Cut(
    lambda shape, weight: weight.chunk(2), lambda shape, weights: torch.cat(tuple(weights))
)


@dataclass(frozen=True)
class _Rule:
    """One weight of a layer, or of an expert; ``key`` and ``names`` lack the prefix."""

    key: str
    names: tuple[str, ...]
    size: tuple[int, ...]
    cut: _Cut = _WHOLE
    of_expert: bool = False
    # Of the names.
    suffix: str = ".weight"


def _attention_rules(shape: ModelShape) -> list[_Rule]:
    hidden, query = shape.hidden, shape.heads * shape.head_dim
    qkv = query + 2 * shape.kv_heads * shape.head_dim
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    linear_qkv = "self_attention.linear_qkv"
    rules = [
        _Rule(f"{linear_qkv}.layer_norm_weight", ("input_layernorm",), (hidden,)),
        _Rule(f"{linear_qkv}.weight", projections, (qkv, hidden), _QUERY_KEY_VALUE),
        *_qkv_biases(shape, qkv),
        _Rule("self_attention.linear_proj.weight", ("self_attn.o_proj",), (hidden, query)),
    ]
    if shape.qk_norm:
        rules += [
            _Rule(
                f"self_attention.{part}_layernorm.weight",
                (f"self_attn.{part}_norm",),
                (shape.head_dim,),
            )
            for part in "qk"
        ]
    return rules


def _qkv_biases(shape: ModelShape, rows: int) -> list[_Rule]:
    if not shape.qkv_bias:
        return []
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    key = "self_attention.linear_qkv.bias"
    return [_Rule(key, names, (rows,), _QUERY_KEY_VALUE, suffix=".bias")]


def _mlp_rules(shape: ModelShape, layout: KeyLayout, layer: int) -> list[_Rule]:
    hidden = shape.hidden
    expert = bool(shape.experts) and layer not in shape.dense_layers
    ffn = shape.dense_ffn if shape.experts and not expert else shape.ffn
    fused = layout.fused_norm or not expert
    norm = _Rule(FUSED_NORM if fused else SEPARATE_NORM, ("post_attention_layernorm",), (hidden,))
    prefix = "mlp.experts.experts" if expert else "mlp"
    gate_and_up, down = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
    fc1 = f"{prefix}.linear_fc1.weight", gate_and_up, (2 * ffn, hidden), _GATE_AND_UP, expert
    fc2 = f"{prefix}.linear_fc2.weight", down, (hidden, ffn), _WHOLE, expert
    rules = [norm, _Rule(*fc1), _Rule(*fc2)]
    if expert:
        rules[1:1] = _router_rules(shape)
        rules += _shared_rules(shape)
    return rules


def _router_rules(shape: ModelShape) -> list[_Rule]:
    rules = [_Rule("mlp.router.weight", ("mlp.gate",), (shape.experts, shape.hidden))]
    if shape.sigmoid_router:
        names = ("mlp.gate.e_score_correction_bias",)
        rules.append(_Rule(_EXPERT_BIAS, names, (shape.experts,), suffix=""))
    return rules


def _shared_rules(shape: ModelShape) -> list[_Rule]:
    """The shared experts of a layer, which are one MLP on both sides."""
    if not shape.shared_ffn:
        return []
    hidden, ffn, prefix = shape.hidden, shape.shared_ffn, "mlp.shared_experts"
    name = "mlp.shared_experts" if shape.sigmoid_router else "mlp.shared_expert"
    gate_and_up = (f"{name}.gate_proj", f"{name}.up_proj")
    rules = [
        _Rule(f"{prefix}.linear_fc1.weight", gate_and_up, (2 * ffn, hidden), _GATE_AND_UP),
        _Rule(f"{prefix}.linear_fc2.weight", (f"{name}.down_proj",), (hidden, ffn)),
    ]
    if shape.shared_gate:
        rules.append(_Rule(f"{prefix}.gate_weight", ("mlp.shared_expert_gate",), (1, hidden)))
    return rules


def _outer_slice(shape: ModelShape, rule: _Rule) -> MegatronSlice:
    names = tuple(f"{name}.weight" for name in rule.names)
    return MegatronSlice(f"{rule.key}.weight", (), rule.size, names, shape, rule.cut)


def _layer_slices(
    shape: ModelShape, layout: KeyLayout, rule: _Rule, layer: int, half: int
) -> list[MegatronSlice]:
    """The slices of one layer; ``half`` is 0 for attention, 1 for what comes after it."""
    stored_layer = 2 * layer + half if layout.hybrid else layer
    key = f"{_LAYERS}{rule.key}" if layout.stacked else f"{_LAYERS}{stored_layer}.{rule.key}"
    index = (stored_layer,) if layout.stacked else ()
    prefix = f"model.layers.{layer}."
    if not rule.of_expert:
        names = tuple(f"{prefix}{name}{rule.suffix}" for name in rule.names)
        return [MegatronSlice(key, index, rule.size, names, shape, rule.cut)]
    return [
        MegatronSlice(
            key,
            (*index, expert),
            rule.size,
            tuple(
                f"{prefix}{name.replace('mlp.', f'mlp.experts.{expert}.')}.weight"
                for name in rule.names
            ),
            shape,
            rule.cut,
        )
        for expert in range(shape.experts)
    ]
