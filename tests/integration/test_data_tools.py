"""The tools that look at a corpus, as they are called from a shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_tst.commands import fit_target_weights, inspect_data
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.corpus.tokenizer import byte_tokenizer, train_byte_level_bpe
from megatron_tst.settings.config import SuperpositionConfig
from tests.corpus import write_documents

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
DRAWN = ["--bag-sizes", "2:3,4:2", "--sequence-length", "32"]
BAGS = ["--bag-size", "4", "--sequence-length", "16"]


def test_inspection_of_a_corpus(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(Path(f"{corpus}.json").read_text())
    assert inspect_data.main([str(corpus), "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert f"documents          {report['documents']:,} (0 empty)" in output
    assert f"tokens             {report['tokens']:,} (uint16)" in output
    assert f"tokenizer_sha256  {report['tokenizer_sha256']}" in output
    assert "warning" not in output
    # The first document is the first file of the folder.
    assert '\'"""The asyncio package, tracking PEP 3156."""\\n\\n#' in output
    assert "\x1b" not in output
    assert (tmp_path / "text-lengths.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["text-lengths.png"]


def bag_rows(output: str) -> list[tuple[str, str, str]]:
    """Position, input and target of each row of the last table, cut where its columns begin."""
    header, *rows = output[output.rindex("position") :].splitlines()
    middle, right = header.index("input"), header.index("target")
    cells = [(row[:middle].strip(), row[middle:right].strip(), row[right:].strip()) for row in rows]
    return [row for row in cells if row[0] not in ("", "...")]


def test_bags_of_a_sample(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main([str(corpus), *BAGS, "--sample", "5", "3"]) == 0
    output = capsys.readouterr().out
    assert (
        "of phase 1: bag size 4, variant full, document boundary cross, sequence length 16"
        in output
    )
    rows = bag_rows(output)
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5", "14", "15"]
    for (position, _, target), (next_position, following, _) in pairwise(rows):
        assert target == following or int(next_position) > int(position) + 1


@pytest.mark.parametrize(("variant", "lengths"), [("input-only", (4, 1)), ("output-only", (1, 4))])
def test_bags_of_the_variants(
    tmp_path: Path, variant: str, lengths: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    # Without a tokenizer the ids are shown.
    write_documents(tmp_path / "text", [np.arange(500)])
    assert inspect_data.main([str(tmp_path / "text"), *BAGS, "--variant", variant]) == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'text'}-tokenizer is missing: token ids follow" in output
    for _, tokens, targets in bag_rows(output):
        assert (len(tokens.split()), len(targets.split())) == lengths
        assert int(targets.split()[0]) == int(tokens.split()[-1]) + 1


def test_bags_of_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "text", [np.arange(5000)])
    schedule = ["--schedule", "4:2,2:3", "--sequence-length", "16"]
    places = [str(place) for place in range(5)]
    assert inspect_data.main([str(tmp_path / "text"), *schedule, "--sample", *places]) == 0
    output = capsys.readouterr().out
    tables = output.split("\nsample ")[1:]
    for place, (phase, size) in enumerate([(1, 4), (1, 4), (2, 2), (2, 2), (2, 2)]):
        assert tables[place].startswith(f"{place} of phase {phase}: bag size {size}, variant full")
        assert {len(tokens.split()) for _, tokens, _ in bag_rows(tables[place])} == {size}
    begins = sorted(int(begin) for begin in re.findall(r"begins at token (\d+)", output))
    assert begins == [0, 64, 128, 160, 192]


def test_bags_that_keep_to_their_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [np.array([*text.encode(), 0]) for text in ("one", "seven", "and", "eleven") * 20]
    write_documents(tmp_path / "text", texts)
    byte_tokenizer().save_files(tmp_path / "text-tokenizer")
    assert inspect_data.main([str(tmp_path / "text"), *BAGS, "--document-boundary", "align"]) == 0
    rows = bag_rows(capsys.readouterr().out)
    bags = {text for row in rows for text in row[1:]}
    end = "<|endoftext|>"
    parts = ["one" + end, "seve", "n" + end, "and" + end, "elev", "en" + end]
    assert bags <= {repr(part) + " -" * (4 - len(part.replace(end, "."))) for part in parts}
    assert any(bag.endswith(" -") for bag in bags)


def test_text_is_neither_markup_nor_control_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[bold]a[/bold] :smile: \x1b[31m \x9b31m é"
    write_documents(tmp_path / "text", [np.array([*text.encode(), 0])])
    byte_tokenizer().save_files(tmp_path / "text-tokenizer")
    assert inspect_data.main([str(tmp_path / "text")]) == 0
    assert repr(text + "<|endoftext|>") in capsys.readouterr().out


def test_tokenizer_that_does_not_belong_to_the_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    prefix, other = tmp_path / "text", tmp_path / "other"
    preprocess(PreprocessConfig((tmp_path / "a.txt",), prefix, byte_level=True))
    train_byte_level_bpe(["text " * 9], 260).save_files(other)
    (tmp_path / "text-tokenizer").rename(tmp_path / "own")
    shutil.copytree(other, tmp_path / "text-tokenizer")
    assert inspect_data.main([str(prefix)]) == 2
    error = capsys.readouterr().err
    assert "text-tokenizer is not the tokenizer of the corpus" in error
    assert error.count("\n") == 1
    assert inspect_data.main([str(prefix), "--tokenizer", str(tmp_path / "own")]) == 0
    output = capsys.readouterr().out
    assert "warning" not in output
    assert "'text<|endoftext|>'" in output
    # One that is named may be the same in another form.
    assert inspect_data.main([str(prefix), "--tokenizer", str(other)]) == 0
    assert f"warning: --tokenizer {other} is not the file of which" in capsys.readouterr().out


def test_report_that_does_not_belong_to_the_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "text", [np.arange(5)])
    (tmp_path / "text.json").write_text('{"documents": 1, "tokens": 6}')
    assert inspect_data.main([str(tmp_path / "text")]) == 0
    assert "text.json says 6 tokens, the index 5." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "/none"], "--tokenizer /none does not exist: name a tokenizer.json"),
        (["--bag-size", "4"], "--bag-size 4 goes with --sequence-length"),
        (["--sample", "0"], "--sample goes with --bag-size"),
        (["--schedule", "4:9"], "--schedule 4:9 goes with --sequence-length"),
        ([*BAGS, "--schedule", "4:9"], "--bag-size 4 and --schedule 4:9 both set bag sizes"),
        (
            ["--schedule", "4:.1", "--sequence-length", "8"],
            "--schedule is '4:.1': .* write samples",
        ),
        (["--schedule", "4", "--sequence-length", "8"], "--schedule is '4': write bag size:share"),
        (
            ["--schedule", "4:2,2:1", "--sequence-length", "8", "--sample", "3"],
            "--sample 3 does not exist: phases 1 to 2 has 3 samples",
        ),
        ([*BAGS, "--bag-sizes", "2,4"], "--bag-size 4 and --bag-sizes 2,4 both set bag sizes"),
        ([*BAGS, "--global-batch-size", "4"], "--global-batch-size 4 goes with --bag-sizes"),
        (DRAWN, ".* are drawn for the steps of a run, and --phase-1-samples is None: pass its"),
        ([*DRAWN, "--phase-1-samples", "9"], ".* and --global-batch-size is None: pass its value"),
        (
            [*DRAWN, "--phase-1-samples", "9", "--global-batch-size", "4"],
            ".*--phase-1-samples 9 are no whole steps of --global-batch-size 4",
        ),
        (["--bag-sizes", "2", "--sequence-length", "8"], "--bag-sizes is '2': name two sizes"),
        ([*BAGS, "--split", "1.2.3"], "--split '1.2.3' gives training no share"),
        (["--seed", "0"], "--seed goes with --bag-size"),
        ([*BAGS, "--sample", "999999"], r"--sample 999999 does not exist: an epoch .* has \d+"),
        (["--bag-size", "1", "--sequence-length", "8"], "--bag-size is 1: use 2 or more"),
    ],
)
def test_bad_arguments(
    corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_data.main([str(corpus), *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.match(f"error: {message}", errors)
    assert errors.count("\n") == 1


@pytest.mark.parametrize("tool", [inspect_data, fit_target_weights])
@pytest.mark.parametrize(
    ("suffix", "size", "message"),
    [
        (".idx", None, r"text\.idx is missing"),
        (".bin", None, r"text\.bin is missing"),
        (".idx", 50, r"text\.idx has 50 bytes and needs"),
        (".bin", 100, r"text\.bin has 100 bytes and its index"),
    ],
)
def test_damaged_files(
    corpus: Path,
    tmp_path: Path,
    tool: ModuleType,
    suffix: str,
    size: int | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in (".bin", ".idx"):
        shutil.copy(f"{corpus}{name}", tmp_path / f"text{name}")
    damaged = tmp_path / f"text{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:size]) if size else damaged.unlink()
    assert tool.main([str(tmp_path / "text")]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.search(message, errors)
    assert errors.count("\n") == 1


def test_wrong_tokenizer_and_broken_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "text", [np.arange(250, 300)])
    byte_tokenizer().save_files(tmp_path / "text-tokenizer")
    assert inspect_data.main([str(tmp_path / "text")]) == 2
    assert "holds token id 256, and the vocabulary has 256" in capsys.readouterr().err
    (tmp_path / "text.json").write_text("[]")
    assert inspect_data.main([str(tmp_path / "text")]) == 2
    assert "text.json is no JSON object" in capsys.readouterr().err


def test_fit_of_target_weights(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(corpus), "--max-distance", "16", "--output", str(tmp_path)]
    assert fit_target_weights.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = json.loads((tmp_path / "text-mutual-information.json").read_text())
    assert (tmp_path / "text-mutual-information.png").read_bytes().startswith(PNG)
    exponent = numbers["tst_power_law_exponent"]
    assert lines[-1] == (
        f"--tst-target-weighting power-law --tst-power-law-exponent {exponent:.3f}"
    )
    # Bytes of Python sources: falling, steeply at first, and hardly any bias to subtract.
    information = numbers["mutual_information"]
    assert numbers["distances"] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert information == sorted(information, reverse=True)
    assert 0.5 < exponent < 1.5
    assert abs(numbers["baseline"]) < 0.02
    assert 3.0 < numbers["entropy"] < 3.6
    assert f"entropy of single tokens: {numbers['entropy']:.4f} nats" in "\n".join(lines)
    weights = SuperpositionConfig(
        bag_size=4, steps=1, target_weighting="power-law", power_law_exponent=exponent
    ).target_weights()
    assert weights[1] / weights[0] == pytest.approx(2.0**-exponent)
    # The same text and seed give the same bytes.
    first = (tmp_path / "text-mutual-information.json").read_bytes()
    assert fit_target_weights.main(arguments) == 0
    assert (tmp_path / "text-mutual-information.json").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-distance", "7"], "--max-distance is 7: use 8 or more"),
        (["--pairs", "0"], "--pairs is 0: use 1000 or more"),
        (["--max-distance", "10000000"], r"text: no document has more than 10000000 tokens"),
    ],
)
def test_bad_arguments_of_the_fit(
    corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_target_weights.main([str(corpus), *arguments]) == 2
    errors = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", errors)
    assert errors.count("\n") == 1


def test_nothing_but_the_error_reaches_the_terminal(tmp_path: Path) -> None:
    tool = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_data.py"), str(tmp_path / "none")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tool.returncode, tool.stdout) == (2, "")
    assert tool.stderr.startswith(f"error: --data-path {tmp_path / 'none'}")
    assert tool.stderr.count("\n") == 1
