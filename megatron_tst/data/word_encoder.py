"""Faster routes to the very ids that the ``tokenizers`` library gives.

The library spends three quarters of its time on tracking where in the text each piece came from,
which a corpus does not need. Byte-level BPE with one of the usual word patterns is done here with
a regular expression and a table of the words met before; the library still merges each new word.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_tst.data.tokenizer import characters_of_bytes

MAX_WORDS = 1 << 18
"""Words remembered by a process, in some 50 MB."""
MAX_WORD_CHARACTERS = 64
"""Longer words hardly ever come again."""

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # also ByteLevel
)
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = _CL100K_PATTERN.replace("@", "{1,3}")
QWEN2_PATTERN = _CL100K_PATTERN.replace("@", "")
# A list of whole patterns, because two engines agree on these constructs but not on any pattern.
_KNOWN_PATTERNS = {GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN}

_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# A character next to each class that the patterns tell apart: it shows its own class.
_PROBE = "a@a 1@1 .@. '@ @@\n@\n  @a"


class TextEncoder(Protocol):
    """Encodes text without control tokens; None where only the library itself will do."""

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        """[tokens] ids of the text."""


def fast_encoder(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> TextEncoder | None:
    """The fast route for a tokenizer that has one.

    Args:
        tokenizer: with ``encode_special_tokens`` set, as control tokens are not looked for.
        dtype: type of the ids; must hold every id.
    """
    definition = json.loads(tokenizer.to_str())
    model, pre_tokenizer = definition["model"], definition["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout"):
        return None
    # Other normalizers belong to tokenizers that do not split words by these patterns.
    if definition["normalizer"] not in (None, {"type": "NFC"}):
        return None
    # These are looked for in every text, and taken out before anything else happens.
    extracted = [token["content"] for token in definition["added_tokens"] if not token["special"]]
    if not all(content.isascii() for content in extracted):
        return None
    pattern = _word_pattern(pre_tokenizer)
    if pattern is not None:
        return _WordEncoder(tokenizer, pattern, extracted, dtype)
    is_plain = isinstance(pre_tokenizer, dict) and _is_byte_level(pre_tokenizer, use_regex=False)
    if is_plain and not (model["merges"] or definition["normalizer"] or extracted):
        return _ByteEncoder(model["vocab"], dtype)
    return None


def _is_byte_level(step: dict[str, Any], use_regex: bool) -> bool:
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}
    return wanted.items() <= step.items()


def _word_pattern(pre_tokenizer: Any) -> str | None:
    """The pattern by which a pre-tokenizer cuts text into words, if it is a known one."""
    match pre_tokenizer:
        case {"type": "ByteLevel"} if _is_byte_level(pre_tokenizer, use_regex=True):
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}} as split,
                {"type": "ByteLevel"} as byte_level,
            ],
        } if pattern in _KNOWN_PATTERNS and _is_byte_level(byte_level, use_regex=False):
            is_plain = split["behavior"] == "Isolated" and not split["invert"]
            return pattern if is_plain else None
    return None


def _in_python(pattern: str) -> str:
    """A word pattern for ``re``, which has no classes for letters and numbers."""
    classes = {r"\p{L}": _characters("L"), r"\p{N}": _characters("N"), r"\s": _WHITE_SPACE}

    def spelled_out(found: re.Match[str]) -> str:
        inside = found[1]
        if inside is None:
            return f"[^{_WHITE_SPACE}]" if found[0] == r"\S" else f"[{classes[found[0]]}]"
        for name, members in classes.items():
            inside = inside.replace(name, members)
        return f"[{inside}]"

    return re.sub(r"\[([^]]*)\]|\\p\{L\}|\\p\{N\}|\\s|\\S", spelled_out, pattern)


def _characters(category: str) -> str:
    """Members of a Unicode category, as ranges in a character class.

    Up to U+FFFF: ``re`` tests those with one look-up, and the few texts with letters or digits
    beyond (not symbols such as emoji) can be left to the library.
    """
    codes = [c for c in range(1 << 16) if unicodedata.category(chr(c)).startswith(category)]
    starts = sorted(set(codes) - {c + 1 for c in codes})
    ends = sorted(set(codes) - {c - 1 for c in codes})
    return "".join(f"\\u{a:04x}-\\u{b:04x}" for a, b in zip(starts, ends, strict=True))


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


class _Words(dict[str, bytes]):
    """Ids of each word, in the bytes of the corpus."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


class _WordEncoder:
    """Byte-level BPE of words that a known pattern finds.

    Python and the library know different versions of Unicode. So each character is looked at when
    it is first met: text with a character that the two class differently is left to the library.
    """

    def __init__(
        self, tokenizer: Tokenizer, pattern: str, extracted: list[str], dtype: np.dtype[Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._find_words = re.compile(_in_python(pattern)).findall
        self._extracted = extracted
        self._normalizes = tokenizer.normalizer is not None
        self._dtype = dtype
        self._character_of_byte = characters_of_bytes()
        self._words = _Words(self._encode_word)
        self._safe: set[str] = set()
        self._unsafe: set[str] = set()

    def encode(self, text: str) -> npt.NDArray[np.integer] | None:
        if any(content in text for content in self._extracted):
            return None
        if self._normalizes and not text.isascii():
            text = self._tokenizer.normalizer.normalize_str(text)
            if any(content in text for content in self._extracted):
                return None
        characters = set(text)
        if not characters <= self._safe and not self._check(characters - self._safe):
            return None
        words = self._find_words(text)
        return np.frombuffer(b"".join(map(self._words.__getitem__, words)), dtype=self._dtype)

    def _encode_word(self, word: str) -> bytes:
        mapped = self._map_bytes(word)
        ids = [token.id for token in self._tokenizer.model.tokenize(mapped)]
        return np.array(ids, dtype=self._dtype).tobytes()

    def _map_bytes(self, word: str) -> str:
        return "".join([self._character_of_byte[byte] for byte in word.encode()])

    def _check(self, characters: set[str]) -> bool:
        """Whether Python and the library agree on all of these characters."""
        for character in characters - self._unsafe:
            probe = _PROBE.replace("@", character)
            theirs = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(probe)]
            agree = theirs == list(map(self._map_bytes, self._find_words(probe)))
            (self._safe if agree else self._unsafe).add(character)
        return characters <= self._safe
