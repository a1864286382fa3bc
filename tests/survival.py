"""What happens to long runs, done to small ones: stops, kills, full disks, damaged files."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tests.runs import SmallRun
from tests.zygote import Launcher, Run

MAIN = "tests.survival:main"
BAG_SIZE = 4
SWITCH = 4
TOTAL = 8
BATCH = 4
# Checkpoints at 3, at the switch, at 6 and at the end; dropout, so that a random state lost at a
# restart would show.
SETTINGS: dict[str, Any] = {
    "tst_bag_size": BAG_SIZE,
    "tst_steps": SWITCH,
    "train_iters": TOTAL,
    "global_batch_size": BATCH,
    "save_interval": 3,
    "eval_iters": 0,
    "hidden_dropout": 0.1,
}


def main() -> int:
    """Trains as the entry point does, under the conditions in the environment.

    STOP_AFTER: the step after whose log line each rank stops itself, until it gets SIGCONT.
    STOP_IN_SAVE: the step in whose checkpoint the first rank stops itself, before its index.
    LIMIT_FILES_AFTER: the step after which no file can grow beyond FILE_BYTES.
    STARTED_SECONDS_AGO: how long the job has been running.
    RECORD_READS: where each rank appends what it reads of the train split.
    RECORD_BATCHES: where one rank of each replica appends the micro-batches that it trains on.
    """
    from megatron.training import set_startup_timestamps

    from megatron_tst.training import pretrain

    if ago := os.environ.get("STARTED_SECONDS_AGO"):
        set_startup_timestamps(program_start=time.time() - float(ago))
    if folder := os.environ.get("RECORD_READS"):
        _record_reads(Path(folder))
    if folder := os.environ.get("RECORD_BATCHES"):
        _record_batches(Path(folder))
    if step := os.environ.get("STOP_IN_SAVE"):
        _stop_in_save(int(step))

    def after_step(step: Any) -> None:
        if os.environ.get("LIMIT_FILES_AFTER") == str(step.iteration):
            size = int(os.environ["FILE_BYTES"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if os.environ.get("STOP_AFTER") == str(step.iteration):
            # A thread writes the scalars, and would end with a rank that is killed.
            pretrain._flush_tensorboard()
            os.kill(os.getpid(), signal.SIGSTOP)

    return pretrain.main(after_step)


def _stop_in_save(step: int) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer: Any = filesystem_async.FileSystemWriterAsync
    finish = writer.finish

    @functools.wraps(finish)
    def stop_first(self: Any, *args: Any) -> Any:
        if Path(self.checkpoint_dir).name == f"iter_{step:07d}":
            os.kill(os.getpid(), signal.SIGSTOP)
        return finish(self, *args)

    writer.finish = stop_first


def _record_reads(folder: Path) -> None:
    from megatron_tst.data.dataset import SuperpositionGPTDataset

    folder.mkdir(parents=True, exist_ok=True)
    read = SuperpositionGPTDataset.__getitem__

    @functools.wraps(read)
    def recorded(self: Any, index: int | None) -> Any:
        item = read(self, index)
        if self.is_superposed and index is not None:
            begin, _ = self.span(index)
            entry = {"index": int(index), "begin": begin, "tokens": item["tokens"].numel()}
            with (folder / f"rank{os.environ['RANK']}").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return item

    SuperpositionGPTDataset.__getitem__ = recorded  # type: ignore[method-assign]


def _record_batches(folder: Path) -> None:
    from megatron.core import mpu

    from megatron_tst.training import forward_step

    folder.mkdir(parents=True, exist_ok=True)
    module: Any = forward_step
    read = module.get_batch

    def recorded(iterator: Any, args: Any, phase: Any, vp_stage: Any = None) -> Any:
        batch = read(iterator, args, phase, vp_stage)
        is_first = mpu.get_tensor_model_parallel_rank() == 0 and mpu.is_pipeline_first_stage()
        if phase is not None and is_first:
            rank, tokens = mpu.get_data_parallel_rank(), batch["tokens"]
            rows = tokens.reshape(len(tokens), -1).tolist()
            with (folder / f"rank{rank}").open("a") as file:
                file.write(json.dumps([args.curr_iteration + 1, rank, rows]) + "\n")
        return batch

    module.get_batch = recorded


def wait_until(condition: Callable[[], bool], run: Run, seconds: float = 100) -> None:
    """Waits for something that a run does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run.log}:\n{run.text[-4000:]}")
        time.sleep(0.002)


def wait_until_stopped(run: Run) -> None:
    """Waits for all ranks to stop themselves."""
    wait_until(lambda: all(_is_stopped(pid, run) for pid in run.pids), run)


def _is_stopped(pid: int, run: Run) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        raise AssertionError(f"rank {run.pids.index(pid)} ended\n{run.text[-4000:]}") from None


def let_go(run: Run) -> None:
    """Lets stopped ranks go on."""
    for pid in run.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(launcher: Launcher, run: Run) -> None:
    """Ends all ranks at once, as the loss of a node does."""
    launcher.kill_all(run)
    launcher.wait(run)


def kill_while_saving(launcher: Launcher, run: Run, checkpoints: Path, step: int) -> None:
    """Kills all ranks while the checkpoint of a step is being written, behind a whole one.

    The run was started with the step in STOP_IN_SAVE.
    """
    wait_until(lambda: _is_stopped(run.pids[0], run), run)
    assert [folder.name for folder in _half_written(checkpoints)] == [f"iter_{step:07d}"]
    kill(launcher, run)


def _half_written(checkpoints: Path) -> list[Path]:
    if not (checkpoints / "latest_checkpointed_iteration.txt").is_file():
        return []
    return [
        folder
        for folder in checkpoints.glob("iter_*")
        if any(folder.glob("*.distcp")) and not (folder / ".metadata").exists()
    ]


def last_checkpoint(run: SmallRun) -> int:
    """The step that the tracker names."""
    return int((run.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def error_lines(run: Run) -> list[str]:
    """What says why a run ended; another rank may have written half a line before it."""
    return re.findall(r"error: (?:rank|/).*", run.text)


def overwrite_weight(checkpoint: Path, name: str, value: float) -> None:
    """Writes a value over all numbers of a tensor in the file of a checkpoint."""
    stored = {
        index.fqn: info
        for index, info in FileSystemReader(str(checkpoint)).read_metadata().storage_data.items()
    }[name]
    path = checkpoint / stored.relative_path
    content = path.read_bytes()
    part = content[stored.offset : stored.offset + stored.length]
    (checkpoint / "part").write_bytes(part)
    tensor = torch.load(checkpoint / "part", weights_only=True)
    (checkpoint / "part").unlink()
    old = tensor.view(torch.uint8).numpy().tobytes()
    new = torch.full_like(tensor, value).view(torch.uint8).numpy().tobytes()
    assert part.count(old) == 1
    path.write_bytes(
        content[: stored.offset] + part.replace(old, new) + content[stored.offset + stored.length :]
    )
