"""Bags of several sizes with all that a run may have besides, and sizes drawn for each step."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tst.checkpoint.saved_accounting import check_accounting
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.commands import inspect_data
from megatron_tst.report.labels import superposition_label
from megatron_tst.report.results import read_result
from megatron_tst.settings.step_sizes import StepSizes
from tests.corpus import write_corpus
from tests.integration.layouts import LAYOUTS
from tests.integration.test_bad_input import assert_messages
from tests.runs import TOTAL_STEPS, Check, SmallRun, assert_bit_equal, assert_faultless
from tests.survival import MAIN, last_checkpoint, wait_until_stopped
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

LENGTH, SEED = 32, 11


def drawn(text: str, steps: int, total: int) -> list[int]:
    """The bag size of each step."""
    return [*StepSizes.parse(text).draw(SEED, steps), *[1] * (total - steps)]


# Sequences of each step; bag sizes of each step, and what is saved. The run is stopped where the
# batch grows, inside of its bags, and at the switch, where state is thrown away.
RAMP = f"0:2 {8 * LENGTH}:4 {20 * LENGTH}:8"
RAMP_SIZES = [2, 2, 2, 2, 4, 4, 4, 8, 8]
TOTAL, SWITCH = len(RAMP_SIZES), 6
SIZES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "one behind the other": (
        {"tst_schedule": "2:0.23,4:0.34,3:0.11"},
        [2, 2, 4, 4, 4, 3, 1, 1, 1],
        [2, 4, 5, 6, 7, 9],
    ),
    "drawn": (
        {"tst_bag_sizes": "2,3,4", "tst_steps": SWITCH},
        drawn("2,3,4", SWITCH, TOTAL),
        [4, 6, 7, 9],
    ),
}
IN_STEPS = ("train_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
MIXED: dict[str, Any] = {
    **dict.fromkeys((*IN_STEPS, "global_batch_size")),
    "train_samples": sum(RAMP_SIZES),
    "lr_warmup_samples": 4,
    "lr_wsd_decay_samples": 8,
    "micro_batch_size": 1,
    "step_batch_size_schedule": RAMP,
    "eval_iters": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"tst_document_boundary": "align", "tst_reset_at_switch": "embeddings"},
    "input-only": {"tst_reset_at_switch": "optimizer"},
    "output-only": {"tst_document_boundary": "align", "tst_loss_impl": "linear"},
}


@pytest.fixture
def mixed(corpus: Path, tmp_path: Path) -> SmallRun:
    """On a blend, with a batch that grows."""
    write_corpus(tmp_path / "text", [300, 40, 7, 500, 64, 2, 1000] * 3, vocabulary_size=256)
    write_corpus(tmp_path / "other", [3, 70, 5, 200, 33, 150, 90, 8] * 4, vocabulary_size=256)
    blend = [70, tmp_path / "text", 30, tmp_path / "other"]
    return SmallRun(corpus, tmp_path / "whole").with_(**MIXED, data_path=blend)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", SIZES)
def test_variants_on_a_blend_with_a_ramp(
    launcher: Launcher, mixed: SmallRun, tmp_path: Path, mode: str, variant: str
) -> None:
    arguments, sizes, saves = SIZES[mode]
    run = mixed.with_(**VARIANTS[variant], **arguments, tst_variant=variant)
    launcher.run(run.argv, run.log)
    assert_accounted(run, sizes, variant)
    parts = run.with_(tmp_path / "parts")
    for stop in (4, SWITCH, None):
        launcher.run(parts.with_(exit_interval=stop).argv, parts.log)
    saved = sorted(path.name for path in (parts.folder / "checkpoints").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in saves]
    assert_bit_equal(parts.checkpoint(TOTAL), run.checkpoint(TOTAL))
    assert parts.scalars()["lm loss"] == run.scalars()["lm loss"]
    is_reset = VARIANTS[variant].get("tst_reset_at_switch") == "optimizer"
    for step in saves[: saves.index(SWITCH) + 1]:
        state = run.checkpoint(step)
        moments = torch.cat([v.flatten() for name, v in state.items() if "exp_avg" in name])
        assert bool(moments.any()) == (not is_reset or step < SWITCH)


def assert_accounted(run: SmallRun, sizes: list[int], variant: str) -> None:
    """Requires the counts of a run to be those of its batches and bags."""
    scalars, steps = run.scalars(), range(1, TOTAL + 1)
    assert [scalars["tst/bag size"][step] for step in steps] == sizes
    assert [scalars["batch-size"][step] for step in steps] == RAMP_SIZES
    reads_bags = variant != "output-only"
    places = [
        LENGTH * sequences * (size if reads_bags else 1)
        for sequences, size in zip(RAMP_SIZES, sizes, strict=True)
    ]
    budgets = run.description()["data_budget"]
    in_bags, padding, plain = (
        sum(budget[name] for budget in budgets)
        for name in ("phase_1", "phase_1_padding", "phase_2")
    )
    assert (in_bags + padding, plain) == (sum(places[:SWITCH]), sum(places[SWITCH:]))
    has_padding = reads_bags and "tst_document_boundary" in VARIANTS[variant]
    assert bool(padding) == has_padding
    if not has_padding:
        read = [sum(places[:step]) for step in steps]
        assert [scalars["tst/data tokens"][step] for step in steps] == read
    # A rounding for each size.
    assert scalars["tst/data tokens"][TOTAL] == pytest.approx(in_bags + plain, abs=2)


# Sizes drawn for each step.
TEXT, STEPS = "2:3,4:2", 7
DRAWN_SIZES = drawn(TEXT, STEPS, TOTAL_STEPS)
POSITIONS = 4 * LENGTH


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(corpus, tmp_path_factory.mktemp("drawn")).with_(
        tst_bag_sizes=TEXT, tst_steps=STEPS, save_interval=4, seed=SEED
    )
    environment = {"RECORD_READS": str(run.folder / "reads")}
    launcher.run(run.argv, run.log, main=MAIN, environment=environment)
    return run


def test_each_token_is_read_once(trained: SmallRun) -> None:
    lines = (trained.folder / "reads" / "rank0").read_text().splitlines()
    reads = [json.loads(line) for line in lines]
    assert [read["index"] for read in reads] == list(range(4 * TOTAL_STEPS))
    assert [read["tokens"] for read in reads] == [
        LENGTH * size for size in DRAWN_SIZES for _ in range(4)
    ]
    # The bags lie side by side in the stream, in another order than they are read in.
    begins = [read["begin"] for read in reads[: 4 * STEPS]]
    position = 0
    for begin, tokens in sorted((read["begin"], read["tokens"]) for read in reads[: 4 * STEPS]):
        assert begin == position
        position += tokens
    assert begins != sorted(begins)
    assert min(read["begin"] for read in reads[4 * STEPS :]) >= position


def test_the_inspection_shows_what_is_read(
    trained: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (trained.folder / "reads" / "rank0").read_text().splitlines()
    reads = [json.loads(line) for line in lines][: 4 * STEPS]
    arguments = {
        "bag-sizes": TEXT,
        "sequence-length": LENGTH,
        "split": "90,10,0",
        "seed": SEED,
        "phase-1-samples": 4 * STEPS,
        "global-batch-size": 4,
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    places = map(str, range(4 * STEPS))
    assert inspect_data.main([str(trained.corpus), *flags, "--sample", *places]) == 0
    output = capsys.readouterr().out
    found = re.findall(r"phase 1: bag size (\d).*\n?.*\nbegins at token ([\d,]+) ", output)
    assert [(int(size), int(begin.replace(",", ""))) for size, begin in found] == [
        (read["tokens"] // LENGTH, read["begin"]) for read in reads
    ]


def test_a_size_is_drawn_for_each_step(trained: SmallRun) -> None:
    # On both sides of the checkpoint that runs go on from.
    assert {*DRAWN_SIZES[:4]} == {*DRAWN_SIZES[4:STEPS]} == {2, 4}
    scalars, steps = trained.scalars(), range(1, TOTAL_STEPS + 1)
    assert scalars["tst/bag size"] == dict(zip(steps, DRAWN_SIZES, strict=True))
    read = [POSITIONS * sum(DRAWN_SIZES[:step]) for step in steps]
    assert scalars["tst/data tokens"] == dict(zip(steps, read, strict=True))
    # Each step costs the same.
    assert scalars["tst/equivalent tokens"] == {step: POSITIONS * step for step in steps}
    of_four = [step for step, size in zip(steps, DRAWN_SIZES, strict=True) if size == 4]
    assert sorted(scalars["tst/loss at offset 4"]) == of_four
    saved = sorted(path.name for path in (trained.folder / "checkpoints").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in (4, STEPS, 8, TOTAL_STEPS)]
    (budget,) = trained.description()["data_budget"]
    assert budget["phase_1"] == read[STEPS - 1]
    assert budget["phase_1"] + budget["phase_2"] == read[-1]
    result = read_result(trained.folder)
    assert superposition_label(result.settings) == "s=2:3|4:2 r=0.5833"
    assert result.data_tokens[-1] == read[-1]
    last = [scalars[f"tst/loss at offset {i}"][of_four[-1]] for i in range(1, 5)]
    assert result.offset_losses == pytest.approx(last, rel=1e-6)
    checkpoint = TorchDistCheckpoint(trained.checkpoint_folder(4))
    found = check_accounting("iter_0000004", checkpoint.read_common())
    assert not found.faults
    assert f"bags of 2:3 or 4:2, 16 samples, {read[3]:,} data tokens" in found.summary


@pytest.mark.parametrize("step", [4, STEPS])
def test_it_goes_on_bit_equal(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, step: int
) -> None:
    run = trained.with_(
        tmp_path, load=trained.folder / "checkpoints", ckpt_step=step, tst_bag_sizes="4:2, 2:3"
    )
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))


def test_it_is_killed_between_draws(launcher: Launcher, trained: SmallRun, tmp_path: Path) -> None:
    run = trained.with_(tmp_path)
    started = launcher.start(run.argv, run.log, main=MAIN, environment={"STOP_AFTER": "6"})
    wait_until_stopped(started)
    started.kill(signum=signal.SIGKILL)
    assert launcher.wait(started) == [-signal.SIGKILL]
    assert last_checkpoint(run) == 4
    launcher.run(run.argv, run.log)
    assert_bit_equal(run.checkpoint(TOTAL_STEPS), trained.checkpoint(TOTAL_STEPS))


@pytest.mark.parametrize(
    "layout", ["TP 2 + SP, PP 2", "TP 2 + SP, DP 2, distributed optimizer", "FSDP2 over 2"]
)
def test_layouts_draw_the_same(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, layout: str
) -> None:
    settings = {**LAYOUTS[layout].arguments, "micro_batch_size": 1}
    if "use_distributed_optimizer" in settings:
        settings["no_load_optim"] = True
        one = trained.with_(tmp_path / "one", no_load_optim=True)
        one = one.with_(load=trained.folder / "checkpoints", ckpt_step=4)
        launcher.run(one.argv, one.log)
    else:
        one = trained
    run = trained.with_(
        tmp_path / "several", **settings, load=trained.folder / "checkpoints", ckpt_step=4
    )
    launcher.run(run.argv, run.log, world_size=LAYOUTS[layout].processes)
    for tag in ("lm loss", "tst/data tokens", "tst/bag size", "grad-norm"):
        actual, expected = run.scalars()[tag], one.scalars()[tag]
        assert sorted(actual) == list(range(5, TOTAL_STEPS + 1))
        # fp32: sums run in another order.
        assert actual == pytest.approx({s: expected[s] for s in actual}, rel=1e-5), tag
    assert_faultless(run.checkpoint_folder(TOTAL_STEPS))


REFUSALS: list[tuple[dict[str, Any], str | None]] = [
    ({"tst_bag_sizes": "2,4"}, "--tst-bag-sizes 2:3,4:2, and this command has 2,4: resume with"),
    (
        {"tst_bag_sizes": None, "tst_bag_size": 4},
        "with --tst-bag-sizes 2:3,4:2, and this command has None",
    ),
    ({"seed": SEED + 1}, f"trained with --seed {SEED}, and this command has {SEED + 1}"),
    (
        {"tst_steps": 8},
        r"drew the bag sizes of its steps up to sample 28 \(step 7\), and with this command \(up "
        r"to sample 32, step 8\) other samples would have them: keep the length of phase 1",
    ),
    # The switch stays, and the samples of the steps before it do not.
    (
        {
            **dict.fromkeys(("global_batch_size", *IN_STEPS)),
            "train_samples": 48,
            "lr_warmup_samples": 8,
            "lr_wsd_decay_samples": 8,
            "step_batch_size_schedule": f"0:4 {16 * LENGTH}:6 {28 * LENGTH}:4",
            "tst_steps": 6,
        },
        r"drew the bag sizes .* up to sample 28 \(step 7\), .*up to sample 28, step 6\)",
    ),
    # Behind the switch a batch may change.
    (
        {
            "ckpt_step": 8,
            **dict.fromkeys(("global_batch_size", *IN_STEPS)),
            "train_samples": 48,
            "lr_warmup_samples": 8,
            "lr_wsd_decay_samples": 8,
            "step_batch_size_schedule": f"0:4 {32 * LENGTH}:8",
        },
        None,
    ),
    ({"reset_position_ids": True}, "does not work with --tst-bag-sizes 2:3,4:2: "),
]


def test_what_it_does_not_resume_with(check: Check, trained: SmallRun) -> None:
    runs = [trained.with_(**{"ckpt_step": 4, **settings}) for settings, _ in REFUSALS]
    assert_messages(check(runs), [message for _, message in REFUSALS])
