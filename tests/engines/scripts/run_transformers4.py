"""transformers 4: run.py describes the arguments and the result."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(folder, work, case):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    made = model.generate(
        **tokenizer([case["text"]], padding=True, return_tensors="pt"),
        max_new_tokens=len(case["tokens"]),
        min_new_tokens=len(case["tokens"]),
        do_sample=False,
    )
    with torch.no_grad():
        logits = model(torch.tensor([case["ids"] + case["tokens"]])).logits[0]
    length = len(case["ids"])
    return {
        "ids": made[0, :length].tolist(),
        "tokens": made[0, length:].tolist(),
        "logits": logits.tolist(),
    }
