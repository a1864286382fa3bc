"""The fast routes give the ids of the tokenizers library, or none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from megatron_tst.data import word_encoder
from megatron_tst.data.encoding import Encoder, EncoderSettings
from megatron_tst.data.tokenizer import END_OF_DOCUMENT, byte_tokenizer, train_byte_level_bpe
from megatron_tst.data.word_encoder import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    fast_encoder,
)

UINT16 = np.dtype(np.uint16)
WORDS = [
    "It's",
    "THEY'LL",
    "don'T",
    " größe",
    "東京",
    "🎉",
    "\n    ",
    "\r\n",
    "0x1F",
    "\uff12\uff13",
    " \t",
]
TRAINING = [" ".join(random.Random(i).choices(WORDS, k=50)) for i in range(20)]


def byte_level_bpe(pattern: str | None = None, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer.from_str(train_byte_level_bpe(TRAINING, 400).definition)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_of_the_library(tokenizer: Tokenizer, text: str) -> list[int]:
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


TOKENIZERS = {
    "ByteLevel": byte_level_bpe(),
    "GPT-2": byte_level_bpe(GPT2_PATTERN),
    "Llama 3": byte_level_bpe(LLAMA3_PATTERN),
    "Qwen 2": byte_level_bpe(QWEN2_PATTERN, nfc=True),
}
ENCODERS = {name: fast_encoder(tokenizer, UINT16) for name, tokenizer in TOKENIZERS.items()}

# Characters that patterns treat in different ways, among any others: blanks of all kinds, digits
# of other scripts, the long s and the Kelvin sign (which are s and k where case is ignored),
# marks that combine, letters beyond U+FFFF, and characters without a name in old Unicode.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*WORDS, END_OF_DOCUMENT]),
        st.sampled_from("'sStTlLdDmMreveaZ09\u017f\u212a\u0301\u00a0\u0085\u001c\u2028\u3000_"),
        st.sampled_from("²Ⅷ五\U0001d400\U00020000\U0001d7d8\ufeff\u200d\u0378\ua7cf\t\n\r\v\f "),
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=3),
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_words_give_the_ids_of_the_library(name: str, text: str) -> None:
    encoder = ENCODERS[name]
    assert encoder is not None
    ids = encoder.encode(text)
    if ids is not None:
        assert ids.dtype == UINT16
        assert ids.tolist() == ids_of_the_library(TOKENIZERS[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_takes_the_fast_route(name: str) -> None:
    encoder = ENCODERS[name]
    assert encoder is not None
    text = "".join(chr(c) for c in range(1, 0x500) if c not in (0x378, 0x379)) + "€“”…東京🎉한글"
    assert (ids := encoder.encode(text)) is not None
    assert ids.tolist() == ids_of_the_library(TOKENIZERS[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_of_other_unicode_versions_are_left_to_the_library(name: str) -> None:
    encoder = ENCODERS[name]
    assert encoder is not None
    # A letter beyond U+FFFF, which the fast route takes for a symbol.
    assert encoder.encode("a\U00020000b") is None
    settings = EncoderSettings(TOKENIZERS[name].to_str(), (), UINT16)
    text = "日本\U00020000 \U00020001x"
    assert Encoder(settings).encode(text).tolist() == ids_of_the_library(TOKENIZERS[name], text)


def test_ids_do_not_depend_on_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_encoder, "MAX_WORDS", 2)
    monkeypatch.setattr(word_encoder, "MAX_WORD_CHARACTERS", 4)
    encoder = fast_encoder(TOKENIZERS["ByteLevel"], UINT16)
    assert encoder is not None
    for text in TRAINING:
        ids = encoder.encode(text)
        assert ids is not None
        assert ids.tolist() == ids_of_the_library(TOKENIZERS["ByteLevel"], text)


def test_text_with_added_tokens_is_left_to_the_library() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    encoder = fast_encoder(tokenizer, UINT16)
    assert encoder is not None
    assert encoder.encode("It's <tool>") is None
    ids = encoder.encode("It's <tool >")
    assert ids is not None
    assert ids.tolist() == ids_of_the_library(tokenizer, "It's <tool >")


def test_words_of_the_vocabulary_that_skip_the_merges() -> None:
    tokenizer = byte_level_bpe()
    vocab = {token: i for i, token in enumerate(byte_level_bpe().get_vocab())} | {"hello": 400}
    tokenizer.model = models.BPE(vocab, [], ignore_merges=True)
    encoder = fast_encoder(tokenizer, UINT16)
    assert encoder is not None
    ids = encoder.encode("hello")
    assert ids is not None
    assert ids.tolist() == ids_of_the_library(tokenizer, "hello") == [400]


def other_tokenizers() -> list[Any]:
    dropout, prefix, pattern, lower, wide = (byte_level_bpe() for _ in range(5))
    dropout.model.dropout = 0.1
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pattern.pre_tokenizer = byte_level_bpe(r"\w+|\W").pre_tokenizer
    lower.normalizer = normalizers.Lowercase()
    wide.add_tokens(["größe"])
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    split_bytes = Tokenizer.from_str(byte_tokenizer().definition)
    split_bytes.normalizer = normalizers.Lowercase()
    return [dropout, prefix, pattern, lower, wide, words, split_bytes]


@pytest.mark.parametrize("tokenizer", other_tokenizers())
def test_other_tokenizers_have_no_fast_route(tokenizer: Tokenizer) -> None:
    assert fast_encoder(tokenizer, UINT16) is None


def test_ids_that_do_not_fit_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    encoder = Encoder(EncoderSettings(tokenizer.to_str(), (), UINT16))
    assert encoder.encode("a").tolist() == [0]
    with pytest.raises(ValueError, match=r"an id that uint16 cannot hold .*70000"):
        encoder.encode("b")
