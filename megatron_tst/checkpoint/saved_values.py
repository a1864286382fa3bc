"""What is wrong with the numbers of a checkpoint, counted piece by piece. Pure functions."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

# A shorter row of zeros may come about by chance.
_FEWEST_ZEROS = 16
MOST_TORN_ROWS = 2
"""Of a tensor cut at a wrong place; more are columns of zeros, of inputs that never occur."""
# The square of a distance by the square of a norm, of so many numbers.
_FAR, _BLOCK = 0.25, 1024
# Of the largest number: half the step of 8-bit numbers around zero (E4M3), and more.
_SMALLEST_QUANTIZED = 1e-5
# Where betas were changed in a run, the moments may lie outside of the bound of the new ones.
_BETAS_MARGIN = 4.0
_LEAST_BETAS_BOUND = 53.0
# Squares of smaller gradients are none in float32.
_LEAST_SQUARE = 1e-30


def count_not_finite(values: Tensor) -> int:
    """How many are NaN or infinite."""
    if not values.is_floating_point():
        return 0
    if values.itemsize < 2:
        values = values.float()
    # A sum is finite where all are, up to an overflow.
    if bool(values.sum(dtype=torch.float32).isfinite()):
        return 0
    return int((~values.isfinite()).sum())


def count_other_weights(masters: Tensor, weights: Tensor) -> tuple[int, int]:
    """How many weights are not the rounded values of their masters.

    Of two values of the dtype that are as near, either will do: optimizers that keep the master as
    the weight and a remainder round halves away from zero.

    Args:
        masters: [n], float32.
        weights: [n], of the dtype of the model.

    Returns:
        How many are wrong, and of how many of these the master is zero.
    """
    rounded = masters.to(weights.dtype)
    if torch.equal(rounded, weights):
        return 0, 0
    distance = (masters - weights.to(masters.dtype)).abs()
    # NaN fails every comparison.
    right = (rounded == weights) | (distance <= (masters - rounded.to(masters.dtype)).abs())
    wrong = ~right
    return int(wrong.sum()), int((wrong & (masters == 0)).sum())


def count_far_weights(masters: Tensor, weights: Tensor) -> tuple[int, int]:
    """How many weights are far from their masters, where they are not their nearest numbers.

    For weights that were quantized to 8 or 4 bits: these are within a tenth of the norm of their
    masters, and other weights are further away than the norm.

    Args:
        masters: [n], of any dtype.
        weights: [n], of the dtype of the model.

    Returns:
        As of :func:`count_other_weights`, whole blocks of 1024 numbers.
    """
    wrong = zeros = 0
    # Smaller numbers of a tensor may all become zero.
    smallest = _SMALLEST_QUANTIZED * weights.abs().amax().float() if len(weights) else 0.0
    whole = len(weights) // _BLOCK * _BLOCK
    for part, size in ((slice(0, whole), _BLOCK), (slice(whole, None), len(weights) - whole)):
        if not size or not len(weights[part]):
            continue
        of_masters, of_weights = (v[part].view(-1, size).float() for v in (masters, weights))
        distance = (of_masters - of_weights).square().sum(1)
        allowed = _FAR * of_weights.square().sum(1) + size * smallest**2
        far = ~(distance <= allowed)
        wrong += int(far.sum()) * size
        zeros += int((of_masters[far] == 0).sum())
    return wrong, zeros


def count_negative(second_moments: Tensor) -> int:
    """How many mean squares of gradients are below zero."""
    return int((second_moments < 0).sum())


def moments_bound(beta1: float, beta2: float) -> float:
    """How often the square of Adam's first moment may contain its second one.

    By the inequality of Cauchy and Schwarz, ``m^2 <= v (1-b1)^2 / (1-b2) / (1 - b1^2/b2)`` of each
    element, whatever the gradients were.

    Returns:
        The bound with a margin; infinite where there is none.
    """
    if not 0 < beta1**2 < beta2 < 1:
        return inf
    bound = (1 - beta1) ** 2 / (1 - beta2) / (1 - beta1**2 / beta2)
    return _BETAS_MARGIN * max(bound, _LEAST_BETAS_BOUND)


def count_other_moments(first: Tensor, second: Tensor, bound: float) -> int:
    """How many first moments are larger than any gradients of the second moments can make them."""
    return int((first.square() > bound * second.clamp(min=0) + _LEAST_SQUARE).sum())


def torn_rows(second_moments: Tensor, columns: int) -> int:
    """Rows of which one part is zero and the rest is not, as where tensors were cut wrongly.

    Whole rows of zeros are those of tokens or experts that no text has had.

    Args:
        second_moments: [n], whole rows.
        columns: of a row.
    """
    zero = second_moments.view(-1, columns) == 0
    zeros = zero.sum(1)
    candidates = zero[(zeros >= _FEWEST_ZEROS) & (zeros < columns)]
    begins = candidates[:, :1].int().sum(1) + (candidates[:, 1:] & ~candidates[:, :-1]).sum(1)
    return int((begins == 1).sum())
