#!/usr/bin/env bash
# megatron-core 0.19.2, torch 2.14.1: the gradient of global_aux_loss shrinks with the ranks.
#
# Behaviour: moe_router_load_balancing_type="global_aux_loss" divides the loss of each rank's own
# tokens by the number of tokens of all data-parallel ranks, and the gradients are averaged over
# these ranks afterwards: the loss that is trained on is 1/DP of the one that moe_aux_loss_coeff asks for.
# Expected: where each rank has the same tokens, global_aux_loss and aux_loss are one and the same
# loss, and the router's gradients are equal at any number of ranks.
# Seen: norm of the gradient of global_aux_loss over that of aux_loss: 1.000 on 1 rank, 0.500 on 2,
#   0.250 on 4.
# Reported as Megatron-LM issue 3672 (open); two pull requests (3768, 3769) were closed unmerged.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON=/path/to/python skips the installation
# (torch 2.14.1 and megatron-core 0.19.2 must be in its environment; no GPU is needed).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [[ -z $python ]]; then
  for base in python3.12 python3 ~/.pyenv/versions/3.12*/bin/python; do
    "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break
  done
  "$base" -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5 packaging==26.3 megatron-core==0.19.2
fi

cat >"$folder/finding.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

torch.cuda.current_device = lambda: torch.device("cpu")  # where the counters go


def gradient_norm(kind, ranks):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)  # the same weights and tokens on each rank
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_router_load_balancing_type=kind, moe_aux_loss_coeff=1.0, use_cpu_initialization=True,
    )
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    probabilities, _ = router(torch.randn(64, 1, 8))
    (probabilities.sum() * 0).backward()  # the gradient of the balancing loss alone
    gradient = router.weight.grad
    dist.all_reduce(gradient)
    return (gradient / ranks).norm().item()  # averaged, as data parallelism does


def main(rank, ranks, store):
    from megatron.core import parallel_state

    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel()
    ratio = gradient_norm("global_aux_loss", ranks) / gradient_norm("aux_loss", ranks)
    if rank == 0:
        print(f"{ranks} ranks: global_aux_loss over aux_loss {ratio:.3f}")
        assert abs(ratio - 1 / ranks) < 1e-3, "the behaviour has changed"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (1, 2, 4):
        multiprocessing.spawn(main, (ranks, sys.argv[1] + str(ranks)), nprocs=ranks)
PYTHON
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$python" -W ignore "$folder/finding.py" "$folder/store"
