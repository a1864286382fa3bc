"""The documents that a trace names are those whose tokens the ranks trained on."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tst.commands import trace_data
from megatron_tst.data.bags import IGNORE_INDEX
from megatron_tst.data.tracing import DataTrace, Passage, TracedSample
from megatron_tst.training.traced_run import open_run
from tests.corpus import write_corpus
from tests.integration.test_bad_input import assert_messages
from tests.runs import Check, SmallRun
from tests.survival import MAIN
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

LENGTH, BAG_SIZE = 32, 4
SIZES = [2, 2, 4, 4, 4, 8, 8, 8]
TOTAL, SWITCH = len(SIZES), 4
# A ramp, and starts at other layouts: the steps at which they end, data-parallel ranks, arguments.
RAMPED: dict[str, Any] = {
    "train_iters": None,
    "lr_warmup_iters": None,
    "lr_wsd_decay_iters": None,
    "train_samples": sum(SIZES),
    "lr_warmup_samples": 4,
    "lr_wsd_decay_samples": 8,
    "global_batch_size": None,
    "micro_batch_size": 1,
    "step_batch_size_schedule": f"0:2 {4 * LENGTH}:4 {16 * LENGTH}:8",
    "eval_iters": 0,
}
STARTS: list[tuple[int, int, int, dict[str, Any]]] = [
    (3, 2, 2, {}),
    (6, 2, 1, {"tensor_model_parallel_size": 2}),
    (TOTAL, 1, 1, {"micro_batch_size": 2}),
]
RUNS: dict[str, dict[str, Any]] = {
    "bags": {"tst_bag_size": BAG_SIZE, "tst_steps": SWITCH},
    "aligned": {
        "tst_bag_size": BAG_SIZE,
        "tst_steps": SWITCH,
        "tst_document_boundary": "align",
    },
    # The first start ends inside a phase of these, and at a switch of the others.
    "several sizes, aligned": {"tst_schedule": "4:2,2:2", "tst_document_boundary": "align"},
    "sizes that come again": {"tst_schedule": "2:1,4:2,2:1"},
    "drawn sizes": {"tst_bag_sizes": "2,4", "tst_steps": SWITCH},
    "drawn sizes, aligned": {
        "tst_bag_sizes": "2,3",
        "tst_steps": SWITCH,
        "tst_document_boundary": "align",
    },
    "baseline": {},
}


@pytest.fixture(scope="module", params=RUNS)
def run(
    launcher: Launcher,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> SmallRun:
    """Trained on a blend, whose second corpus is read more than once."""
    folder = tmp_path_factory.mktemp("traced")
    write_corpus(folder / "text", [300, 40, 0, 7, 500, 64, 2, 1000] * 3, vocabulary_size=256)
    write_corpus(folder / "other", [3, 0, 70, 5, 200, 1, 33, 150, 90, 8] * 2, vocabulary_size=256)
    run = SmallRun(corpus, folder).with_(
        **RAMPED,
        **RUNS[request.param],
        data_path=[70, folder / "text", 30, folder / "other"],
        tst_max_epochs=9,
    )
    for stop, processes, _, layout in STARTS:
        launcher.run(
            run.with_(exit_interval=stop, **layout).argv,
            run.log,
            processes,
            main=MAIN,
            environment={"RECORD_BATCHES": str(folder / f"batches-{stop}")},
        )
    return run


@pytest.fixture
def trace(run: SmallRun) -> Iterator[DataTrace]:
    with open_run(run.folder) as opened:
        yield opened.data


def trained_on(run: SmallRun) -> dict[tuple[int, int], list[list[int]]]:
    """The samples of each step and data-parallel rank, as token ids."""
    found: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for path in run.folder.glob("batches-*/rank*"):
        for line in path.read_text().splitlines():
            step, rank, rows = json.loads(line)
            found[step, rank] += [[t for t in row if t != IGNORE_INDEX] for row in rows]
    return found


def text_of(sample: TracedSample) -> list[int]:
    text: list[int] = []
    for passage in sample.passages:
        corpus = IndexedDataset(passage.corpus)
        text += corpus.get(passage.document, passage.offset, passage.tokens).tolist()
    return text


def all_samples(trace: DataTrace) -> list[TracedSample]:
    return [sample for step in range(1, TOTAL + 1) for sample in trace.step(step)]


def test_steps_and_ranks_read_what_the_trace_names(run: SmallRun, trace: DataTrace) -> None:
    expected = defaultdict(list)
    for sample in all_samples(trace):
        _, _, ranks, layout = next(start for start in STARTS if sample.step <= start[0])
        rank = sample.rank(layout.get("micro_batch_size", 1), ranks)
        expected[sample.step, rank].append(text_of(sample))
    found = trained_on(run)
    assert {step for step, _ in found} == set(range(1, TOTAL + 1))
    assert [sum(len(found[step, r]) for r in range(2)) for step in range(1, TOTAL + 1)] == SIZES
    assert dict(expected) == {key: rows for key, rows in found.items() if rows}


def test_the_way_back_finds_every_passage(run: SmallRun, trace: DataTrace) -> None:
    by_document: dict[tuple[str, int], list[tuple[int, Passage]]] = defaultdict(list)
    for sample in all_samples(trace):
        for passage in sample.passages:
            by_document[passage.corpus, passage.document].append((sample.index, passage))
    assert len(trace.corpora) == 2
    for corpus in trace.corpora:
        for document in range(len(IndexedDataset(corpus))):
            found = [
                (sample.index, passage)
                for sample in trace.document(corpus, document)
                for passage in sample.passages
            ]
            assert found == by_document.get((corpus, document), [])


def test_other_sources_say_the_same(run: SmallRun, trace: DataTrace, tmp_path: Path) -> None:
    """A checkpoint in place of the description, and a run whose cache is gone."""
    expected = all_samples(trace)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with open_run(run.folder / "checkpoints") as opened:
        assert all_samples(opened.data) == expected
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
    shutil.move(run.folder / "cache", tmp_path / "cache")
    try:
        with open_run(run.folder) as opened:
            assert all_samples(opened.data) == expected
        assert not (run.folder / "cache").exists()
    finally:
        shutil.move(tmp_path / "cache", run.folder / "cache")


def test_the_tool(run: SmallRun, trace: DataTrace, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--run", str(run.folder)]
    assert trace_data.main([*argv, "--steps", "4:5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [(s, p) for step in (4, 5) for s in trace.step(step) for p in s.passages]
    assert [(row["step"], row["sample"], row["document"], row["tokens"]) for row in rows] == [
        (sample.step, sample.index, p.document, p.tokens) for sample, p in expected
    ]
    sample, passage = next((s, p) for s, p in expected if p.corpus.endswith("text"))
    assert trace_data.main([*argv, "--document", f"text:{passage.document}"]) == 0
    output = capsys.readouterr().out
    assert f"step {sample.step}, sample {sample.index}, rank 0" in output
    assert f"{passage.corpus}:{passage.document}  tokens {passage.offset:,} to " in output
    assert trace_data.main([*argv, "--steps", "5", "--rank", "1", "--data-parallel-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    samples = [line.split(",")[1] for line in lines if line.startswith("step")]
    # Micro-batches of 2, as in the last start.
    assert samples == [f" sample {index}" for index in (14, 15)]
    assert trace_data.main([*argv, "--spikes"]) == 0
    assert capsys.readouterr() == ("", "0 spikes in 8 logged steps\n")


def test_what_cannot_be_traced(
    run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--run", str(run.folder)]
    other = tmp_path / "other"
    write_corpus(other, [100] * 20, vocabulary_size=256)
    cases = {
        "step 9 is not in the run, which has steps 1 to 8": [*argv, "--steps", "8:9"],
        "--steps '5:4': write A:B": [*argv, "--steps", "5:4"],
        "--document 'texts:1': write CORPUS:INDEX with one of ": [*argv, "--document", "texts:1"],
        "document 20 is not in": [*argv, "--document", "other:20"],
        "--rank 1 is not among the 1": [*argv, "--steps", "1", "--rank", "1"],
        "has no tst_run.json, nor a checkpoint": ["--run", str(tmp_path), "--steps", "1"],
        "the corpora of --data-path are not those of the run (corpus_": [
            *(*argv, "--steps", "1", "--data-path"),
            *("70", str(run.folder / "text"), "30", str(other)),
        ],
    }
    for message, arguments in cases.items():
        assert trace_data.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "run", ["bags", "aligned", "several sizes, aligned", "drawn sizes"], indirect=True
)
def test_documents_are_left_out_from_a_resume_on(
    launcher: Launcher, run: SmallRun, trace: DataTrace, tmp_path: Path
) -> None:
    """Twice, in phase 1 and in phase 2; and what was read before stays what it was."""
    planned = all_samples(trace)
    resumed, listed = run.with_(tmp_path / "run"), tmp_path / "list.txt"
    expected, absent = planned, set[str]()
    # The steps that are kept, and those after which the next start ends.
    for done, stop in ((3, 6), (6, TOTAL)):
        source = run.folder if done == 3 else resumed.folder
        new = {f"{p.corpus}:{p.document}" for p in expected[-1].passages}
        new |= {f"other:{p.document}" for p in expected[-2].passages if "other" in p.corpus}
        listed.write_text("# bad\n" + "\n".join(sorted(new)) + "\n")
        absent |= {name.rsplit("/")[-1] for name in new}
        start = resumed.with_(
            load=source / "checkpoints",
            ckpt_step=done,
            exit_interval=stop,
            tst_exclude_documents=listed,
        )
        environment = {"RECORD_BATCHES": str(resumed.folder / f"batches-{stop}")}
        launcher.run(start.argv, resumed.log, main=MAIN, environment=environment)
        with open_run(resumed.folder) as opened:
            found = all_samples(opened.data)
        assert [s for s in found if s.step <= done] == [s for s in expected if s.step <= done]
        later = [p for s in found if s.step > done for p in s.passages]
        assert not absent & {f"{Path(p.corpus).name}:{p.document}" for p in later}
        assert [(s.step, s.place) for s in found] == [(s.step, s.place) for s in planned]
        expected = found
    batches = {key: rows for key, rows in trained_on(resumed).items() if rows}
    rows_of = defaultdict(list)
    for sample in expected:
        if sample.step > 3:
            rows_of[sample.step, 0].append(text_of(sample))
    assert dict(rows_of) == batches
    assert resumed.scalars()["tst/data tokens"][TOTAL] == run.scalars()["tst/data tokens"][TOTAL]


@pytest.mark.parametrize("run", ["bags", "baseline"], indirect=True)
def test_a_run_goes_on_without_the_list(
    launcher: Launcher, run: SmallRun, trace: DataTrace, tmp_path: Path
) -> None:
    """A new run without some documents; its checkpoint knows them."""
    passages = {p for sample in all_samples(trace) for p in sample.passages}
    listed = tmp_path / "list.txt"
    document = next(p.document for p in passages if p.corpus.endswith("other"))
    listed.write_text(f"other:{document}  tokens 0 to 4  'first words'\n")
    first = run.with_(tmp_path / "run", exit_interval=3)
    launcher.run(first.with_(tst_exclude_documents=listed).argv, first.log)
    launcher.run(first.with_(exit_interval=None).argv, first.log)
    assert "> 1 documents are left out from sample 0 on" in first.log.read_text()
    with open_run(first.folder) as opened:
        corpus = opened.data.corpora[1]
        assert opened.data.document(corpus, document) == []


def test_lists_that_are_refused(check: Check, run: SmallRun, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    contents = {
        "other:20": r"list.txt, line 1: \S*other has documents 0 to 19, and no 20\.",
        "\nothers:2": r"list.txt, line 2: 'others:2': write CORPUS:INDEX with one of ",
        "text:1": "leaves 1 documents out of a run of --tst-bag-size 1 that has begun",
    }
    runs: list[SmallRun] = []
    expected: list[str | None] = []
    for number, (content, message) in enumerate(contents.items()):
        path = listed.with_stem(f"{number}-list")
        path.write_text(content)
        runs.append(run.with_(tst_exclude_documents=path, ckpt_step=3))
        expected.append(message)
    if {"tst-bag-size", "tst-schedule", "tst-bag-sizes"} & run.overrides.keys():
        expected[-1] = None
    runs.append(run.with_(tst_exclude_documents=tmp_path / "none", ckpt_step=3))
    assert_messages(check(runs), [*expected, "none cannot be read .*: pass a text file"])
