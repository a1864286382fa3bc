"""Tells what the user has to mend from what is wrong with the program."""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class UsageError(ValueError):
    """Input that cannot be used: its message names the flag or file, the value and the remedy."""


def command[**A](main: Callable[A, int]) -> Callable[A, int]:
    """Ends a command with one line and exit code 2 where its input cannot be used.

    That is a :class:`UsageError`, or a file that cannot be read or written. Every other error is
    one of the program and keeps its traceback. Ctrl-C and SIGTERM end it with 130 and 143, once it
    has removed what it was writing.
    """

    @functools.wraps(main)
    def guarded(*args: A.args, **kwargs: A.kwargs) -> int:
        try:
            with _leaving_on_sigterm():
                return main(*args, **kwargs)
        except (UsageError, OSError) as error:
            print_error(error)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT

    return guarded


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception, so that a command cleans up on the way out."""
    # Python takes handlers from the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def raise_interrupt(error: BaseException | None) -> None:
    """Raises the Ctrl-C or exit that an error comes from, and does nothing for any other error.

    C code that a signal meets can make an error of its own of it: with Python 3.13 torch's reader
    of checkpoints may raise SystemError, which looks like damage
    (findings/interrupt_during_checkpoint_load.sh). torch's CheckpointException holds those of all
    ranks in ``failures``, a plain Ctrl-C too.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        for of_a_rank, _ in getattr(error, "failures", {}).values():
            raise_interrupt(of_a_rank)
        error = error.__cause__ or error.__context__


def interrupt_code(error: BaseException) -> int | None:
    """Exit code of the Ctrl-C or SIGTERM that an error comes from, None for any other error."""
    try:
        raise_interrupt(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as end:
        return 128 + signal.SIGTERM if end.code == 128 + signal.SIGTERM else None
    return None


def print_error(error: BaseException) -> None:
    """Prints an error in one line on standard error."""
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file of JSON.

    Args:
        path: the file.
        remedy: what to do where it holds something else.

    Raises:
        UsageError: it does.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no JSON object: {remedy}.")
    return content
