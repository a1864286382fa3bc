"""Preprocessing that says how far it is."""

from __future__ import annotations

from rich.console import Console
from rich.filesize import decimal

from megatron_tst.common.progress import TaskProgress
from megatron_tst.corpus.preprocessing import (
    PreprocessConfig,
    PreprocessProgress,
    PreprocessResult,
    preprocess,
)

_STAGE_TITLES = {"train": "training", "tokenize": "tokenizing"}


def preprocess_with_progress(config: PreprocessConfig, console: Console) -> PreprocessResult:
    """:func:`preprocess`, its progress shown on a console.

    Raises:
        UsageError: see :func:`preprocess`.
    """
    with TaskProgress(console) as display:

        def show(progress: PreprocessProgress) -> None:
            status = f"{progress.documents:,} documents"
            if progress.stage == "tokenize":
                tokens = progress.tokens - progress.tokens_before
                status += f", {tokens / progress.seconds:,.0f} tokens/s"
            display.update(
                _STAGE_TITLES[progress.stage],
                progress.bytes_read,
                progress.total_bytes,
                f"{decimal(progress.bytes_read)} of {decimal(progress.total_bytes)}",
                status,
            )

        return preprocess(config, show)
