"""A run whose thread that writes TensorBoard files is late, as on a busy machine."""

from __future__ import annotations

import time
from unittest import mock

from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_tst.training import pretrain

_write = RecordWriter.write


def _write_late(writer: RecordWriter, data: bytes) -> None:
    if b"validation" in data:
        time.sleep(0.5)
    _write(writer, data)


def main() -> int:
    """Trains; returns the exit code."""
    with mock.patch.object(RecordWriter, "write", _write_late):
        return pretrain.main()
