"""What a verification of a checkpoint looks at, what it found, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FILES = "files"
CHECKSUMS = "checksums"
FINITE = "NaN and infinite numbers"
MASTERS = "weights that are their rounded masters"
ZERO_MASTERS = "masters of zero, of other weights"
NEGATIVE = "second moments below zero"
MOMENTS = "first moments beyond the second"
TORN = "second moments that end within a row"
COUNTS = "steps, samples and tokens"
CHECKS = (FILES, CHECKSUMS, FINITE, MASTERS, ZERO_MASTERS, NEGATIVE, MOMENTS, TORN, COUNTS)
"""What is looked at, in this order."""


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        check: one of ``CHECKS``.
        where: the tensor, the file or the folder.
        text: what it is.
        count: of wrong numbers, files or sentences.
        of: how many were looked at there.
    """

    check: str
    where: str
    text: str
    count: int
    of: int

    @property
    def is_of_optimizer(self) -> bool:
        """Whether a run that does not load the state of the optimizer does not meet it."""
        in_tensor = self.check in (FINITE, CHECKSUMS) and "optimizer." in self.where
        return in_tensor or self.check in (MASTERS, ZERO_MASTERS, NEGATIVE, MOMENTS, TORN)

    @property
    def share(self) -> float:
        """Of what was looked at there."""
        return self.count / max(self.of, self.count)


@dataclass
class Verification:
    """What was found.

    Attributes:
        checkpoint: folder of the iteration.
        summary: where the run was.
        looked_at: for each check how many numbers, files or counts were compared.
        notes: what was not compared, and what is unusual.
        bytes: of all tensors.
    """

    checkpoint: Path
    summary: str = ""
    looked_at: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    _counts: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    def count(self, check: str, where: str, wrong: int, of: int, text: str) -> None:
        """Adds what was looked at.

        Args:
            check: one of ``CHECKS``.
            where: the tensor, the file or the folder.
            wrong: how many of it are wrong.
            of: how many were looked at.
            text: what is wrong with these.
        """
        self.looked_at[check] += of
        counts = self._counts.setdefault((check, where, text), [0, 0])
        counts[0] += wrong
        counts[1] += of

    @property
    def faults(self) -> list[Fault]:
        """What is wrong."""
        return [Fault(*what, *counts) for what, counts in self._counts.items() if counts[0]]

    @property
    def remedy(self) -> str:
        """What to do, in a sentence; empty without faults."""
        if not self.faults:
            return ""
        if all(fault.is_of_optimizer for fault in self.faults):
            return (
                "Only the state of the optimizer was found wrong: use an older one that passes, or "
                "resume with --no-load-optim, which makes the masters from the weights and starts "
                "the moments at zero; tst verify --rebuild-masters writes a "
                "checkpoint with such a state, which plain Megatron continues too."
            )
        return (
            "Copy it again, or use an older one that passes: --ckpt-step with another iter_ folder."
        )
