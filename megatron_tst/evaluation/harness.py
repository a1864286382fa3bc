"""Zero-shot tasks of the EleutherAI harness (lm-eval), which is imported on first use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import CountCallback, no_progress
from megatron_tst.evaluation.folder import LoadedModel

PUBLISHED_TASKS = (
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "mmlu",
    "boolq",
    "openbookqa",
    "piqa",
    "winogrande",
)
"""Those of the tables of arXiv 2605.06546."""

# What can be a name in YAML, and what is one.
_WORD = re.compile(rb"[^\s\"'\[\]{},:#]+")
_TASK = re.compile(rb"^(?:task|group): *[\"']?([\w.-]+)", re.MULTILINE)
# Where lm-eval keeps them: reading all its 14,000 task files takes a quarter of a minute.
_FOLDERS = ("arc", "hellaswag", "mmlu", "openbookqa", "piqa", "super_glue", "winogrande")


class Tasks(NamedTuple):
    """Tasks with their data, ready to be run.

    Attributes:
        names: as they were asked for.
        built: lm-eval's tasks and groups.
        manager: lm-eval's index, in which they were found.
    """

    names: tuple[str, ...]
    built: list[Any]
    manager: Any


def load_tasks(names: Sequence[str] | None, tasks_dir: Path | None = None) -> Tasks:
    """Finds tasks and loads their data.

    Args:
        names: tasks, groups or tags of lm-eval; by default all tasks of ``tasks_dir``, or the
            published ones.
        tasks_dir: folder with task files of lm-eval, which come before lm-eval's own. They can
            name Python functions beside them, which are run.

    Raises:
        UsageError: lm-eval is not installed, an unknown task, or data that cannot be had.
    """
    manager = _manager(tasks_dir, names)
    if names is None:
        names = PUBLISHED_TASKS if tasks_dir is None else manager.all_subtasks
    names = tuple(dict.fromkeys(names))
    built: list[Any] = []
    for name in names:
        try:
            loaded = manager.load(name)
        # Whatever the loading script of a data set, the hub and the network raise.
        except Exception as error:
            raise UsageError(_no_data(name, error)) from error
        built += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    try:
        manager.load(built)
    except ValueError as error:
        raise UsageError(f"--tasks {' '.join(names)}: {error}. Name each task once.") from error
    return Tasks(names, built, manager)


def _manager(tasks_dir: Path | None, names: Sequence[str] | None) -> Any:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(
            f"lm-eval cannot be imported ({error}): pip install 'megatron-tst[eval]'."
        ) from error
    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / folder for folder in _FOLDERS]
    if tasks_dir is not None:
        if not tasks_dir.is_dir():
            raise UsageError(f"--tasks-dir {tasks_dir} is not a folder.")
        local = lm_eval.tasks.TaskManager(include_path=tasks_dir, include_defaults=False)
        if not local.all_subtasks:
            raise UsageError(f"--tasks-dir {tasks_dir} holds no task file of lm-eval (.yaml).")
        if not _unknown(names or (), local):
            return local
        folders.append(tasks_dir)
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    if unknown := _unknown(names or (), manager):
        _check_mentioned(unknown, own, manager.all_tasks)
        manager = lm_eval.tasks.TaskManager(include_path=tasks_dir)
        _refuse(_unknown(unknown, manager), manager.all_tasks)
    return manager


def _check_mentioned(names: Sequence[str], folder: Path, known: Sequence[str]) -> None:
    """Refuses names that stand in no file of lm-eval: in a second, as nothing is parsed."""
    # Files that others include have any ending, or none.
    others = (".py", ".pyc", ".md")
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix not in others)
    text = b"\n".join(file.read_bytes() for file in files)
    words = set(_WORD.findall(text))
    tasks = [name.decode() for name in _TASK.findall(text)]
    _refuse([name for name in names if name.encode() not in words], [*known, *tasks])


def _refuse(unknown: Sequence[str], known: Sequence[str]) -> None:
    for name in unknown:
        close = difflib.get_close_matches(name, known)
        raise UsageError(
            f"--tasks {name} is no task of lm-eval or --tasks-dir"
            + (f" (close: {', '.join(close)})." if close else ".")
        )


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    return [name for name in names if name not in manager.all_tasks]


def _no_data(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"--tasks {name}: its data cannot be loaded ({type(error).__name__}: {reason}). Data sets "
        "of the hub need a network once: without one, set HF_HOME to a folder that was filled "
        "where there is, with HF_HUB_OFFLINE=1, or pass --tasks-dir with task files whose data "
        "is local."
    )


def run_tasks(
    loaded: LoadedModel,
    tasks: Tasks,
    batch_size: int,
    limit: int | None = None,
    on_progress: CountCallback = no_progress,
) -> dict[str, dict[str, Any]]:
    """Runs tasks without examples in the prompt.

    Args:
        loaded: model and tokenizer.
        tasks: from :func:`load_tasks`.
        batch_size: requests at once.
        limit: only the first samples of each task, for trying out.
        on_progress: called with the answers of which the model has told the likelihood, and their
            number.

    Returns:
        By task, subtasks of groups included: ``metrics``, each with ``value`` and ``stderr`` (None
        where lm-eval gives none), ``main_metric``, ``samples`` and ``version``.
    """
    from lm_eval.evaluator import simple_evaluate

    results = simple_evaluate(
        _harness_model(loaded, batch_size, on_progress),
        tasks=tasks.built,
        task_manager=tasks.manager,
        num_fewshot=0,
        limit=limit,
        log_samples=False,
    )
    return {
        name: {
            **_metrics(values),
            "samples": (results["n-samples"].get(name) or {}).get("effective"),
            "version": results["versions"].get(name),
        }
        for name, values in results["results"].items()
    }


def _harness_model(loaded: LoadedModel, batch_size: int, on_progress: CountCallback) -> Any:
    """lm-eval's model, which tells how far it is in place of its own bar."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        done, total = 0, 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.done, self.total = 0, len(requests)
            answers = super()._loglikelihood_tokens(
                requests, *args, **{**options, "disable_tqdm": True}
            )
            # Fewer sequences than answers: those of one token share one.
            on_progress(self.total, self.total)
            return answers

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            on_progress(min(self.done, self.total), self.total)
            self.done += len(inps)
            return super()._model_call(inps, *args, **options)

    return Counting(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's ``{"acc,none": .., "acc_stderr,none": ..}``, with a table a metric."""
    metrics = {}
    for key, value in values.items():
        metric, _, answers = key.partition(",")
        if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{answers}")
        # Answers can be extracted in several ways; "none" is the only one of multiple choice.
        name = metric if answers == "none" else f"{metric} ({answers})"
        metrics[name] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    main = next(
        (name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics), None)
    )
    return {"metrics": metrics, "main_metric": main}
