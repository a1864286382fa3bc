"""The fast routes give the ids of the tokenizers library, or leave the text to it."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from megatron_tst.corpus import documents, encoder_choice, encoding, fast_encoder
from megatron_tst.corpus.documents import BadDocumentError, decode
from megatron_tst.corpus.encoder_choice import EncoderChoice, choose_encoder, probe_texts
from megatron_tst.corpus.encoding import Encoder, EncoderSettings
from megatron_tst.corpus.fast_encoder import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    GigatokenEncoder,
    NoFastRouteError,
)
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.corpus.readers import RawDocument
from megatron_tst.corpus.sources import Source
from megatron_tst.corpus.tokenizer import (
    END_OF_DOCUMENT,
    CorpusTokenizer,
    byte_tokenizer,
    train_byte_level_bpe,
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


def sentence_piece_bpe(mistral: bool = False) -> Tokenizer:
    """Of the kind of Llama 2: all of a text is one word, and unknown characters are bytes."""
    control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ("▁ t", "▁t h", "▁ ▁", "▁▁ ▁▁", "s </", "▁ a", "a ▁a", "g r")
    pairs = [(left, right) for left, right in map(str.split, words)]
    single = [chr(code) for code in range(0x21, 0x7F)] + ["▁", "</", "ö", "東"]
    entries = dict.fromkeys([*control, *single, *(left + right for left, right in pairs)])
    vocab = {entry: number for number, entry in enumerate(entries)}
    model = models.BPE(vocab, pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if mistral:
        metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer.pre_tokenizer = metaspace
    else:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_special_tokens(control[:3])
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_of_the_library(tokenizer: Tokenizer, text: str) -> list[int]:
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids


def corpus_tokenizer(tokenizer: Tokenizer) -> CorpusTokenizer:
    return CorpusTokenizer(tokenizer.to_str(), END_OF_DOCUMENT, 0, tokenizer.get_vocab_size())


def choose(tokenizer: Tokenizer, *sample: str) -> EncoderChoice:
    return choose_encoder("auto", corpus_tokenizer(tokenizer), sample)


def settings(tokenizer: Tokenizer, **others: Any) -> EncoderSettings:
    return EncoderSettings(tokenizer.to_str(), UINT16, **{"is_fast": True} | others)


TOKENIZERS = {
    "ByteLevel": byte_level_bpe(),
    "GPT-2": byte_level_bpe(GPT2_PATTERN),
    "Llama 3": byte_level_bpe(LLAMA3_PATTERN),
    "Qwen 2": byte_level_bpe(QWEN2_PATTERN, nfc=True),
    "Llama 2": sentence_piece_bpe(),
    "Mistral": sentence_piece_bpe(mistral=True),
}
ENCODERS = {name: fast_encoder.fast_encoder(each, UINT16) for name, each in TOKENIZERS.items()}

# Characters that patterns treat in different ways, among any others: blanks of all kinds, digits
# of other scripts, the long s and the Kelvin sign (which are s and k where case is ignored),
# marks that combine, letters beyond U+FFFF, and characters without a name in old Unicode.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*WORDS, END_OF_DOCUMENT, "</s>", "<s>", "<0x41>", "▁", "▁▁ "]),
        st.sampled_from("'sStTlLdDmMreveaZ09\u017f\u212a\u0301\u00a0\u0085\u001c\u2028\u3000_"),
        st.sampled_from("²Ⅷ五\U0001d400\U00020000\U0001d7d8\ufeff\u200d\u0378\ua7cf\t\n\r\v\f "),
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=3),
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_the_fast_route_gives_the_ids_of_the_library(name: str, text: str) -> None:
    ids = ENCODERS[name].encode(text)
    if ids is None:
        assert fast_encoder.has_unsettled(text)
        ids = Encoder(settings(TOKENIZERS[name])).encode(text)
    assert ids.dtype == UINT16
    assert ids.tolist() == ids_of_the_library(TOKENIZERS[name], text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_of_the_usual_kinds_are_proven(name: str) -> None:
    assert choose(TOKENIZERS[name], *TRAINING) == EncoderChoice(is_fast=True)


@given(text=TEXTS)
def test_python_knows_what_the_library_would_normalize(text: str) -> None:
    if unicodedata.is_normalized("NFC", text) and not fast_encoder.has_unsettled(text):
        assert normalizers.NFC().normalize_str(text) == text


def test_unsettled_characters_are_found_anywhere() -> None:
    for text in ("\xff", "東京", "é🎉", "\U00020000"):
        assert not fast_encoder.has_unsettled(text)
        for character in "\u0378\ua7f1\U00010940\U000e0041\ud800":
            assert fast_encoder.has_unsettled(text + character)


def test_ordinary_text_takes_the_fast_route() -> None:
    known = [c for c in map(chr, range(1, 0x500)) if unicodedata.category(c) != "Cn"]
    text = "".join([*known, "€“”…東京🎉한글"])
    for name, encoder in ENCODERS.items():
        ids = encoder.encode(text)
        assert ids is not None
        assert ids.tolist() == ids_of_the_library(TOKENIZERS[name], text)


@pytest.mark.parametrize("name", ["ByteLevel", "Llama 3", "Qwen 2"])
def test_letters_of_new_unicode_are_left_to_the_library(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ENCODERS[name].encode("a \ua7f1a") is None
    assert choose(TOKENIZERS[name]).is_fast
    # gigatoken takes them for letters and the library does not.
    nothing = np.zeros(0x110000, dtype=np.bool_)
    monkeypatch.setattr(fast_encoder, "_unsettled_characters", lambda: nothing)
    monkeypatch.setattr(encoder_choice, "_proven", set())
    encoder_choice._characters_in_context.cache_clear()
    reason = choose(TOKENIZERS[name]).reason
    encoder_choice._characters_in_context.cache_clear()
    assert str(reason).startswith("gigatoken gives other ids at ")


def test_text_with_added_tokens_is_left_to_the_library() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    encoder = fast_encoder.fast_encoder(tokenizer, UINT16)
    assert encoder.encode("It's <tool>") is None
    assert choose(tokenizer).is_fast
    for text in ("It's <tool>", "It's <tool >"):
        ids = Encoder(settings(tokenizer)).encode(text).tolist()
        assert ids == ids_of_the_library(tokenizer, text)


def test_words_of_the_vocabulary_that_skip_the_merges() -> None:
    tokenizer = byte_level_bpe()
    vocab = {token: i for i, token in enumerate(byte_level_bpe().get_vocab())} | {"hello": 400}
    tokenizer.model = models.BPE(vocab, [], ignore_merges=True)
    ids = Encoder(settings(tokenizer)).encode("hello").tolist()
    assert ids == ids_of_the_library(tokenizer, "hello") == [400]


def changed(**steps: Any) -> Tokenizer:
    tokenizer = byte_level_bpe()
    for name, value in steps.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_dropout() -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.model.dropout = 0.1
    return tokenizer


def with_added(*tokens: str | AddedToken) -> Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def two_patterns() -> Tokenizer:
    """Words of Llama 3 take a character in front of letters along, those of GPT-2 do not."""
    vocab = byte_level_bpe().get_vocab()
    pairs = [("(", "a"), ("(a", "a")]
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(pairs)}
    steps = pre_tokenizers.Sequence([LLAMA3_SPLIT, BY_WORDS])
    return changed(model=models.BPE(vocab, pairs), pre_tokenizer=steps)


def llama2_with_added_token() -> Tokenizer:
    tokenizer = sentence_piece_bpe()
    tokenizer.add_tokens(["a b"])
    return tokenizer


BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BY_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3_SPLIT = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")

OTHERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "dropout": (with_dropout, "dropout"),
    "prefix space": (lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel()), "words"),
    "pattern": (lambda: byte_level_bpe(r"\w+|\W"), "words"),
    "lower case": (lambda: changed(normalizer=normalizers.Lowercase()), "NFC"),
    "wide token": (lambda: with_added("größe"), "beyond ASCII"),
    "superwords": (lambda: changed(pre_tokenizer=BYTES_ONLY), "words"),
    "two patterns": (two_patterns, "words"),
    "digits first": (
        lambda: changed(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(), LLAMA3_SPLIT, BYTES_ONLY]
            )
        ),
        "words",
    ),
    "no words": (lambda: changed(pre_tokenizer=None), "words"),
    "added to Llama 2": (llama2_with_added_token, "SentencePiece"),
    "word level": (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"),
    "unigram": (lambda: Tokenizer(models.Unigram([("a", 0.0)], 0)), "Unigram"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_have_no_fast_route(name: str) -> None:
    make, reason = OTHERS[name]
    choice = choose(make())
    assert not choice.is_fast
    assert reason in str(choice.reason)
    with pytest.raises(ValueError, match=rf"--encoder gigatoken .*{reason}.*--encoder auto"):
        choose_encoder("gigatoken", corpus_tokenizer(make()), [])


@pytest.mark.parametrize("name", ["superwords", "two patterns", "digits first", "no words"])
def test_the_probe_finds_encoders_that_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gigatoken loads these and gives other ids without an error."""
    monkeypatch.setattr(
        fast_encoder, "_known_words", lambda definition: definition["pre_tokenizer"]
    )
    make, _ = OTHERS[name]
    assert isinstance(fast_encoder.fast_encoder(make(), UINT16), GigatokenEncoder)
    assert str(choose(make()).reason).startswith("gigatoken gives other ids at ")


def test_the_sample_of_the_corpus_finds_encoders_that_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        fast_encoder, "_known_words", lambda definition: definition["pre_tokenizer"]
    )
    monkeypatch.setattr(encoder_choice, "probe_texts", lambda library: [])
    monkeypatch.setattr(encoder_choice, "_prove_words", lambda library: None)
    tokenizer = changed(pre_tokenizer=BYTES_ONLY)
    monkeypatch.setattr(encoder_choice, "_proven", set())
    assert choose(tokenizer, "Its").is_fast
    reason = choose(tokenizer, "Its", TRAINING[0]).reason
    assert str(reason).startswith("gigatoken gives other ids at ")


def test_the_probe_spells_out_control_tokens_and_entries() -> None:
    tokenizer = with_added(AddedToken("<|control|>", special=True))
    texts = list(probe_texts(tokenizer))
    assert any("<|control|>" in text for text in texts)
    assert sum(map(len, texts)) < 1_000_000


def test_the_library_serves_where_gigatoken_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert choose(byte_level_bpe()).reason == "gigatoken is not installed"
    assert choose_encoder("auto", byte_tokenizer(), []).is_fast
    with pytest.raises(ValueError, match=r"--encoder gigatoken .*not installed"):
        choose_encoder("gigatoken", corpus_tokenizer(byte_level_bpe()), [])


def test_ids_do_not_depend_on_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_encoder, "MAX_CACHE_BYTES", -1 << 60)
    monkeypatch.setattr(fast_encoder, "_CHARACTERS_BETWEEN_LOOKS", 100)
    tokenizer = TOKENIZERS["Llama 3"]
    encoder = fast_encoder.fast_encoder(tokenizer, UINT16)
    assert isinstance(encoder, GigatokenEncoder)
    for text in TRAINING * 3:
        ids = encoder.encode(text)
        assert ids is not None
        assert ids.tolist() == ids_of_the_library(tokenizer, text)
    assert encoder.rebuilds > 1


class PanicError(BaseException):
    """What a panic of Rust is in Python: no Exception."""


class BrokenGigatoken:
    """Fails, or gives an id that uint16 would take for the id 1."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def encode(self, text: str) -> Any:
        if self.fails:
            raise PanicError("index out of bounds")
        return np.array([65_537], dtype=np.uint32)


@pytest.mark.parametrize("fails", [True, False])
def test_the_library_steps_in_where_gigatoken_fails(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(settings(TOKENIZERS["ByteLevel"]))
    fast = encoder._fast
    assert isinstance(fast, GigatokenEncoder)
    monkeypatch.setattr(GigatokenEncoder, "_load", lambda self: None)
    monkeypatch.setattr(fast, "_gigatoken", BrokenGigatoken(fails))
    for text in TRAINING:
        expected = ids_of_the_library(TOKENIZERS["ByteLevel"], text)
        assert encoder.encode(text).tolist() == expected
    assert len(caplog.messages) == encoding.MAX_FAILURES
    assert "gigatoken " in caplog.messages[0]
    assert "the tokenizers library encodes it" in caplog.messages[0]
    assert "the tokenizers library encodes all that follows" in caplog.messages[-1]


def test_ids_that_do_not_fit_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    encoder = Encoder(settings(tokenizer, is_fast=False))
    assert encoder.encode("a").tolist() == [0]
    with pytest.raises(ValueError, match=r"an id that uint16 cannot hold .*70000"):
        encoder.encode("b")


def test_both_encoders_write_the_same_corpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TRAINING))
    folder = tmp_path / "t"
    train_byte_level_bpe(TRAINING, 400).save_files(folder)
    packages = {}
    for encoder in ("gigatoken", "tokenizers"):
        config = PreprocessConfig(
            (tmp_path / "a.jsonl",), tmp_path / encoder, tokenizer=folder, encoder=encoder
        )
        packages[encoder] = preprocess(config).encoder
    assert packages["gigatoken"].startswith("gigatoken 0.")
    assert packages["tokenizers"].startswith("tokenizers 0.")
    for suffix in (".bin", ".idx"):
        contents = [(tmp_path / f"{name}{suffix}").read_bytes() for name in packages]
        assert contents[0] == contents[1]
    assert not caplog.messages


def test_a_tokenizer_without_a_fast_route_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = PreprocessConfig(
        (tmp_path / "a.jsonl",),
        tmp_path / "out",
        tokenizer=tmp_path / "tokenizer.json",
        eod_token="<eos>",
    )
    preprocess(config)
    assert caplog.messages == [
        "encoding with the tokenizers library alone: a WordLevel model.",
    ]


def test_loading_fails_where_gigatoken_does_not_know_a_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        fast_encoder, "_known_words", lambda definition: definition["pre_tokenizer"]
    )
    with pytest.raises(NoFastRouteError, match=r"gigatoken cannot load it \(Unknown pre_tokenizer"):
        fast_encoder.fast_encoder(byte_level_bpe(r"\w+|\W"), UINT16)


def test_text_that_cannot_be_encoded_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="none"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = PreprocessConfig(
        (tmp_path / "a.jsonl",),
        tmp_path / "out",
        tokenizer=tmp_path / "tokenizer.json",
        eod_token="<eos>",
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:2: --tokenizer cannot encode .*'b'"):
        preprocess(config)


LINES = [
    b'{"text": "plain"}',
    b' {"text": "blanks"}\t\r',
    '{"text": "größe \u2028 🎉"}'.encode(),
    b'{"text": "\\ud83c\\udf89 \\n \\u0001"}',
    b'{"text": "twice", "text": "the last"}',
    b'\xef\xbb\xbf{"text": "after a byte order mark"}',
    b'{"text": "no number", "x": NaN}',
    b'{"text": "a large number", "x": 1e999}',
    b'{"text": "a long number", "x": ' + b"7" * 400 + b"}",
    b'{"text": "a half", "\\ud800": 1}',
    b'{"text": "a half \\ud800"}',
    b'{"text": "\\u0000"}',
    b'{"text": "invalid \xff"}',
    b'{"text": "cut',
    b'{"text": "comma",}',
    b'{"text": 7}',
    b'{"body": "other"}',
    b'["text"]',
    b"7",
]


@pytest.mark.parametrize("line", LINES)
def test_orjson_changes_nothing(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    document = RawDocument(Source(Path("a.jsonl"), from_folder=False, kind="lines"), 1, line)

    def outcome() -> tuple[str, int] | str:
        try:
            return decode(document, "text")
        except BadDocumentError as error:
            return str(error)

    assert vars(documents)["orjson"] is not None
    quick = outcome()
    monkeypatch.setattr(documents, "orjson", None)
    assert outcome() == quick
