"""A checkpoint is continued by the right run only, on any number of processes, token by token."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.checkpoint.torch_dist_index import read_index
from tests.corpus import write_corpus
from tests.integration.layouts import arguments_of
from tests.newer_torch import NEWER, record_torch, write_as_newer_torch
from tests.runs import Check, SmallRun, assert_bit_equal, assert_faultless
from tests.survival import (
    BAG_SIZE,
    BATCH,
    MAIN,
    SETTINGS,
    SWITCH,
    TOTAL,
    error_lines,
    kill,
    last_checkpoint,
    wait_until_stopped,
)
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

LENGTH = 32
# All the text that a run reads, once.
TOKENS = BATCH * LENGTH * (SWITCH * BAG_SIZE + TOTAL - SWITCH)


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Checkpoints at 3 and at the switch, by two processes with the distributed optimizer."""
    run = SmallRun(corpus, tmp_path_factory.mktemp("trained"))
    run = run.with_(**SETTINGS, use_distributed_optimizer=True)
    launcher.run(run.with_(exit_interval=SWITCH).argv, run.log, 2)
    return run


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# What happened to a file of the last checkpoint, and what is said about it.
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("__1_0.distcp", cut_in_half, r"__1_0\.distcp has \d+ bytes instead of \d+"),
    "missing": ("__0_0.distcp", Path.unlink, r"__0_0\.distcp is missing"),
    "index": (".metadata", lambda path: path.write_bytes(os.urandom(999)), ".*"),
    "half an index": (".metadata", cut_in_half, ".*"),
    "no index": (".metadata", Path.unlink, ".*metadata.*"),
}


def damage(trained: SmallRun, folder: Path, name: str) -> SmallRun:
    file, harm, _ = DAMAGE[name]
    shutil.copytree(trained.folder / "checkpoints", folder)
    harm(folder / f"iter_{SWITCH:07d}" / file)
    return trained.with_(load=folder)


# What the trained run is continued with, and what is said about it.
OVERRIDE = "or --override-opt_param-scheduler to go on with the values of this command"
RATES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    (
        {"train_iters": 10},
        "with --train-iters 8 --lr-decay-iters 8, .* has --train-iters 10 --lr-decay-iters 10, "
        f".*: pass --train-iters 8 --lr-decay-iters 8, {OVERRIDE}",
    ),
    ({"lr_warmup_iters": 3}, f"has --lr-warmup-iters 3, .*: pass --lr-warmup-iters 2, {OVERRIDE}"),
    ({"lr_decay_style": "cosine"}, "with --lr-decay-style WSD, .* has --lr-decay-style cosine, "),
    ({"lr": 1e-3}, f"with --lr 0.003, .* has --lr 0.001, .*: pass --lr 0.003, {OVERRIDE}"),
    ({"min_lr": 1e-4}, "with --min-lr 0.0, .* has --min-lr 0.0001, "),
    ({"lr_decay_iters": 6}, "with --lr-decay-iters 8, .* has --lr-decay-iters 6, "),
    ({"lr_wsd_decay_iters": 4}, "with --lr-wsd-decay-iters 2, .* has --lr-wsd-decay-iters 4, "),
    ({"lr_wsd_decay_style": "cosine"}, "style linear, .* has --lr-wsd-decay-style cosine, "),
    ({"lr_warmup_init": 1e-5}, "with --lr-warmup-init 0.0, .* has --lr-warmup-init 1e-05, "),
    ({"weight_decay": 0.2}, "with --weight-decay 0.1, .* has --weight-decay 0.2, "),
    ({"decoupled_lr": 1e-4}, "no --decoupled-lr, .* has --decoupled-lr 0.0001: .* --no-load-optim"),
    (
        {
            **dict.fromkeys(("train_iters", "lr_warmup_iters", "lr_wsd_decay_iters")),
            **{"train_samples": 64, "lr_wsd_decay_samples": 4},
        },
        "equivalent of .*--lr-warmup-samples 8 .* has .*--lr-warmup-samples 0 .*: pass "
        "--train-samples 32 --lr-decay-samples 32 --lr-warmup-samples 8 --lr-wsd-decay-samples 8,",
    ),
    ({"lr": 1e-3, "no_load_optim": True}, "has --lr 0.001, "),
    ({"lr": 1e-3, "finetune": True}, None),
    ({"lr": 1e-3, "override_opt_param-scheduler": True}, None),
    ({"lr": 1e-3, "use_checkpoint-opt_param-scheduler": True}, None),
    (
        {"lr_wsd_decay_iters": 4, "use_checkpoint-opt_param-scheduler": True},
        "pass --lr-wsd-decay-iters 2, which --use-checkpoint-opt_param-scheduler does not take",
    ),
]


def test_other_learning_rates_are_refused(check: Check, trained: SmallRun) -> None:
    messages = check([trained.with_(**settings) for settings, _ in RATES])
    for (settings, expected), message in zip(RATES, messages, strict=True):
        assert (message is None) == (expected is None), (settings, message)
        assert expected is None or re.search(expected, message or ""), message


MODELS: list[tuple[dict[str, Any], str | None]] = [
    ({"hidden_size": 64}, "--hidden-size 32, and this command has 64: the weights do not fit"),
    ({"rotary_base": 20000}, "--rotary-base 10000, and this command has 20000: .* other positions"),
    (
        {"use_rope_scaling": True},
        "--use-rope-scaling False, and this command has True: .* --finetune",
    ),
    ({"num_layers": 4}, "--num-layers 2, and this command has 4"),
    ({"num_query_groups": 4}, "--num-query-groups 2, and this command has 4"),
    ({"num_experts": 4}, "--num-experts None, and this command has 4"),
    ({"mtp_num_layers": 1}, "--mtp-num-layers None, and this command has 1"),
    (
        {"untie_embeddings_and_output_weights": None},
        "--untie-embeddings-and-output-weights True, and this command has False",
    ),
    ({"adam_beta2": 0.99}, "--adam-beta2 0.95, and this command has 0.99: .* --no-load-optim"),
    ({"adam_beta2": 0.99, "no_load_optim": True}, None),
    ({"adam_beta2": 0.99, "skip_train": True}, None),
    ({"bf16": True, "use_distributed_optimizer": None}, "without --bf16 .* --no-load-optim"),
    ({"hidden_size": 64, "num_experts": 4, "finetune": True}, None),
]


def test_another_model_or_optimizer_is_refused(check: Check, trained: SmallRun) -> None:
    messages = check([trained.with_(**settings) for settings, _ in MODELS])
    for (settings, expected), message in zip(MODELS, messages, strict=True):
        assert (message is None) == (expected is None), (settings, message)
        assert expected is None or re.search(expected, message or ""), message


# How the trained run is continued from the switch, and the learning rates that it has then.
CONTINUED: dict[str, tuple[int, dict[str, Any], list[float]]] = {
    "without optimizer": (
        1,
        {"no_load_optim": True, "use_distributed_optimizer": None},
        [3e-3, 3e-3, 1.5e-3, 0],
    ),
    "another rate": (
        2,
        {"lr": 1e-3, "min_lr": 2e-4, "override_opt_param-scheduler": True},
        [1e-3, 1e-3, 6e-4, 2e-4],
    ),
    "the rate of the checkpoint": (
        2,
        {"lr": 1e-3, "use_checkpoint-opt_param-scheduler": True},
        [3e-3, 3e-3, 1.5e-3, 0],
    ),
    "longer": (
        2,
        {"train_iters": 9, "override_opt_param-scheduler": True},
        [3e-3, 3e-3, 3e-3, 1.5e-3, 0],
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_learning_rate_goes_on(
    launcher: Launcher, trained: SmallRun, tmp_path: Path, name: str
) -> None:
    processes, settings, expected = CONTINUED[name]
    run = trained.with_(tmp_path, load=trained.folder / "checkpoints", **settings)
    launcher.run(run.argv, run.log, processes)
    rates = run.scalars()["learning-rate"]
    assert rates == pytest.approx(dict(enumerate(expected, start=SWITCH + 1)), abs=1e-9)


def test_an_error_of_several_lines_is_told_in_full(
    launcher: Launcher, trained: SmallRun, tmp_path: Path
) -> None:
    """As of weights that the checkpoint does not have, which torch finds in each process."""
    load = trained.folder / "checkpoints"
    other = {"position_embedding_type": "learned_absolute", "finetune": True}
    run = trained.with_(tmp_path, load=load, **other)
    started = launcher.start(run.argv, run.log, 2)
    assert launcher.wait(started) == [1, 1]
    line = error_lines(started)[0]
    assert "cannot be loaded (CheckpointException" in line
    assert "embedding.position_embeddings.weight from model not in state dict" in line
    assert "File " not in line


def test_a_baseline_without_a_saved_optimizer(
    launcher: Launcher, check: Check, small_run: SmallRun
) -> None:
    run = small_run.with_(eval_iters=0, train_iters=8)
    launcher.run(run.with_(no_save_optim=True, exit_interval=4).argv, run.log)
    (refused,) = check([run])
    assert "was saved with --no-save-optim, so that it holds no state" in (refused or "")
    launcher.run(run.with_(no_load_optim=True).argv, run.log)
    rates = list(run.scalars()["learning-rate"].values())
    assert rates == pytest.approx([1.5e-3, *[3e-3] * 5, 1.5e-3, 0], abs=1e-9)
    assert "learning rate schedule goes on at sample 16" in run.log.read_text()


def test_damaged_checkpoints(check: Check, trained: SmallRun, tmp_path: Path) -> None:
    runs = [damage(trained, tmp_path / name, name) for name in DAMAGE]
    messages = check([*runs, *(run.with_(ckpt_step=3) for run in runs)])
    for name, message in zip(DAMAGE, messages, strict=False):
        folder = re.escape(str(tmp_path / name / f"iter_{SWITCH:07d}"))
        remedy = r"pass --ckpt-step with another checkpoint of its folder \(iter_0000003\)"
        expected = rf"{folder} is damaged \({DAMAGE[name][2]}\): {remedy}"
        assert message is not None
        assert re.match(expected, message), message
    assert messages[len(runs) :] == [None] * len(runs)


def test_each_checkpoint_of_the_shipped_script_can_be_read(one_node_run: SmallRun) -> None:
    """From the second one on, Megatron writes the plans of the save before into the index."""
    folders = sorted((one_node_run.folder / "checkpoints").glob("iter_*"))
    assert len(folders) == 6
    assert_faultless(*folders)


def test_the_checkpoint_of_a_newer_torch_is_not_called_damaged(
    check: Check, trained: SmallRun, tmp_path: Path
) -> None:
    shutil.copytree(trained.folder / "checkpoints", tmp_path / "newer")
    checkpoint = tmp_path / f"newer/iter_{SWITCH:07d}"
    write_as_newer_torch(checkpoint)
    resumed = trained.with_(load=tmp_path / "newer")
    weights = trained.with_(load=tmp_path / "none", pretrained_checkpoint=tmp_path / "newer")
    messages = check([resumed, resumed.with_(finetune=True), weights])
    record_torch(checkpoint, NEWER)
    messages += check([resumed])
    for message in messages:
        assert message is not None
        assert message.startswith(f"{checkpoint}/.metadata is whole and was written by ")
        assert "damaged (" not in message
        assert "copy it again" not in message
    *unnamed, named = map(str, messages)
    for message in unnamed:
        assert re.search("by a newer torch than .*: use that torch or a newer one", message)
    assert re.search(rf"by torch {NEWER}.*, a newer one.*: use torch {NEWER}", named)
    with pytest.raises(ValueError, match="a newer one than"):
        read_index(checkpoint / ".metadata")
    # Half of it is damaged, whoever wrote it.
    cut_in_half(checkpoint / ".metadata")
    with pytest.raises(ValueError, match="the save was interrupted"):
        read_index(checkpoint / ".metadata")


def test_a_damaged_checkpoint_ends_a_launch_in_one_line(
    launcher: Launcher, trained: SmallRun, tmp_path: Path
) -> None:
    run = damage(trained, tmp_path / "truncated", "truncated")
    started = launcher.start(run.argv, tmp_path / "log.txt", 2)
    assert launcher.wait(started) == [2, 2]
    assert "Traceback" not in started.text
    assert "training ..." not in started.text.splitlines()
    (line,) = error_lines(started)
    assert "is damaged" in line


def test_other_data_is_refused(check: Check, trained: SmallRun, tmp_path: Path) -> None:
    write_corpus(tmp_path / "small", [500])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 12}, r"--seed 11, and this command has 12: resume with"),
        ({"split": "80,20,0"}, r"--split 90,10,0, and this command has 80,20,0: resume with"),
        ({"data_path": tmp_path / "small"}, r"this many bytes: \d+, and this command has 2000:"),
        ({"eod_mask_loss": True}, r"--eod-mask-loss False, and this command has True:"),
    ]
    messages = check([trained.with_(**settings) for settings, _ in cases])
    for (_, expected), message in zip(cases, messages, strict=True):
        assert message is not None
        assert re.search(expected, message), message


def test_other_text_is_refused_and_moved_text_is_not(
    check: Check, trained: SmallRun, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    for prefix in (moved, other):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(f"{trained.corpus}{suffix}", f"{prefix}{suffix}")
    text = other.with_suffix(".bin")
    text.write_bytes(text.read_bytes()[::-1])
    runs = [trained.with_(data_path=moved), trained.with_(data_path=other)]
    accepted, refused = check(runs)
    assert accepted is None
    assert refused is not None
    expected = r"was trained with --data-path .* of fingerprint (\w+), and this command has (\w+):"
    found = re.search(expected, refused)
    assert found
    assert found[1] != found[2]


def test_a_checkpoint_without_a_fingerprint_is_continued(
    check: Check, trained: SmallRun, tmp_path: Path
) -> None:
    """As versions wrote it that compared sizes only."""
    folder = tmp_path / "old"
    shutil.copytree(trained.folder / "checkpoints", folder)
    renamed = 0
    for path in (folder / f"iter_{SWITCH:07d}").glob("*.distcp"):
        content = path.read_bytes()
        renamed += content.count(b"corpus_fingerprint")
        path.write_bytes(content.replace(b"corpus_fingerprint", b"corpus_fingerprin_"))
    assert renamed == 1
    assert check([trained.with_(load=folder)]) == [None]


def test_a_checkpoint_without_a_document_boundary_was_made_across_documents(
    check: Check, trained: SmallRun, tmp_path: Path
) -> None:
    """As versions wrote it that had no other."""
    folder = tmp_path / "old"
    shutil.copytree(trained.folder / "checkpoints", folder)
    for path in (folder / f"iter_{SWITCH:07d}").glob("*.distcp"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"document_boundary", b"document_boundar_"))
    old = trained.with_(load=folder)
    aligned = old.with_(tst_document_boundary="align")
    refused = "--tst-document-boundary cross, and this command has align"
    messages = check([old, aligned])
    assert messages[0] is None
    assert refused in (messages[1] or "")


def test_layouts_that_the_optimizer_state_does_not_fit(check: Check, trained: SmallRun) -> None:
    bound = "it was saved without --dist-ckpt-optim-fully-reshardable"
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"tensor_model_parallel_size": 2}, f"--tensor-model-parallel-size 1, .* 2: .* {bound}"),
        (
            {"pipeline_model_parallel_size": 2},
            f"--pipeline-model-parallel-size 1, .* 2: .* {bound}",
        ),
        ({"use_distributed_optimizer": None}, "--use-distributed-optimizer True, .* has False: "),
        ({"tensor_model_parallel_size": 2, "no_load_optim": True}, None),
        ({"use_distributed_optimizer": None, "no_load_optim": True}, None),
    ]
    messages = check([trained.with_(**layout) for layout, _ in cases])
    for (_, expected), message in zip(cases, messages, strict=True):
        assert (message is None) == (expected is None), message
        assert expected is None or re.search(expected, message or ""), message


@pytest.fixture(scope="module")
def reference(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> SmallRun:
    """One process in fp32 that reads its text to the last token, and was not interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    write_corpus(folder / "text", [1000, 7, TOKENS - 1007], vocabulary_size=256)
    # No dropout, which differs by rank.
    settings: dict[str, Any] = {**SETTINGS, "hidden_dropout": 0, "save_interval": 2}
    text: dict[str, Any] = {"data_path": folder / "text", "split": "100,0,0"}
    run = SmallRun(corpus, folder).with_(**settings, **text)
    launcher.run(run.argv, run.log)
    return run


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
    ],
    ids=["plain", "distributed", "fully reshardable"],
)
def test_other_numbers_of_processes_read_each_token_once(
    launcher: Launcher, reference: SmallRun, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """1, 2 and 1 processes; killed a step after a checkpoint in phase 1, and again in phase 2."""
    run = reference.with_(tmp_path, **optimizer)
    reads: list[dict[str, int]] = []
    done = 0
    for world_size, stop, saved in ((1, 3, 2), (2, 7, 6), (1, None, TOTAL)):
        folder = tmp_path / f"from step {done}"
        environment = {"RECORD_READS": str(folder), "STOP_AFTER": str(stop)}
        started = launcher.start(run.argv, run.log, world_size, main=MAIN, environment=environment)
        if stop:
            wait_until_stopped(started)
            kill(launcher, started)
        else:
            assert launcher.wait(started) == [0], started.text[-4000:]
        assert last_checkpoint(run) == saved
        assert sorted(path.name for path in folder.iterdir()) == [
            f"rank{rank}" for rank in range(world_size)
        ]
        new = [
            json.loads(line) for path in folder.iterdir() for line in path.read_text().splitlines()
        ]
        # Every sample from the checkpoint on, none before it, and none ahead of the step.
        steps_done = stop or TOTAL
        assert sorted(read["index"] for read in new) == list(
            range(done * BATCH, steps_done * BATCH)
        )
        # What was done after the last checkpoint is lost, and done again.
        reads += [read for read in new if read["index"] < saved * BATCH]
        done = saved

    assert sorted(read["index"] for read in reads) == list(range(TOTAL * BATCH))
    # The samples lie side by side in the stream: no token is left out and none comes twice.
    position = 0
    for read in sorted(reads, key=lambda read: read["begin"]):
        assert read["begin"] == position
        in_phase_1 = read["index"] < SWITCH * BATCH
        assert read["tokens"] == LENGTH * (BAG_SIZE if in_phase_1 else 1)
        position += read["tokens"]
    assert position == TOKENS
    expected, actual = reference.scalars(), run.scalars()
    assert actual["tst/data tokens"][TOTAL] == TOKENS
    # fp32: the gradients of two processes are summed in another order.
    assert actual["lm loss"] == pytest.approx(expected["lm loss"], rel=1e-5)


def test_random_routing_goes_on_on_each_rank(
    launcher: Launcher, small_run: SmallRun, tmp_path: Path
) -> None:
    """Expert-parallel ranks draw from streams of their own, of which Megatron saves one."""
    run = small_run.with_(
        **{**SETTINGS, **arguments_of("Qwen3-MoE", "EP 2, alltoall")},
        moe_router_force_load_balancing=True,
        micro_batch_size=1,
    ).with_(train_iters=5)
    launcher.run(run.argv, run.log, 2)
    resumed = run.with_(tmp_path / "resumed", load=run.folder / "checkpoints", ckpt_step=3)
    # What it does not save itself is loaded nevertheless.
    resumed = resumed.with_(no_save_optim=True, no_save_rng=True)
    launcher.run(resumed.argv, resumed.log, 2)
    assert sorted(resumed.scalars()["lm loss"]) == [4, 5]
    expected = run.checkpoint(5)
    weights = {name: expected[name] for name in expected if not name.startswith("optimizer")}
    assert_bit_equal(resumed.checkpoint(5), weights)

    # As Megatron alone writes it.
    folder = tmp_path / "old"
    shutil.copytree(run.folder / "checkpoints", folder)
    index = folder / "iter_0000003" / ".metadata"
    index.write_bytes(index.read_bytes().replace(b"tst_rng_state", b"old_rng_state"))
    old = resumed.with_(tmp_path / "from old", load=folder)
    launcher.run(old.argv, old.log, 2)
    assert "does not hold the random states of 2 ranks" in old.log.read_text()
    assert old.scalars()["lm loss"] != resumed.scalars()["lm loss"]
