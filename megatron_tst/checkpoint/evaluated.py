"""Evaluates checkpoints of a run, as the Hugging Face models that they would be exported as."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tst.checkpoint.hf_export import export_to_huggingface
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_index import find_checkpoint
from megatron_tst.common.atomic_files import temporary_folder
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.evaluate import Evaluation, EvaluationConfig, prepare
from megatron_tst.evaluation.folder import check_model_folder
from megatron_tst.evaluation.results import Results, check_output, write_results
from megatron_tst.settings.arguments import superposition_schedule_from_args
from megatron_tst.settings.batch_arguments import total_steps_from_args
from megatron_tst.settings.phases import is_superposed, phase_at, recorded_phases


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a run was when it saved.

    Attributes:
        folder: of the iteration, an absolute path.
        step: optimizer steps done.
        total_steps: of the whole run, None where its arguments do not say.
        phase: of the last step, from 1; None in a run without superposition.
        bag_size: of the phase of the last step, the largest of those that are drawn.
        data_tokens: of text that were read, None where the arguments do not say.
    """

    folder: str
    step: int
    total_steps: int | None
    phase: int | None
    bag_size: int
    data_tokens: int | None


def read_saved(folder: Path) -> SavedCheckpoint:
    """Reads the training arguments of a checkpoint, and no weights.

    Raises:
        UsageError: they are missing or damaged.
    """
    common: Mapping[str, Any] = TorchDistCheckpoint(folder).read_common()
    args, step = common["args"], int(common.get("iteration", 0))
    settings = getattr(args, "tst_settings", None)
    phases = recorded_phases(settings)
    phase = phase_at(phases, max(step - 1, 0))
    total_steps, data_tokens = _counts(args, step, is_superposed(settings))
    return SavedCheckpoint(
        folder=str(folder.resolve()),
        step=step,
        total_steps=total_steps,
        phase=1 + phases.index(phase) if is_superposed(settings) else None,
        bag_size=phase.bag_size,
        data_tokens=data_tokens,
    )


def _counts(args: Namespace, step: int, has_bags: bool) -> tuple[int | None, int | None]:
    # Other versions and programs save other arguments.
    try:
        total_steps = total_steps_from_args(args) or None
        if has_bags:
            return total_steps, superposition_schedule_from_args(args).data_tokens(step)
        return total_steps, int(args.consumed_train_samples) * int(args.seq_length)
    except (AttributeError, TypeError, ValueError):
        return None, None


def evaluate_checkpoint(
    config: EvaluationConfig, checkpoint: Path, tokenizer: Path, display: TaskProgress
) -> tuple[Results, Results | None]:
    """Evaluates a checkpoint and writes the results.

    Args:
        config: what to evaluate, and how.
        checkpoint: folder of an iteration, or a folder of ``--save`` (its latest iteration).
        tokenizer: folder of the Hugging Face tokenizer.
        display: shows how far it is.

    Returns:
        The results, with ``checkpoint`` besides, and those of ``config.compare``.

    Raises:
        UsageError: input that cannot be used, naming it and the remedy.
    """
    check_output(config.output, config.overwrite)
    saved = read_saved(find_checkpoint(checkpoint))
    results, other = run_on(prepare(config), saved, tokenizer, display)
    write_results(config.output, results, other)
    return results, other


def run_on(
    evaluation: Evaluation,
    saved: SavedCheckpoint,
    tokenizer: Path,
    display: TaskProgress,
    warns: bool = True,
) -> tuple[Results, Results | None]:
    """Exports a checkpoint into a folder beside the output, evaluates it and removes it again.

    Raises:
        UsageError: it cannot be exported, or its evaluation fails.
    """
    folder = Path(saved.folder)
    with temporary_folder(evaluation.config.output, "exported") as work:
        model = work / folder.name
        count = display.counting(f"Exporting {folder.name}", "parts")
        exported = export_to_huggingface(folder, tokenizer, model, on_progress=count)
        for warning in exported.warnings if warns else ():
            display.say(f"warning: {warning}")
        checked = replace(check_model_folder(model), name=saved.folder)
        results, other = evaluation.run(checked, display)
    return {**results, "checkpoint": asdict(saved)}, other
