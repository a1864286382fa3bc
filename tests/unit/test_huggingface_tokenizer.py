"""transformers gives the tokens of training, or says that it does not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from megatron_tst.corpus.huggingface_tokenizer import (
    PLAIN_CLASS,
    class_warning,
    load_huggingface_tokenizer,
)
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.evaluation.folder import check_model_folder, load_model
from tests.bpe_tokenizers import BYTE_LEVEL, END, TEXTS, THREE_DIGITS, save_bpe
from tests.tiny_llama import CPU, save_tiny_llama


@pytest.mark.parametrize(
    ("name", "splitting", "normalizer", "problem"),
    [
        ("Qwen2Tokenizer", THREE_DIGITS, None, "gives other tokens for '1234567890 12 345'"),
        ("GPT2Tokenizer", BYTE_LEVEL, normalizers.NFC(), "gives other tokens for 'cafe"),
        ("GPTNeoXTokenizer", BYTE_LEVEL, normalizers.Lowercase(), "gives other tokens for"),
        ("CohereTokenizer", BYTE_LEVEL, None, "gives other tokens for"),
        ("CodeLlamaTokenizer", BYTE_LEVEL, None, "gives other tokens for"),
        ("AlbertTokenizer", BYTE_LEVEL, None, "cannot be built"),
        ("GemmaTokenizer", BYTE_LEVEL, None, "gives other tokens for"),
    ],
)
def test_a_class_that_reads_otherwise_is_replaced_by_the_plain_one(
    tmp_path: Path,
    name: str,
    splitting: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None,
    problem: str,
) -> None:
    folder = save_bpe(tmp_path / "t", name, splitting, normalizer)
    found = load_huggingface_tokenizer(folder, f"--tokenizer {folder}")
    assert problem in found.note
    assert class_warning(folder) == found.note
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS[:3]:
        assert found.tokenizer(text)["input_ids"] == expected.encode(text).ids
    assert found.tokenizer.eos_token_id == expected.token_to_id(END)


@pytest.mark.parametrize("name", [PLAIN_CLASS, "TokenizersBackend", None])
def test_a_class_that_reads_alike_says_nothing(tmp_path: Path, name: str | None) -> None:
    folder = save_bpe(tmp_path / "t", name, THREE_DIGITS)
    assert load_huggingface_tokenizer(folder, "").note == ""
    assert class_warning(folder / "tokenizer.json") is None


def test_a_tokenizer_that_no_class_reads_alike_is_refused(tmp_path: Path) -> None:
    """A configured token that the file does not have takes a piece of each text out."""
    folder = save_bpe(tmp_path / "t", PLAIN_CLASS)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    token = {"content": "year", "special": False, "lstrip": False, "rstrip": False}
    settings["added_tokens_decoder"] = {"300": {**token, "content": "12", "normalized": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"^--tokenizer x: transformers gives other tokens"):
        load_huggingface_tokenizer(folder, "--tokenizer x")


def test_preprocessing_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_bpe(tmp_path / "t", "Qwen2Tokenizer", THREE_DIGITS)
    (tmp_path / "a.txt").write_text("In 1234567.")
    config = PreprocessConfig(
        inputs=(tmp_path / "a.txt",), output_prefix=tmp_path / "text", tokenizer=folder, workers=1
    )
    with caplog.at_level(logging.WARNING):
        preprocess(config)
    assert "warning: --tokenizer" in caplog.text
    assert f"{PLAIN_CLASS} is used" in caplog.text


def test_evaluation_reads_the_tokens_of_training(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    tokenizer = save_bpe(tmp_path / "t", "Qwen2Tokenizer", THREE_DIGITS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, model / name)
    loaded = load_model(check_model_folder(model), "float32", CPU)
    (note,) = loaded.notes
    assert f"{PLAIN_CLASS} is used" in note
    expected = Tokenizer.from_file(str(model / "tokenizer.json")).encode("In 1234567.").ids
    assert loaded.tokenizer("In 1234567.", add_special_tokens=False)["input_ids"] == expected
