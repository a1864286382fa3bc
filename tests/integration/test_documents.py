"""Documents kept apart in bags and in attention, on Megatron's own loop."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.report.runs import read_run
from tests.integration.layouts import MODELS
from tests.runs import TOTAL_STEPS, SmallRun, assert_bit_equal
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH, STEPS = 4, 7
# Of models whose steps take longer.
FEW_STEPS = 6
DOCUMENTS: dict[str, Any] = {
    "tst_bag_size": 4,
    "tst_steps": SWITCH,
    "train_iters": STEPS,
    # Evaluated once, at the end.
    "eval_interval": STEPS + 1,
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
    run = run.with_(**DOCUMENTS, num_layers=4)
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
        # Stages in the middle get nothing of a batch but where its documents begin.
        (4, {"pipeline_model_parallel_size": 4, "micro_batch_size": 1}),
    ],
    ids=["micro-batches", "data", "tensor", "sequence", "2 stages", "4 stages"],
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
        assert STEPS in wanted
        # fp32: sums run in another order; measured 2e-7 at most.
        assert actual[tag] == pytest.approx(wanted, rel=1e-6), tag


# Experts are balanced within each sample, and samples are parts of a packed sequence.
BALANCED = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}


@pytest.mark.parametrize(
    ("model", "settings", "other_settings"),
    [
        ("Llama, hybrid", {}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("Qwen3-MoE", {}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("Qwen3-MoE", BALANCED, {"micro_batch_size": 1}),
        # Depths have fewer targets than positions, as many as documents in a micro-batch.
        ("Llama, MTP 2", {"micro_batch_size": 1}, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["hybrid", "experts", "balanced experts", "multi-token"],
)
def test_other_models(
    launcher: Launcher,
    paragraphs: Path,
    tmp_path: Path,
    model: str,
    settings: dict[str, Any],
    other_settings: dict[str, Any],
) -> None:
    few = {"tst_steps": FEW_STEPS // 2, "train_iters": FEW_STEPS, "eval_iters": 0}
    run = SmallRun(paragraphs, tmp_path / "one").with_(
        **{**DOCUMENTS, **MODELS[model], **settings, **few}
    )
    launcher.run(run.with_(exit_interval=1).argv, run.log)
    other = run.with_(tmp_path / "two", **other_settings)
    shutil.copytree(run.folder / "checkpoints", other.folder / "checkpoints")
    launcher.run(run.argv, run.log)
    launcher.run(other.argv, other.log, world_size=2)
    losses = ["lm loss", *(["mtp_1 loss", "mtp_2 loss"] if "MTP" in model else [])]
    for tag in losses:
        expected, actual = run.scalars()[tag], other.scalars()[tag]
        assert expected[FEW_STEPS] < expected[1]
        assert sorted(actual) == list(range(2, FEW_STEPS + 1))
        assert actual == pytest.approx({step: expected[step] for step in actual}, rel=1e-6), tag


def test_padding_is_no_text(single: SmallRun) -> None:
    """Of bags of 4 on documents of a few lines, a few percent are padding."""
    scalars, description = single.scalars(), single.description()
    (budget,) = description["data_budget"]
    places = budget["phase_1"] + budget["phase_1_padding"]
    assert places == SWITCH * 4 * 32 * 4
    assert budget["phase_1_padding"] > 0.005 * places
    assert description["text_share"] == budget["phase_1"] / places
    assert description["text_shares"] == [[4, description["text_share"]]]
    in_phase_2 = (STEPS - SWITCH) * 4 * 32
    assert scalars["tst/data tokens"][SWITCH] == budget["phase_1"]
    assert scalars["tst/data tokens"][STEPS] == budget["phase_1"] + in_phase_2
    assert read_run(single.folder).spent("data tokens", SWITCH) == budget["phase_1"]


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
    unmasked = run.with_(dataloader_inter_document_masking=None)
    refused = launcher.start(unmasked.argv, tmp_path / "unmasked.txt")
    assert launcher.wait(refused) == [2]
    assert "--dataloader-inter-document-masking True, and this command has False" in refused.text
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(STEPS), single.checkpoint(STEPS))
