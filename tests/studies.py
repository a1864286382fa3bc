"""A small study over the test corpus, as the content of a study file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "num-layers": 1,
    "hidden-size": 16,
    "ffn-hidden-size": 32,
    "num-attention-heads": 2,
    "kv-channels": 8,
}


def study_content(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Keys of a study; ``changes`` replace keys of the top."""
    arguments = {
        "use-mcore-models": True,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": True,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "make-vocab-size-divisible-by": 1,
        "seq-length": 32,
        "max-position-embeddings": 32,
        "micro-batch-size": 2,
        "global-batch-size": 2,
        "min-lr": 0,
        "lr-decay-style": "WSD",
        "lr-wsd-decay-style": "linear",
        "clip-grad": 1.0,
        "split": "90,10,0",
        "log-interval": 1,
        "tensorboard-log-interval": 1,
        "data-path": str(corpus),
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": f"{corpus}-tokenizer",
    }
    return {
        "arguments": arguments,
        "models": {"tiny": MODEL},
        "schedule": {"warmup_share": 0.1, "decay_share": 0.2},
        "validation": {"times": 2, "tokens": 500, "batch_size": 4},
        "defaults": {"model": "tiny", "total_steps": 10, "learning_rate": "1e-3"},
        "seeds": [0],
        "arms": [{}, {"bag_size": 2, "step_ratio": 0.3}],
        **changes,
    }


def write_study(path: Path, content: dict[str, Any]) -> Path:
    """Writes a study file and returns its path."""
    path.write_text(yaml.safe_dump(content))
    return path
