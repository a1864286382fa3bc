"""Evaluates a Hugging Face folder on tasks and text, and another one beside it."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_tst import __version__
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import TaskProgress
from megatron_tst.evaluation.bits_per_byte import bits_per_byte, read_documents
from megatron_tst.evaluation.folder import (
    DtypeName,
    ModelFolder,
    check_model_folder,
    device_of,
    load_model,
)
from megatron_tst.evaluation.harness import Tasks, load_tasks, run_tasks
from megatron_tst.evaluation.results import (
    FORMAT,
    Results,
    check_comparable,
    check_output,
    read_results,
    write_results,
)

_PACKAGES = ("lm-eval", "transformers", "tokenizers", "torch", "datasets")


@dataclass(frozen=True)
class EvaluationConfig:
    """On what a model is evaluated, and how.

    Attributes:
        output: JSON file to write.
        tasks: names of lm-eval; None takes all of ``tasks_dir``, or the published ones if there is
            no ``text`` either.
        tasks_dir: folder with task files.
        text: file, or folder of files, for bits per byte.
        compare: folder of a second model, or the JSON file of its evaluation.
        limit: samples of each task; all by default.
        batch_size: sequences at once.
        window: most tokens that a prediction of bits per byte sees; the model's context by default.
        stride: tokens from one window to the next; half a window by default.
        by_position: also the bits by the number of tokens that a prediction sees.
        dtype: of the weights; ``auto`` is as stored, or float32 where a CPU has no bf16.
        device: ``auto`` is the GPU where there is one.
        overwrite: replace an existing output.
    """

    output: Path
    tasks: tuple[str, ...] | None = None
    tasks_dir: Path | None = None
    text: Path | None = None
    compare: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    window: int | None = None
    stride: int | None = None
    by_position: bool = False
    dtype: DtypeName = "auto"
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value}: use 1 or more.")
        if self.by_position and self.text is None:
            raise UsageError("--by-position is of text: pass --text with held-out text.")

    @property
    def runs_tasks(self) -> bool:
        """Whether lm-eval is needed."""
        return self.tasks is not None or self.tasks_dir is not None or self.text is None


@dataclass(frozen=True)
class Evaluation:
    """Input that was checked, but for the model.

    Attributes:
        config: what to evaluate, and how.
        settings: as the results have them.
        documents: text by file.
        tasks: of lm-eval.
        second: the folder to compare with.
        earlier: results to compare with.
    """

    config: EvaluationConfig
    settings: Results
    documents: Mapping[Path, str] | None
    tasks: Tasks | None
    second: ModelFolder | None = None
    earlier: Results | None = None

    def run(self, folder: ModelFolder, display: TaskProgress) -> tuple[Results, Results | None]:
        """Evaluates a model, and the second one if there is one; writes nothing.

        Raises:
            UsageError: the models do not go with each other or with the window, or do not load.
        """
        if self.documents is not None:
            folders = [folder] if self.second is None else [folder, self.second]
            earlier = [] if self.earlier is None else [self.earlier["text"]["window"]]
            _check_windows(self.config, folders, earlier)
        results = self._run_one(folder, display)
        if self.second is None:
            return results, self.earlier
        return results, self._run_one(self.second, display)

    def _run_one(self, folder: ModelFolder, display: TaskProgress) -> Results:
        config, started = self.config, time.monotonic()
        loaded = load_model(folder, config.dtype, device_of(config.device))
        for note in loaded.notes:
            display.say(f"note: {note}")
        text = None
        if self.documents is not None:
            measured = bits_per_byte(
                loaded,
                list(self.documents.values()),
                config.window,
                config.stride,
                config.batch_size,
                display.counting(f"{folder.name}, text", "windows"),
            )
            text = measured.to_dict(config.by_position)
        of_tasks = {}
        if self.tasks is not None:
            count = display.counting(f"{folder.name}, tasks", "answers")
            of_tasks = run_tasks(loaded, self.tasks, config.batch_size, config.limit, count)
        return {
            "format": FORMAT,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": _description(folder, loaded.model),
            "settings": self.settings,
            "tasks": of_tasks,
            "text": text,
            "versions": _versions(),
            "seconds": round(time.monotonic() - started, 1),
        }


def prepare(config: EvaluationConfig) -> Evaluation:
    """Checks all input but the model and the output, and loads none of the models.

    Raises:
        UsageError: input that cannot be used, naming it and the remedy.
    """
    second = None
    if config.compare is not None and config.compare.is_dir():
        second = check_model_folder(config.compare, "--compare")
    device = device_of(config.device)
    documents = None if config.text is None else read_documents(config.text)
    tasks = load_tasks(config.tasks, config.tasks_dir) if config.runs_tasks else None
    settings = _settings(config, str(device), documents, tasks)
    earlier = None
    if config.compare is not None and second is None:
        earlier = read_results(config.compare)
        check_comparable(settings, earlier, config.compare)
    return Evaluation(config, settings, documents, tasks, second, earlier)


def evaluate(
    config: EvaluationConfig, model: Path, display: TaskProgress
) -> tuple[Results, Results | None]:
    """Evaluates one or two models and writes the results; all input is checked before any loads.

    Args:
        config: what to evaluate, and how.
        model: Hugging Face folder.
        display: shows how far it is.

    Returns:
        The results, and those of ``config.compare``.

    Raises:
        UsageError: input that cannot be used, naming it and the remedy.
    """
    check_output(config.output, config.overwrite)
    folder = check_model_folder(model)
    results, other = prepare(config).run(folder, display)
    write_results(config.output, results, other)
    return results, other


def _check_windows(
    config: EvaluationConfig, folders: Sequence[ModelFolder], others: Sequence[int]
) -> None:
    """What a token sees changes its bits: both models must see as much."""
    known = [folder.context for folder in folders if folder.context is not None]
    if config.window is None:
        windows = {*known, *others}
        if len(windows) > 1:
            raise UsageError(
                f"--compare {config.compare}: the models have contexts of "
                f"{' and '.join(map(str, sorted(windows)))} tokens, which makes their bits per "
                f"byte two measures: pass --window {min(windows)}, or less."
            )
    elif known and config.window > min(known):
        raise UsageError(f"--window {config.window}: a model has a context of {min(known)} tokens.")


def _settings(
    config: EvaluationConfig,
    device: str,
    documents: Mapping[Path, str] | None,
    tasks: Tasks | None,
) -> Results:
    text_hash = None
    if documents is not None:
        digest = hashlib.sha256()
        for text in documents.values():
            digest.update(hashlib.sha256(text.encode()).digest())
        text_hash = digest.hexdigest()
    return {
        "tasks": [] if tasks is None else list(tasks.names),
        "tasks_dir": None if config.tasks_dir is None else str(config.tasks_dir),
        "shots": 0,
        "limit": config.limit,
        "text": None if config.text is None else str(config.text),
        "text_sha256": text_hash,
        "window": config.window,
        "stride": config.stride,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": device,
    }


def _description(folder: ModelFolder, model: Any) -> Results:
    return {
        "folder": folder.name,
        "revision": folder.revision,
        "sha256": folder.sha256(),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "megatron-tst": __version__,
    }
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions
