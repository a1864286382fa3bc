"""Bits per byte of text: what a model costs on it, whatever its tokenizer.

The tokens of a document are predicted one by one, each from those before it; the sum of
``-log2 p`` is divided by the bytes of the text in UTF-8. The first token is predicted from the
token that the tokenizer itself puts in front of a text, else from its end-of-document token (which
is what comes before a document in training); where there is neither, it counts as if every entry of
the vocabulary were equally likely.

A document that does not fit into the window is read in overlapping windows: each is ``stride``
tokens further than the one before and adds the tokens that were not counted yet, so that these see
at least ``window - stride`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import CountCallback, no_progress
from megatron_tst.corpus.documents import BadDocumentError, checked_size
from megatron_tst.evaluation.folder import LoadedModel


@dataclass(frozen=True)
class BitsPerByte:
    """Result on some documents.

    Attributes:
        bits: sum of -log2 p over all tokens.
        bytes: of the text in UTF-8.
        tokens: without the one in front of a document.
        documents: number of documents.
        stderr: standard error of ``value`` over the documents, as of a ratio of sums; None for one
            document.
        window: most tokens that a prediction sees.
        stride: see above.
        position_bits: their sum by the number of tokens that the prediction sees, from 1 to
            ``window``. Where a tokenizer puts nothing in front of a text, the first token of a
            document is in none of them.
        position_tokens: how many tokens that is a sum of.
    """

    bits: float
    bytes: int
    tokens: int
    documents: int
    stderr: float | None
    window: int
    stride: int
    position_bits: tuple[float, ...]
    position_tokens: tuple[int, ...]

    @property
    def value(self) -> float:
        """Bits per byte."""
        return self.bits / self.bytes

    def to_dict(self, by_position: bool = False) -> dict[str, Any]:
        """For JSON, with a number for each position of the window if that is wanted."""
        content = {"bits_per_byte": self.value, **asdict(self)}
        if not by_position:
            del content["position_bits"], content["position_tokens"]
        return content


class _Window(NamedTuple):
    document: int
    inputs: list[int]
    targets: list[int]
    """The targets of the last inputs; those of the others are counted in an earlier window."""


def read_documents(path: Path, flag: str = "--text") -> dict[Path, str]:
    """The text of a file, or of all files under a folder in sorted order, empty ones left out.

    A file is read as one of a corpus is: a byte order mark is no part of it.

    Raises:
        UsageError: nothing there, a file that is not text in UTF-8, or no text at all.
    """
    if not path.exists():
        raise UsageError(f"{flag} {path} does not exist.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    documents = {}
    for file in files:
        try:
            # Not read_text(), which translates the ends of lines and so changes the bytes.
            documents[file] = file.read_bytes().decode("utf-8-sig")
            checked_size(documents[file])
        except BadDocumentError as error:
            raise UsageError(
                f"{flag} {path}: {file} has {error}: convert it to UTF-8, or take it out."
            ) from error
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{flag} {path}: {file} is not text in UTF-8 (byte {error.start}): convert it, or "
                "take it out."
            ) from error
    found = {file: text for file, text in documents.items() if text}
    if not found:
        raise UsageError(f"{flag} {path} holds no text: pass a file that is not empty.")
    return found


def bits_per_byte(
    loaded: LoadedModel,
    documents: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    on_progress: CountCallback = no_progress,
) -> BitsPerByte:
    """Measures a model on documents that are not empty.

    Probabilities are taken in float32 and summed in float64.

    Args:
        loaded: model and tokenizer.
        documents: texts.
        window: most tokens that a prediction sees; the model's context by default.
        stride: tokens from one window to the next; half a window by default.
        batch_size: windows at once.
        on_progress: called with the windows that are done, and their number.

    Raises:
        UsageError: a window or stride that the model cannot have.
    """
    window = loaded.context if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= window <= loaded.context:
        raise UsageError(f"--window {window}: use 1 to {loaded.context}, the context of the model.")
    if not 1 <= stride <= window:
        raise UsageError(f"--stride {stride}: use 1 to {window}, the window.")
    front = _token_in_front(loaded.tokenizer)
    encoded = [_encode(loaded.tokenizer, text) for text in documents]
    bits = [0.0 if front is not None else math.log2(len(loaded.tokenizer))] * len(documents)
    windows = [
        part
        for index, tokens in enumerate(encoded)
        for part in _windows(index, tokens if front is None else [front, *tokens], window, stride)
    ]
    # Windows of one length side by side leave little padding, the longest first.
    windows.sort(key=lambda part: -len(part.inputs))
    of_positions = torch.zeros(2, window, dtype=torch.float64)
    for begin in range(0, len(windows), batch_size):
        on_progress(begin, len(windows))
        batch = windows[begin : begin + batch_size]
        for part, nats in zip(batch, _negative_log_likelihoods(loaded, batch), strict=True):
            bits[part.document] += float(nats.sum()) / math.log(2)
            seen = slice(len(part.inputs) - len(part.targets), len(part.inputs))
            of_positions[0, seen] += nats / math.log(2)
            of_positions[1, seen] += 1
    on_progress(len(windows), len(windows))
    sizes = [len(text.encode()) for text in documents]
    return BitsPerByte(
        bits=math.fsum(bits),
        bytes=sum(sizes),
        tokens=sum(map(len, encoded)),
        documents=len(documents),
        stderr=_ratio_stderr(bits, sizes),
        window=window,
        stride=stride,
        position_bits=tuple(of_positions[0].tolist()),
        position_tokens=tuple(map(int, of_positions[1].tolist())),
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    # As in training, a text that spells a control token is text. And not verbose: it would warn of
    # texts that are longer than the context, which is what windows are for.
    tokens: list[int] = tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    return tokens


def _token_in_front(tokenizer: Any) -> int | None:
    added: list[int] = tokenizer.encode("", add_special_tokens=True)
    if added and added[0] == tokenizer.bos_token_id:
        return added[0]
    token: int | None = tokenizer.eos_token_id
    return token


def _windows(document: int, tokens: list[int], window: int, stride: int) -> Iterator[_Window]:
    """Windows that count each token but the first once."""
    counted, last = 0, len(tokens) - 1
    while counted < last:
        end = min(window if counted == 0 else counted + stride, last)
        inputs = tokens[max(end - window, 0) : end]
        yield _Window(document, inputs, tokens[counted + 1 : end + 1])
        counted = end


@torch.no_grad()
def _negative_log_likelihoods(loaded: LoadedModel, batch: list[_Window]) -> Iterable[Tensor]:
    """Of the targets of each window, in nats, float64 on the CPU."""
    device = loaded.model.device
    longest = max(len(part.inputs) for part in batch)
    # Causal: what stands behind the inputs does not change what is predicted from them.
    padded = [part.inputs + [0] * (longest - len(part.inputs)) for part in batch]
    logits: Tensor = loaded.model(torch.tensor(padded, device=device), use_cache=False).logits
    for part, row in zip(batch, logits, strict=True):
        counted = row[len(part.inputs) - len(part.targets) : len(part.inputs)]
        targets = torch.tensor(part.targets, device=device)
        losses = torch.nn.functional.cross_entropy(counted.float(), targets, reduction="none")
        yield losses.double().cpu()


def _ratio_stderr(bits: Sequence[float], sizes: Sequence[int]) -> float | None:
    count = len(bits)
    if count < 2:
        return None
    ratio = sum(bits) / sum(sizes)
    squares = sum((b - ratio * size) ** 2 for b, size in zip(bits, sizes, strict=True))
    return math.sqrt(count / (count - 1) * squares) / sum(sizes)
