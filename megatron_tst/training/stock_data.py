"""Lets plain Megatron go on with the text that a run with superposition has not read."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.global_vars import set_args
from megatron.training.training import get_train_valid_test_num_samples
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint
from megatron_tst.common.atomic_files import replacing_folder
from megatron_tst.common.errors import UsageError
from megatron_tst.data.blend import samples_by_corpus
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.data.stock_order import stock_indices
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.phases import is_superposed
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.training.datasets import check_data_files, dataset_config_from_args


@dataclass(frozen=True)
class StockData:
    """What :func:`write_stock_data` found and wrote.

    Attributes:
        checkpoint: folder of the checkpoint.
        step: steps that are done.
        schedule: phases of the run.
        samples_read: samples that the run has read.
        samples: samples of the whole run.
        cache: folder for ``--data-cache-path``.
    """

    checkpoint: Path
    step: int
    schedule: SuperpositionSchedule
    samples_read: int
    samples: int
    cache: Path


def write_stock_data(checkpoint: Path, cache: Path) -> StockData:
    """Writes a data cache with which Megatron's own GPTDataset continues the text of a run.

    All settings come from the arguments in the checkpoint, whose corpora must be where they were.
    Needs a process in which Megatron has no arguments yet; no collectives.

    Args:
        checkpoint: an ``iter_...`` folder, or the folder of ``--save``.
        cache: folder to make, for ``--data-cache-path`` of the run that goes on.

    Raises:
        UsageError: not a checkpoint of a run with superposition, nothing left to read, corpora
            that have moved, or data that plain Megatron would read in another way.
    """
    folder = find_checkpoint(checkpoint)
    if cache.exists():
        raise UsageError(f"--data-cache-path {cache} exists: choose a folder that does not.")
    common = TorchDistCheckpoint(folder).read_common()
    args = common["args"]
    refuse_other_checkpoints(args, folder)
    check_data_files(args)
    schedule = superposition_schedule_from_args(args)
    set_args(args)
    ours = dataset_config_from_args(args, schedule)
    counts = get_train_valid_test_num_samples()
    samples_read = int(args.consumed_train_samples)
    if samples_read >= counts[0]:
        raise UsageError(
            f"{folder} is the end of its run: there are no tokens left that it planned."
        )
    write_cache(ours, counts, samples_read, cache)
    step = int(common["iteration"])
    return StockData(folder, step, schedule, samples_read, counts[0], cache)


def refuse_other_checkpoints(args: Namespace, folder: Path) -> None:
    """Refuses what plain Megatron would continue in another way, or without any help.

    Args:
        args: arguments in a checkpoint.
        folder: of that checkpoint.

    Raises:
        UsageError: no superposition, or a blend without weights.
    """
    if not is_superposed(getattr(args, "tst_settings", None)):
        raise UsageError(f"{folder} was made without superposition: plain Megatron reads on.")
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for paths, weights in filter(None, [blend, *(blend_per_split or [])]):
        if len(paths) > 1 and weights is None:
            raise UsageError(
                f"--data-path {' '.join(paths)} has no weights, without which plain Megatron "
                "blends in another way: the data cannot be continued there."
            )


def write_cache(
    config: SuperpositionGPTDatasetConfig,
    counts: tuple[int, int | None, int | None],
    samples_read: int,
    cache: Path,
) -> GPTDatasetConfig:
    """Lets upstream fill its cache, and puts the order of the run in the place of its own.

    Args:
        config: datasets of the run.
        counts: samples of the train, validation and test split that plain Megatron will ask for.
        samples_read: of the train split.
        cache: folder to write; nothing can be added to it afterwards, unless by root.

    Returns:
        The configuration with which upstream's datasets find the cache.
    """
    paths, weights = config.train_blend
    read = [samples_read]
    if len(paths) > 1:
        assert weights is not None
        read = samples_by_corpus(weights, samples_read)
    planned = _build(SuperpositionGPTDataset, (counts[0], 0, 0), config)
    rest = [
        stock_indices(dataset.stream, dataset.layout, done, config.random_seed)
        for dataset, done in zip(planned, read, strict=True)
    ]
    settings = {f.name: getattr(config, f.name) for f in fields(GPTDatasetConfig) if f.init}
    # Elsewhere first: half a cache would hold upstream's order.
    with replacing_folder(cache) as temporary:
        stock_config = GPTDatasetConfig(**{**settings, "path_to_cache": str(temporary)})
        for ours, stock, indices in zip(
            planned, _build(GPTDataset, counts, stock_config), rest, strict=True
        ):
            assert stock.dataset_path == ours.dataset_path
            name = f"{stock.unique_description_hash}-{type(stock).__name__}-train"
            indices.save(f"{temporary}/{name}")
        # A run with other arguments would not find its index, and make one that starts over.
        temporary.chmod(0o555)
    return replace(stock_config, path_to_cache=str(cache))


def _build(dataset_class: Any, counts: Any, config: GPTDatasetConfig) -> list[Any]:
    """The train dataset of each corpus."""
    train, _, _ = BlendedMegatronDatasetBuilder(dataset_class, counts, lambda: True, config).build()
    return list(getattr(train, "datasets", [train]))
