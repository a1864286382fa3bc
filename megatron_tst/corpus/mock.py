"""A corpus without meaning, to benchmark a cluster before its data is there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from megatron_tst.common.atomic_files import move
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter, token_dtype

_DOCUMENTS = 4096
_MEAN_TOKENS = 4096


def mock_corpus(folder: Path, vocabulary: int) -> Path:
    """Writes a corpus of 16M tokens, unless it is there, the same one on every machine.

    Ids follow Zipf's law, as those of text do: uniform ones would touch far more rows of the
    embedding. Any number of processes may call it at once.

    Args:
        folder: where to write; made if it is not there.
        vocabulary: ids.

    Returns:
        Its path, without ``.bin`` or ``.idx``.
    """
    target = folder / f"mock-{vocabulary}"
    prefix = target / target.name
    if target.exists():
        return prefix
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=folder))
    try:
        _write(staging / prefix.name, vocabulary)
        move(staging, target)
    except OSError:
        # Another process was first: a folder that holds something is not replaced.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return prefix


def _write(prefix: Path, vocabulary: int) -> None:
    random = np.random.default_rng(0)
    lengths = 1 + random.exponential(_MEAN_TOKENS, _DOCUMENTS).astype(np.int64)
    dtype = token_dtype(vocabulary)
    tokens, index = (prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx"))
    with IndexedDatasetWriter(tokens, index, dtype) as writer:
        for length in lengths.tolist():
            # The n-th id has a share of 1 / n: uniform in its logarithm.
            ids = np.exp(random.random(length) * np.log(vocabulary + 1)).astype(np.int64) - 1
            writer.add_documents(ids.clip(0, vocabulary - 1).astype(dtype), [length])
