"""Checkpoints with faults are found out, by the tool and before a resume, and can be rebuilt."""

from __future__ import annotations

import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_tst.checkpoint import findings, rebuilding
from megatron_tst.checkpoint.findings import MASTERS, Verification
from megatron_tst.checkpoint.stored_shards import shards_by_key
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import COMMON_KEY
from megatron_tst.checkpoint.torch_dist_writer import PlannedChunk, write_checkpoint
from megatron_tst.checkpoint.tracker import TRACKER_FILE
from megatron_tst.checkpoint.verification import verify_checkpoint
from megatron_tst.commands import verify_checkpoint as tool
from tests.runs import Check, SmallRun, assert_faultless
from tests.unmended_host import MAIN
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SAVED, STEPS = 2, 4
# Buckets of one or a few parameters each, most of which end in padding.
SETTINGS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 40,
    "ffn_hidden_size": 80,
    "tst_bag_size": 4,
    "tst_steps": SAVED,
    "train_iters": STEPS,
    "save_interval": SAVED,
    "eval_iters": 1,
    "micro_batch_size": 1,
    "bf16": True,
}
BUCKETS: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "ddp_bucket_size": 3000,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "expert_model_parallel_size": 2,
}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "wrong": (2, {**BUCKETS, "dist_ckpt_optim_fully_reshardable": True}),
    "one optimizer": (1, {}),
    "buckets": (4, {**BUCKETS, **EXPERTS}),
    "buckets, TP 2": (2, {**BUCKETS, "tensor_model_parallel_size": 2}),
}
# Of experts.
BUCKET = (
    "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0."
    "dtype_(torch.bfloat16, torch.float32).bucket_idx_1.param"
)
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def saved(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], SmallRun]:
    """Runs with two checkpoints each, made when needed."""
    runs: dict[str, SmallRun] = {}

    def get(name: str) -> SmallRun:
        if name not in runs:
            processes, arguments = RUNS[name]
            run = SmallRun(corpus, tmp_path_factory.mktemp("saved")).with_(**SETTINGS, **arguments)
            launcher.run(run.argv, run.log, processes, main=MAIN)
            runs[name] = run
        return runs[name]

    return get


def faults(result: Verification) -> dict[str, int]:
    """Number of wrong things by check."""
    found: dict[str, int] = {}
    for fault in result.faults:
        found[fault.check] = found.get(fault.check, 0) + fault.count
    return found


def test_masters_that_megatron_saved_at_wrong_places(
    saved: Callable[[str], SmallRun], capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved("wrong")
    assert "padded with zeros" in run.log.read_text()
    tensors = run.checkpoint(SAVED)
    weights = {name: value for name, value in tensors.items() if "optimizer" not in name}
    wrong = {
        name: int((tensors[f"optimizer.state.param.{name}"].bfloat16() != value).sum())
        for name, value in weights.items()
    }
    assert sum(wrong.values()) > 0.5 * sum(value.numel() for value in weights.values())
    folder = run.checkpoint_folder(SAVED)
    result = verify_checkpoint(folder)
    found = {fault.where: fault.count for fault in result.faults if fault.check == MASTERS}
    assert found == {name: count for name, count in wrong.items() if count}
    assert faults(result)[findings.ZERO_MASTERS] > 0
    assert tool.main(["--checkpoint", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert f"| {FC1} | the masters are those of other weights | {wrong[FC1]:,} | " in printed
    assert "FAULTS FOUND." in printed
    assert "resume with --no-load-optim" in printed


def test_a_resume_of_them_is_refused(saved: Callable[[str], SmallRun], check: Check) -> None:
    run = saved("wrong")
    variants: list[dict[str, Any]] = [
        {},
        {"tst_verify_checkpoint": "full"},
        {"no_load_optim": True},
        {"tst_verify_checkpoint": "off"},
    ]
    by_sample, in_full, *taken = check([run.with_(**variant) for variant in variants])
    for message in (by_sample, in_full):
        assert message is not None
        assert f"{STEPS:07d} has faults, such as " in message
        assert "the masters are those of other weights, " in message
        assert "or --no-load-optim. tst verify" in message
    assert taken == [None, None]


def test_a_rebuilt_checkpoint_goes_on_with_the_weights_and_the_learning_rate(
    launcher: Launcher,
    saved: Callable[[str], SmallRun],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = saved("wrong")
    # Kept under a name of its own, and written where a link points to.
    folder = shutil.copytree(wrong.checkpoint_folder(SAVED), tmp_path / "best")
    output = tmp_path / "rebuilt"
    output.symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", str(folder), "--rebuild-masters", "rebuilt"]
    assert tool.main(argv) == 0
    assert f"no fault found. Continue with --load {output}." in capsys.readouterr().out
    assert output.is_symlink()
    found = {path.name for path in output.iterdir()}
    assert found == {TRACKER_FILE, wrong.checkpoint_folder(SAVED).name}
    assert tool.main(argv) == 2
    printed = capsys.readouterr()
    assert "--rebuild-masters rebuilt exists: name a folder that does not" in printed.err
    # It was not read before.
    assert not printed.out
    run = wrong.with_(tmp_path / "run", load=output, save=None)
    launcher.run(run.argv, run.log, RUNS["wrong"][0])
    actual, expected = run.scalars(), wrong.scalars()
    # The weights are those of the run, so its next loss is as well.
    assert actual["lm loss"][SAVED + 1] == expected["lm loss"][SAVED + 1]
    assert sorted(actual["lm loss"]) == list(range(SAVED + 1, STEPS + 1))
    for step, rate in actual["learning-rate"].items():
        assert rate == expected["learning-rate"][step]


def test_a_rebuilding_that_is_ended_leaves_nothing(
    saved: Callable[[str], SmallRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output = saved("wrong").checkpoint_folder(SAVED), tmp_path / "rebuilt"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):

            def interrupted(*arguments: Any, number: int = signum) -> None:
                write_checkpoint(*arguments)
                signal.raise_signal(number)

            monkeypatch.setattr(rebuilding, "write_checkpoint", interrupted)
            with pytest.raises(SystemExit) as end:
                tool.main([f"--checkpoint={folder}", f"--rebuild-masters={output}"])
            assert end.value.code == 128 + signum
            assert capsys.readouterr().err == "interrupted: nothing was written\n"
            assert not list(tmp_path.iterdir())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_whole_checkpoint_under_any_name_has_no_fault(
    saved: Callable[[str], SmallRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = saved("one optimizer").checkpoint_folder(SAVED)
    best = shutil.copytree(source, tmp_path / "best")
    output = tmp_path / "rebuilt"
    assert tool.main([f"--checkpoint={best}", f"--rebuild-masters={output}"]) == 0
    printed = capsys.readouterr().out
    assert f"called best: Megatron loads it where it is called {source.name}" in printed
    assert f"There is nothing to rebuild: {output} was not written." in printed
    assert not output.exists()
    # A number of its own is a claim.
    other = best.rename(tmp_path / "iter_0000009")
    assert faults(verify_checkpoint(other)) == {findings.COUNTS: 1}
    monkeypatch.chdir(source)
    assert not verify_checkpoint(Path()).notes
    assert not verify_checkpoint(Path()).faults


@pytest.mark.parametrize("name", ["one optimizer", "buckets", "buckets, TP 2"])
def test_all_masters_of_a_good_checkpoint_are_compared(
    saved: Callable[[str], SmallRun], name: str
) -> None:
    run = saved(name)
    for step in (SAVED, STEPS):
        assert_faultless(run.checkpoint_folder(step))
        tensors = run.checkpoint(step)
        parameters = sum(t.numel() for key, t in tensors.items() if "optimizer" not in key)
        looked_at = verify_checkpoint(run.checkpoint_folder(step)).looked_at
        assert looked_at[MASTERS] >= parameters
        assert looked_at[findings.MOMENTS] >= parameters


def test_checkpoints_without_optimizer_pass(checkpoints: Path) -> None:
    folders = sorted(checkpoints.glob("*/iter_*"))
    assert folders
    assert_faultless(*folders)


Change = Callable[[Tensor], Tensor]


def changed(
    folder: Path,
    target: Path,
    tensors: dict[str, Change],
    change_common: Callable[[dict[str, Any]], object] = lambda common: None,
) -> Path:
    """A checkpoint with other values, whose checksums are right."""
    source = TorchDistCheckpoint(folder)
    common = source.read_common()
    change_common(common)
    chunks = []
    for key, entry in source.index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        whole = tensors.get(key, lambda tensor: tensor)(source.read(key))
        layers = [(layer,) for layer in range(whole.shape[0])] if whole.dim() > 2 else [()]
        for index in layers:
            size = tuple(whole.shape[len(index) :])
            load = whole[index].clone
            chunks.append(PlannedChunk(key, index, size, whole.dtype, load))
    write_checkpoint(target, source.shapes(), chunks, {COMMON_KEY: common}, lambda: None)
    return target


def with_value(value: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return change


def set_argument(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(common: dict[str, Any]) -> None:
        args: Namespace = common["args"]
        setattr(args, name, value)

    return change


def _tear(tensor: Tensor) -> Tensor:
    tensor.view(-1)[100:340] = 0
    return tensor


MASTER, FIRST, SECOND = (
    f"optimizer.state.{name}.{FC2}" for name in ("fp32_param", "exp_avg", "exp_avg_sq")
)
CHANGES: dict[str, tuple[dict[str, Change], Any, str]] = {
    "NaN in a weight": ({FC2: with_value(torch.nan)}, None, findings.FINITE),
    "infinite moment": ({FIRST: with_value(torch.inf)}, None, findings.FINITE),
    "another master": ({MASTER: with_value(0.5)}, None, MASTERS),
    "masters of other layers": ({MASTER: lambda t: t.flip(0)}, None, MASTERS),
    "zeros in a master": ({MASTER: _tear}, None, findings.ZERO_MASTERS),
    "moment below zero": ({SECOND: with_value(-1e-9)}, None, findings.NEGATIVE),
    "moments of other layers": ({SECOND: lambda t: t * 0}, None, findings.MOMENTS),
    "zeros in a moment": ({FIRST: _tear, SECOND: _tear}, None, findings.TORN),
    "another step": ({}, lambda common: common.update(iteration=3), findings.COUNTS),
    "other samples": ({}, set_argument("consumed_train_samples", 12), findings.COUNTS),
    "another switch": ({}, set_argument("tst_steps", 3), findings.COUNTS),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_thing_that_is_wrong(
    saved: Callable[[str], SmallRun], tmp_path: Path, name: str
) -> None:
    tensors, change_common, expected = CHANGES[name]
    source = saved("one optimizer").checkpoint_folder(SAVED)
    nothing = changed(source, tmp_path / "same" / source.name, {})
    assert not verify_checkpoint(nothing).faults
    folder = changed(
        source, tmp_path / "other" / source.name, tensors, change_common or (lambda common: None)
    )
    assert expected in faults(verify_checkpoint(folder))


def test_a_checkpoint_without_a_list_of_phases(
    saved: Callable[[str], SmallRun], check: Check, tmp_path: Path
) -> None:
    """As versions wrote it that had two."""

    def as_before(common: dict[str, Any]) -> None:
        settings = common["args"].tst_settings
        bags, plain = settings.pop("phases")
        assert (bags["bag_size"], bags["first_step"]) == (settings["bag_size"], 0)
        settings.update(switch_step=plain["first_step"], switch_sample=plain["first_sample"])

    run = saved("one optimizer")
    name = run.checkpoint_folder(SAVED).name
    folder = changed(run.checkpoint_folder(SAVED), tmp_path / name, {}, as_before)
    result = verify_checkpoint(folder)
    assert not result.faults
    assert not [note for note in result.notes if "cannot be compared" in note]
    old = run.with_(load=tmp_path, ckpt_step=SAVED)
    same, moved = check([old, old.with_(tst_steps=SAVED + 1)])
    assert same is None
    assert "was trained with the switch at sample 8 (step 2), and this command has it at" in (
        moved or ""
    )


def test_weights_that_were_quantized(saved: Callable[[str], SmallRun], tmp_path: Path) -> None:
    source = saved("one optimizer").checkpoint_folder(SAVED)

    def quantize(tensor: Tensor) -> Tensor:
        scale = 448 / tensor.abs().max()
        return ((tensor * scale).to(torch.float8_e4m3fn).float() / scale).bfloat16()

    fp8: dict[str, Change] = {FC1: quantize, FC2: quantize}
    flag = set_argument("fp8_param_gather", True)
    folder = changed(source, tmp_path / "right" / source.name, fp8, flag)
    assert not verify_checkpoint(folder).faults
    assert faults(verify_checkpoint(changed(source, tmp_path / "no flag" / source.name, fp8)))
    wrong: dict[str, Change] = {**fp8, MASTER: lambda tensor: tensor.flip(0)}
    folder = changed(source, tmp_path / "wrong" / source.name, wrong, flag)
    assert faults(verify_checkpoint(folder)) == {MASTERS: 4 * 40 * 80}


def overwritten(source: Path, target: Path, end_of_key: str, change: Change) -> Path:
    """A copy of a checkpoint with other numbers in the largest part of a tensor."""
    folder = shutil.copytree(source, target)
    by_key = shards_by_key(folder, TorchDistCheckpoint(folder).index)
    [shards] = [shards for key, shards in by_key.items() if key.endswith(end_of_key)]
    shard = max(shards, key=lambda shard: shard.elements)
    values = torch.cat(list(shard.pieces()))
    before, after = (tensor.numpy().tobytes() for tensor in (values, change(values.clone())))
    content = shard.path.read_bytes()
    assert content.count(before) == 1
    shard.path.write_bytes(content.replace(before, after))
    return folder


@pytest.mark.parametrize("change", [with_value(9), lambda tensor: tensor.roll(64)])
def test_masters_in_a_bucket_that_are_of_no_weight(
    saved: Callable[[str], SmallRun], tmp_path: Path, change: Change
) -> None:
    source = saved("buckets").checkpoint_folder(STEPS)
    folder = overwritten(source, tmp_path / source.name, BUCKET, change)
    assert faults(verify_checkpoint(folder)).keys() == {MASTERS, findings.CHECKSUMS}


def damage(folder: Path, how: str) -> str:
    """Damages a copy; returns the file."""
    index = TorchDistCheckpoint(folder).index
    [stored] = [
        place
        for of, place in index.storage_data.items()
        if of == MetadataIndex(SECOND, torch.Size([2, 0, 0]))
    ]
    file = folder / stored.relative_path
    if how == "missing":
        file.unlink()
    elif how == "cut off":
        with file.open("r+b") as opened:
            opened.truncate(stored.offset + stored.length // 2)
    else:
        with file.open("r+b") as opened:
            opened.seek(stored.offset + stored.length // 2)
            byte = opened.read(1)[0]
            opened.seek(-1, 1)
            opened.write(bytes([byte ^ 1]))
    return file.name


@pytest.mark.parametrize(
    ("how", "check", "text"),
    [
        ("missing", findings.FILES, "is missing"),
        ("cut off", findings.FILES, "bytes"),
        ("one bit", findings.CHECKSUMS, "the bytes are not the ones that were written"),
    ],
)
def test_damaged_files(
    saved: Callable[[str], SmallRun],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    check: str,
    text: str,
) -> None:
    source = saved("one optimizer").checkpoint_folder(SAVED)
    folder = shutil.copytree(source, tmp_path / source.name)
    damage(folder, how)
    code = tool.main(["--checkpoint", str(folder)])
    assert code == 1
    assert text in capsys.readouterr().out
    assert check in faults(verify_checkpoint(folder))


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_masters_in_rows_are_not_rebuilt(
    saved: Callable[[str], SmallRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved("buckets").checkpoint_folder(STEPS)
    folder = overwritten(source, tmp_path / source.name, BUCKET, with_value(9))
    argv = ["--checkpoint", str(folder), "--rebuild-masters", str(tmp_path / "new")]
    assert tool.main(argv) == 2
    assert "resume with --no-load-optim" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_folder_of_save_is_taken_too(
    saved: Callable[[str], SmallRun], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("one optimizer").folder / "checkpoints"
    assert (folder / TRACKER_FILE).is_file()
    assert tool.main(["--checkpoint", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"step {STEPS} of {STEPS}, phase 2, switch at step {SAVED}, bags of 4" in printed
    assert "No fault found." in printed
