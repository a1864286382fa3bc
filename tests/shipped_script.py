"""The shipped launch script of the smallest model, made tiny, for two ranks."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.runs import SmallRun, assert_bit_equal
from tests.zygote import Launcher

SCRIPT = Path(__file__).parents[1] / "examples/pretrain/pretrain_gpt_270m.sh"
TOTAL, SWITCH, SAVE_INTERVAL = 24, 12, 4
# The published model is too large for a CPU; what is not named here is the script's own, such as
# the distributed optimizer, its overlaps and the saves in the background.
TINY = shlex.split(
    f"""
    --transformer-impl local --hybrid-layer-pattern *-*- --hidden-size 32 --ffn-hidden-size 64
    --num-attention-heads 4 --kv-channels 8 --make-vocab-size-divisible-by 1
    --seq-length 32 --max-position-embeddings 32 --global-batch-size 4 --split 90,10,0
    --lr 3e-3 --lr-warmup-iters 2 --tst-bag-size 4 --tst-step-ratio {SWITCH / TOTAL}
    --num-workers 0 --eval-iters 0 --log-interval 1
    """
)


def variables(run: SmallRun) -> dict[str, str]:
    """What the script is told by its environment, on any number of nodes."""
    return {
        **os.environ,
        "CUDA_GRAPHS": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "DATA_PATH": str(run.corpus),
        "TOKENIZER": f"{run.corpus}-tokenizer",
        "OUTPUT_DIR": str(run.folder),
        "PRECISION": "bf16",
        "TRAIN_STEPS": str(TOTAL),
        "SAVE_INTERVAL": str(SAVE_INTERVAL),
        "MICRO_BATCH_SIZE": "2",
        "NUM_QUERY_GROUPS": "2",
    }


def run_on_one_node(launcher: Launcher, run: SmallRun) -> None:
    """The same command with both ranks on one node, not interrupted."""
    printed = subprocess.run(
        [str(SCRIPT), *TINY],
        env={**variables(run), "DRY_RUN": "1", "GPUS_PER_NODE": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    command = shlex.split(printed.stdout)
    argv = command[command.index("megatron_tst.pretrain") + 1 :]
    launcher.run(argv, run.log, world_size=2)


def assert_same_run(run: SmallRun, reference: SmallRun) -> None:
    """Each loss and gradient norm to the bit, and all weights and moments at the end."""
    found, expected = run.scalars(), reference.scalars()
    for tag in ("lm loss", "grad-norm"):
        assert found[tag] == expected[tag]
        assert list(found[tag]) == list(range(1, TOTAL + 1))
    assert_bit_equal(run.checkpoint(TOTAL), reference.checkpoint(TOTAL))
