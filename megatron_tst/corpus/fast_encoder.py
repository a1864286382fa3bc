"""Faster routes to the very ids that the ``tokenizers`` library gives.

The library spends most of its time on tracking where in the text each piece came from, which a
corpus does not need. gigatoken, an optional package, does the same work some forty times as fast.
It is used for the kinds of tokenizers that are listed here, and for those only after
``encoder_choice.py`` has compared its ids with the library's.
"""

from __future__ import annotations

import importlib.metadata
import json
import unicodedata
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
from tokenizers import Tokenizer

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.tokenizer import characters_of_bytes

MAX_CACHE_BYTES = 100_000_000
"""What a process may grow by before the words that gigatoken remembers are dropped."""
_CHARACTERS_BETWEEN_LOOKS = 1 << 20
_LOOKS_BETWEEN_REBUILDS = 16  # words that do not repeat take ten bytes for each byte of text

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # also ByteLevel
)
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = _CL100K_PATTERN.replace("@", "{1,3}")
QWEN2_PATTERN = _CL100K_PATTERN.replace("@", "")
_KNOWN_PATTERNS = {GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN}

_CODES = 0x40000
_LETTERS_OF_UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2)),
    *((0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7)),
    *((0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3)),
    *((0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2)),
    *((0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED)),
    *((0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD)),
    (0x323B0, 0x33479),
)

_SPACE = "▁"  # stands for a blank in tokenizers of SentencePiece
_LLAMA2_NORMALIZER = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]


class NoFastRouteError(UsageError):
    """There is no fast route for a tokenizer; says why."""


class FastEncoder(Protocol):
    """Encodes text without control tokens; None where only the library itself will do."""

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        """[tokens] ids of the text."""


def gigatoken_version() -> str | None:
    """Version of gigatoken, None where it is not installed."""
    try:
        return importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        return None


def fast_encoder(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> FastEncoder:
    """The fast route for a tokenizer that has one.

    Args:
        tokenizer: with ``encode_special_tokens`` set, as control tokens are not looked for.
        dtype: type of the ids; must hold every id.

    Raises:
        NoFastRouteError: there is none.
    """
    definition = json.loads(tokenizer.to_str())
    model, pre_tokenizer = definition["model"], definition["pre_tokenizer"]
    if model["type"] != "BPE":
        raise NoFastRouteError(f"a {model['type']} model")
    if model.get("dropout"):
        raise NoFastRouteError("a BPE with dropout")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NoFastRouteError("a BPE that marks the parts of words")
    # These are looked for in every text, and taken out before anything else happens.
    extracted = [token["content"] for token in definition["added_tokens"] if not token["special"]]
    if not all(content.isascii() for content in extracted):
        raise NoFastRouteError("an added token with characters beyond ASCII")
    is_bytes = isinstance(pre_tokenizer, dict) and _is_byte_level(pre_tokenizer, use_regex=False)
    if is_bytes and not (model["merges"] or definition["normalizer"] or extracted):
        return _ByteEncoder(model["vocab"], dtype)
    definition |= dict.fromkeys(("post_processor", "truncation", "padding"))
    # What is not there cannot be found in the text: to gigatoken all of it is text.
    definition["added_tokens"] = []
    if not _is_sentence_piece(definition):
        definition["pre_tokenizer"] = _known_words(definition)
        definition["normalizer"] = None
    elif extracted:
        raise NoFastRouteError("a SentencePiece model with added tokens that are no control tokens")
    return GigatokenEncoder(tokenizer, json.dumps(definition), extracted, dtype)


def _is_byte_level(step: dict[str, Any], use_regex: bool) -> bool:
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
    return wanted.items() <= step.items()


def _known_words(definition: dict[str, Any]) -> dict[str, Any]:
    """The pre-tokenizer of byte-level BPE in the form that gigatoken knows.

    A list of whole patterns, because two engines agree on these constructs but not on any pattern.

    Raises:
        NoFastRouteError: it is none of the usual ones, or text is changed before.
    """
    if definition["normalizer"] not in (None, {"type": "NFC"}):
        raise NoFastRouteError("a normalizer that is not NFC")
    by_words: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    match steps := definition["pre_tokenizer"]:
        case {"type": "ByteLevel"} if _is_byte_level(steps, use_regex=True):
            return by_words | {"trim_offsets": True}
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}} as split,
                {"type": "ByteLevel"} as byte_level,
            ],
        } if pattern in _KNOWN_PATTERNS and _is_byte_level(byte_level, use_regex=False):
            if split["behavior"] == "Isolated" and not split["invert"]:
                is_gpt2 = pattern == GPT2_PATTERN
                return by_words | {"trim_offsets": True} if is_gpt2 else dict(steps)
    raise NoFastRouteError("words that are not cut as GPT-2, Llama 3 or Qwen 2 do")


def _is_sentence_piece(definition: dict[str, Any]) -> bool:
    """Whether it is a tokenizer of the kind of Llama 2 or Mistral."""
    if not definition["model"].get("byte_fallback"):
        return False
    match definition["normalizer"], definition["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": steps}, None:
            return bool(steps == _LLAMA2_NORMALIZER)
        case None, {"type": "Metaspace", "replacement": "▁", "split": False} as metaspace:
            return metaspace["prepend_scheme"] in ("first", "always")
    return False


class _ByteEncoder:
    """A vocabulary of single bytes without merges."""

    def __init__(self, vocab: dict[str, int], dtype: np.dtype[Any]) -> None:
        ids = [vocab.get(character, -1) for character in characters_of_bytes()]
        self._ids = np.array([max(i, 0) for i in ids], dtype=dtype)
        self._is_missing = np.array([i < 0 for i in ids])

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        values = np.frombuffer(text.encode(), dtype=np.uint8)
        if self._is_missing[values].any():
            return None
        return self._ids[values]


class GigatokenEncoder:
    """Encodes with gigatoken, in the calling thread and in bounded memory.

    gigatoken remembers every word it has met. It cannot be told to forget, so it is loaded anew
    when the process has grown by ``MAX_CACHE_BYTES``; ids do not depend on that.

    Args:
        tokenizer: the library's, to normalize with.
        definition: content of a ``tokenizer.json`` without added tokens, and without a normalizer
            that changes what added tokens are looked for in.
        extracted: text with one of these is left to the library.
        dtype: type of the ids.

    Attributes:
        has_words: text is cut into words by the classes of its characters.
        rebuilds: how often what was remembered has been dropped.

    Raises:
        NoFastRouteError: gigatoken is missing or cannot load the definition.
    """

    def __init__(
        self, tokenizer: Tokenizer, definition: str, extracted: list[str], dtype: np.dtype[Any]
    ) -> None:
        # SentencePiece cuts no words, and so asks for no classes of characters.
        self.has_words = not json.loads(definition)["model"].get("byte_fallback")
        self._normalizer = tokenizer.normalizer if self.has_words else None
        self._definition = definition
        self._extracted = extracted
        self._ids_below = min(tokenizer.get_vocab_size(), np.iinfo(dtype).max + 1)
        self._dtype = dtype
        self._process = psutil.Process()
        self._load()
        self._bytes_allowed = self._process.memory_info().rss + MAX_CACHE_BYTES
        self.rebuilds = 0

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        """[tokens] ids of the text, or None.

        Raises:
            RuntimeError: gigatoken failed; it is loaded anew for the next text.
        """
        if any(content in text for content in self._extracted):
            return None
        if self.has_words and has_unsettled(text):
            return None
        if self._normalizer is not None and not unicodedata.is_normalized("NFC", text):
            text = self._normalizer.normalize_str(text)
            if any(content in text for content in self._extracted):
                return None
        try:
            ids = self._gigatoken.encode(text)
        # A panic of Rust is a BaseException of its own, and what it leaves behind is not trusted.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self._load()
            raise RuntimeError(f"gigatoken failed: {error}") from error
        # Wider than the corpus: an id that does not fit would wrap around.
        if ids.size and int(ids.max()) >= self._ids_below:
            raise RuntimeError(f"gigatoken gave the id {ids.max()} of {self._ids_below}")
        self._characters += len(text)
        if self._characters >= self._next_look:
            self._bound_memory()
        narrow: npt.NDArray[np.integer] = ids.astype(self._dtype)
        return narrow

    def _load(self) -> None:
        try:
            # Not the package's own front, which brings in more than is needed.
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError as error:
            raise NoFastRouteError("gigatoken is not installed") from error
        try:
            self._gigatoken = load_hf_json(self._definition)
        # Panics too.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = str(error).partition("\n")[0]
            raise NoFastRouteError(f"gigatoken cannot load it ({reason})") from error
        self._characters = 0
        self._next_look = _CHARACTERS_BETWEEN_LOOKS

    def _bound_memory(self) -> None:
        self._next_look += _CHARACTERS_BETWEEN_LOOKS
        # Memory may be others' too: then loading anew frees nothing, and must not be done all
        # the time.
        is_new = self._characters < _LOOKS_BETWEEN_REBUILDS * _CHARACTERS_BETWEEN_LOOKS
        if not is_new and self._process.memory_info().rss > self._bytes_allowed:
            del self._gigatoken
            self._load()
            self.rebuilds += 1


@cache
def _unsettled_characters() -> npt.NDArray[np.bool_]:
    """[0x110000] Characters whose class gigatoken and the library may read in other Unicodes.

    Those of a recent Unicode: gigatoken 0.10.0 has Unicode 17, tokenizers 0.23.3 has 16, and the
    ids differ without an error. And those that Python does not know, whose Unicode is older or as
    old in all its versions so far: normalization is asked of Python.
    """
    table = np.ones(0x110000, dtype=np.bool_)
    # What lies beyond is hardly used: not worth the time to look at.
    for code in range(_CODES):
        table[code] = unicodedata.category(chr(code)) == "Cn"
    for first, last in (*_LETTERS_OF_UNICODE_17, (0xD800, 0xDFFF)):
        table[first : last + 1] = True
    return table


def has_unsettled(text: str) -> bool:
    """Whether a text has a character whose class is not the same in all versions of Unicode."""
    if text.isascii():
        return False
    with suppress(UnicodeEncodeError):
        text.encode("latin-1")
        return False
    table = _unsettled_characters()
    halves = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype=np.uint16)
    # Halves of pairs have no class of their own, so that a text without pairs is done here.
    if not table[: 1 << 16].take(halves).any():
        return False
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return bool(table.take(codes).any())
