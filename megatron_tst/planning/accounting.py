"""FLOPs, speed, time and money of a run: pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tst.common.errors import UsageError

SECONDS_PER_HOUR = 3600
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Dense bf16 FLOP/s of a GPU, SXM boards, from NVIDIA's data sheets."""

_MULTIPLIERS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class ModelSize:
    """What the cost of a model follows from.

    Attributes:
        name: for the output.
        parameters: all of them.
        matmul_parameters: those that a token is multiplied with: without the input embedding and
            without the experts that it does not visit.
        layers: layers whose attention sees all positions before; 0 leaves their FLOPs out.
        attention_width: query heads times head dimension, of keys and values the mean.
        windows: positions that a layer with a sliding window sees, of each such layer.
    """

    name: str
    parameters: int
    matmul_parameters: int
    layers: int = 0
    attention_width: float = 0
    windows: tuple[int, ...] = ()

    @property
    def is_mixture_of_experts(self) -> bool:
        """Whether a token visits the smaller part of the parameters."""
        return self.matmul_parameters < 0.5 * self.parameters

    @property
    def visited_parameters(self) -> int:
        """All parameters; of a mixture of experts those that a token is multiplied with."""
        return self.matmul_parameters if self.is_mixture_of_experts else self.parameters

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of training on one latent position, forward and backward.

        Six for each parameter, and causal attention: for each layer 4 * width forward for every
        position that is seen, on average half of the length without a window, and twice that
        backward.
        """
        seen = self.layers * sequence_length / 2
        for window in self.windows:
            width = min(window, sequence_length)
            seen += width - width**2 / (2 * sequence_length)
        return 6.0 * self.matmul_parameters + 12 * self.attention_width * seen


@dataclass(frozen=True)
class Cluster:
    """GPUs and how fast they train.

    Attributes:
        gpus: number of GPUs.
        tokens_per_second: equivalent tokens a second and GPU, the same in both phases.
        price_per_gpu_hour: in any currency; None where money does not matter.
    """

    gpus: int
    tokens_per_second: float
    price_per_gpu_hour: float | None = None

    def gpu_hours(self, equivalent_tokens: float) -> float:
        """GPU-hours that a run takes; text read beyond the equivalent tokens is free."""
        return equivalent_tokens / self.tokens_per_second / SECONDS_PER_HOUR

    def equivalent_tokens(self, gpu_hours: float) -> float:
        """Latent positions that GPU-hours buy."""
        return gpu_hours * SECONDS_PER_HOUR * self.tokens_per_second

    def cost(self, gpu_hours: float) -> float | None:
        """Price of GPU-hours."""
        return None if self.price_per_gpu_hour is None else gpu_hours * self.price_per_gpu_hour


def parse_tokens(flag: str, text: str) -> float:
    """A number that may end in K, M, B or T, such as ``1.05T``.

    Raises:
        UsageError: it is no number above 0.
    """
    stripped = text.strip().upper()
    multiplier = _MULTIPLIERS.get(stripped[-1:], 1.0)
    try:
        value = float(stripped[:-1] if multiplier > 1 else stripped) * multiplier
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(
            f"{flag} is {text!r}: pass a number above 0, such as 300000000000 or 300B."
        )
    return value
