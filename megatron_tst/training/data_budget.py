"""Prints and checks, before anything is built, what a run reads of each corpus."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from megatron.training import print_rank_0
from numpy.typing import NDArray

from megatron_tst.common.errors import UsageError
from megatron_tst.data.budget import (
    CorpusBudget,
    TrainText,
    data_budget,
    refuse_repetition,
    text_shares,
)
from megatron_tst.data.dataset_config import SuperpositionGPTDatasetConfig
from megatron_tst.settings.phases import bags_name, plain_name
from megatron_tst.settings.schedule import SuperpositionSchedule


def check_data_budget(
    args: Namespace, schedule: SuperpositionSchedule, config: SuperpositionGPTDatasetConfig
) -> SuperpositionSchedule:
    """Prints the data budget, and puts it among Megatron's arguments, which checkpoints store.

    Corpora in object storage are not looked at, nor is any text of a run that does not train.

    Args:
        args: validated command line.
        schedule: phases of the run.
        config: of its datasets.

    Returns:
        The schedule, which knows how much of the bags is text.

    Raises:
        UsageError: the run reads a corpus more often than ``--tst-max-epochs``, which is 1 with
            superposition and unlimited without; or an explicit limit cannot be checked.
    """
    args.tst_data_budget = []
    paths, weights = config.train_blend
    # Paths of splits are read whole.
    bounds = (0.0, 1.0) if config.split_matrix is None else config.split_matrix[Split.train.value]
    if not paths or bounds is None:
        return schedule
    remote = [path for path in paths if is_object_storage_path(path)]
    if remote:
        if args.tst_max_epochs is not None:
            raise UsageError(
                f"--tst-max-epochs {args.tst_max_epochs:g} cannot be checked for {remote[0]}, as "
                "corpora in object storage are not counted: remove it, or copy the corpus."
            )
        print_rank_0(f"> data budget: not counted, as {remote[0]} is in object storage")
        return schedule
    _, share = bounds
    texts = [TrainText(path, share, _absent(config, path)) for path in paths]
    # Without weights upstream reads from each as much as it holds.
    shares = weights or [text.tokens or 1 for text in texts]
    budgets = data_budget(schedule, texts, shares)
    args.tst_data_budget = [_as_dict(budget) for budget in budgets]
    print_rank_0("> data budget, in tokens:")
    for budget in budgets:
        print_rank_0(f"    {_line(budget, schedule)}")
    max_epochs = args.tst_max_epochs
    if max_epochs is None and schedule.config.enabled:
        max_epochs = 1.0
    if max_epochs is not None:
        refuse_repetition(schedule, texts, shares, max_epochs)
    text = sum(budget.phase_1 for budget in budgets)
    places = text + sum(budget.phase_1_padding for budget in budgets)
    if places == text:
        return schedule
    by_size = text_shares(schedule, texts, shares)
    return replace(schedule, text_share=text / places, text_shares=by_size)


def _absent(config: SuperpositionGPTDatasetConfig, path: str) -> NDArray[Any]:
    """The documents that are no part of a corpus from the start."""
    left_out = [each.documents for each in config.exclusions_of(path) if not each.first_place]
    return np.concatenate([np.zeros(0, dtype=np.int64), *left_out])


def _as_dict(budget: CorpusBudget) -> dict[str, Any]:
    return {**asdict(budget), "epochs": budget.epochs}


def _line(budget: CorpusBudget, schedule: SuperpositionSchedule) -> str:
    places = budget.phase_1 + budget.phase_1_padding
    padding = ""
    if budget.phase_1_padding:
        padding = f" (about: {budget.phase_1_padding / places:.1%} of its places are padding)"
    return (
        f"{budget.path}: {budget.available:,} available, {budget.phase_1:,} in "
        f"{bags_name(schedule.phases)}{padding}, {budget.phase_2:,} in "
        f"{plain_name(schedule.phases)}, {budget.epochs:.3g} epochs"
    )
