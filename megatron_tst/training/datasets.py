"""Builds the training, validation and test datasets that Megatron's loop asks for."""

from __future__ import annotations

import math
import os
import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tst.common.errors import UsageError
from megatron_tst.corpus.mock import mock_corpus
from megatron_tst.data.batch import reads_data_on_stage
from megatron_tst.data.blend import Blend
from megatron_tst.data.budget import TrainText
from megatron_tst.data.dataset import SuperpositionGPTDataset
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.data.files import (
    check_indexed_dataset,
    check_same_tokenizer,
    check_vocabulary,
)
from megatron_tst.data.named_corpora import data_path_prefixes
from megatron_tst.settings.arguments import has_bags
from megatron_tst.settings.schedule import SuperpositionSchedule
from megatron_tst.settings.validation_arguments import refuse_validation_data
from megatron_tst.training.validation_split import samples_per_evaluation, validation_split


class DatasetsProvider:
    """Called by Megatron with the number of samples of each split.

    Args:
        args: validated command line.
        schedule: where the switch lies.

    Raises:
        UsageError: the data does not go together with superposition, or with ``--full-validation``.
    """

    is_distributed = True
    """Tells Megatron to call the provider on every rank."""

    def __init__(self, args: Namespace, schedule: SuperpositionSchedule) -> None:
        self.config = dataset_config_from_args(args, schedule)
        paths, weights = self.config.blend_of(Split.valid) or ([], None)
        has_test = self.config.blend_of(Split.test) is not None
        refuse_validation_data(args, paths, weights, has_test)
        self.samples_read = schedule.batch_sizes.samples_at(schedule.total_steps)

    def __call__(
        self, num_samples: tuple[int, int | None, int], vp_stage: int | None = None
    ) -> tuple[Any, Any, Any]:
        """Returns the train, validation and test datasets, None on ranks that read no data.

        Raises:
            UsageError: the train split is shorter than one sample, or nothing is left to validate
                on, which Megatron would find out at the first evaluation.
        """
        args = get_args()
        train_samples, _, test_samples = num_samples
        # The last batch of a schedule of batch sizes may reach beyond --train-samples.
        train_samples = max(train_samples, self.samples_read)
        per_evaluation = samples_per_evaluation(args)
        print_rank_0("> building train, validation, and test datasets for GPT ...")
        train, valid, test = BlendedMegatronDatasetBuilder(
            SuperpositionGPTDataset,
            [train_samples, per_evaluation, test_samples],
            lambda: _reads_data(vp_stage),
            self.config,
        ).build()
        valid = validation_split(valid, args, _reads_data(vp_stage))
        test = None if per_evaluation == 0 else test
        print_rank_0("> finished creating GPT datasets ...")
        return train, valid, test


def check_data_files(args: Namespace) -> None:
    """Checks the corpora and the tokenizer on the command line before anything is built.

    Raises:
        UsageError: a missing, truncated or inconsistent file, named with the remedy.
    """
    prefixes = data_path_prefixes(args)
    if not prefixes and has_bags(args) and not args.mock_data:
        raise UsageError(
            "--data-path is missing: pass the path of a corpus, without .bin or .idx "
            "(tst preprocess makes one), or --mock-data to measure speed without one."
        )
    for prefix in prefixes:
        check_indexed_dataset(prefix)
    check_same_tokenizer(prefixes)
    tokenizer = args.tokenizer_model
    if tokenizer is not None and not _is_hub_name(tokenizer) and not Path(tokenizer).exists():
        raise UsageError(
            f"--tokenizer-model {tokenizer} does not exist: pass the file or folder of the "
            "tokenizer that the corpus was made with."
        )


def write_mock_corpus(args: Namespace) -> None:
    """Puts a corpus without meaning in the place of ``--mock-data``, read as often as it takes.

    Megatron's own mock data are documents that count upwards, which no bag could be read from and
    of which an embedding would touch other rows than of text.

    Args:
        args: validated command line; changed.
    """
    if not args.mock_data:
        return
    user = f"megatron-tst-{os.getuid()}"
    folder = Path(args.data_cache_path or Path(tempfile.gettempdir()) / user)
    args.data_path = [str(mock_corpus(folder, args.padded_vocab_size))]
    args.mock_data, args.tst_max_epochs = False, math.inf
    args.split = args.split or "99,1,0"


def check_data_vocabulary(args: Namespace) -> None:
    """Looks for token ids without a row in the embedding, in a sample of every corpus.

    Raises:
        UsageError: naming the file, the id and the remedy.
    """
    for prefix in data_path_prefixes(args):
        check_vocabulary(prefix, args.padded_vocab_size)


def _with_weights(blend: Blend | None) -> Blend | None:
    """Weighs several corpora by their size, where the command line gives no weights."""
    if blend is None or blend[1] is not None or len(blend[0]) == 1:
        return blend
    for prefix in blend[0]:
        if is_object_storage_path(prefix):
            raise UsageError(
                f"--data-path {prefix} has no weight, and corpora in object storage are not "
                "counted: put a number in front of each path."
            )
    return blend[0], [float(TrainText(prefix).tokens) for prefix in blend[0]]


def _is_hub_name(tokenizer: str) -> bool:
    """Whether it can name a tokenizer of the Hugging Face hub: NAME or OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", tokenizer) is not None


def _reads_data(vp_stage: int | None) -> bool:
    is_tp_source = mpu.get_tensor_model_parallel_rank() == 0
    return is_tp_source and reads_data_on_stage(get_args(), vp_stage)


def dataset_config_from_args(
    args: Namespace, schedule: SuperpositionSchedule
) -> SuperpositionGPTDatasetConfig:
    """The dataset configuration of a parsed command line.

    Raises:
        UsageError: the data does not go together with superposition.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if schedule.config.enabled:
        blend = _with_weights(blend)
        if blend_per_split:
            train, *others = blend_per_split
            # Sets that are evaluated one by one are not blended.
            is_blended = not args.multiple_validation_sets
            blend_per_split = [
                _with_weights(train),
                *(_with_weights(b) if is_blended else b for b in others),
            ]
    return SuperpositionGPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
        superposition=schedule.config,
        phases=schedule.stretches,
        left_out=getattr(args, "tst_left_out", []),
        reads_train_split=not args.skip_train,
    )
