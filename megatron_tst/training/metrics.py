"""What a run reports besides upstream's metrics: phase, data tokens and speed."""

from __future__ import annotations

import time


class StepClock:
    """Seconds spent in training steps, without evaluations and checkpoints."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._started_at: float | None = None

    def start(self) -> None:
        """Marks the start of a training step; later calls within the step change nothing."""
        if self._started_at is None:
            self._started_at = time.perf_counter()

    def stop(self) -> None:
        """Marks the end of the step, if one is running."""
        if self._started_at is not None:
            self.seconds += time.perf_counter() - self._started_at
            self._started_at = None
