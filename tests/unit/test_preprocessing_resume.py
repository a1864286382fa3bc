"""A preprocessing run that was interrupted is gone on with, and ends in the same bytes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.corpus import preprocessing, readers
from megatron_tst.corpus.partial_run import PartialRun, RunProgress
from megatron_tst.corpus.preprocessing import PreprocessConfig, PreprocessProgress, preprocess

SUFFIXES = (".bin", ".idx", ".json", ".left-out.log")


class KilledError(Exception):
    pass


def write_inputs(folder: Path) -> Path:
    """Forty documents in four files, some of them bad or empty."""
    folder.mkdir()
    for number in range(2):
        texts = ["" if i == 4 else f"{number} {i} größe " * 20 for i in range(14)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        lines.insert(9, "no document\n")
        (folder / f"{number}.jsonl").write_text("".join(lines))
    packed = gzip.compress((folder / "1.jsonl").read_bytes())
    (folder / "2.jsonl.gz").write_bytes(packed)
    (folder / "3.txt").write_text("the last")
    return folder


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(preprocessing, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(readers, "BATCH_BYTES", 1000)
    return write_inputs(tmp_path / "in")


def config(inputs: Path, prefix: Path, **options: Any) -> PreprocessConfig:
    return PreprocessConfig(
        (inputs,), prefix, **{"train_bpe": 280, "max_bad_documents": 3} | options
    )


def outputs(prefix: Path) -> list[bytes]:
    names = [prefix.name + suffix for suffix in SUFFIXES]
    content = [prefix.with_name(name).read_bytes() for name in names]
    tokenizer = prefix.with_name(prefix.name + "-tokenizer")
    content[2] = content[2].replace(str(tokenizer).encode(), b"")
    return [*content, (tokenizer / "tokenizer.json").read_bytes()]


def run_until(config: PreprocessConfig, batches: int) -> list[PreprocessProgress]:
    """Runs until so many batches have been written; the state on disk is one batch behind."""
    seen: list[PreprocessProgress] = []

    def interrupt(progress: PreprocessProgress) -> None:
        if progress.stage == "tokenize":
            seen.append(progress)
            if len(seen) == batches:
                raise KilledError

    preprocess(config, interrupt)
    return seen


def test_a_run_interrupted_many_times_ends_in_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    preprocess(config(inputs, tmp_path / "whole"))
    workers = 1
    for _ in range(20):
        try:
            seen = run_until(config(inputs, tmp_path / "parts", workers=workers), 7)
            break
        except KilledError:
            # A different number each time: it must not matter.
            workers = workers % 3 + 1
    assert seen[0].tokens_before > 0
    assert seen[0].tokens > seen[0].tokens_before
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    left_out = (tmp_path / "whole.left-out.log").read_text().splitlines()
    assert [line.partition(f"{inputs}/")[2].split(" ")[0] for line in left_out] == [
        *("0.jsonl:5:", "0.jsonl:10:", "1.jsonl:5:", "1.jsonl:10:", "2.jsonl.gz:5:"),
        "2.jsonl.gz:10:",
    ]


def test_limits_count_from_the_beginning(inputs: Path, tmp_path: Path) -> None:
    limits = {"max_documents": 20, "byte_level": True, "train_bpe": None}
    whole = preprocess(config(inputs, tmp_path / "whole", **limits))
    with pytest.raises(KilledError):
        run_until(config(inputs, tmp_path / "parts", **limits), 5)
    assert preprocess(config(inputs, tmp_path / "parts", **limits)).documents == 20
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")
    assert whole.documents == 20


def test_interruption_when_all_is_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(config(inputs, tmp_path / "whole"))
    save = PartialRun.save

    def interrupt(run: PartialRun, progress: RunProgress) -> None:
        if progress.is_complete:
            raise KilledError
        save(run, progress)

    with monkeypatch.context() as patched:
        patched.setattr(PartialRun, "save", interrupt)
        with pytest.raises(KilledError):
            preprocess(config(inputs, tmp_path / "parts"))
    preprocess(config(inputs, tmp_path / "parts"))
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_interruption_while_renaming(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(config(inputs, tmp_path / "whole"))
    replace, prefix = os.replace, tmp_path / "parts"

    def interrupt(source: Path, target: Path) -> None:
        # Once for each file of the outputs: every run gets one further than the one before.
        if target.parent == tmp_path and target not in done:
            done.add(target)
            raise KilledError
        replace(source, target)

    done: set[Path] = set()
    monkeypatch.setattr(os, "replace", interrupt)
    for _ in SUFFIXES:
        with pytest.raises(KilledError):
            preprocess(config(inputs, prefix))
        assert not prefix.with_name("parts.idx").exists()
    result = preprocess(config(inputs, prefix))
    assert len(done) == len(SUFFIXES)
    assert outputs(prefix) == outputs(tmp_path / "whole")
    assert result.documents == 40


OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"json_key": "body"}, "--json-key was 'text' and is 'body'"),
    ({"append_eod": False}, "--append-eod was True and is False"),
    ({"train_bpe": 300}, "tokenizer was 'byte-level BPE of 280' and is 'byte-level BPE of 300'"),
    ({"max_documents": 5}, "--max-documents was None and is 5"),
    ({"shuffle_seed": 1}, "inputs was"),
    ({"encoder": "gigatoken"}, "--encoder was 'auto' and is 'gigatoken'"),
    ({"encoder": "tokenizers"}, r"--encoder was .* gigatoken was '[\d.]+' and is None"),
]


def test_other_settings_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run_until(config(inputs, tmp_path / "out"), 3)
    for change, message in OTHER_SETTINGS:
        with pytest.raises(ValueError, match=rf"an interrupted run .*{message}.*--start-anew"):
            preprocess(config(inputs, tmp_path / "out", **change))
    assert (tmp_path / "out.partial").is_dir()


def test_starting_anew_discards_what_was_done(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run_until(config(inputs, tmp_path / "out"), 3)
    (inputs / "3.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"inputs was .*--start-anew"):
        preprocess(config(inputs, tmp_path / "out"))
    preprocess(config(inputs, tmp_path / "out", start_anew=True))
    preprocess(config(inputs, tmp_path / "whole"))
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_one_bad_document_too_many_can_be_allowed_later(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.jsonl:10 has malformed.*--max-bad-documents \(now 1"):
        preprocess(config(inputs, tmp_path / "out", max_bad_documents=1))
    result = preprocess(config(inputs, tmp_path / "out"))
    assert (result.documents, result.bad_documents, result.empty_documents) == (40, 3, 3)


def test_two_runs_of_one_prefix_are_refused(inputs: Path, tmp_path: Path) -> None:
    with (
        PartialRun(tmp_path / "out.partial", {}, start_anew=False),
        pytest.raises(ValueError, match=r"out\.partial is in use by another run"),
    ):
        preprocess(config(inputs, tmp_path / "out", start_anew=True))


def test_lost_data_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run_until(config(inputs, tmp_path / "out"), 5)
    (tmp_path / "out.partial" / "bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bin is shorter than .*--start-anew"):
        preprocess(config(inputs, tmp_path / "out"))
