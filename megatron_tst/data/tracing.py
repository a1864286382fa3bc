"""Which documents a step of a run reads, and which steps read a document.

Both are asked of the datasets of training: a sample is found by the code that reads it in a run,
and only its tokens stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.settings.phases import Phase
from megatron_tst.settings.schedule import SuperpositionSchedule


@dataclass(frozen=True)
class Passage:
    """Tokens of one document that a sample reads.

    Attributes:
        corpus: path without ``.bin`` or ``.idx``, as training was given it.
        document: its index in the corpus.
        offset: of the first token in the document.
        tokens: how many.
    """

    corpus: str
    document: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class TracedSample:
    """One sample of a run.

    Attributes:
        step: that reads it, as the log counts: the first step is 1.
        index: of the sample in the run, from 0 on.
        place: of the sample in the global batch of its step, from 0 on.
        passages: its text in order, without the look-ahead that serves as targets only.
    """

    step: int
    index: int
    place: int
    passages: tuple[Passage, ...]

    def rank(self, micro_batch_size: int, ranks: int) -> int:
        """The data-parallel rank that reads it, of so many (``MegatronPretrainingSampler``)."""
        return self.place // micro_batch_size % ranks


class DataTrace:
    """The text of a run by step and by document.

    Args:
        dataset: the train split of the run, of one corpus or a blend. From here on its samples hold
            no text: the trace puts lengths in the place of the tokens.
        schedule: of the run.
    """

    def __init__(self, dataset: Any, schedule: SuperpositionSchedule) -> None:
        self.schedule = schedule
        self._blend = dataset if hasattr(dataset, "datasets") else None
        self._corpora: list[SuperpositionGPTDataset] = getattr(dataset, "datasets", [dataset])
        self._readers = [_Reader(corpus.dataset) for corpus in self._corpora]
        for corpus, reader in zip(self._corpora, self._readers, strict=True):
            corpus.dataset = reader

    @property
    def corpora(self) -> list[str]:
        """Their paths."""
        return [str(corpus.dataset_path) for corpus in self._corpora]

    def phase_at(self, step: int) -> Phase:
        """The phase of a step, counted from 1."""
        return self.schedule.phase_at(step - 1)

    def step(self, step: int) -> Iterator[TracedSample]:
        """The samples of the global batch of a step, counted from 1, in the order of the batch.

        The order does not depend on the parallel layout, nor on where the run was resumed.

        Raises:
            UsageError: the run has no such step.
        """
        if not 1 <= step <= self.schedule.total_steps:
            raise UsageError(
                f"step {step} is not in the run, which has steps 1 to {self.schedule.total_steps}."
            )
        first, end = (self.schedule.batch_sizes.samples_at(s) for s in (step - 1, step))
        for index in range(first, end):
            yield TracedSample(step, index, index - first, tuple(self._passages(index)))

    def document(self, corpus: str, document: int) -> list[TracedSample]:
        """Every sample that reads tokens of a document, with these passages alone, by step.

        Args:
            corpus: one of ``corpora``.
            document: its index in the corpus.

        Raises:
            UsageError: the corpus has no such document.
        """
        number = self.corpora.index(corpus)
        documents = len(self._readers[number].sequence_lengths)
        if not 0 <= document < documents:
            raise UsageError(
                f"document {document} is not in {corpus}, which has documents 0 to {documents - 1}."
            )
        places = _places_of(self._corpora[number], document)
        found = []
        for index in self._samples_of(number, places):
            passages = [
                p for p in self._passages(index) if (p.corpus, p.document) == (corpus, document)
            ]
            step = self.schedule.batch_sizes.steps_to(index + 1)
            first = self.schedule.batch_sizes.samples_at(step - 1)
            if passages and step <= self.schedule.total_steps:
                found.append(TracedSample(step, index, index - first, tuple(passages)))
        return found

    def tokens(self, passage: Passage, count: int) -> list[int]:
        """The first tokens of a passage, at most ``count``."""
        reader = self._readers[self.corpora.index(passage.corpus)]
        length = min(count, passage.tokens)
        ids: list[int] = reader.source.get(passage.document, passage.offset, length).tolist()
        return ids

    def _passages(self, index: int) -> Iterator[Passage]:
        number, place = 0, index
        if self._blend is not None:
            number = int(self._blend.dataset_index[index])
            place = int(self._blend.dataset_sample_index[index])
        corpus, reader = self._corpora[number], self._readers[number]
        reader.reads.clear()
        text, _, lengths = corpus._query_document_sample_shuffle_indices(place)
        left = len(text) - self.schedule.phase_of_sample(index).look_ahead
        for (document, offset, tokens), positions in zip(reader.reads, lengths, strict=True):
            if (own := min(tokens, left)) > 0:
                yield Passage(self.corpora[number], document, offset, own)
            left -= positions

    def _samples_of(self, number: int, places: NDArray[Any]) -> list[int]:
        """Indices in the run of samples of a corpus."""
        if self._blend is None:
            samples = places
        else:
            of_corpus = np.flatnonzero(self._blend.dataset_index == number)
            samples = of_corpus[places[places < len(of_corpus)]]
        found: list[int] = np.sort(samples).tolist()
        return found


class _Reader:
    """Stands in for a corpus: notes what is read, and gives as many zeros."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.reads: list[tuple[int, int, int]] = []

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        lengths: NDArray[np.int32] = self.source.sequence_lengths
        return lengths

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        if length is None:
            length = int(self.sequence_lengths[idx]) - offset
        self.reads.append((int(idx), int(offset), int(length)))
        return np.zeros(int(length), dtype=np.int32)


def _places_of(dataset: SuperpositionGPTDataset, document: int) -> NDArray[Any]:
    """Places of a dataset whose samples may read a document."""
    if dataset.is_superposed:
        stream, samples = dataset.stream, [np.zeros(0, dtype=np.int64)]
        for place in np.flatnonzero(stream.documents == document):
            begin, end = stream.starts[place : place + 2].tolist()
            samples.append(np.asarray(dataset.text_layout.samples_on(begin, end), dtype=np.int64))
        return np.flatnonzero(np.isin(stream.samples, np.concatenate(samples)))
    starts = dataset.sample_index[:, 0]
    of_upstream: list[int] = []
    for occurrence in np.flatnonzero(dataset.document_index == document).tolist():
        # A sample ends in the document in which the next one begins.
        first = int(starts.searchsorted(occurrence, side="left")) - 1
        of_upstream += range(max(first, 0), int(starts.searchsorted(occurrence, side="right")))
    return np.flatnonzero(np.isin(dataset.shuffle_index, np.array(of_upstream, dtype=np.int64)))
