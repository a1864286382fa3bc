#!/usr/bin/env bash
# megatron-core 0.19.2: documents of a packed sequence get wrong rotary positions under context
# parallelism, or an error.
#
# Behaviour: with --dataloader-inter-document-masking Megatron's script cuts the whole sequence into
# two chunks a rank (get_batch_on_this_cp_rank with use_per_sequence_balancing, made for documents
# that are no multiples of 2 * ranks), and hands on where documents begin in the whole sequence. The
# rotary embedding of packed sequences takes the part of a rank for two chunks of each document.
# Expected: each position of a rank is rotated as in the whole sequence on one rank.
# Seen: so it is with one document. Two of 4 positions on 2 ranks: places 0, 1, 6, 7 are rotated as
#   0, 3, 4, 7, without an error. 3 and 5 positions: RuntimeError from split_with_sizes.
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
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import distributed

LENGTH, RANKS = 8, 2
assert version("megatron-core") == "0.19.2"
rank = int(sys.argv[2])
distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=RANKS
)
ranks = distributed.group.WORLD
alone = [distributed.new_group([one]) for one in range(RANKS)][rank]
# Turns the first of two numbers by an angle of its position, so that the angle can be read off.
angles = (torch.arange(LENGTH) * 0.1).reshape(LENGTH, 1, 1, 1).repeat(1, 1, 1, 2)
states = torch.tensor([1.0, 0.0]).expand(LENGTH, 1, 2).contiguous()


def positions(part, documents, group):
    turned = _apply_rotary_pos_emb_thd(part, documents, angles, cp_group=group)
    return (torch.atan2(turned[:, 0, 1], turned[:, 0, 0]) * 10).round().int().tolist()


found = []
for bounds in ([0, 8], [0, 4, 8], [0, 3, 8]):
    documents = torch.tensor(bounds, dtype=torch.int32)
    batch = get_batch_on_this_cp_rank(
        {"tokens": torch.arange(LENGTH)[None], "cu_seqlens": documents[None]},
        is_hybrid_cp=False,
        cp_group=ranks,
        use_per_sequence_balancing=True,
    )
    mine = batch["tokens"][0]
    # The positions of the angles go on from one document to the next, as the function allows.
    expected = mine.tolist()
    try:
        seen = positions(states[mine], documents, ranks)
    except RuntimeError as error:
        seen = str(error).splitlines()[0]
    print(f"documents at {bounds}, rank {rank}: {expected} are taken for {seen}", flush=True)
    found.append(seen == expected)
assert positions(states, torch.tensor([0, 4, 8], dtype=torch.int32), alone) == list(range(LENGTH))
raise SystemExit(found != [True, False, False])
PYTHON
"$python" -W ignore "$folder/finding.py" "$folder/store" 1 2>/dev/null &
other=$!
"$python" -W ignore "$folder/finding.py" "$folder/store" 0 2>/dev/null
wait "$other"
