"""Says in one last line why a run that had started ended, and what to do."""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
from argparse import Namespace
from pathlib import Path

from megatron.training import get_args

_SAVING = {"save_checkpoint", "maybe_finalize_async_save"}
_LOADING = {"load_checkpoint"}
_VALIDATING = {"validate_result"}
# Characters that are shown of a message: Megatron lists all keys of a checkpoint in some.
_LONGEST = 1200
# What gloo and NCCL tell the ranks that wait for one that is gone.
_LOST_RANK = re.compile(
    "closed by peer|reset by peer|broken pipe|remote process exited|likely been shutdown"
    "|timed out waiting",
    re.I,
)


def report_failure(error: BaseException) -> int:
    """Prints the traceback of an error, and below it the rank, the step, the cause and the remedy.

    Upstream's own message may stand far above the end of the log, or not say what it is about.

    Returns:
        The exit code.
    """
    sys.stdout.flush()
    traceback.print_exception(error)
    # Not an error of this rank: "error:" leads to the cause.
    kind = "ended" if _LOST_RANK.search(str(error)) else "error"
    line = f"{kind}: rank {os.environ.get('RANK', '0')}, {_explain(error)}"
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    return 1


def _explain(error: BaseException) -> str:
    callers = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    cause = f"{type(error).__name__}: {one_line(error)}"
    try:
        args = get_args()
    except AssertionError:  # Megatron has none yet.
        args = Namespace()
    has_begun = hasattr(args, "curr_iteration")
    when = f"step {args.curr_iteration + 1}" if has_begun else "before any step"
    if _LOST_RANK.search(str(error)):
        return (
            f"{when}: another rank is gone or hangs, whose own last line says why ({cause}). The "
            "same command continues from the last checkpoint."
        )
    if callers & _LOADING:
        return f"{when}: {_explain_load(cause, args)}"
    if callers & _SAVING:
        return f"{when}: {_explain_save(cause, args)}"
    if callers & _VALIDATING:
        return f"{when}: {_explain_nan(error)}"
    return f"{when}: {cause}"


def _explain_load(cause: str, args: Namespace) -> str:
    return (
        f"the checkpoint in --load {args.load} cannot be loaded ({cause}). If this command has "
        "other settings than the one that saved it, restore them, or pass --no-load-optim where "
        "they concern the optimizer; if the number of processes is new, save one with "
        "--dist-ckpt-optim-fully-reshardable on the old number first; if files are damaged, pass "
        "--ckpt-step with another checkpoint of that folder."
    )


def _explain_save(cause: str, args: Namespace) -> str:
    free = shutil.disk_usage(args.save).free / 2**30 if Path(args.save).is_dir() else 0.0
    return (
        f"the checkpoint in --save {args.save} cannot be written ({cause}). The usual causes are a "
        f"full disk ({free:.3g} GiB are free), a quota, or a limit on the size of a file. Remove "
        "it: the same command then continues from the last checkpoint, which is untouched."
    )


def _explain_nan(error: BaseException) -> str:
    # Upstream counts the step that failed one too far.
    found = re.search(r"\(message='(.*)'\)", str(error), re.DOTALL)
    return (
        f"{found.group(1) if found else error}. Nothing was saved since. Continue from the last "
        "checkpoint, or --ckpt-step with an earlier one, with a lower --lr (and "
        "--override-opt_param-scheduler) or --clip-grad."
    )


def one_line(error: BaseException) -> str:
    """What an error says, in one line: without the frames of a traceback within its message."""
    lines = str(error).strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        lines = [line for line in lines if not line.startswith((" ", "Traceback"))]
    text = " ".join(" ".join(lines).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text or type(error).__name__
