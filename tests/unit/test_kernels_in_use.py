"""The loss and the embedding by their Triton kernels, through the public functions."""

from __future__ import annotations

import itertools
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from megatron_tst.model.model import SuperpositionGPTModel
from megatron_tst.ops.cross_entropy import (
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_by_offset,
)
from megatron_tst.ops.embedding import bag_embedding
from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy_by_offset
from megatron_tst.ops.reference import (
    bag_embedding_reference,
    multi_hot_cross_entropy_reference,
    per_target_cross_entropy_reference,
)
from megatron_tst.settings.config import SuperpositionConfig
from megatron_tst.settings.losses import losses_of_run, plain_loss
from tests.kernel_devices import Runner, missing_for_interpreter, run_interpreted_on_ranks

# float32 against float64: float32 noise.
SAME: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
TRITON: dict[str, Any] = {"implementation": "triton"}


def loss_case(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 300).mul(4)
    targets = torch.randint(0, 300, (3, 4, 5))
    targets[0, 0] = 7
    targets[0, 1, 2:] = -100
    targets[1, 1] = -100
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0])
    return logits.to(device), targets.to(device), weights.to(device), torch.rand(3, 4).to(device)


def check_loss(device: str, is_weighted: bool, reuse: bool) -> None:
    logits, targets, weights, grad = loss_case(device)
    shares = weights if is_weighted else None
    leaf = logits.clone().requires_grad_()
    own = leaf * 1
    loss, by_offset = multi_hot_cross_entropy_by_offset(
        own, targets, shares, reuse_logits=reuse, **TRITON
    )
    exact_leaf = logits.double().requires_grad_()
    exact = multi_hot_cross_entropy_reference(exact_leaf, targets, shares)
    offsets = per_target_cross_entropy_reference(logits, targets)
    torch.testing.assert_close(loss.double(), exact, **SAME)
    torch.testing.assert_close(by_offset.double(), offsets, **SAME)
    assert not by_offset.requires_grad
    (own_grad,) = torch.autograd.grad(loss, own, grad)
    assert (own_grad.data_ptr() == own.data_ptr()) == reuse
    exact.backward(grad.double())
    assert exact_leaf.grad is not None
    torch.testing.assert_close(own_grad.double(), exact_leaf.grad, **SAME)
    assert torch.equal(leaf, logits)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_loss(on_device: Runner, is_weighted: bool, reuse: bool) -> None:
    on_device(check_loss, is_weighted, reuse)


def check_known_gradient(device: str, is_by_offset: bool) -> None:
    """The gradient that the forward left is that of two passes, whether the guess was right."""
    logits, targets, weights, grad = loss_case(device)
    logits = torch.nn.functional.pad(logits, (0, 4))  # rows at multiples of 16
    function: Any = multi_hot_cross_entropy_by_offset if is_by_offset else multi_hot_cross_entropy
    grad[:2] = 0.375
    results = []
    for expected in (None, torch.tensor(0.375, device=device), torch.tensor([4.0], device=device)):
        leaf = logits.clone().requires_grad_()
        own = leaf * 1
        loss = function(own, targets, weights, None, -100, True, "triton", expected)
        loss, *offsets = loss if is_by_offset else (loss,)
        assert torch.equal(own.detach(), logits) == (expected is None)
        forward = own.detach().clone()
        (own_grad,) = torch.autograd.grad(loss, own, grad)
        assert own_grad.data_ptr() == own.data_ptr()
        results.append([loss.detach(), *offsets, own_grad])
        if expected is not None and expected.dim() == 0:
            assert torch.equal(own_grad[:2], forward[:2])  # as expected: nothing to do
            assert not torch.equal(own_grad[2], forward[2])
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, wanted, **SAME)


@pytest.mark.parametrize("is_by_offset", [False, True])
def test_a_known_gradient_is_left_by_the_forward(on_device: Runner, is_by_offset: bool) -> None:
    on_device(check_known_gradient, is_by_offset)


def check_who_else_reads_the_logits(device: str) -> None:
    logits, targets, _, grad = loss_case(device)
    logits = torch.nn.functional.pad(logits, (0, 4))
    settings: dict[str, Any] = {
        "reuse_logits": True,
        "expected_gradient": torch.ones((), device=device),
        **TRITON,
    }
    # 1. Without a gradient nothing is written.
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        loss = multi_hot_cross_entropy(leaf, targets, **settings)
    assert torch.equal(leaf, logits)
    multi_hot_cross_entropy(leaf.detach(), targets, **settings)
    assert torch.equal(leaf, logits)
    # 2. Who has kept them, or wants them a second time, is refused.
    kept = leaf.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        multi_hot_cross_entropy(kept, targets, **settings).backward(grad)
    once = multi_hot_cross_entropy(leaf * 1, targets, **settings)
    once.backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        once.backward(grad)
    # 3. Checkpoints compute them again.
    expected = leaf.grad
    for use_reentrant in (False, True):
        leaf.grad = None

        def of_leaf(leaf: torch.Tensor) -> torch.Tensor:
            return multi_hot_cross_entropy(leaf * 1, targets, **settings)

        again: Any = torch.utils.checkpoint.checkpoint(of_leaf, leaf, use_reentrant=use_reentrant)
        torch.testing.assert_close(again, loss, **SAME)
        again.backward(grad)
        assert leaf.grad is not None
        assert expected is not None
        assert torch.equal(leaf.grad, expected)


def test_a_known_gradient_is_left_to_nobody_elses_harm(on_device: Runner) -> None:
    on_device(check_who_else_reads_the_logits)


def check_model(device: str) -> None:
    """The loss of a model leaves the gradient in the logits where its trainer knows it."""
    model: Any = SuperpositionGPTModel.__new__(SuperpositionGPTModel)
    torch.nn.Module.__init__(model)
    model.superposition = SuperpositionConfig(bag_size=4, steps=1, loss_impl="triton")
    model.config, model.tp_group = Namespace(cross_entropy_loss_fusion=False), None
    logits = torch.randn(5, 2, 304, device=device, requires_grad=True)
    for labels in (torch.ones(2, 5), torch.ones(2, 5, 4)):
        for expected in (None, torch.ones(1, device=device)):
            model.expected_gradient = expected
            given = logits * 1
            loss = model.compute_language_model_loss(labels.long().to(device), given)
            assert torch.equal(given, logits) == (expected is None)
            loss.sum().backward()
            assert not torch.equal(given, logits)


def test_a_model_knows_the_gradient_of_its_losses(on_device: Runner) -> None:
    on_device(check_model)


def check_linear_loss(device: str, is_uniform: bool) -> None:
    from megatron_tst.ops import logit_blocks

    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 20, device=device, requires_grad=True)
    # Rows of the logits at multiples of 16, or not.
    weight = torch.randn(304 if is_uniform else 300, 20, device=device, requires_grad=True)
    _, targets, weights, grad = loss_case(device)
    blocks = logit_blocks._BLOCK_ELEMENTS_CPU, logit_blocks._LEAST_POSITIONS
    settings: dict[str, Any] = {**TRITON, "uniform_gradient": is_uniform}
    if is_uniform:
        grad = torch.full((), 0.37, device=device).expand(3, 4)
    try:
        # Blocks of 5 positions and of the 2 that are left, of 256 rows and of 44.
        logit_blocks._BLOCK_ELEMENTS_CPU, logit_blocks._LEAST_POSITIONS = 1, 5
        loss, by_offset = linear_multi_hot_cross_entropy_by_offset(
            hidden, weight, targets, weights, **settings
        )
        grads = torch.autograd.grad(loss, (hidden, weight), grad)
    finally:
        logit_blocks._BLOCK_ELEMENTS_CPU, logit_blocks._LEAST_POSITIONS = blocks
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    exact = multi_hot_cross_entropy_reference(logits, targets, weights)
    torch.testing.assert_close(loss.double(), exact, **SAME)
    offsets = per_target_cross_entropy_reference(logits.detach(), targets)
    torch.testing.assert_close(by_offset.double(), offsets, **SAME)
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    for ours, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(ours.double(), exact_grad, **SAME)


@pytest.mark.parametrize("is_uniform", [False, True])
def test_linear_loss(on_device: Runner, is_uniform: bool) -> None:
    on_device(check_linear_loss, is_uniform)


def check_layouts_that_are_copied(device: str) -> None:
    logits, targets, _, grad = loss_case(device)
    strided = logits.transpose(-1, 0).contiguous().transpose(-1, 0).requires_grad_()
    plain = logits.clone().requires_grad_()
    for leaf in (strided, plain):
        multi_hot_cross_entropy(leaf, targets, **TRITON).backward(grad)
    assert strided.grad is not None
    assert plain.grad is not None
    assert torch.equal(strided.grad, plain.grad)


def test_layouts_that_are_copied(on_device: Runner) -> None:
    on_device(check_layouts_that_are_copied)


def check_embedding(device: str, has_gaps: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 24, device=device, requires_grad=True)
    bags = torch.randint(0, 50, (3, 7, 6), device=device)
    if has_gaps:
        bags[0, :, 4:] = -100
        bags[1, 0] = -100
    ignore_index = -100 if has_gaps else None
    output = bag_embedding(weight, bags, ignore_index=ignore_index, **TRITON)
    exact_weight = weight.detach().double().requires_grad_()
    exact = bag_embedding_reference(exact_weight, bags, ignore_index=ignore_index)
    torch.testing.assert_close(output.double(), exact, **SAME)
    grad = torch.randn(3, 7, 24, device=device)
    output.backward(grad)
    exact.backward(grad.double())
    assert weight.grad is not None
    assert exact_weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **SAME)


@pytest.mark.parametrize("has_gaps", [False, True])
def test_embedding(on_device: Runner, has_gaps: bool) -> None:
    on_device(check_embedding, has_gaps)


def on_ranks() -> list[torch.Tensor]:
    """Losses, gradients and losses by offset of this rank, by kernels and without."""
    group: Any = torch.distributed.group.WORLD
    logits, targets, weights, grad = loss_case("cpu")
    embedding = torch.randn(48, 16)
    bags = torch.randint(0, 48, (3, 4, 6))
    rank, results = torch.distributed.get_rank(), []
    for implementation in ("triton", "torch"):
        settings: dict[str, Any] = {"tp_group": group, "implementation": implementation}
        shard = logits.chunk(2, -1)[rank].clone().requires_grad_()
        loss, by_offset = multi_hot_cross_entropy_by_offset(shard, targets, weights, **settings)
        loss.backward(grad)
        rows = embedding.chunk(2)[rank].clone().requires_grad_()
        output = bag_embedding(rows, bags, sequence_parallel=False, **settings)
        output.square().sum().backward()
        assert shard.grad is not None
        assert rows.grad is not None
        results.append([loss.detach(), by_offset, shard.grad, output.detach(), rows.grad])
    return [torch.cat([tensor.flatten() for tensor in result]) for result in results]


@pytest.mark.skipif(missing_for_interpreter() is not None, reason=str(missing_for_interpreter()))
def test_tensor_parallel_ranks_join_what_kernels_give(tmp_path: Path) -> None:
    for by_kernels, without in run_interpreted_on_ranks(2, on_ranks, tmp_path):
        torch.testing.assert_close(by_kernels, without, **SAME)


def main_grads() -> dict[tuple[torch.dtype, bool, bool], list[torch.Tensor]]:
    """Sums of this rank's gradients after steps of Megatron's DDP, by dtype, tying and fusion."""
    from megatron.core import parallel_state

    from megatron_tst import cpu

    cpu.activate()
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    cases = itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True))
    return {case: main_grads_of_steps(*case) for case in cases}


def main_grads_of_steps(dtype: torch.dtype, is_tied: bool, fuses: bool) -> list[torch.Tensor]:
    """A step of three micro-batches of bags, and one of single tokens."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tst.model.layers import superpose_embedding
    from megatron_tst.ops.linear_cross_entropy import linear_multi_hot_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, tensor_model_parallel_size=2,
        params_dtype=dtype, use_cpu_initialization=True, gradient_accumulation_fusion=fuses,
    )  # fmt: skip
    # With these Megatron never resets the mark of a gradient that is in its sum.
    config.cuda_graph_impl = "transformer_engine"
    embedding: Any = VocabParallelEmbedding(
        48, 16, init_method=torch.nn.init.normal_, config=config, tp_group=group
    )
    torch.manual_seed(1)
    embedding.weight.data.normal_()
    settings = SuperpositionConfig(bag_size=4, steps=1, loss_impl="triton")
    superpose_embedding(embedding, settings)
    embedding.weight.zero_out_wgrad = is_tied
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    model: Any = DistributedDataParallel(config, ddp_config, embedding)

    def run(tokens: torch.Tensor) -> None:
        hidden = model(tokens)
        loss = hidden.float().square().sum()
        if is_tied:
            targets = torch.randint(0, 48, (2, 3, 4))
            loss = loss + linear_multi_hot_cross_entropy(
                hidden, embedding.weight, targets, tp_group=group, implementation="torch",
                accumulate_into_main_grad=fuses,
            ).sum()  # fmt: skip
        loss.backward()

    results = []
    for step in ([(2, 3, 4)] * 3, [(2, 3)]):
        model.zero_grad_buffer()
        *first, last = [torch.randint(0, 48, shape) for shape in step]
        with model.no_sync():
            for tokens in first:
                run(tokens)
        run(last)
        model.finish_grad_sync()
        assert embedding.weight.grad is None
        results.append(embedding.weight.main_grad.clone())
    return results


@pytest.mark.skipif(missing_for_interpreter() is not None, reason=str(missing_for_interpreter()))
def test_the_embeddings_gradient_goes_into_megatrons_sum(tmp_path: Path) -> None:
    """To the bit in float32; in bfloat16 within the rounding of three micro-batches it spares."""
    for results in run_interpreted_on_ranks(2, main_grads, tmp_path):
        for (dtype, is_tied, fuses), sums in results.items():
            assert all(total.abs().sum() > 0 for total in sums)
            if fuses:
                for total, dense in zip(sums, results[dtype, is_tied, False], strict=True):
                    near = 2**-7 * dense.abs().max() if dtype == torch.bfloat16 else 1e-6
                    atol = 0 if (dtype, is_tied) == (torch.float32, False) else near
                    torch.testing.assert_close(total, dense, rtol=0, atol=atol)
        unrounded = results[torch.bfloat16, False, True][0]
        assert not torch.equal(unrounded, results[torch.bfloat16, False, False][0])


def test_what_cannot_run_is_refused() -> None:
    logits, targets, _, _ = loss_case("cpu")
    with pytest.raises(ValueError, match=r"'triton', and tensors are on cpu: .* Use 'auto'"):
        multi_hot_cross_entropy(logits, targets, **TRITON)
    with pytest.raises(ValueError, match=r"'triton', and tensors are on cpu: .* Use 'auto'"):
        bag_embedding(torch.zeros(5, 2), torch.zeros(1, 1, 2, dtype=torch.int64), **TRITON)


def beside_the_hosts() -> list[list[torch.Tensor]]:
    """Loss and gradient of single targets on this rank by the kernels and by the host, by dtype."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group: Any = torch.distributed.group.WORLD
    rank, results = torch.distributed.get_rank(), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        logits = torch.randn(6, 2, 2000).mul(4).to(dtype)
        targets, grad = torch.randint(0, 2000, (6, 2)), torch.rand(6, 2)
        shard = logits.chunk(2, -1)[rank].contiguous()
        ours, theirs = shard.clone().requires_grad_(), shard.clone().requires_grad_()
        loss = multi_hot_cross_entropy(ours, targets[..., None], tp_group=group, **TRITON)
        # The host overwrites float32 logits.
        hosts = vocab_parallel_cross_entropy(theirs * 1, targets, tp_group=group)
        loss.backward(grad)
        hosts.backward(grad)
        assert ours.grad is not None
        assert theirs.grad is not None
        results.append([loss.detach(), hosts.detach(), ours.grad.float(), theirs.grad.float()])
    return results


@pytest.mark.skipif(missing_for_interpreter() is not None, reason=str(missing_for_interpreter()))
def test_single_targets_have_the_hosts_loss_and_gradient(tmp_path: Path) -> None:
    """Within float32 noise, and the gradient in bf16 within one rounding, as it is rounded once."""
    for single, half in run_interpreted_on_ranks(2, beside_the_hosts, tmp_path):
        for loss, hosts, *_ in (single, half):
            torch.testing.assert_close(loss, hosts, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(single[2], single[3], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(half[2], half[3], rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize(
    ("loss_impl", "fusion", "is_hosts"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("host", False, True),
        ("torch", False, False),
        ("triton", False, False),
    ],
)
def test_single_targets_on_a_gpu_take_the_kernels_by_default(
    loss_impl: str, fusion: bool, is_hosts: bool
) -> None:
    """Of the model as of the record; a tensor without data stands in for one on a GPU."""
    from torch._subclasses import FakeTensor, FakeTensorMode

    model: Any = SuperpositionGPTModel.__new__(SuperpositionGPTModel)
    torch.nn.Module.__init__(model)
    model.superposition = SuperpositionConfig(loss_impl=loss_impl)  # type: ignore[arg-type]
    model.config = Namespace(cross_entropy_loss_fusion=fusion)
    # Not by torch.empty, for which a GPU is the CPU where the platform of CPUs is active.
    data = torch.empty(2, 1, 8, dtype=torch.bfloat16, device="meta")
    logits = FakeTensor(FakeTensorMode(), data, torch.device("cuda", 0))
    assert model._leaves_plain_targets(logits) == is_hosts
    args = Namespace(
        tst_bag_size=1,
        tst_schedule=None,
        tst_bag_sizes=None,
        tst_loss_impl=loss_impl,
        cross_entropy_loss_fusion=fusion,
        cross_entropy_fusion_impl="native",
    )
    loss = plain_loss(args, has_gpu=True)
    assert loss.startswith("host") == is_hosts
    assert losses_of_run(args, has_gpu=True) == {"plain": loss}
    args.tst_bag_size = 4
    with_bags = losses_of_run(args, has_gpu=True)
    assert with_bags == {"plain": loss, "bags": "torch" if loss_impl == "torch" else "triton"}
    # On a CPU nothing changes unless the flag asks.
    if loss_impl in ("auto", "host") and not fusion:
        assert losses_of_run(args, has_gpu=False) == {"plain": "cpu", "bags": "cpu"}
