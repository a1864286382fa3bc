"""Two nodes launched by the shipped script, each with a network of its own, one of which fails."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.network_namespaces import INTERFACE, NETWORK, Cluster, Node, cluster, why_unavailable
from tests.runs import SmallRun
from tests.shipped_script import (
    SAVE_INTERVAL,
    SCRIPT,
    SWITCH,
    TINY,
    TOTAL,
    assert_same_run,
    variables,
)
from tests.survival import last_checkpoint

ROOT = Path(__file__).parents[2]
TIMEOUT = 10
ARGUMENTS = [*TINY, "--distributed-timeout-seconds-after-init", str(TIMEOUT)]


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """Of each test its own: what a failed test leaves running ends with it."""
    reason = why_unavailable()
    if reason:
        pytest.skip(f"needs network namespaces: {reason}")
    with cluster(2) as made:
        yield made


def connect(node: Node, address: str, port: int) -> str:
    """What becomes of a connection from a node, within a second."""
    code = (
        "import errno, socket, sys\n"
        "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), 1); print('connected')\n"
        "except TimeoutError: print('silence')\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    return node.run(sys.executable, "-S", "-c", code, address, str(port)).strip()


def test_nodes_reach_each_other_and_nothing_else(two_nodes: Cluster) -> None:
    first, second = two_nodes.nodes
    for node in two_nodes.nodes:
        routes = node.run("ip", "-json", "route", "show", "table", "all")
        assert "default" not in routes
        assert NETWORK in routes
        # Of another network that no one has.
        assert connect(node, "203.0.113.1", 80) == "ENETUNREACH"
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        for addresses in psutil.net_if_addrs().values():
            for address in (found.address for found in addresses if found.family == socket.AF_INET):
                with socket.create_connection((address, port), 5):
                    refusal = "ECONNREFUSED" if address.startswith("127.") else "ENETUNREACH"
                    assert connect(first, address, port) == refusal
    # No one listens, which only the other node can say.
    assert connect(first, second.address, 29500) == "ECONNREFUSED"
    two_nodes.cut_off(1)
    assert connect(first, second.address, 29500) == "silence"
    assert connect(second, first.address, 29500) == "silence"
    two_nodes.reconnect(1)
    assert connect(first, second.address, 29500) == "ECONNREFUSED"


def is_gone(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_nodes_end_with_their_processes(two_nodes: Cluster, tmp_path: Path) -> None:
    """Even when whoever made them is killed."""
    code = (
        "import time\n"
        "from tests.network_namespaces import *\n"
        "with cluster(1) as made:\n"
        "    (node,) = made.nodes\n"
        f"    sleep = node.start(['sleep', '1000'], Path({str(tmp_path / 'log')!r}), {{}})\n"
        "    print(node.first_process, made.switch.first_process, sleep.pid, flush=True)\n"
        "    time.sleep(1000)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        processes = [int(word) for word in owner.stdout.readline().split()]
        assert len(processes) == 3
        assert not any(is_gone(process) for process in processes)
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not all(is_gone(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launch(made: Cluster, run: SmallRun) -> list[subprocess.Popen[bytes]]:
    """Starts the script on each node, one rank a node."""
    shared = {
        "NNODES": "2",
        "GPUS_PER_NODE": "1",
        "MASTER_ADDR": made.nodes[0].address,
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    return [
        node.start(
            [str(SCRIPT), *ARGUMENTS],
            run.folder / f"{node.name}.txt",
            {**variables(run), **shared, "NODE_RANK": str(rank)},
        )
        for rank, node in enumerate(made.nodes)
    ]


def log(run: SmallRun, node: Node) -> str:
    return (run.folder / f"{node.name}.txt").read_text(errors="replace")


def wait(
    jobs: list[subprocess.Popen[bytes]], made: Cluster, run: SmallRun, seconds: float
) -> list[int]:
    """Waits for both nodes and returns their exit codes."""
    deadline = time.monotonic() + seconds
    try:
        return [job.wait(max(0.0, deadline - time.monotonic())) for job in jobs]
    except subprocess.TimeoutExpired:
        tails = "\n".join(log(run, node)[-4000:] for node in made.nodes)
        raise TimeoutError(tails) from None


def launch_until_a_checkpoint(two_nodes: Cluster, run: SmallRun) -> list[subprocess.Popen[bytes]]:
    jobs = launch(two_nodes, run)
    tracker = run.folder / "checkpoints/latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 300
    while not tracker.exists():
        assert time.monotonic() < deadline, log(run, two_nodes.nodes[0])[-4000:]
        assert [job.poll() for job in jobs] == [None, None], log(run, two_nodes.nodes[0])[-4000:]
        time.sleep(0.002)
    return jobs


@pytest.mark.slow
def test_two_nodes_train_as_one_does_though_one_is_cut_off(
    two_nodes: Cluster, one_node_run: SmallRun, tmp_path: Path
) -> None:
    """What was trained before and after it is, to the bit, the run of one node."""
    run = SmallRun(one_node_run.corpus, tmp_path)
    jobs = launch_until_a_checkpoint(two_nodes, run)
    two_nodes.cut_off(1)
    cut = time.monotonic()
    # Nothing says that the other is gone, to either: both wait out the time limit. Ending the
    # processes after it takes seconds on a busy machine.
    codes = wait(jobs, two_nodes, run, TIMEOUT + 60)
    assert codes == [1, 1]
    assert time.monotonic() - cut > TIMEOUT / 2
    for rank, node in enumerate(two_nodes.nodes):
        expected = (
            rf"(?m)^ended: rank {rank}, step \d+: .* or hangs.*Timed out waiting {TIMEOUT}000ms"
        )
        assert re.search(expected, log(run, node)), log(run, node)[-4000:]
    saved = last_checkpoint(run)
    assert saved in range(SAVE_INTERVAL, TOTAL)
    assert not (run.folder / f"checkpoints/iter_{TOTAL:07d}").exists()

    two_nodes.reconnect(1)
    jobs = launch(two_nodes, run)
    assert wait(jobs, two_nodes, run, 300) == [0, 0], log(run, two_nodes.nodes[0])[-4000:]
    first, last = (log(run, node) for node in two_nodes.nodes)
    assert f"at iteration {saved}\n" in first
    assert first.count("using world size: 2, data-parallel size: 2") == 2
    # Reports of a step come from the last rank: those of the second launch are the last ones.
    phases = [line.split("phase: ")[1].split()[0] for line in last.splitlines() if "phase:" in line]
    whole = ["superposition"] * SWITCH + ["recovery"] * (TOTAL - SWITCH)
    assert phases[saved - TOTAL :] == whole[saved:]
    assert phases[: saved - TOTAL] == whole[: len(phases) + saved - TOTAL]
    assert_same_run(run, one_node_run)
    # In each step a node sends the other half of its gradients in fp32 and its own half of the
    # weights in bf16: less would mean that they took another way.
    parameters = run.description()["parameters"]
    for rank in range(2):
        assert two_nodes.bytes_from(rank) > TOTAL * parameters * (4 + 2) / 2
