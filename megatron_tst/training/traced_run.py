"""Opens what a run read from what it left behind: its checkpoint, or ``tst_run.json``."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint
from megatron_tst.common.errors import UsageError, read_json_object
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.data.tracing import DataTrace
from megatron_tst.report.runs import RUN_FILE
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.datasets import check_data_files, dataset_config_from_args
from megatron_tst.training.resume import corpus_identity


@dataclass(frozen=True)
class TracedRun:
    """A run and what it reads.

    Attributes:
        source: file or folder that describes it.
        args: Megatron's arguments, of its last start or of the checkpoint.
        data: the trace.
        tokenizer: Megatron's tokenizer of the run.
    """

    source: Path
    args: Namespace
    data: DataTrace
    tokenizer: Any


@contextmanager
def open_run(path: Path, data_path: list[str] | None = None) -> Iterator[TracedRun]:
    """Opens the text of a run, in the order in which it reads it.

    The run's data cache is used where it is, and is not written to; what is missing of it is worked
    out in a temporary folder. No collectives.

    Args:
        path: folder of the run or of its ``--tensorboard-dir`` with ``tst_run.json``, or an
            ``iter_...`` or ``--save`` folder.
        data_path: ``--data-path`` or ``--train-data-path`` of corpora that have moved.

    Raises:
        UsageError: no description of a run, other corpora than it had, or an order that this
            project does not know.
    """
    source, args, steps_done = _read_arguments(path)
    if data_path is not None:
        name = "data_path" if args.train_data_path is None else "train_data_path"
        setattr(args, name, data_path)
    check_data_files(args)
    schedule = _schedule_of(source, args, steps_done)
    cache = args.data_cache_path
    # Promises of a cache that is there, for ranks that must not look.
    args.dataloader_fast_cache_load = args.dataloader_defer_npy_index_mmap = False
    with tempfile.TemporaryDirectory(prefix="trace-data-") as temporary:
        args.data_cache_path = temporary
        config = dataset_config_from_args(args, schedule)
        _link_cache(cache, config, Path(temporary))
        # The other splits are not read.
        for splits in ("split_matrix", "blend_per_split"):
            if (found := getattr(config, splits)) is not None:
                setattr(config, splits, [found[0], None, None])
        # As many as training asks for: Megatron's own order depends on their number.
        planned = args.train_samples or args.train_iters * args.global_batch_size
        samples = max(planned, schedule.batch_sizes.samples_at(schedule.total_steps))
        train, _, _ = BlendedMegatronDatasetBuilder(
            SuperpositionGPTDataset, [samples, 0, 0], lambda: True, config
        ).build()
        yield TracedRun(source, args, DataTrace(train, schedule), config.tokenizer)


def run_file(path: Path) -> Path | None:
    """The ``tst_run.json`` of a folder, None without one."""
    places = [path / RUN_FILE, path / "tensorboard" / RUN_FILE]
    return next((place for place in places if place.is_file()), None)


def _read_arguments(path: Path) -> tuple[Path, Namespace, int]:
    """Where the arguments of a run were found, these, and the steps that were done by then."""
    description = run_file(path)
    if description is None:
        try:
            folder = find_checkpoint(path)
        except UsageError as error:
            raise UsageError(
                f"--run {path} has no {RUN_FILE}, nor a checkpoint ({error}): pass the folder of "
                "--tensorboard-dir or --save, or the one that holds tensorboard/."
            ) from error
        common = TorchDistCheckpoint(folder).read_common()
        args: Namespace = common["args"]
        if not hasattr(args, "tst_settings"):
            raise UsageError(f"{folder} was not trained by python -m megatron_tst.pretrain.")
        return folder, args, common["iteration"]
    arguments = read_json_object(description, "pass a checkpoint").get("arguments")
    if arguments is None:
        raise UsageError(
            f"{description} was written by an earlier version, without the arguments of the run: "
            "pass a folder with its checkpoints."
        )
    # Written behind the first step of a start.
    return description, Namespace(**arguments), arguments["curr_iteration"] + 1


def _schedule_of(source: Path, args: Namespace, steps_done: int) -> SuperpositionSchedule:
    if args.phase_transition_iterations:
        raise UsageError(
            f"{source}: a run with --phase-transition-iterations cannot be traced, because its "
            "samples do not follow each other."
        )
    if args.dataloader_type != "single":
        raise UsageError(
            f"{source}: a run with --dataloader-type {args.dataloader_type} cannot be traced, "
            "because its samples are shuffled again while they are read."
        )
    schedule = superposition_schedule_from_args(args)
    saved = args.tst_settings
    identity = corpus_identity(args)
    other = [name for name, value in identity.items() if saved.get(name, value) != value]
    if other:
        raise UsageError(
            f"{source}: the corpora of --data-path are not those of the run ({', '.join(other)}): "
            "pass the right ones with --data-path."
        )
    # Megatron lets a baseline go on with another batch size, and does not write that down.
    samples = schedule.batch_sizes.samples_at(steps_done)
    if args.consumed_train_samples != samples:
        raise UsageError(
            f"{source}: {args.consumed_train_samples} samples were read in {steps_done} steps, and "
            f"its batch size makes that {samples}: it was another one before, which is not known. "
            "Trace a checkpoint from before the change."
        )
    return schedule


def _link_cache(cache: str | None, config: SuperpositionGPTDatasetConfig, folder: Path) -> None:
    """Puts links to what there is of the data cache of a run into a folder."""
    name = SuperpositionGPTDataset.__name__
    beside = [Path(path) / "cache" / f"{name}_indices" for path in config.train_blend[0]]
    for source in [Path(cache)] if cache else beside:
        for path in source.glob("*"):
            os.symlink(path.resolve(), folder / path.name)
