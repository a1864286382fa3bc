"""The scripts of examples/: what they launch, and that Megatron's parser and checks accept it.

``tests/launch_arguments.py`` runs the real parser, Megatron's validation and configurations and
this project's checks. Replaced there, because this needs no GPU: the compute capability (a
B200's), the version of Transformer Engine (the container's), the vocabulary that the tokenizer
would give, and three kernel fusions that Megatron refuses where it cannot import them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tst.settings.config import SETTINGS
from tests.corpus import write_corpus

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "examples/pretrain"
MODELS = ("270m", "600m", "3b", "10b_a1b")
# docs/cluster.md: variables before, arguments behind, in code marks in the last column.
_TABLE = (ROOT / "docs/cluster.md").read_text().split("## Ablations")[1].split("\n## ")[0]
ABLATIONS = re.findall(r"^\|.*\| `([^`|]+)` \|$", _TABLE, re.M)


def launch(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1"} | variables
    return subprocess.run(
        [str(script), *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )


class Cases:
    """Command lines of scripts, and after ``run`` what became of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {
            "DATA_PATH": str(folder / "corpus"),
            "TOKENIZER": str(folder),
            "OUTPUT_DIR": str(folder / "runs"),
        }
        self._argv: dict[str, tuple[int, list[str]]] = {}
        self.found: dict[str, dict[str, Any]] = {}

    def command(self, model: str, *arguments: str, **variables: str) -> list[str]:
        script = PRETRAIN / f"pretrain_gpt_{model}.sh"
        printed = launch(script, *arguments, **self.paths, **variables)
        assert printed.returncode == 0, printed.stderr
        return shlex.split(printed.stdout)

    def add(self, name: str, size: int, model: str, *arguments: str, **variables: str) -> None:
        command = self.command(model, *arguments, **variables)
        start = next(i for i, word in enumerate(command) if "pretrain" in word)
        self._argv[name] = (size, command[start + 1 :])

    def run(self) -> None:
        cases, results = self.folder / "cases.json", self.folder / "results.json"
        cases.write_text(json.dumps(list(self._argv.values())))
        subprocess.run(
            [sys.executable, "-m", "tests.launch_arguments", str(cases), str(results)],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
        )
        self.found = dict(zip(self._argv, json.loads(results.read_text()), strict=True))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """All command lines of this file, parsed in one process: its imports take most of the time."""
    cases = Cases(tmp_path_factory.mktemp("launch"))
    write_corpus(cases.folder / "corpus", [50, 30])
    for model in MODELS:
        for variant in ("baseline", "tst"):
            cases.add(f"{model} {variant}", 64, model, VARIANT=variant)
    for model in ("3b", "10b_a1b"):
        cases.add(f"{model} on 8", 8, model)
        for precision in ("fp8", "bf16"):
            cases.add(f"{model} {precision}", 64, model, PRECISION=precision)
    for row in ABLATIONS:
        words = shlex.split(row)
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        cases.add(row, 64, "3b", *(word for word in words if "=" not in word), **variables)
    cases.add("stock", 64, "10b_a1b", "--ckpt-step", "12483", STOCK_MEGATRON="/opt/Megatron-LM")
    for model in ("270m", "3b"):
        cases.add(f"{model} FSDP2", 8, model, FSDP="1", PRECISION="bf16")
    cases.add("synchronous", 64, "3b", ASYNC_SAVE="0", EXIT_DURATION_MINS="200")
    cases.add("misspelt", 64, "3b", "--no-such-argument")
    cases.add("undivided", 48, "3b")
    cases.run()
    return cases


def test_every_variant_and_precision_is_accepted_as_written(cases: Cases) -> None:
    wrong = {
        name: finding.get("error") or finding["changed"]
        for name, finding in cases.found.items()
        if name not in ("misspelt", "undivided") and (finding.get("error") or finding["changed"])
    }
    assert not wrong


def test_what_megatron_refuses_is_seen(cases: Cases) -> None:
    assert cases.found["misspelt"]["error"].startswith("SystemExit")
    assert "must be divisible by" in cases.found["undivided"]["error"]


@pytest.mark.parametrize(
    ("case", "steps", "switch", "phase_1", "data", "equivalent", "rate"),
    # Published numbers, rounded as published: hence 1%.
    [
        ("270m baseline", 20_000, 0, 0, 42e9, 42e9, 2e-3),
        ("270m tst", 20_000, 6_000, 75e9, 105e9, 42e9, 2e-3),
        ("600m tst", 20_000, 6_000, 75e9, 105e9, 42e9, 1e-3),
        ("3b baseline", 20_000, 0, 0, 42e9, 42e9, 2e-4),
        ("3b tst", 20_000, 6_000, 75e9, 105e9, 42e9, 2e-4),
        ("10b_a1b baseline", 125_000, 0, 0, 1.05e12, 1.05e12, 3e-4),
        ("10b_a1b tst", 49_983, 12_483, 1.68e12, 2e12, 4.19e11, 3e-4),
    ],
)
def test_published_settings(
    cases: Cases,
    case: str,
    steps: int,
    switch: int,
    phase_1: float,
    data: float,
    equivalent: float,
    rate: float,
) -> None:
    found = cases.found[case]
    assert (found["steps"], found["switch_step"], found["lr"]) == (steps, switch, rate)
    assert found["decay_steps"] == steps // 10
    tokens = [found[name] for name in ("phase_1_tokens", "data_tokens", "equivalent_tokens")]
    assert tokens == pytest.approx([phase_1, data, equivalent], rel=0.01)


def test_weightings_are_the_published_ones(cases: Cases) -> None:
    weighting = {
        model: cases.found[f"{model} tst"]["superposition"]["target_weighting"] for model in MODELS
    }
    assert weighting == {m: "power-law" if m == "10b_a1b" else "uniform" for m in MODELS}


def test_the_table_of_ablations_has_an_effect_row_by_row(cases: Cases) -> None:
    assert len(ABLATIONS) >= 12
    published = cases.found["3b tst"]
    for row in ABLATIONS:
        assert cases.found[row] != published, row


def test_the_table_of_ablations_is_whole_and_has_every_choice_of_the_method() -> None:
    heading = 2
    assert len(ABLATIONS) == _TABLE.count("\n|") - heading
    # What the scripts do without a flag: the published method.
    published = {"full", "mce", "none", "cross"}
    for known in SETTINGS.values():
        for value in set(known.choices if known.is_method else ()) - published:
            assert any(f"{known.flag} {value}" in row for row in ABLATIONS), (known.flag, value)


def test_phase_2_of_stock_megatron_has_the_steps_of_the_run_and_none_of_our_flags(
    cases: Cases,
) -> None:
    command = cases.command("10b_a1b", STOCK_MEGATRON="/opt/Megatron-LM")
    assert "/opt/Megatron-LM/pretrain_hybrid.py" in command
    assert not [word for word in command if "tst" in word.removeprefix(str(cases.folder))]
    assert cases.found["stock"]["steps"] == 49_983
    # Which Megatron 0.19.2 gets wrong where this package does not mend it.
    by_parameter = "--dist-ckpt-optim-fully-reshardable"
    assert by_parameter not in command
    assert by_parameter in cases.command("10b_a1b")


def test_arguments_and_paths_with_spaces_arrive_whole(cases: Cases) -> None:
    paths = cases.paths | {"OUTPUT_DIR": "/my runs", "DATA_PATH": "30 /a 70 /b"}
    printed = launch(PRETRAIN / "pretrain_gpt_270m.sh", "--wandb-exp-name", "a b", **paths)
    command = shlex.split(printed.stdout)
    assert command[-2:] == ["--wandb-exp-name", "a b"]
    assert command[command.index("--save") + 1] == "/my runs/checkpoints"
    start = command.index("--data-path")
    assert command[start + 1 : start + 5] == ["30", "/a", "70", "/b"]


@pytest.mark.parametrize("blend", ["30 /a\n70 /b", "30 /a\n70 /b\n", "\n 30 /a\n\n 70 /b"])
def test_a_blend_over_several_lines_is_whole(cases: Cases, blend: str) -> None:
    paths = cases.paths | {"DATA_PATH": blend}
    command = shlex.split(launch(PRETRAIN / "pretrain_gpt_270m.sh", **paths).stdout)
    start, end = command.index("--data-path"), command.index("--data-cache-path")
    assert command[start + 1 : end] == ["30", "/a", "70", "/b"]


@pytest.mark.parametrize(
    "flags",
    ["--tst-schedule 8:0.1,4:0.2", "--tst-schedule=8:0.1", "--tst-bag-sizes 2,4 --tst-steps 9"],
)
def test_several_bag_sizes_take_the_place_of_one(cases: Cases, flags: str) -> None:
    command = cases.command("3b", *flags.split())
    assert [
        word for word in command if word.startswith("--tst-bag-size") and word not in flags
    ] == []
    assert "--tst-step-ratio" not in command


def test_launchers(cases: Cases) -> None:
    alone = cases.command("3b")
    assert alone[0] == "torchrun"
    assert alone[alone.index("--nproc-per-node") + 1] == "8"
    node = cases.command("3b", NNODES="8", NODE_RANK="3", MASTER_ADDR="node0", GPUS_PER_NODE="4")
    assert node[:9] == shlex.split(
        "torchrun --nnodes 8 --node-rank 3 --nproc-per-node 4 --master-addr node0"
    )
    every = cases.command("3b", GPUS_PER_NODE="gpu")
    assert every[every.index("--nproc-per-node") + 1] == "gpu"
    rank = cases.command("3b", LOCAL_RANK="2", RANK="10", WORLD_SIZE="16")
    assert rank[:3] == ["python", "-m", "megatron_tst.pretrain"]


def environment_of(cases: Cases, *arguments: str, **variables: str) -> dict[str, str]:
    """What the ranks of a launch get, from a torchrun that prints it."""
    folder = cases.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "torchrun").write_text("#!/bin/sh\nenv\n")
    (folder / "torchrun").chmod(0o755)
    printed = launch(
        PRETRAIN / "pretrain_gpt_270m.sh",
        *arguments,
        **{"DRY_RUN": "0", "PATH": f"{folder}:{os.environ['PATH']}"} | cases.paths | variables,
    )
    assert printed.returncode == 0, printed.stderr
    return dict(line.split("=", 1) for line in printed.stdout.splitlines())


def test_connections_are_limited_where_the_order_of_kernels_counts(cases: Cases) -> None:
    name, tensor = "CUDA_DEVICE_MAX_CONNECTIONS", ["--tensor-model-parallel-size", "2"]
    assert name not in environment_of(cases, PRECISION="bf16")
    assert environment_of(cases, *tensor, PRECISION="bf16")[name] == "1"
    assert environment_of(cases, "--context-parallel-size=2", PRECISION="fp8")[name] == "1"
    # Blackwell, which alone has this precision.
    assert name not in environment_of(cases, *tensor, PRECISION="mxfp8")
    assert environment_of(cases, PRECISION="bf16", **{name: "8"})[name] == "8"


def test_shards_of_fsdp2(cases: Cases) -> None:
    command = cases.command("270m", FSDP="1")
    assert {"--use-torch-fsdp2", "--no-gradient-accumulation-fusion"} <= set(command)
    assert not {"--use-distributed-optimizer", "--cuda-graph-impl"} & set(command)
    # Megatron refuses one connection with it.
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert name not in environment_of(cases, FSDP="1", **{name: "1"})


def test_small_models_take_graphs_and_bf16_and_none_makes_masks(cases: Cases) -> None:
    for model in MODELS:
        command = cases.command(model)
        is_small = model in ("270m", "600m")
        assert ("--cuda-graph-impl" in command) == is_small
        assert ("--fp8-format" in command) != is_small
        assert {"--no-create-attention-mask-in-dataloader", "--manual-gc"} <= set(command)
    assert "--cuda-graph-impl" not in cases.command("270m", CUDA_GRAPHS="0")


def test_graphs_and_registered_buffers_do_not_meet_expandable_segments(cases: Cases) -> None:
    """Megatron asserts the one at the start, and raises for the other where it wraps the model."""
    allocator, registers = "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER"
    plain = environment_of(cases, CUDA_GRAPHS="0")
    assert (plain[allocator], plain.get(registers)) == ("expandable_segments:True", None)
    for graphs in (["--cuda-graph-impl", "transformer_engine"], ["--cuda-graph-impl=local"]):
        with_graphs = environment_of(cases, *graphs)
        assert (with_graphs[allocator], with_graphs[registers]) == (plain[allocator], "0")
    without = environment_of(cases, "--cuda-graph-impl", "local", "--cuda-graph-impl", "none")
    assert registers not in without
    assert environment_of(cases, "--cuda-graph-impl", "local", **{registers: "1"})[registers] == "1"
    assert allocator not in environment_of(cases, "--use-nccl-ub")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DATA_PATH": ""}, "error: DATA_PATH is not set"),
        ({"PRECISION": "int8"}, "error: PRECISION is 'int8': use mxfp8, fp8 or bf16"),
        ({"VARIANT": "tts"}, "error: VARIANT is 'tts': use tst or baseline"),
        ({"NNODES": "2"}, "error: NNODES is 2: set MASTER_ADDR"),
        ({"NNODES": "two"}, "error: NNODES is 'two': use a whole number, 1 or more"),
        ({"NODE_RANK": "-1"}, "error: NODE_RANK is '-1': use a whole number, 0 or more"),
        ({"TRAIN_STEPS": "1e5"}, "error: TRAIN_STEPS is '1e5': use a whole number, 1 or more"),
        ({"TRAIN_STEPS": "0200"}, "error: TRAIN_STEPS is '0200': use a whole number, 1 or more"),
        ({"MICRO_BATCH_SIZE": "2.5"}, "error: MICRO_BATCH_SIZE is '2.5': use a whole number"),
        ({"GPUS_PER_NODE": "0"}, "error: GPUS_PER_NODE is '0': use a whole number, 1 or more"),
        ({"FSDP": "true"}, "error: FSDP is 'true': use 0 or 1"),
        ({"CUDA_GRAPHS": "yes"}, "error: CUDA_GRAPHS is 'yes': use 0 or 1"),
        ({"DRY_RUN": "true"}, "error: DRY_RUN is 'true': use 0 or 1"),
        ({"FSDP": "1"}, "error: FSDP=1 with PRECISION=mxfp8 was not tried: use PRECISION=bf16"),
        (
            {"FSDP": "1", "PRECISION": "bf16", "STOCK_MEGATRON": "/opt/Megatron-LM"},
            "error: FSDP=1: Megatron 0.19.2 alone neither saves nor resumes it right",
        ),
    ],
)
def test_bad_variables_are_named(cases: Cases, variables: dict[str, str], message: str) -> None:
    refused = launch(PRETRAIN / "pretrain_gpt_3b.sh", **(cases.paths | variables))
    assert refused.returncode == 2
    assert refused.stderr.startswith(message)
    assert ("usage:" in refused.stderr) == ("DATA_PATH" in message)
