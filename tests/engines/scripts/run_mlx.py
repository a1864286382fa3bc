"""MLX: run.py describes the arguments and the result."""

import mlx.core as mx
import numpy
from mlx_lm import load
from mlx_lm.generate import generate_step


def run(folder, work, case):
    model, tokenizer = load(str(folder))
    ids = tokenizer.encode(case["text"])
    steps = generate_step(mx.array(ids), model, max_tokens=len(case["tokens"]))
    tokens = [int(token) for token, _ in steps]
    logits = model(mx.array([case["ids"] + case["tokens"]])).astype(mx.float32)
    return {"ids": ids, "tokens": tokens, "logits": numpy.array(logits[0]).tolist()}
