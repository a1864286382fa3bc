"""OpenVINO through optimum-intel: run.py describes the arguments and the result."""

import torch
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer


def run(folder, work, case):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Its default on a CPU with AMX or AVX512 is bf16.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, ov_config=settings)
    made = model.generate(
        **tokenizer([case["text"]], padding=True, return_tensors="pt"),
        max_new_tokens=len(case["tokens"]),
        min_new_tokens=len(case["tokens"]),
        do_sample=False,
    )
    tokens = torch.tensor([case["ids"] + case["tokens"]])
    logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    length = len(case["ids"])
    return {
        "ids": made[0, :length].tolist(),
        "tokens": made[0, length:].tolist(),
        "logits": logits.tolist(),
    }
