"""What is measured beside each other on a GPU: loss, embedding, output layer with its loss.

Forward and backward in bf16 at the shapes of a model. "torch" is this project's implementation
without Triton; names that benchmarks/roofline.py has are those of its designs. What needs a package
that is not there is left out by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.roofline import (
    BF16,
    LARGEST_ROW,
    Cost,
    Model,
    embedding_costs,
    head_costs,
    loss_costs,
)
from megatron_tst.ops import logit_blocks
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy

Contestant = Callable[[], object]
# Or why it is left out.
Contestants = Iterator[tuple[str, Contestant | str]]
BLOCK_ELEMENTS = tuple(1 << power for power in range(23, 28))


def loss_contestants(n: int, v: int, s: int, device: str) -> Contestants:
    from megatron_tst.ops.kernels.cross_entropy import shard_gradient, shard_statistics

    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n, s), device=device)
    shares = torch.full((n, s), 1 / s, device=device)
    grad = torch.full((n,), 1 / n, device=device)
    leaf = logits.requires_grad_()

    normalizers = torch.logsumexp(logits.detach(), -1).float()

    def gradient(out: Tensor | None) -> None:
        shard_gradient(logits.detach(), targets, shares, normalizers, grad, out=out)

    def triton(out: Tensor | None) -> None:
        maximum, sums, _ = shard_statistics(logits.detach(), targets, shares)
        shard_gradient(logits.detach(), targets, shares, maximum + sums.log(), grad, out=out)

    def torch_path() -> None:
        loss = multi_hot_cross_entropy(leaf, targets, implementation="torch")
        torch.autograd.grad(loss, leaf, grad)

    def loop() -> None:
        wide = leaf.float()
        losses = [F.cross_entropy(wide, column, reduction="none") for column in targets.unbind(-1)]
        torch.autograd.grad(sum(losses, start=torch.zeros_like(grad)) / s, leaf, grad)

    yield "Triton", lambda: triton(None)
    yield "torch", torch_path
    yield "loop of s cross-entropies", loop
    yield "Triton, statistics alone", lambda: shard_statistics(logits.detach(), targets, shares)
    yield "Triton, gradient alone", lambda: gradient(None)
    if s == 1:
        yield from other_losses(leaf, targets.squeeze(-1), grad)
    # Last, because it leaves gradients where the logits were.
    yield "Triton, in place", lambda: triton(logits.detach())


def one_read_contestants(n: int, v: int, s: int, device: str) -> Contestants:
    """The loss of rows that a program can hold: the gradient left by the forward, or by two."""
    from megatron_tst.ops.kernels.whole_rows import replace_by_gradient, rescale

    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n, s), device=device)
    shares, grad = torch.full((n, s), 1 / s, device=device), torch.full((n,), 1 / n, device=device)

    def one_read() -> None:
        replace_by_gradient(logits, targets, shares, grad)
        rescale(logits, grad, grad)

    contestants = dict(loss_contestants(n, v, s, device))
    yield "Triton, in place", contestants["Triton, in place"]
    yield "Triton, one read", one_read


def other_losses(logits: Tensor, targets: Tensor, grad: Tensor) -> Contestants:
    """Losses of other projects, which have one target a position."""

    def train(load: Callable[[], Callable[[], Tensor]]) -> Contestant | str:
        try:
            loss = load()
        except ImportError as error:
            return f"left out: {error}"

        def step() -> None:
            value = loss()
            of_each = grad if value.numel() == grad.numel() else grad.new_ones(1)
            torch.autograd.grad(value, logits, of_each.reshape(value.shape).to(value.dtype))

        return step

    def host() -> Callable[[], Tensor]:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        group = torch.distributed.group.WORLD
        return lambda: vocab_parallel_cross_entropy(logits, targets, tp_group=group)

    def native() -> Callable[[], Tensor]:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        group = torch.distributed.group.WORLD
        return lambda: fused_vocab_parallel_cross_entropy(logits[None], targets[None], group)

    def transformer_engine() -> Callable[[], Tensor]:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        return lambda: parallel_cross_entropy(logits[None], targets[None])

    def liger() -> Callable[[], Tensor]:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return lambda: liger_cross_entropy(logits, targets)

    def quack() -> Callable[[], Tensor]:
        from quack.cross_entropy import cross_entropy

        return lambda: cross_entropy(logits, targets, reduction="none")

    yield "Megatron, vocabulary-parallel", train(host)
    yield "Megatron, native fusion", train(native)
    yield "Transformer Engine", train(transformer_engine)
    yield "Liger, cross-entropy", train(liger)
    yield "quack", train(quack)


def embedding_contestants(n: int, v: int, s: int, h: int, device: str) -> Contestants:
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16, requires_grad=True)
    # As in text, a few tokens are frequent.
    frequency = 1 / torch.arange(1, v + 1, device=device, dtype=torch.float64)
    bags = torch.multinomial(frequency, n * s, replacement=True).view(1, n, s)
    grad = torch.randn(1, n, h, device=device, dtype=torch.bfloat16)

    def train(embed: Callable[[], Tensor]) -> Contestant:
        return lambda: torch.autograd.grad(embed(), weight, grad)

    def look_ups() -> Tensor:
        total = F.embedding(bags[..., 0], weight)
        for offset in range(1, s):
            total = total + F.embedding(bags[..., offset], weight)
        return total / s

    yield "Triton", train(lambda: bag_embedding(weight, bags, implementation="triton"))
    yield "torch", train(lambda: bag_embedding(weight, bags, implementation="torch"))
    yield (
        "gather [n, s, h] and average",
        train(lambda: F.embedding(bags, weight).float().mean(-2).to(weight.dtype)),
    )
    yield "s look-ups, s - 1 additions", train(look_ups)


def head_contestants(n: int, v: int, h: int, s: int, device: str) -> Contestants:
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device=device).div_(h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, v, (n, s), device=device)
    grad = torch.full((n,), 1 / n, device=device)

    def dense() -> Tensor:
        return multi_hot_cross_entropy(
            hidden @ weight.t(), targets, reuse_logits=True, implementation="triton"
        )

    def linear() -> Tensor:
        return linear_multi_hot_cross_entropy(hidden, weight, targets, implementation="triton")

    def train(loss: Callable[[], Tensor]) -> Contestant:
        def step() -> None:
            value = loss()
            of_each = grad if value.dim() else grad.new_ones(())
            torch.autograd.grad(value, (hidden, weight), of_each.to(value.dtype))

        return step

    def in_blocks(elements: int) -> Contestant:
        def step() -> None:
            kept = logit_blocks._BLOCK_ELEMENTS_GPU
            logit_blocks._BLOCK_ELEMENTS_GPU = elements
            try:
                train(linear)()
            finally:
                logit_blocks._BLOCK_ELEMENTS_GPU = kept

        return step

    yield "dense, Triton in place", train(dense)
    yield "--tst-loss-impl linear", train(linear)
    for elements in BLOCK_ELEMENTS:
        yield f"linear, blocks of 2^{elements.bit_length() - 1}", in_blocks(elements)
    if s == 1:
        for name, load in other_heads(hidden, weight, targets.squeeze(-1)).items():
            try:
                yield name, train(load())
            except ImportError as error:
                yield name, f"left out: {error}"


def other_heads(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Output layers with their loss of other projects, which have one target a position."""

    def cut_cross_entropy() -> Callable[[], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        return lambda: linear_cross_entropy(hidden, weight, targets, reduction="none")

    def liger() -> Callable[[], Tensor]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda: liger_fused_linear_cross_entropy(hidden, weight, targets)

    def of_torch() -> Callable[[], Tensor]:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has none, 2.14 has")
        return lambda: F.linear_cross_entropy(hidden, weight, targets)

    return {
        "cut cross-entropy": cut_cross_entropy,
        "Liger, fused linear": liger,
        "torch, linear_cross_entropy": of_torch,
    }


KERNELS, LINEAR = "kernels", "linear"


def operations(
    model: Model, n: int, device: str, stage: str
) -> Iterator[tuple[str, int, Contestants, Mapping[str, Cost]]]:
    """Operation, bag size, contestants and paper figures of one model.

    Args:
        model: gives the shapes.
        n: positions.
        device: where the tensors are made.
        stage: "kernels" for loss and embedding, "linear" for the output layer with its loss.
    """
    v, h, s = model.vocabulary, model.hidden, model.bag_size
    if stage == LINEAR:
        for bag in (s, 1):
            costs = head_costs(n, v, h, bag)
            yield "output layer and loss", bag, head_contestants(n, v, h, bag, device), costs
        return
    for bag in (s, 1):
        halves = {
            "Triton, statistics alone": Cost(BF16 * n * v),
            "Triton, gradient alone": Cost(2 * BF16 * n * v),
        }
        costs = {**loss_costs(n, v, bag), **halves}
        yield "loss", bag, loss_contestants(n, v, bag, device), costs
    row = LARGEST_ROW if v > LARGEST_ROW else 256
    contestants = one_read_contestants(n, row, s, device)
    yield f"loss, {row} columns", s, contestants, loss_costs(n, row, s)
    yield "embedding", s, embedding_contestants(n, v, s, h, device), embedding_costs(n, v, s, h)
