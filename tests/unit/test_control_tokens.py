"""No text spells the end of a document, whatever the tokenizer and whichever way it is encoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_tst.corpus.control_tokens import ControlTokens
from megatron_tst.corpus.encoding import Encoder, EncoderSettings
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.corpus.tokenizer import byte_tokenizer, train_byte_level_bpe

EOS = "</s>"
UINT16 = np.dtype(np.uint16)
TEXTS = [
    *("A tag </s> ends a strike.", "</s>", "</s></s>", " </s>\n", "x</s>x", "<s></s></s"),
    *("plain", "", "</s", "ö</s>東", "<s> and </s>"),
]


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_vocabulary(*more: str) -> dict[str, int]:
    pieces = [EOS, "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *more]
    return {piece: number for number, piece in enumerate(pieces)}


def bpe_without_special_eos() -> Tokenizer:
    tokenizer = byte_level(byte_vocabulary("</"), [("<", "/")])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken(EOS, normalized=False, special=False, lstrip=True)])
    return tokenizer


def bpe_that_ignores_merges() -> Tokenizer:
    tokenizer = byte_level(byte_vocabulary("</"), [("<", "/")], ignore_merges=True)
    tokenizer.add_special_tokens(["<s>", EOS])
    return tokenizer


def bpe_that_merges_the_eos() -> Tokenizer:
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), (EOS, EOS)]
    tokenizer = byte_level(byte_vocabulary("</", "</s", EOS * 2), merges)
    tokenizer.add_special_tokens(["<s>", EOS])
    return tokenizer


def bpe_without_added_eos() -> Tokenizer:
    return byte_level(byte_vocabulary("</", "</s"), [("<", "/"), ("</", "s"), ("</s", ">")])


def unigram() -> Tokenizer:
    letters = sorted(set("▁abcdefghiklmnoprstA</>.\nx"))
    vocab = [(EOS, 0.0), ("<s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return tokenizer


def words() -> Tokenizer:
    vocab = {EOS: 0, "<s>": 1, "<unk>": 2, "tag": 3, "ends": 4, "a": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return tokenizer


def word_pieces() -> Tokenizer:
    vocab = {EOS: 0, "<s>": 1, "<unk>": 2, "tag": 3, "<": 4, "##/": 5, "##s": 6, "##>": 7}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return tokenizer


MAKERS = {
    maker.__name__: maker
    for maker in (
        *(bpe_without_special_eos, bpe_that_ignores_merges, bpe_that_merges_the_eos),
        *(bpe_without_added_eos, unigram, words, word_pieces),
    )
}


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    definition = tokenizer.to_str()
    return Encoder(EncoderSettings(definition, UINT16, eod_id=0, append_eod=True))


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_end_of_a_document_stands_at_its_end(make: Callable[[], Tokenizer]) -> None:
    encoder, plain = encoder_of(make()), make()
    spelled = 0
    for text in TEXTS:
        ids = encoder.encode(text).tolist()
        *inside, last = ids or [0]
        assert last == 0
        assert not {0, 1} & set(inside), text
        library = library_ids(plain, text)
        if {0, 1} & set(library):
            spelled += 1
        else:
            # All other texts keep the ids of the library.
            assert inside == library
        if isinstance(plain.decoder, decoders.ByteLevel):
            assert plain.decode(inside, skip_special_tokens=False) == text
    assert spelled > 0  # else this tokenizer is no case


def test_words_that_are_not_the_eos_keep_their_ids() -> None:
    ids = encoder_of(words()).encode("a tag </s> ends a strike <s>").tolist()
    assert ids == [5, 3, 2, 4, 5, 2, 2, 0]
    pieces = encoder_of(word_pieces()).encode("tag </s> tag").tolist()
    assert pieces == [3, 4, 5, 6, 7, 3, 0]


@given(text=st.text(st.sampled_from("<s/> a\nö"), max_size=30))
def test_bytes_of_any_text_survive(text: str) -> None:
    for tokenizer, encoder in BYTE_LEVEL:
        ids = encoder.encode(text).tolist()
        assert not {0, 1} & set(ids[:-1])
        assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


BYTE_LEVEL = [
    (make(), encoder_of(make())) for name, make in MAKERS.items() if name.startswith("bpe")
]


@pytest.mark.parametrize("unknown", [EOS, "<unk>"])
def test_an_eos_for_the_unknown_is_refused(tmp_path: Path, unknown: str) -> None:
    vocab = [("<unk>", 0.0), (EOS, 0.0), ("▁", -2.0), ("a", -1.0)]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=[t for t, _ in vocab].index(unknown)))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "aaa"}\n{"text": "aba"}\n')
    config = PreprocessConfig((corpus,), tmp_path / "out", tokenizer=folder, append_eod=False)
    if unknown == EOS:
        with pytest.raises(ValueError, match=r"a\.jsonl:2: --tokenizer gives a control token"):
            preprocess(config)
    else:
        preprocess(config)
        assert np.fromfile(tmp_path / "out.bin", UINT16).tolist() == [3, 3, 3, 3, 0, 3]


def test_the_guard_costs_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers whose control tokens cannot be spelled are never asked a second time."""
    monkeypatch.setattr(ControlTokens, "unspellable", lambda self: pytest.fail("asked"))
    for made in (byte_tokenizer(), train_byte_level_bpe(["<|endoftext|> größe"] * 50, 300)):
        settings = EncoderSettings(made.definition, UINT16, made.eod_id)
        text = "<|endoftext|> größe <|endoftext|>"
        ids = Encoder(replace(settings)).encode(text).tolist()
        assert made.eod_id not in ids
        assert Tokenizer.from_str(made.definition).decode(ids, skip_special_tokens=False) == text


def test_ids_that_lie_far_apart() -> None:
    definition = json.loads(words().to_str())
    # Elsewhere than in the model the library does not take an id.
    definition["added_tokens"][1]["id"] = definition["model"]["vocab"]["<s>"] = 900
    controls = ControlTokens(json.dumps(definition), eod_id=7)
    found = [i for i in range(1000) if controls.are_in(np.array([500, i], UINT16))]
    assert found == [0, 7, 900]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_files_without_members_that_the_library_does_without(make: Callable[[], Tokenizer]) -> None:
    """GPT-2's ``tokenizer.json`` does not name the type of its model."""
    whole = make()
    definition: dict[str, Any] = json.loads(whole.to_str())
    if definition["model"].get("unk_token") is None:
        definition["model"].pop("unk_token", None)
    shortened = [definition | {"model": dict(definition["model"])}, dict(definition)]
    del shortened[0]["model"]["type"]
    if not definition["added_tokens"]:
        del shortened[1]["added_tokens"]
    expected = encoder_of(whole)
    for short in shortened:
        settings = EncoderSettings(json.dumps(short), UINT16, eod_id=0, append_eod=True)
        encoder = Encoder(settings)
        for text in TEXTS:
            assert encoder.encode(text).tolist() == expected.encode(text).tolist()
