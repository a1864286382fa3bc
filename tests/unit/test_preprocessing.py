"""Text to .bin/.idx: nothing lost, the same bytes for any worker count, nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from megatron_tst.commands.preprocess_data import parse_arguments
from megatron_tst.corpus import encoding, indexed_writer, readers
from megatron_tst.corpus.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_tst.corpus.preprocessing import PreprocessConfig, PreprocessProgress, preprocess
from megatron_tst.corpus.sources import find_sources
from megatron_tst.corpus.tokenizer import (
    END_OF_DOCUMENT,
    byte_tokenizer,
    load_tokenizer,
    train_byte_level_bpe,
    turn_end_hint,
)

ROOT = Path(__file__).parents[2]
WORDS = [
    "def",
    "return",
    " the",
    "größe",
    "東京",
    "🎉",
    "\n    ",
    "\r\n",
    END_OF_DOCUMENT,
    "0x1F",
    " ",
]
TOKENIZERS: list[dict[str, Any]] = [{"byte_level": True}, {"train_bpe": 300}]


def make_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(WORDS, k=generator.randint(1, 400))) for _ in range(count)]


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(corpus: Path, prefix: Path, **options: Any) -> PreprocessConfig:
    if not {"tokenizer", "train_bpe"} & options.keys():
        options.setdefault("byte_level", True)
    return PreprocessConfig((corpus,), prefix, **options)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read_tokens(prefix: Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(str(prefix))]


@pytest.mark.parametrize("choice", TOKENIZERS)
@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back_from_the_dataset(
    tmp_path: Path, choice: dict[str, Any], append_eod: bool
) -> None:
    texts = make_texts(30)
    corpus = write_json_lines(tmp_path / "a.jsonl", [*texts, ""])
    prefix = tmp_path / "new" / "corpus.v1"
    result = preprocess(config(corpus, prefix, append_eod=append_eod, **choice))
    documents = read_tokens(prefix)
    tokenizer = AutoTokenizer.from_pretrained(f"{prefix}-tokenizer", local_files_only=True)
    if append_eod:
        assert {document.pop() for document in documents} == {result.eod_id}
    # Text that mentions the end-of-document token holds no such token.
    assert all(result.eod_id not in document for document in documents)
    assert [tokenizer.decode(document) for document in documents] == texts
    assert result.documents == len(texts)
    assert result.empty_documents == 1
    assert result.tokens == sum(map(len, documents)) + append_eod * len(texts)
    assert result.text_bytes == sum(len(text.encode()) for text in texts)
    assert json.loads(prefix.with_name("corpus.v1.json").read_text()) == result.to_dict()
    definition = Path(result.tokenizer, "tokenizer.json").read_bytes()
    assert sha256(definition).hexdigest() == result.tokenizer_sha256
    left_out = prefix.with_name("corpus.v1.left-out.log")
    assert left_out.read_text() == f"{corpus}:31: empty\n"
    assert len(list(prefix.parent.iterdir())) == 5  # also .bin, .idx, .json, -tokenizer


def write_untidy_lines(path: Path, texts: list[str]) -> list[str]:
    """Lines as they come from elsewhere; returns what is to be said of those left out."""
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines[3] += b"\r"
    # In front of a long line, behind it and on both sides of it: blocks end in many places.
    lines[50] = json.dumps({"text": "long line " * 1000}).encode()
    bad = {0: b"", 7: b'{"text": ""}', 8: b"\r", 20: b"no JSON", 49: b" ", 51: b'{"text": "\xff"}'}
    bad |= {98: b'{"text": ""}', 99: b"[1]", 100: b"\t"}
    for number, line in bad.items():
        lines.insert(number, line)
    # The last line lacks its end.
    path.write_bytes(b"\n".join(lines))
    said = {7: "empty", 20: "malformed", 51: "invalid", 98: "empty", 99: "a"}
    return [f"{path}:{number + 1}: {word}" for number, word in said.items()]


@pytest.mark.slow
@pytest.mark.parametrize("choice", TOKENIZERS)
def test_output_does_not_depend_on_workers_or_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any]
) -> None:
    corpus = tmp_path / "a.jsonl"
    left_out = write_untidy_lines(corpus, texts := make_texts(100))
    written = set()
    for workers, batch in [(1, 1 << 18), (1, 2000), (2, 2000), (3, 1)]:
        monkeypatch.setattr(readers, "BATCH_BYTES", batch)
        prefix = tmp_path / f"{workers}-{batch}"
        options = choice | {"workers": workers, "max_bad_documents": 3}
        result = preprocess(config(corpus, prefix, **options))
        files = [prefix.with_suffix(".bin"), prefix.with_suffix(".idx")]
        files.append(prefix.with_suffix(".left-out.log"))
        files.append(Path(result.tokenizer, "tokenizer.json"))
        written.add(b"".join(file.read_bytes() for file in files))
        said = files[2].read_text().splitlines()
        assert [" ".join(line.split(" ")[:2]).rstrip(",") for line in said] == left_out
        counts = (result.documents, result.empty_documents, result.bad_documents)
        assert counts == (len(texts), 2, 3)
    assert len(written) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:52 has invalid UTF-8 .*\(now 1\)"):
        preprocess(config(corpus, tmp_path / "out", **options | {"max_bad_documents": 1}))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_equal_those_of_megatrons_builder(tmp_path: Path, dtype: Any) -> None:
    documents = [np.arange(length, dtype=dtype) for length in (5, 1, 300)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedDatasetWriter(
        tmp_path / "ours.bin", tmp_path / "ours.idx", np.dtype(dtype)
    ) as writer:
        writer.add_documents(np.concatenate(documents[:2]), [5, 1])
        writer.add_documents(documents[2], [300])
    for document in documents:
        builder.add_document(document, [document.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{whose}.{suffix}" for whose in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_smallest_dtype_that_holds_the_vocabulary() -> None:
    names = [token_dtype(size).name for size in (256, 65_500, 65_536, 65_537, 128_256)]
    assert names == ["uint16", "uint16", "uint16", "int32", "int32"]


def test_byte_tokenizer_has_exactly_the_bytes() -> None:
    ours = byte_tokenizer()
    tokenizer = Tokenizer.from_str(ours.definition)
    assert (ours.vocab_size, ours.eod_id) == (256, 0)
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    code_points = [*range(1, 0xD800), *range(0xE000, 0x110000, 31)]
    text = "".join(map(chr, code_points))
    assert bytes(tokenizer.encode(text).ids) == text.encode()
    # C0, C1 and F5 to FF never occur in UTF-8, so no text can produce their ids.
    assert set(range(1, 256)) - set(text.encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}


BYTES = encoding.EncoderSettings(byte_tokenizer().definition, np.dtype(np.uint16))
BYTE_ENCODER = encoding.Encoder(BYTES)
BYTE_TOKENIZER = Tokenizer.from_str(byte_tokenizer().definition)


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_byte_tokenizer_round_trips_any_text(text: str) -> None:
    ids = BYTE_ENCODER.encode(text)
    assert ids.astype(np.uint8).tobytes() == text.encode()
    assert BYTE_TOKENIZER.decode(ids.tolist(), skip_special_tokens=False) == text


def test_bpe_training_is_exact_in_size_and_deterministic() -> None:
    first, second = (train_byte_level_bpe(make_texts(50), 280) for _ in range(2))
    assert first == second
    assert (first.vocab_size, first.eod_id, first.eod_token) == (280, 0, END_OF_DOCUMENT)
    assert first != train_byte_level_bpe(make_texts(50), 281)


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_byte_level_bpe(make_texts(9), 270)])
def test_megatron_loads_saved_tokenizers(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    tokenizer.save_files(tmp_path)
    arguments = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path),
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        pad_vocab_size=False,
        use_gigatoken=False,  # of main
    )
    for name in ("chat_template", "vocab_file", "merge_file", "special_tokens", "metadata_path"):
        setattr(arguments, name, None)
    loaded = build_tokenizer(arguments)
    assert (loaded.vocab_size, loaded.eod) == (tokenizer.vocab_size, tokenizer.eod_id)
    text = " größe , don 't\n\t x ."
    assert loaded.detokenize(loaded.tokenize(text)) == text
    assert load_tokenizer(tmp_path) == load_tokenizer(tmp_path / "tokenizer.json") == tokenizer


def test_inference_settings_of_a_tokenizer_do_not_change_documents(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_tokenizer().definition)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    folder = save_tokenizer(tmp_path / "t", tokenizer, eos_token={"content": END_OF_DOCUMENT})
    corpus = write_json_lines(tmp_path / "a.jsonl", ["longer than four", "ab"])
    preprocess(config(corpus, tmp_path / "out", tokenizer=folder))
    assert list(map(bytes, read_tokens(tmp_path / "out"))) == [b"longer than four\0", b"ab\0"]


def test_long_documents_are_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10)
    text = "a\nbcd\nefghijklmnopqrstuvwxyz\n\nä"
    encoder = encoding.Encoder(replace(BYTES, eod_id=0, append_eod=True))
    assert bytes(encoder.encode(text).tolist()) == text.encode() + b"\0"
    pieces = list(encoding.split_long(text))
    assert pieces == ["a\nbcd\n", "efghijklmn", "opqrstuvwx", "yz\n\nä"]


def test_a_document_too_long_for_the_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (tmp_path / "bin", tmp_path / "idx")
    too_long = np.broadcast_to(np.uint16(0), 2**31)  # without memory of that size
    message = r"idx has 2147483648 tokens, .* at most 2147483647: split"
    with (
        pytest.raises(ValueError, match=rf"^a document of .*{message}"),
        IndexedDatasetWriter(*paths, np.dtype(np.uint16)) as writer,
    ):
        writer.add_documents(too_long, [too_long.size])
    assert not paths[1].exists()

    monkeypatch.setattr(indexed_writer, "_MAX_DOCUMENT_TOKENS", 5)
    corpus = write_json_lines(tmp_path / "a.jsonl", ["12345", "123456"])
    with pytest.raises(ValueError, match=r"a\.jsonl:2 has 6 tokens, .* at most 5: split it"):
        preprocess(config(corpus, tmp_path / "out", append_eod=False))


def test_progress_ends_at_the_totals(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", make_texts(20))
    seen: list[PreprocessProgress] = []
    result = preprocess(config(corpus, tmp_path / "out", train_bpe=300), seen.append)
    size = corpus.stat().st_size
    assert [seen[0].stage, seen[19].stage, seen[20].stage] == ["train", "train", "tokenize"]
    last = PreprocessProgress("tokenize", size, size, 20, result.tokens, seen[-1].seconds)
    assert seen[-1] == last
    assert last.seconds > 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": Path("x"), "byte_level": True}, "2 tokenizers are chosen: .*exactly one"),
        ({"byte_level": False}, "0 tokenizers are chosen: .*exactly one"),
        ({"eod_token": "</s>"}, "--eod-token '</s>' goes with --tokenizer"),
        ({"workers": 0}, "--workers is 0: use 1 or more"),
        ({"max_bad_documents": -1}, "--max-bad-documents is -1: use 0 or more"),
        ({"max_empty_documents": -1}, "--max-empty-documents is -1: use 0 or more"),
        ({"train_bpe": 256}, "--train-bpe is 256: .*use --byte-level"),
        ({"tokenizer": Path("missing")}, "--tokenizer missing does not exist"),
        ({"extensions": (".py", "txt")}, "--extensions has 'txt': .*like .py"),
        ({"extensions": (".jsonl.gz",)}, "--extensions has '.jsonl.gz': .*without .gz"),
        ({"max_bytes": 3}, "--input .*gave no documents .*--max-bytes"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ValueError, match=message):
        preprocess(config(corpus, tmp_path / "out", **options))
    assert list(tmp_path.iterdir()) == [corpus]


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    folder = save_tokenizer(tmp_path / "no_eos", words)
    with pytest.raises(ValueError, match=r"names no eos_token .*--eod-token"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="--eod-token 'c' is not in the vocabulary"):
        load_tokenizer(folder, "c")
    assert load_tokenizer(folder, "b").eod_id == 1
    gap = save_tokenizer(tmp_path / "gap", Tokenizer(models.WordLevel({"a": 0, "b": 5}, "a")))
    with pytest.raises(ValueError, match="token id 5 but 2 entries"):
        load_tokenizer(gap, "b")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON object"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no Hugging Face tokenizer"):
        load_tokenizer(folder, "b")


@pytest.mark.parametrize("known", ["<|end_of_text|>", "<|endoftext|>", None])
@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|im_end|>", "</s>"])
def test_the_end_of_a_turn_is_no_end_of_a_document(
    tmp_path: Path, known: str | None, eos: str
) -> None:
    definition = byte_tokenizer().definition.replace(END_OF_DOCUMENT, known or "<other>")
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.add_special_tokens([eos])
    hint = turn_end_hint(load_tokenizer(save_tokenizer(tmp_path / "t", tokenizer, eos_token=eos)))
    if eos == "</s>":
        assert hint is None
    else:
        advice = f"--eod-token '{known}'" if known else "--eod-token with the token of its base"
        assert f"documents end with {eos}, " in (hint or "")
        assert advice in (hint or "")


def test_a_hint_is_given_unless_the_end_is_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    definition = byte_tokenizer().definition.replace(END_OF_DOCUMENT, "<|im_end|>")
    tokenizer = Tokenizer.from_str(definition)
    folder = save_tokenizer(tmp_path / "t", tokenizer, eos_token="<|im_end|>")
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    for number, chosen in enumerate((None, "<|im_end|>")):
        preprocess(config(corpus, tmp_path / str(number), tokenizer=folder, eod_token=chosen))
        assert ["documents end with" in message for message in caplog.messages] == [True]


def test_text_outside_the_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="?"))
    folder = save_tokenizer(tmp_path / "t", words, eos_token="b")
    corpus = write_json_lines(tmp_path / "a.jsonl", ["a", "unseen words"])
    with pytest.raises(ValueError, match=r"jsonl:2: --tokenizer cannot encode .*'unseen words'"):
        preprocess(config(corpus, tmp_path / "out", tokenizer=folder))
    assert sorted(tmp_path.iterdir()) == [corpus, folder]


def test_existing_outputs_are_replaced_on_request_only(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["old", "text"])
    preprocess(config(corpus, tmp_path / "out"))
    write_json_lines(corpus, ["new"])
    with pytest.raises(ValueError, match=r"out\.bin.*out\.idx.*already there.*--overwrite"):
        preprocess(config(corpus, tmp_path / "out"))
    preprocess(config(corpus, tmp_path / "out", overwrite=True))
    assert list(map(bytes, read_tokens(tmp_path / "out"))) == [b"new\0"]


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "corpus.json", ["text"])
    (tmp_path / "link.jsonl").symlink_to(corpus)
    for path in (corpus, tmp_path / "link.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"would write .*corpus\.json over the input"):
            preprocess(config(path, tmp_path / "corpus", overwrite=True))
    tokenizer = tmp_path / "corpus.json"
    byte_tokenizer().save_files(tmp_path / "bytes")
    (tmp_path / "bytes" / "tokenizer.json").rename(tokenizer)
    text = write_json_lines(tmp_path / "text.jsonl", ["text"])
    options = {"tokenizer": tokenizer, "eod_token": END_OF_DOCUMENT, "overwrite": True}
    before = tokenizer.read_bytes()
    with pytest.raises(ValueError, match=r"over the input .*corpus\.json: choose another prefix"):
        preprocess(config(text, tmp_path / "corpus", **options))
    assert tokenizer.read_bytes() == before


def test_lists_of_what_was_left_out_are_replaced_on_request_only(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "out.left-out.log").write_text("precious")
    with pytest.raises(ValueError, match=r"out\.left-out\.log already there"):
        preprocess(config(corpus, tmp_path / "out"))
    assert (tmp_path / "out.left-out.log").read_text() == "precious"


def test_no_tokenizer_of_the_corpus_before_is_left(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    beside, other = tmp_path / "out-tokenizer", tmp_path / "other"
    train_byte_level_bpe(["text " * 9], 260).save_files(other)
    preprocess(config(corpus, tmp_path / "out"))
    # The one that is given may be the one that lies there, by whatever name.
    (tmp_path / "here").symlink_to(tmp_path)
    for same in (beside, beside / "tokenizer.json", tmp_path / "here" / beside.name):
        preprocess(config(corpus, tmp_path / "out", tokenizer=same, overwrite=True))
        assert (beside / "tokenizer_config.json").exists()
    (beside / "notes.txt").write_text("precious")
    for options in ({"tokenizer": other}, {"byte_level": True}):
        with pytest.raises(ValueError, match=r"out-tokenizer is another .* holds notes\.txt"):
            preprocess(config(corpus, tmp_path / "out", overwrite=True, **options))
    (beside / "notes.txt").unlink()
    preprocess(config(corpus, tmp_path / "out", tokenizer=other, overwrite=True))
    assert not beside.exists()
    # Nor is one taken for that of a corpus which is new.
    byte_tokenizer().save_files(tmp_path / "new-tokenizer")
    with pytest.raises(ValueError, match=r"new: .*new-tokenizer already there"):
        preprocess(config(corpus, tmp_path / "new", tokenizer=other))


def test_a_linked_tokenizer_is_not_written_to(tmp_path: Path) -> None:
    corpus, other = write_json_lines(tmp_path / "a.jsonl", ["text"]), tmp_path / "other"
    train_byte_level_bpe(["text " * 9], 260).save_files(other)
    (tmp_path / "out-tokenizer").symlink_to(other)
    before = (other / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match=r"out-tokenizer is no folder that preprocessing made"):
        preprocess(config(corpus, tmp_path / "out", overwrite=True))
    preprocess(config(corpus, tmp_path / "out", tokenizer=other))
    assert (tmp_path / "out-tokenizer" / "tokenizer.json").read_bytes() == before


def test_a_folder_is_no_prefix(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "in").mkdir()
    prefix = f"{tmp_path / 'in'}/"
    for other in (".", "..", f"{prefix}.", ""):
        with pytest.raises(ValueError, match=r"--output-prefix .*names a folder: add the name"):
            parse_arguments(["--input", str(corpus), "--byte-level", "--output-prefix", other])
    process = command("--input", corpus, "--output-prefix", prefix, "--byte-level")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"error: --output-prefix {prefix} names a folder: add the name")
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "in"]


def test_output_folder_must_be_writable(tmp_path: Path) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ValueError, match=r"--output-prefix: cannot write to .*writable folder"):
        preprocess(config(corpus, corpus / "folder" / "out"))


def test_few_batches_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    corpus = write_json_lines(tmp_path / "a.jsonl", make_texts(100))
    batches = readers.read_batches(find_sources([corpus], (".jsonl",)))
    with closing(encoding.encode_in_order(batches, BYTES, workers=2)) as encoded:
        next(encoded)
        assert len(list(batches)) == 100 - 2 * encoding.IN_FLIGHT_BATCHES_PER_WORKER


def test_workers_import_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_tst.corpus.preprocessing; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "tokenizers" in loaded
    assert not {"torch", "megatron", "transformers"} & set(loaded)


@pytest.mark.slow
def test_killed_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1)
    corpus = write_json_lines(tmp_path / "a.jsonl", make_texts(100))

    # Other tests of this session keep workers of their own.
    others = set(multiprocessing.active_children())

    def kill_workers(progress: PreprocessProgress) -> None:
        # None is left when a batch that was done before is reported.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()

    with pytest.raises(ChildProcessError, match=r"tokenizing process died.*--workers 2"):
        preprocess(config(corpus, tmp_path / "out", workers=2), kill_workers)
    assert list(tmp_path.iterdir()) == [corpus]


def command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts background jobs with the interrupt ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_command_line(tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    for name in ("a.md", "b.png", "c.PNG", ".hidden.md"):
        (folder / name).write_text("text")
    arguments = ["--input", folder, "--output-prefix", tmp_path / "out", "--byte-level"]
    output, _ = (process := command(*arguments, "--no-append-eod")).communicate(timeout=60)
    assert process.returncode == 0
    assert "1 documents, 4 tokens (uint16), vocabulary 256, end of document 0" in output
    assert "not read in folders: 2 .png, 1 hidden files\n" in output
    unread = json.loads((tmp_path / "out.json").read_text())["unread_files"]
    assert unread == {".png": 2, "hidden files": 1}
    assert read_tokens(tmp_path / "out") == [list(b"text")]
    output, errors = (process := command(*arguments)).communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith(f"error: --output-prefix {tmp_path / 'out'}")
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_kill_leaves_no_output_and_no_process(tmp_path: Path, kill: signal.Signals) -> None:
    corpus = write_json_lines(tmp_path / "a.jsonl", ["größe " * 100_000] * 100)  # takes seconds
    # A tokenizer without a fast route.
    words = Tokenizer(models.WordLevel({"größe": 0, "<eos>": 1}, unk_token="größe"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = save_tokenizer(tmp_path / "t", words, eos_token="<eos>")
    prefix = tmp_path / "out"
    process = command("--input", corpus, "--output-prefix", prefix, "--tokenizer", folder)
    partial = prefix.with_name("out.partial")
    while not (partial / "bin").exists() or not (partial / "bin").stat().st_size:
        assert process.poll() is None
        sleep(0.01)
    process.send_signal(kill)
    # The workers hold the output pipes open: this returns when they have ended too.
    process.communicate(timeout=30)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    # Nothing had time to say that the work so far is worth keeping.
    left = {corpus, folder} | ({partial} if kill == signal.SIGKILL else set())
    assert set(tmp_path.iterdir()) == left
