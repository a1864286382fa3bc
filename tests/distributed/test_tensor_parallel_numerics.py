"""Embedding and losses on several ranks: equal to one rank, to the host's bits, and as frugal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_tst.cpu.cross_entropy import in_chunks
from megatron_tst.ops.cross_entropy import multi_hot_cross_entropy, per_target_cross_entropy
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy
from megatron_tst.ops.objectives import superposition_loss
from megatron_tst.ops.reference import multi_hot_cross_entropy_reference
from tests.distributed.harness import run_distributed

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 8, 16, 48

# float32 against one rank: only the order of a few additions differs.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


# --- inputs, the same on every rank ---------------------------------------------------------------


def shard(tensor: Tensor, dim: int) -> Tensor:
    """This rank's contiguous part along a dimension, as a leaf."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return tensor.chunk(ranks, dim)[rank].clone().requires_grad_()


def embedding_case(bag_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    # 11 ids over 48 rows repeat within and across bags, and lie in every shard.
    bags = torch.randint(0, 11, (BATCH, LENGTH, bag_size)) * 4
    return weight, bags, torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype)


def loss_case(bag_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    logits = torch.randn(LENGTH, BATCH, VOCABULARY).mul(4).to(dtype)
    targets = torch.randint(0, VOCABULARY, (LENGTH, BATCH, bag_size))
    return logits, targets, torch.rand(LENGTH, BATCH)


def loss_case_with_ignored(bag_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, targets, grad = loss_case(bag_size, torch.float32)
    targets[:, 0, -1] = targets[:, 0, 0]  # a repeated token
    targets[0, 1, 1:] = -100
    targets[1] = -100
    return logits, targets, torch.arange(bag_size, 0, -1.0), grad


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


# --- equal to one rank ----------------------------------------------------------------------------


def embedding_on_ranks(bag_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    weight, bags, grad = embedding_case(bag_size, torch.float32)
    group = torch.distributed.group.WORLD
    weight_shard = shard(weight, 0)
    output = bag_embedding(weight_shard, bags, group, sequence_parallel)
    output.backward(shard(grad.transpose(0, 1), 0) if sequence_parallel else grad)
    assert weight_shard.grad is not None
    return output.detach(), weight_shard.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("bag_size", [1, 3, 4])
@pytest.mark.parametrize("ranks", [2, 4])
def test_embedding_equals_one_rank(ranks: int, bag_size: int, sequence_parallel: bool) -> None:
    weight, bags, grad = embedding_case(bag_size, torch.float32)
    weight.requires_grad_()
    expected = bag_embedding(weight, bags)
    expected.backward(grad)
    results = run_distributed(ranks, embedding_on_ranks, bag_size, sequence_parallel)
    outputs = [output for output, _ in results]
    if sequence_parallel:
        assert outputs[0].shape == (LENGTH // ranks, BATCH, HIDDEN)
        outputs = [torch.cat(outputs).transpose(0, 1)]
    for output in outputs:
        torch.testing.assert_close(output, expected, **SAME)
    torch.testing.assert_close(torch.cat([g for _, g in results]), weight.grad, **SAME)


def linear_case(bag_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, targets, weights, grad = loss_case_with_ignored(bag_size)
    torch.manual_seed(2)
    return torch.randn(LENGTH, BATCH, HIDDEN), torch.randn(48, HIDDEN), targets, weights, grad


def linear_loss_on_ranks(
    bag_size: int, sequence_parallel: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Losses and gradients: computed by the backward, and by the forward for a sum of the losses.

    The forward has blocks of 5 positions.
    """
    results = []
    for is_uniform in (False, True):
        hidden, weight, targets, weights, grad = linear_case(bag_size)
        hidden = shard(hidden, 0) if sequence_parallel else hidden.requires_grad_()
        weight_shard = shard(weight, 0)
        blocks: dict[str, Any] = {"_LEAST_POSITIONS": 5, "_BLOCK_ELEMENTS_CPU": 1}
        with mock.patch.multiple("megatron_tst.ops.logit_blocks", **blocks):
            loss = linear_multi_hot_cross_entropy(
                *(hidden, weight_shard, targets, weights, torch.distributed.group.WORLD),
                sequence_parallel=sequence_parallel,
                uniform_gradient=is_uniform,
            )
            if is_uniform:
                with mock.patch("megatron_tst.ops.linear_function._computed_again", None):
                    (0.37 * loss.sum()).backward()
            else:
                loss.backward(grad)
        assert hidden.grad is not None
        assert weight_shard.grad is not None
        results.append((loss.detach(), hidden.grad, weight_shard.grad))
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("bag_size", [1, 5])
@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_loss_equals_one_rank(ranks: int, bag_size: int, sequence_parallel: bool) -> None:
    hidden, weight, targets, weights, grad = linear_case(bag_size)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = multi_hot_cross_entropy_reference(hidden @ weight.t(), targets, weights).float()
    of_ranks = run_distributed(ranks, linear_loss_on_ranks, bag_size, sequence_parallel)
    for results, up in zip(
        zip(*of_ranks, strict=True), (grad, torch.full_like(grad, 0.37)), strict=True
    ):
        of_hidden, of_weight = torch.autograd.grad(
            expected, (hidden, weight), up, retain_graph=True
        )
        for loss, _, _ in results:
            torch.testing.assert_close(loss, expected, **SAME)
        hidden_grads = [grad for _, grad, _ in results]
        whole = [torch.cat(hidden_grads)] if sequence_parallel else hidden_grads
        for actual in whole:
            torch.testing.assert_close(actual, of_hidden, **SAME)
        torch.testing.assert_close(torch.cat([g for _, _, g in results]), of_weight, **SAME)


def loss_on_ranks(objective: str, bag_size: int) -> tuple[Tensor, Tensor, bool]:
    logits, targets, weights, grad = loss_case_with_ignored(bag_size)
    logits_shard = shard(logits, -1)
    before = bits(logits_shard)
    loss = superposition_loss(
        logits_shard,
        targets,
        objective,
        weights if objective.startswith("mce") else None,
        torch.distributed.group.WORLD,
    )
    loss.backward(grad)
    assert logits_shard.grad is not None
    return loss.detach(), logits_shard.grad, bits(logits_shard) == before


@pytest.mark.parametrize("objective", ["mce", "mce-sum", "bce", "hinge"])
@pytest.mark.parametrize("bag_size", [1, 5])
@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_equals_one_rank(ranks: int, bag_size: int, objective: str) -> None:
    logits, targets, weights, grad = loss_case_with_ignored(bag_size)
    logits.requires_grad_()
    expected = superposition_loss(
        logits,
        targets,
        objective,
        weights if objective.startswith("mce") else None,
    )
    expected.backward(grad)
    results = run_distributed(ranks, loss_on_ranks, objective, bag_size)
    for loss, _, unchanged in results:
        torch.testing.assert_close(loss, expected, **SAME)
        assert unchanged
    torch.testing.assert_close(torch.cat([g for _, g, _ in results], -1), logits.grad, **SAME)


def per_target_on_ranks(bag_size: int) -> Tensor:
    logits, targets, _, _ = loss_case_with_ignored(bag_size)
    return per_target_cross_entropy(shard(logits, -1), targets, torch.distributed.group.WORLD)


def test_per_target_cross_entropy_equals_one_rank() -> None:
    logits, targets, _, _ = loss_case_with_ignored(5)
    expected = per_target_cross_entropy(logits, targets)
    for losses in run_distributed(2, per_target_on_ranks, 5):
        torch.testing.assert_close(losses, expected, **SAME)


def target_outside_vocabulary() -> None:
    logits, targets, _ = loss_case(2, torch.float32)
    targets[0, 0, 0] = VOCABULARY
    multi_hot_cross_entropy(shard(logits, -1), targets, tp_group=torch.distributed.group.WORLD)


def test_target_outside_the_whole_vocabulary_is_refused() -> None:
    with pytest.raises(AssertionError, match=f"target {VOCABULARY} lies outside"):
        run_distributed(2, target_outside_vocabulary)


# --- the host's bits at s = 1 ---------------------------------------------------------------------


@contextmanager
def model_parallel_state() -> Iterator[None]:
    """Megatron's groups with every rank in one tensor-parallel group."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def embedding_bits(dtype: torch.dtype) -> list[tuple[bytes, bytes]]:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    weight, bags, grad = embedding_case(1, dtype)
    group = torch.distributed.group.WORLD
    with model_parallel_state():
        host = VocabParallelEmbedding(
            VOCABULARY,
            HIDDEN,
            init_method=lambda master: master.copy_(weight),
            config=ModelParallelConfig(use_cpu_initialization=True, params_dtype=dtype),
            tp_group=group,
        )
        expected = host(bags.squeeze(-1))
        expected.backward(grad)
    weight_shard = shard(weight, 0)
    output = bag_embedding(weight_shard, bags, group)
    output.backward(grad)
    assert weight_shard.grad is not None
    return [
        (bits(output), bits(expected)),
        (bits(weight_shard.grad), bits(host.weight.grad)),
    ]


def cross_entropy_bits(dtype: torch.dtype) -> list[tuple[bytes, bytes]]:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    logits, targets, grad = loss_case(1, dtype)
    group = torch.distributed.group.WORLD
    ours, theirs = shard(logits, -1), shard(logits, -1)
    # The kernels for one CPU core have bits of their own.
    loss = multi_hot_cross_entropy(ours, targets, tp_group=group, implementation="torch")
    loss.backward(grad)
    # A copy: the host overwrites float32 logits.
    expected = vocab_parallel_cross_entropy(theirs.clone(), targets.squeeze(-1), tp_group=group)
    expected.backward(grad)
    assert ours.grad is not None
    assert theirs.grad is not None
    return [(bits(loss), bits(expected)), (bits(ours.grad), bits(theirs.grad))]


def cross_entropy_bits_in_chunks(dtype: torch.dtype) -> list[tuple[bytes, bytes]]:
    with mock.patch("megatron_tst.ops.torch_cross_entropy._CHUNK_ELEMENTS_CPU", 5 * VOCABULARY):
        return cross_entropy_bits(dtype)


def cpu_platform_bits(dtype: torch.dtype) -> list[tuple[bytes, bytes]]:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    logits, targets, grad = loss_case(1, dtype)
    targets[3] = -100  # which Megatron's loss does not leave out
    group = torch.distributed.group.WORLD
    of_platform = in_chunks(vocab_parallel_cross_entropy)
    results: list[bytes] = []
    with (
        mock.patch("megatron_tst.cpu.cross_entropy._CHUNK_ELEMENTS", 5 * VOCABULARY),
        # One rank would take the kernels.
        mock.patch("megatron_tst.cpu.cross_entropy.kernels", return_value=None),
    ):
        for cross_entropy in (of_platform, vocab_parallel_cross_entropy):
            leaf = shard(logits, -1)
            loss = cross_entropy(leaf.clone(), targets.squeeze(-1), 0.0, group)
            loss.backward(grad)
            assert leaf.grad is not None
            is_chunked = "Chunked" in _backward_names(loss)
            assert is_chunked == (cross_entropy is of_platform)
            results += [bits(loss), bits(leaf.grad)]
    return [(results[0], results[2]), (results[1], results[3])]


def _backward_names(loss: Tensor) -> str:
    nodes, names = [loss.grad_fn], ""
    while nodes:
        node = nodes.pop()
        if node is not None:
            names += node.name()
            nodes += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize(
    "compare",
    [embedding_bits, cross_entropy_bits, cross_entropy_bits_in_chunks, cpu_platform_bits],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_bag_size_1_has_the_bits_of_the_host(
    ranks: int, dtype: torch.dtype, compare: Callable[..., Any]
) -> None:
    for output_and_gradient in run_distributed(ranks, compare, dtype):
        for ours, theirs in output_and_gradient:
            assert ours == theirs


# --- collectives and bytes ------------------------------------------------------------------------


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Name and bytes of this rank's input to every collective of torch.distributed."""
    calls: list[tuple[str, int]] = []
    patches = []
    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        original = getattr(torch.distributed, name)
        # The input is the first argument of all_reduce, and the second of the others.
        position = 0 if name == "all_reduce" else 1

        def record(
            *args: Any,
            _name: str = name,
            _position: int = position,
            _original: Callable[..., Any] = original,
            **kwargs: Any,
        ) -> Any:
            calls.append((_name, args[_position].nbytes))
            return _original(*args, **kwargs)

        patches.append(mock.patch.object(torch.distributed, name, record))
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


Calls = list[tuple[str, int]]


def embedding_collectives(bag_size: int, sequence_parallel: bool) -> tuple[Calls, Calls]:
    weight, bags, grad = embedding_case(bag_size, torch.bfloat16)
    with recorded_collectives() as forward:
        output = bag_embedding(
            shard(weight, 0), bags, torch.distributed.group.WORLD, sequence_parallel
        )
    with recorded_collectives() as backward:
        output.backward(shard(grad.transpose(0, 1), 0) if sequence_parallel else grad)
    return forward, backward


@pytest.mark.parametrize("bag_size", [1, 2, 16])
def test_embedding_takes_one_collective_whatever_the_bag_size(bag_size: int) -> None:
    output_bytes = BATCH * LENGTH * HIDDEN * 2
    for calls in run_distributed(2, embedding_collectives, bag_size, False):
        assert calls == ([("all_reduce", output_bytes)], [])
    for calls in run_distributed(2, embedding_collectives, bag_size, True):
        assert calls == (
            [("reduce_scatter_tensor", output_bytes)],
            [("all_gather_into_tensor", output_bytes // 2)],
        )


def loss_collectives(bag_size: int) -> tuple[Calls, Calls]:
    logits, targets, grad = loss_case(bag_size, torch.bfloat16)
    with recorded_collectives() as forward:
        loss = multi_hot_cross_entropy(
            shard(logits, -1), targets, tp_group=torch.distributed.group.WORLD
        )
    with recorded_collectives() as backward:
        loss.backward(grad)
    return forward, backward


@pytest.mark.parametrize("bag_size", [1, 2, 16])
def test_loss_takes_two_collectives_whatever_the_bag_size(bag_size: int) -> None:
    positions_bytes = LENGTH * BATCH * 4
    for calls in run_distributed(2, loss_collectives, bag_size):
        assert calls == ([("all_reduce", positions_bytes), ("all_reduce", 2 * positions_bytes)], [])


# --- layers of a user -----------------------------------------------------------------------------


def own_embedding_on_ranks(
    sequence_parallel: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    from megatron_tst.model.layers import superpose_embedding
    from megatron_tst.settings.config import DocumentBoundary, SuperpositionConfig

    class Doubled(VocabParallelEmbedding):
        def forward(self, input_: Tensor) -> Tensor:
            return 2 * super().forward(input_)

    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)
    weight, bags, grad = embedding_case(3, torch.float32)
    if ignore_index is not None:
        bags[0, 2, 1:] = ignore_index
        bags[1, 3] = ignore_index
    layer = Doubled(
        VOCABULARY,
        HIDDEN,
        init_method=torch.nn.init.zeros_,
        reduce_scatter_embeddings=sequence_parallel,
        config=ModelParallelConfig(
            tensor_model_parallel_size=ranks,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
        ),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(ranks)[torch.distributed.get_rank()])
    boundary: DocumentBoundary = "cross" if ignore_index is None else "align"
    superpose_embedding(layer, SuperpositionConfig(bag_size=3, steps=1, document_boundary=boundary))
    result = layer(bags)
    whole = grad.transpose(0, 1).chunk(ranks)[torch.distributed.get_rank()]
    result.backward(whole if sequence_parallel else grad)
    parallel_state.destroy_model_parallel()
    assert layer.weight.grad is not None
    return result.detach(), layer.weight.grad


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_an_embedding_with_its_own_forward_keeps_it(
    sequence_parallel: bool, ignore_index: int | None
) -> None:
    weight, bags, grad = embedding_case(3, torch.float32)
    if ignore_index is not None:
        bags[0, 2, 1:] = ignore_index
        bags[1, 3] = ignore_index
    weight.requires_grad_()
    expected = 2 * bag_embedding(weight, bags, ignore_index=ignore_index)
    expected.backward(grad)
    results = run_distributed(
        2, own_embedding_on_ranks, sequence_parallel, ignore_index, cpu_platform=True
    )
    parts = [result for result, _ in results]
    if sequence_parallel:
        torch.testing.assert_close(torch.cat(parts).transpose(0, 1), expected, **SAME)
    else:
        for part in parts:
            torch.testing.assert_close(part, expected, **SAME)
    torch.testing.assert_close(torch.cat([g for _, g in results]), weight.grad, **SAME)


# --- under torch.compile --------------------------------------------------------------------------


def compiled_on_ranks() -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Of each function on this rank: values and gradients without a compiler and with one."""
    group = torch.distributed.group.WORLD
    assert group is not None
    weight, bags, _ = embedding_case(3, torch.float32)
    hidden, head, targets, weights, _ = linear_case(3)
    logits = shard(hidden @ head.t(), -1)
    states, rows = hidden.requires_grad_(), shard(head, 0)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "embedding": (lambda w: bag_embedding(w, bags, group), (shard(weight, 0),)),
        "split embedding": (lambda w: bag_embedding(w, bags, group, True), (shard(weight, 0),)),
        "embedding of single tokens": (
            lambda w: bag_embedding(w, bags[..., :1], group),
            (shard(weight, 0),),
        ),
        "loss": (lambda z: multi_hot_cross_entropy(z, targets, weights, group), (logits,)),
        "linear loss": (
            lambda h, w: linear_multi_hot_cross_entropy(h, w, targets, weights, group),
            (states, rows),
        ),
        **{
            name: (
                partial(superposition_loss, target_bags=targets, objective=name, tp_group=group),
                (logits,),
            )
            for name in ("mce-sum", "bce", "hinge")
        },
    }
    found = []
    for name, (function, operands) in calls.items():
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            value = call(*operands)
            up = torch.linspace(0.5, 1.5, value.numel()).view_as(value)
            results.append([value.detach(), *torch.autograd.grad(value, operands, up)])
        found.append((name, results[0], results[1]))
    return found


def test_compiled_functions_are_the_same_on_several_ranks() -> None:
    for of_rank in run_distributed(2, compiled_on_ranks):
        for name, eager, compiled in of_rank:
            assert all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True)), name
