"""How many samples of each phase a blend takes from each of its corpora."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import normalize
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError

Blend = tuple[Sequence[str], Sequence[float] | None]
"""Paths of corpora, without .bin or .idx, and their weights."""


def check_blend(paths: Sequence[str], weights: Sequence[float] | None) -> None:
    """Refuses what cannot be blended.

    Raises:
        UsageError: a corpus that comes twice, under one name or two, or a weight that is not a
            positive number.
    """
    files = [path if is_object_storage_path(path) else os.path.realpath(path) for path in paths]
    for index, path in enumerate(paths):
        if files[index] in files[:index]:
            raise UsageError(
                f"--data-path names {path} twice: each corpus is one stream. Name it once, with "
                "the sum of its weights."
            )
        if weights is not None and not 0 < weights[index] < math.inf:
            raise UsageError(
                f"--data-path gives {path} the weight {weights[index]}: use a positive number, or "
                "leave the corpus out."
            )


def check_numbers(words: Sequence[str], has_weights: bool) -> None:
    """Refuses numbers that name a corpus, where Megatron takes numbers for weights.

    Args:
        words: numbers and paths, as on the command line.
        has_weights: they are taken for pairs of a weight and a path.

    Raises:
        UsageError: a number in the place of a weight, or without any weights, with an index of
            that name in the working folder.
    """
    for word in words[::2] if has_weights else words:
        if is_number(word) and os.path.isfile(f"{word}.idx"):
            raise UsageError(
                f"--data-path {' '.join(words)}: {word} is a number and would be a weight, and "
                f"{word}.idx is a corpus. Write ./{word} for the corpus; if it is a weight, write "
                f"it another way, such as {float(word):.1f}."
            )


def is_number(text: str) -> bool:
    """Whether Megatron takes a word of a blend for a weight."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def find_corpus(text: str, paths: Sequence[str]) -> tuple[int, int]:
    """Reads CORPUS:INDEX, a document of a blend; CORPUS is a path, its last part, or empty.

    Returns:
        The place of the corpus among ``paths``, and the index of the document.

    Raises:
        UsageError: another form, or no corpus or several of this name.
    """
    name, _, index = text.rpartition(":")
    named = [i for i, path in enumerate(paths) if name == path] or [
        i for i, path in enumerate(paths) if name in ("", os.path.basename(path))
    ]
    if len(named) != 1 or not index.isdecimal():
        raise UsageError(f"{text!r}: write CORPUS:INDEX with one of {', '.join(paths)}.")
    return named[0], int(index)


def samples_by_corpus(weights: Sequence[float], samples: int) -> list[int]:
    """What the first ``samples`` of a blend take from each corpus: one number a corpus."""
    counts: list[int] = samples_by_corpus_at(weights, [samples])[0].tolist()
    return counts


def samples_by_corpus_at(weights: Sequence[float], samples: Sequence[int]) -> NDArray[np.int64]:
    """What the first samples of a blend take from each corpus.

    Upstream's ``BlendedDataset`` gives each sample to the corpus that is furthest behind its
    weight, so that the weights hold in every beginning of a run to within a sample or two. All
    samples of a phase hold the same number of tokens: the weights hold in data tokens as well, in
    each phase by itself.

    Args:
        weights: of the corpora, in the order of the blend.
        samples: how many first ones, several such numbers, ascending.

    Returns:
        [numbers, corpora].
    """
    most = samples[-1]
    corpus_of_sample = np.zeros(most, dtype=np.int16)
    helpers.build_blending_indices(
        corpus_of_sample,
        np.zeros(most, dtype=np.int64),
        # Twice, as upstream's builder and its dataset: the last bit decides ties.
        normalize(normalize(list(weights))),
        len(weights),
        most,
        False,
    )
    # Each is given to the corpus that is furthest behind, so that fewer samples are the first ones.
    places = [np.flatnonzero(corpus_of_sample == corpus) for corpus in range(len(weights))]
    return np.stack([place.searchsorted(samples) for place in places], axis=1)
