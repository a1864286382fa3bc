#!/usr/bin/env bash
# megatron-core 0.19.2 with torch 2.14.1: a model of torch FSDP2 cannot be saved with its optimizer.
#
# Behaviour: megatron.core.dist_checkpointing.optimizer finds the parameters of the model among those
# of the optimizer by id(). Of a DTensor it takes that of to_local(), which in torch 2.14.1 makes a
# new tensor of a parameter at each call; the model's side takes _local_tensor. None is found.
# Expected: a sharded state of the optimizer, as of a parameter that is no DTensor.
# Seen: ValueError "Param id 0 does not match any model sharded param". A run with
#   --use-torch-fsdp2 and --ckpt-format torch_dist trains, and ends at its first save.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON skips the installation; no GPU is needed.
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
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5 "megatron-core[training]==0.19.2"
fi

cat >"$folder/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from megatron.core.dist_checkpointing import optimizer as of_checkpoints
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

print("megatron-core", version("megatron-core"), "torch", torch.__version__)
assert version("megatron-core") == "0.19.2"
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def sharded_state(is_sharded: bool) -> str:
    torch.manual_seed(1)
    model = nn.Linear(4, 4)
    if is_sharded:
        fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        # As Megatron's TorchFullyShardedDataParallel marks them.
        parameter.is_torch_fsdp2_param = is_sharded
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    groups = {"tp_group": distributed.group.WORLD, "dp_cp_group": distributed.group.WORLD}
    entries = {
        name: make_sharded_tensor_for_checkpoint(parameter, name, **groups)
        for name, parameter in model.named_parameters()
    }
    found = of_checkpoints.get_param_id_to_sharded_param_map(entries, model.parameters())
    state = optimizer.state_dict()
    try:
        of_checkpoints.optim_state_to_sharding_state(state, found, exclude_keys="step")
    except ValueError as error:
        return str(error)
    return f"{len(state['state'])} parameters"


plain, fsdp2 = sharded_state(is_sharded=False), sharded_state(is_sharded=True)
print("plain:", plain)
print("FSDP2:", fsdp2)
assert plain == "2 parameters"
raise SystemExit("does not match any model sharded param" not in fsdp2)
PYTHON
"$python" -W ignore "$folder/finding.py" "$folder/store" 2>/dev/null
