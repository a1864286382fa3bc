"""Which encoder a corpus is made with: equality with the ``tokenizers`` library is not assumed."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.fast_encoder import (
    GigatokenEncoder,
    NoFastRouteError,
    fast_encoder,
    gigatoken_version,
    has_unsettled,
)
from megatron_tst.corpus.tokenizer import CorpusTokenizer, characters_of_bytes, library_tokenizer

EncoderName = Literal["auto", "gigatoken", "tokenizers"]

_ENTRIES = 20_000
_MIXTURES = 300
_WIDE = np.dtype(np.int32)
_proven: set[str] = set()  # tokenizers that this process has tried with the probe

_DIGITS = ("7", "٣", "५", "\uff12", "²", "Ⅷ", "五", "\U0001d7d8")
_BLANKS = (" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028")
_MARKS = ("\u0301", "\u0323", "\u0345", "\u093f", "\u200d", "\ufe0f", "\u0e33", "\u1161")
_WORDS = (
    *("It's", "THEY'LL", "don'T", "I'VE", "'\u017f", "x'\u212a", "'re", "größe", "gro\u0308ße"),
    *(
        "東京",
        "한국어",
        "ทดสอบ",
        "हिन्दी",
        "עברית",
        "العربية",
        "🎉",
        "👩\u200d👩",
        "\U00020000",
        "\ufeff",
    ),
    *("0x1F", "3.14159", "a_b", "<a href='x'>", "//", "...", "!!!", "{}", "\\n", "é", "▁", "▁a"),
)


@dataclass(frozen=True)
class EncoderChoice:
    """What to encode with.

    Attributes:
        is_fast: by the fast route of ``fast_encoder.py``, not by the library alone.
        reason: why not by the fast route, None where it is taken or was not asked for.
    """

    is_fast: bool
    reason: str | None = None

    @property
    def packages(self) -> str:
        """The packages that encode, with their versions."""
        library = f"tokenizers {tokenizers.__version__}"
        return f"gigatoken {gigatoken_version()}, {library}" if self.is_fast else library


def choose_encoder(
    wanted: EncoderName, tokenizer: CorpusTokenizer, sample: Iterable[str]
) -> EncoderChoice:
    """Compares the ids of the fast route with the library's, on a probe and on some of the corpus.

    Args:
        wanted: ``auto`` takes the fast route where there is one and it proves equal.
        tokenizer: of the corpus.
        sample: texts of the corpus.

    Raises:
        UsageError: the fast route was asked for and cannot be taken.
    """
    if wanted == "tokenizers":
        return EncoderChoice(is_fast=False)
    try:
        library = library_tokenizer(tokenizer.definition)
        fast = fast_encoder(library, _WIDE)
        # Bytes are their own ids: nothing to prove.
        if isinstance(fast, GigatokenEncoder):
            if tokenizer.sha256 not in _proven:
                _prove(fast, library, probe_texts(library))
                if fast.has_words:
                    _prove_words(library)
                _proven.add(tokenizer.sha256)
            _prove(fast, library, sample)
    except NoFastRouteError as error:
        if wanted == "gigatoken":
            raise UsageError(
                f"--encoder gigatoken does not serve this tokenizer ({error}): pass --encoder auto."
            ) from error
        return EncoderChoice(is_fast=False, reason=str(error))
    return EncoderChoice(is_fast=True)


def _prove(fast: GigatokenEncoder, library: Tokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        try:
            ids = fast.encode(text)
        except RuntimeError as error:
            raise NoFastRouteError(f"{error} at {_excerpt(text)}") from error
        if ids is None:
            continue
        try:
            (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
        # Text that the library itself cannot encode ends the run when it comes.
        except Exception:
            continue
        expected = np.array(encoding.ids, dtype=_WIDE)
        if not np.array_equal(ids, expected):
            # The quick call says nothing of places.
            offsets = library.encode(text, add_special_tokens=False).offsets
            same = min(ids.size, expected.size)
            first = int(np.argmin(np.append(ids[:same] == expected[:same], False)))
            start = offsets[first][0] if first < len(offsets) else len(text)
            raise NoFastRouteError(f"gigatoken gives other ids at {_excerpt(text, start)}")


def _prove_words(library: Tokenizer) -> None:
    """Compares where words end, which ids show only if a merge would reach beyond."""
    pairs = [(byte, other) for byte in characters_of_bytes() for other in ("a", "1", ".")]
    vocab = {entry: i for i, entry in enumerate(characters_of_bytes())}
    for left, right in pairs:
        vocab.setdefault(left + right, len(vocab))
    merging = Tokenizer(models.BPE(vocab, pairs))
    merging.pre_tokenizer = library.pre_tokenizer
    merging.encode_special_tokens = True
    fast = fast_encoder(merging, _WIDE)
    assert isinstance(fast, GigatokenEncoder)
    _prove(fast, merging, _characters_in_context())


def _excerpt(text: str, start: int = 0) -> str:
    return repr(text[max(0, start - 10) : start + 30])


def probe_texts(library: Tokenizer) -> Iterator[str]:
    """Texts in which encoders that are meant to be equal have differed.

    All classes of characters beside letters, digits and blanks; runs of digits and blanks; marks
    that combine; control tokens spelled out; words of the vocabulary; long runs; and mixtures of
    all these.
    """
    pieces = [*_WORDS, *_DIGITS, *_BLANKS, *_MARKS]
    tokens = [token["content"] for token in json.loads(library.to_str())["added_tokens"]]
    pieces += tokens[:50]
    yield ""
    yield from pieces
    yield from _characters_in_context()
    for digit, blank in zip(_DIGITS, _BLANKS, strict=False):
        yield "".join(f"{blank}a{digit * n}" for n in range(1, 9))
    for blank in _BLANKS:
        yield "".join(f"{blank * n}a{blank * n}\n{blank * n}!" for n in range(1, 9)) + blank * 3
    for mark in _MARKS:
        yield "".join(f"e{mark * n} \u0323{mark}" for n in range(1, 9))
    for token in tokens[:50]:
        yield f"{token}{token} {token}\n{token}a a{token} {token[:-1]} {token.upper()}"
    yield from (piece * 1500 for piece in ("a", "ab", " ", "\n", "=", "7", "é", "東", "\u0301"))
    generator = random.Random(0)
    # Each entry, not its merges alone: ranks that are read differently show here.
    ids = sorted(library.get_vocab().values())
    ids = generator.sample(ids, min(_ENTRIES, len(ids)))
    for start in range(0, len(ids), 1000):
        yield library.decode(ids[start : start + 1000], skip_special_tokens=False)
    for _ in range(_MIXTURES):
        yield "".join(generator.choices(pieces, k=40))


@cache
def _characters_in_context() -> list[str]:
    """Each class of characters of Unicode where each rule on words would notice it.

    Of a run of neighbours in one class the ends and every sixteenth, and all below U+0500. The
    classes are those of Python's Unicode; what is newer is among the characters without a class.
    """
    codes = (code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000)
    settled: list[str] = []
    unsettled: list[str] = []
    for _, run in groupby(map(chr, codes), unicodedata.category):
        members = list(run)
        step = 1 if ord(members[0]) < 0x500 else 16 if len(members) < 5000 else 257
        for character in members[::step] + members[-1:]:
            (unsettled if has_unsettled(character) else settled).append(character)
    # A text with one of the others is not for the fast route at all.
    texts = [f"{c}a{c}1 {c}. {c}a {c}{c}'{c}\n" for c in settled]
    together = ["".join(texts[start : start + 200]) for start in range(0, len(texts), 200)]
    return together + unsettled
