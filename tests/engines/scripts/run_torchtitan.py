"""torchtitan: its adapters of state dicts and its models; run.py describes the arguments."""

import json

import torch
from safetensors.torch import load_file
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common import config_utils as parts
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from transformers import AutoTokenizer

# Every weight is loaded.
NO_INIT = {"weight": torch.nn.init.zeros_, "bias": torch.nn.init.zeros_}
LLAMA = Llama3Model, Llama3TransformerBlock, Llama3StateDictAdapter, ComplexRoPE
QWEN3 = Qwen3Model, Qwen3TransformerBlock, Qwen3StateDictAdapter, CosSinRoPE


def run(folder, work, case):
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    classes = LLAMA if config["model_type"] == "llama" else QWEN3
    settings = _model(config, *classes)
    adapter = classes[2](settings, str(folder))
    model = settings.build()
    model.init_states()
    loaded = adapter.from_hf(dict(weights))
    left = model.load_state_dict(loaded, strict=False)
    assert not left.unexpected_keys
    # Its balance of experts, which no other model has.
    assert all("expert_bias" in name or "tokens_per_expert" in name for name in left.missing_keys)
    _same_bits(adapter.to_hf(model.state_dict()), weights)
    _keep_experts_in_fp32()
    sequence = list(case["ids"])
    with torch.no_grad():
        for _ in case["tokens"]:
            sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
        logits = model(torch.tensor([case["ids"] + case["tokens"]]))[0]
    ids = AutoTokenizer.from_pretrained(folder)(case["text"])["input_ids"]
    return {"ids": ids, "tokens": sequence[len(case["ids"]) :], "logits": logits.tolist()}


def _same_bits(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name].view(torch.int32), weight.view(torch.int32)), name


def _keep_experts_in_fp32():
    """torchtitan computes experts in bf16 whatever the model has; its kernel has nothing else."""
    torch.Tensor.bfloat16 = lambda tensor: tensor

    def grouped_mm(self, *, offs, **operands):
        tokens = operands["A"].tensor_split(offs[:-1].tolist())
        pairs = zip(tokens, operands["B_t"], strict=True)
        return torch.cat([rows @ weight for rows, weight in pairs])

    GroupedExperts._grouped_mm = grouped_mm


def _model(config, model, block, adapter, rope):
    hidden, rows = config["hidden_size"], config["vocab_size"]

    def norm(size):
        return RMSNorm.Config(normalized_shape=size, eps=config["rms_norm_eps"], param_init=NO_INIT)

    def layer():
        return block.Config(
            attention_norm=norm(hidden),
            ffn_norm=norm(hidden),
            attention=parts.make_gqa_config(
                dim=hidden,
                n_heads=config["num_attention_heads"],
                n_kv_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                wqkv_param_init=NO_INIT,
                wo_param_init=NO_INIT,
                # The one that runs on a CPU without a compiler.
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=rope.Config(
                    dim=config["head_dim"],
                    max_seq_len=config["max_position_embeddings"],
                    theta=config["rope_parameters"]["rope_theta"],
                ),
                qk_norm=norm(config["head_dim"]) if block is Qwen3TransformerBlock else None,
            ),
            **_feed_forward(config),
        )

    return model.Config(
        dim=hidden,
        vocab_size=rows,
        tok_embeddings=Embedding.Config(
            num_embeddings=rows, embedding_dim=hidden, param_init=NO_INIT
        ),
        norm=norm(hidden),
        lm_head=Linear.Config(in_features=hidden, out_features=rows, param_init=NO_INIT),
        layers=[layer() for _ in range(config["num_hidden_layers"])],
    )


def _feed_forward(config):
    hidden = config["hidden_size"]
    if "num_experts" not in config:
        return {
            "feed_forward": parts.make_ffn_config(
                dim=hidden,
                hidden_dim=config["intermediate_size"],
                w1_param_init=NO_INIT,
                w2w3_param_init=NO_INIT,
            )
        }
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    names = "w1_EFD", "w2_EDF", "w3_EFD"
    return {
        "moe": parts.make_moe_config(
            num_experts=experts,
            router=parts.make_router_config(
                dim=hidden,
                num_experts=experts,
                gate_param_init=NO_INIT,
                top_k=top_k,
                score_func="softmax",
                route_norm=config["norm_topk_prob"],
            ),
            routed_experts=parts.make_routed_experts_config(
                dim=hidden,
                hidden_dim=config["moe_intermediate_size"],
                num_experts=experts,
                top_k=top_k,
                param_init=dict.fromkeys(names, torch.nn.init.zeros_),
                comm_backend="standard",
            ),
        )
    }
