"""The datasets of megatron-core."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import numpy as np


def split_without_documents() -> str:
    """Issue 957, PR 5519: the epochs of an empty split are counted for ever."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = SimpleNamespace(sequence_length=4, add_extra_token_to_sequence=1)
    split = SimpleNamespace(num_samples=1, config=config)

    def give_up(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3)
    try:
        epochs = GPTDataset._get_num_epochs(split, 0)
    except TimeoutError:
        return "still counting the epochs of 0 tokens after 3 seconds"
    finally:
        signal.alarm(0)
    raise AssertionError(f"mended: {epochs}")


def small_corpus_of_a_blend() -> str:
    """Issue 705: a blend can ask a corpus for more samples than it was built with."""
    from megatron.core.datasets import helpers_cpp

    samples, weights = 10, [0.001, 0.999]
    corpora, places = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    helpers_cpp.build_blending_indices(corpora, places, weights, 2, samples, False)
    used = np.bincount(corpora, minlength=2).tolist()
    # As BlendedMegatronDatasetBuilder computes them, with its surplus of 0.5%.
    built = [int(np.ceil(np.ceil(samples * weight) * 1.005)) for weight in weights]
    assert all(u <= b for u, b in zip(used, built, strict=True)), f"{used} of {built}"
    return f"{samples} samples with weights {weights}: {used} used, {built} built"
