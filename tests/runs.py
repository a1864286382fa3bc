"""Command lines of small runs, and what they leave behind."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

TOTAL_STEPS = 12


def tokenize_standard_library(folder: Path) -> Path:
    """Byte-level corpus of a few hundred kB of Python's own sources; returns its prefix."""
    from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess

    sources = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    config = PreprocessConfig(
        inputs=(sources,), output_prefix=folder / "text", byte_level=True, workers=1
    )
    preprocess(config)
    return folder / "text"


@dataclass
class SmallRun:
    """Arguments of a tiny Llama-shaped run on byte-level text, in fp32.

    Attributes:
        corpus: prefix of the tokenized text.
        folder: where the run writes.
        overrides: Megatron arguments that replace or join the ones below; None removes a value.
    """

    corpus: Path
    folder: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    def with_(self, folder: Path | None = None, **overrides: Any) -> SmallRun:
        """The same run with other arguments: ``bag_size=4`` stands for ``--tst-bag-size 4``."""
        named = {name.replace("_", "-"): value for name, value in overrides.items()}
        return SmallRun(self.corpus, folder or self.folder, {**self.overrides, **named})

    @property
    def argv(self) -> list[str]:
        has_pattern = self.overrides.get("hybrid-layer-pattern") is not None
        arguments: dict[str, Any] = {
            # A pattern says it.
            "num-layers": None if has_pattern else 2,
            "hidden-size": 32,
            "ffn-hidden-size": 64,
            "num-attention-heads": 4,
            "group-query-attention": True,
            "num-query-groups": 2,
            "seq-length": 32,
            "max-position-embeddings": 32,
            "micro-batch-size": 2,
            "global-batch-size": 4,
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": f"{self.corpus}-tokenizer",
            "make-vocab-size-divisible-by": 1,
            "use-mcore-models": True,
            "position-embedding-type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "disable-bias-linear": True,
            "untie-embeddings-and-output-weights": True,
            "attention-dropout": 0,
            "hidden-dropout": 0,
            "lr": 3e-3,
            "min-lr": 0,
            "train-iters": TOTAL_STEPS,
            "lr-decay-style": "WSD",
            "lr-wsd-decay-style": "linear",
            "lr-wsd-decay-iters": 2,
            "lr-warmup-iters": 2,
            "adam-beta2": 0.95,
            "weight-decay": 0.1,
            "eval-iters": 2,
            "eval-interval": 4,
            "log-interval": 1,
            "seed": 11,
            "data-path": self.corpus,
            "split": "90,10,0",
            "data-cache-path": self.folder / "cache",
            "tensorboard-dir": self.folder / "tensorboard",
            "save": self.folder / "checkpoints",
            "load": self.folder / "checkpoints",
            "save-interval": 100,
            **self.overrides,
        }
        argv: list[str] = []
        for name, value in arguments.items():
            if value is None or value is False:
                continue
            argv.append(f"--{name}")
            if value is not True:
                argv.extend(str(part) for part in (value if isinstance(value, list) else [value]))
        return argv

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def scalars(self) -> dict[str, dict[int, float]]:
        """Values of every TensorBoard scalar by step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: dict[str, dict[int, float]] = {}
        # One by one: of two files of one second, a reader of the folder skips one.
        files = (self.folder / "tensorboard").glob("events.out.tfevents.*")
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            events = EventAccumulator(str(path), size_guidance={"scalars": 0})
            events.Reload()
            for tag in events.Tags()["scalars"]:
                values = {event.step: event.value for event in events.Scalars(tag)}
                found.setdefault(tag, {}).update(values)
        return found

    def description(self) -> dict[str, Any]:
        text = (self.folder / "tensorboard" / "tst_run.json").read_text()
        result: dict[str, Any] = json.loads(text)
        return result

    def checkpoint_folder(self, step: int, folder_name: str = "checkpoints") -> Path:
        return self.folder / folder_name / f"iter_{step:07d}"

    def checkpoint(self, step: int, folder_name: str = "checkpoints") -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, model and optimizer, by key."""
        reader = FileSystemReader(str(self.checkpoint_folder(step, folder_name)))
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        load(tensors, storage_reader=reader, no_dist=True)
        return tensors


def assert_bit_equal(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Requires the same keys and the same bits."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


def assert_faultless(*folders: Path) -> None:
    """Requires that the verification of checkpoints finds nothing and compares all masters."""
    from megatron_tst.checkpoint.verification import verify_checkpoint
    from megatron_tst.checkpoint.verification_wording import description

    for folder in folders:
        result = verify_checkpoint(folder)
        assert not result.faults, description(result)
        assert not [note for note in result.notes if "compared" in note], description(result)


Check = Callable[[Sequence[SmallRun]], list[str | None]]
"""What the checks before training say about each of some runs; None if nothing."""
