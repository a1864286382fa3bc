"""Multi-hot cross-entropy over vocabulary-parallel logits: one pass for all targets of a bag."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tst.ops.collectives import group_name
from megatron_tst.ops.kernels.launch import Implementation, uses_triton
from megatron_tst.ops.native_cross_entropy import NativeMultiHotCrossEntropy, uses_native
from megatron_tst.ops.targets import (
    IGNORE_INDEX,
    TargetWeights,
    as_ids,
    as_weights,
    validate_targets,
)
from megatron_tst.ops.torch_cross_entropy import TorchMultiHotCrossEntropy
from megatron_tst.ops.triton_cross_entropy import (
    OneReadMultiHotCrossEntropy,
    TritonMultiHotCrossEntropy,
    reads_once,
)


def multi_hot_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    reuse_logits: bool = False,
    implementation: Implementation = "auto",
    expected_gradient: Tensor | None = None,
) -> Tensor:
    """Weighted mean of the cross-entropies of a bag of targets, sharing one log-sum-exp.

    ``logsumexp(z) - sum_i w_i z[y_i] / sum_i w_i`` over the targets that are not ignored, with
    gradient ``softmax(z) - sum_i w_i onehot(y_i) / sum_i w_i``. A token that occurs twice counts
    twice. A bag without a target of positive weight has loss 0 and gradient 0.

    Exactly two all-reduces, whatever s: one number a position for the maximum, then two (sum of
    exponentials, weighted target logit). Statistics are float32 (float64 for float64 logits).
    The logits are what is saved for the backward, which recomputes the exponentials chunk by chunk,
    unless all fit one chunk and are kept. The forward does not modify them unless it may reuse them
    and knows the gradient of the losses, and neither does the backward unless it may reuse them. At
    s = 1 loss and gradient of the torch implementation have the bits of the host's unfused
    ``vocab_parallel_cross_entropy`` (one or two ranks; with more, the order of the ranks' sums is
    up to the collective).

    The kernels for one CPU core read a row twice in the forward, the second time from a cache, and
    once in the backward. The Triton kernels read the logits once in each pass, or once altogether
    (``expected_gradient``), and their results repeat bit for bit. The torch implementation adds the
    gradients of repeated tokens of unequal weight in no fixed order on CUDA, unless
    ``torch.use_deterministic_algorithms(True)`` is set.

    Args:
        logits: [..., v], this rank's contiguous vocabulary shard; padded rows take part in the
            softmax, as in the host. Layouts whose leading dimensions cannot be merged are copied.
        target_bags: [..., s] integers, global token ids, the same on every rank of the group.
        target_weights: [s] numbers or a tensor, not negative; ``None`` means uniform.
        tp_group: ranks that share the vocabulary; ``None`` when there is one shard.
        ignore_index: target id that does not count.
        reuse_logits: the backward may overwrite the logits with their gradient, which then takes no
            memory of its own. For logits that nobody reads after this loss, such as those of an
            output layer; the graph can be used once. ``torch.compile`` does not reuse them.
        implementation: ``torch``, ``triton``, or ``auto``: Triton on CUDA, where it is installed;
            the kernels of ``megatron_tst.ops.native`` on a CPU with one shard and one thread, where
            they can be compiled.
        expected_gradient: one number, not 0: what the backward will bring as the gradient of each
            loss that counts, if the caller knows. With ``reuse_logits`` the forward of the Triton
            kernels then writes the gradient over logits of up to 65536 columns (32768 of
            float32) on one shard, and reads them once altogether. Where the backward brings
            another number for a position, off by more than 2^-21 of it, the gradient there is
            multiplied and rounded again; the GPU finds these positions, nobody waits for it.
            Without gradients, and elsewhere, it changes nothing.

    Returns:
        [...] loss a position, float32 (float64 for float64 logits), the same on every rank.

    Raises:
        ValueError: shapes do not fit, ids are no integers, or (checked on the CPU only, as it would
            stall a GPU) a target lies outside the vocabulary or a weight is none.

    Source: arXiv 2605.06546, multi-hot cross-entropy.
    """
    loss, _ = _multi_hot_cross_entropy(
        logits,
        target_bags,
        target_weights,
        tp_group,
        ignore_index,
        reuse_logits,
        implementation,
        expected_gradient,
        by_offset=False,
    )
    return loss


def multi_hot_cross_entropy_by_offset(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None = None,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
    reuse_logits: bool = False,
    implementation: Implementation = "auto",
    expected_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of :func:`multi_hot_cross_entropy`, and those of each target without a gradient.

    The latter cost no pass over the logits, and one more all-reduce, of s numbers a position.

    Returns:
        The loss, and what :func:`per_target_cross_entropy` returns.
    """
    loss, by_offset = _multi_hot_cross_entropy(
        logits,
        target_bags,
        target_weights,
        tp_group,
        ignore_index,
        reuse_logits,
        implementation,
        expected_gradient,
        by_offset=True,
    )
    assert by_offset is not None
    return loss, by_offset


def _multi_hot_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    target_weights: TargetWeights | None,
    tp_group: ProcessGroup | None,
    ignore_index: int,
    reuse_logits: bool,
    implementation: Implementation,
    expected_gradient: Tensor | None,
    by_offset: bool,
) -> tuple[Tensor, Tensor | None]:
    weights, target_bags = as_weights(target_weights), as_ids("target_bags", target_bags)
    validate_targets(logits.shape, target_bags, weights, tp_group, ignore_index)
    rows = logits.reshape(-1, logits.shape[-1])
    targets = target_bags.reshape(-1, target_bags.shape[-1]).contiguous()
    offset_losses: Tensor | None
    if torch.compiler.is_compiling():
        from megatron_tst.ops.compiled import multi_hot_loss

        name = group_name(tp_group)
        loss, offset_losses = multi_hot_loss(
            rows, targets, weights, name, ignore_index, implementation, by_offset
        )[:2]
        offset_losses = offset_losses if by_offset else None
    elif (
        expected_gradient is not None
        and reuse_logits
        and uses_triton(implementation, logits)
        and reads_once(rows, tp_group)
    ):
        loss, offset_losses = OneReadMultiHotCrossEntropy.apply(
            rows, targets, weights, expected_gradient, ignore_index, by_offset
        )
    else:
        loss, offset_losses = function_for(implementation, logits, tp_group).apply(
            rows, targets, weights, tp_group, ignore_index, reuse_logits, by_offset
        )
    if offset_losses is not None:
        offset_losses = offset_losses.view(target_bags.shape)
    return loss.view(logits.shape[:-1]), offset_losses


def function_for(
    implementation: Implementation, logits: Tensor, tp_group: ProcessGroup | None
) -> type[torch.autograd.Function]:
    """What computes the loss of these logits."""
    if uses_triton(implementation, logits):
        return TritonMultiHotCrossEntropy
    if uses_native(implementation, logits, tp_group):
        return NativeMultiHotCrossEntropy
    return TorchMultiHotCrossEntropy


@torch.no_grad()
def per_target_cross_entropy(
    logits: Tensor,
    target_bags: Tensor,
    tp_group: ProcessGroup | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The s ordinary cross-entropies of each bag, for logging the loss by offset; no gradient.

    Three all-reduces: of one, of two and of s numbers a position. Arguments and errors are those
    of :func:`multi_hot_cross_entropy`.

    Returns:
        [..., s] in float32 (float64 for float64 logits), the same on every rank. Ignored targets
        are 0: leave them out of a mean by counting ``target_bags != ignore_index``.
    """
    return multi_hot_cross_entropy_by_offset(logits, target_bags, None, tp_group, ignore_index)[1]
