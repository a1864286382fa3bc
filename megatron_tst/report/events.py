"""Reads TensorBoard event files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
_TEXT_SUFFIX = "/text_summary"


@dataclass(frozen=True)
class Series:
    """A logged scalar.

    Attributes:
        steps: optimizer steps completed when the value was logged, ascending, [n].
        values: float64, [n].
    """

    steps: npt.NDArray[np.int64]
    values: FloatArray


def read_scalars(folder: Path) -> dict[str, Series]:
    """Reads all scalars by tag, merging the event files of a run and its restarts.

    A step that two files have was run again after a restart, so the later file wins. Within a file
    the first value wins: after training, Megatron logs the test loss under the tag and step of the
    last validation loss (``evaluate_and_print_results`` in megatron/training/training.py).
    """
    files = [_read_event_file(path) for path in folder.rglob("events.out.tfevents.*")]
    merged: dict[str, dict[int, float]] = {}
    for _, scalars in sorted(files, key=lambda file: file[0]):
        for tag, values in scalars.items():
            merged.setdefault(tag, {}).update(values)
    return {tag: _series(values) for tag, values in merged.items()}


def _read_event_file(path: Path) -> tuple[float, dict[str, dict[int, float]]]:
    """When the file was started, and the first value of each tag and step."""
    reader = _reader(path)
    scalars: dict[str, dict[int, float]] = {}
    for tag in reader.Tags()["scalars"]:
        values = scalars.setdefault(tag, {})
        for event in reader.Scalars(tag):
            values.setdefault(event.step, event.value)
    started = reader.FirstEventTimestamp() if scalars else 0.0
    return started, scalars


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    return Series(
        steps=np.array(steps, dtype=np.int64),
        values=np.array([values[step] for step in steps], dtype=np.float64),
    )


def read_texts(folder: Path) -> dict[str, str]:
    """Reads all texts by tag, of the newest file that has them."""
    texts: dict[str, tuple[float, str]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        reader = _reader(path)
        for tag in reader.Tags()["tensors"]:
            if tag.endswith(_TEXT_SUFFIX):
                event = reader.Tensors(tag)[-1]
                text = event.tensor_proto.string_val[0].decode(errors="replace")
                name = tag.removesuffix(_TEXT_SUFFIX)
                texts[name] = max(texts.get(name, (0.0, "")), (event.wall_time, text))
    return {name: text for name, (_, text) in texts.items()}


def _reader(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Purging would drop the validation losses, which are logged after the scalars of a later step.
    reader = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    reader.Reload()
    return reader
