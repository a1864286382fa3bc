"""Documents kept apart in bags and in attention, on Megatron's own loop."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.data.preprocessing import PreprocessConfig, preprocess
from tests.integration.layouts import MODELS
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH = 5
DOCUMENTS: dict[str, Any] = {
    "tst_bag_size": 4,
    "tst_steps": SWITCH,
    "tst_document_boundary": "align",
    "dataloader_inter_document_masking": True,
}


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a few lines, so that most samples hold several."""
    folder = tmp_path_factory.mktemp("paragraphs")
    sources = sorted((Path(sysconfig.get_paths()["stdlib"]) / "asyncio").glob("*.py"))
    texts = [text for source in sources for text in source.read_text().split("\n\n") if text]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    preprocess(
        PreprocessConfig((folder / "text.jsonl",), folder / "text", byte_level=True, workers=1)
    )
    return folder / "text"


@pytest.fixture(scope="module")
def single(
    launcher: Launcher, paragraphs: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """One process in fp32, with a checkpoint after its first step."""
    run = SmallRun(paragraphs, tmp_path_factory.mktemp("single"))
    run = run.with_(**DOCUMENTS, bf16=False)
    launcher.run(run.with_(exit_interval=1).argv, run.log)
    shutil.copytree(run.folder / "checkpoints", run.folder / "first step")
    launcher.run(run.argv, run.log)
    return run


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {"micro_batch_size": 1}),
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2, "micro_batch_size": 1}),
    ],
    ids=["micro-batches", "data parallel", "tensor parallel", "sequence parallel", "pipeline"],
)
def test_layouts_train_as_one_process(
    launcher: Launcher, single: SmallRun, tmp_path: Path, processes: int, layout: dict[str, Any]
) -> None:
    # From the first step's checkpoint on, as other layouts draw their weights from other seeds.
    run = single.with_(tmp_path, **layout)
    shutil.copytree(single.folder / "first step", run.folder / "checkpoints")
    launcher.run(run.argv, run.log, world_size=processes)
    expected, actual = single.scalars(), run.scalars()
    for tag in ("lm loss", "lm loss validation"):
        wanted = {step: expected[tag][step] for step in actual[tag]}
        assert TOTAL_STEPS in wanted
        # fp32: sums run in another order; measured 2e-7 at most.
        assert actual[tag] == pytest.approx(wanted, rel=1e-6), tag


@pytest.mark.parametrize("model", ["Llama, hybrid", "Qwen3-MoE"])
def test_other_models(launcher: Launcher, paragraphs: Path, tmp_path: Path, model: str) -> None:
    # The balance of experts is that of a micro-batch, which must stay what it is.
    run = SmallRun(paragraphs, tmp_path / "one").with_(**DOCUMENTS, **MODELS[model], bf16=False)
    launcher.run(run.with_(exit_interval=1).argv, run.log)
    other = run.with_(tmp_path / "two", tensor_model_parallel_size=2, sequence_parallel=True)
    shutil.copytree(run.folder / "checkpoints", other.folder / "checkpoints")
    launcher.run(run.argv, run.log)
    launcher.run(other.argv, other.log, world_size=2)
    expected, actual = run.scalars()["lm loss"], other.scalars()["lm loss"]
    assert expected[TOTAL_STEPS] < expected[1]
    assert actual == pytest.approx({step: expected[step] for step in actual}, rel=1e-6)


def test_without_superposition_the_run_is_upstreams(
    launcher: Launcher, paragraphs: Path, tmp_path: Path
) -> None:
    stock, ours = (
        SmallRun(paragraphs, tmp_path / name).with_(dataloader_inter_document_masking=True)
        for name in ("stock", "ours")
    )
    launcher.run(stock.argv, stock.log, main="tests.stock_gpt:main")
    launcher.run(ours.argv, ours.log)
    assert_bit_equal(ours.checkpoint(TOTAL_STEPS), stock.checkpoint(TOTAL_STEPS))
    assert ours.scalars()["lm loss"] == stock.scalars()["lm loss"]


def test_a_stopped_run_resumes_bit_equal_and_at_no_other_boundary(
    launcher: Launcher, single: SmallRun, tmp_path: Path
) -> None:
    run = single.with_(tmp_path / "run")
    launcher.run(run.with_(exit_interval=3).argv, run.log)
    crossing = run.with_(tst_document_boundary="cross", dataloader_inter_document_masking=None)
    refused = launcher.start(crossing.argv, tmp_path / "refused.txt")
    assert launcher.wait(refused) == [2]
    assert "--tst-document-boundary align" in refused.text
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), single.checkpoint(TOTAL_STEPS))
