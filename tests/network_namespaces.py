"""Nodes of a cluster on one machine: Linux namespaces, joined by a switch that can cut one off.

A node has interfaces, processes, shared memory and a host name of its own, and the file system in
common with the others, as a cluster has. Its first process reads a pipe from this one: when that
closes, even because this process was killed, the kernel ends all processes of the node and then
removes its interfaces. Nothing has a name on the machine that could be left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERFACE = "eth0"
# Reserved for measurements between devices: no real network has these addresses.
NETWORK = "198.18.0.0/24"

_UNSHARE = ["unshare", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
# `ip` is not on the PATH of every user.
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_ENVIRONMENT = {"PATH": _PATH}


def why_unavailable() -> str | None:
    """Says why nodes cannot be made here; None if they can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool, path=_PATH)]
    if missing:
        return f"no {', '.join(missing)}: install iproute2 and util-linux"
    links = "ip link add name s type bridge && ip link add name a type veth peer name b"
    probe = subprocess.run(
        [*_UNSHARE, "sh", "-c", links], env=_ENVIRONMENT, capture_output=True, text=True
    )
    if probe.returncode:
        return f"root with CAP_SYS_ADMIN and CAP_NET_ADMIN: {probe.stderr.strip()}"
    return None


@dataclass
class Node:
    """Namespaces of their own.

    Attributes:
        name: host name.
        address: in ``NETWORK``; empty for the switch.
        first_process: with which everything in the node ends.
    """

    name: str
    address: str
    first_process: int

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts a command, whose output is added to ``log``; leaving ``cluster`` ends it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                self.inside(command), stdout=output, stderr=output, env=environment
            )

    def run(self, *command: str) -> str:
        """Runs a command and returns what it prints."""
        done = subprocess.run(
            self.inside(command), env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0, command
        return done.stdout

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command in the node."""
        # The folder is named because entering namespaces of mounts leaves it.
        enter = ["nsenter", "--target", str(self.first_process), "--all", f"--wd={Path.cwd()}"]
        return [*enter, *command]


@dataclass
class Cluster:
    """Nodes at the ports of a switch."""

    nodes: list[Node]
    switch: Node

    def cut_off(self, rank: int) -> None:
        """Switches the port of a node off: for the others it falls silent."""
        self._set_port(rank, "down")

    def reconnect(self, rank: int) -> None:
        self._set_port(rank, "up")

    def bytes_from(self, rank: int) -> int:
        """What the switch has got from a node."""
        shown = self.switch.run("ip", "-json", "-statistics", "link", "show", f"port{rank}")
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def _set_port(self, rank: int, state: str) -> None:
        self.switch.run("ip", "link", "set", f"port{rank}", state)


@contextmanager
def cluster(size: int) -> Iterator[Cluster]:
    """Builds nodes; ends their processes and removes them at the end."""
    with ExitStack() as stack:
        switch = stack.enter_context(_node("switch", ""))
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        nodes = []
        for rank in range(size):
            address = NETWORK.replace("0/", f"{rank + 1}/")
            node = stack.enter_context(_node(f"node{rank}", address.split("/")[0]))
            _plug_in(node, switch, f"port{rank}", address)
            nodes.append(node)
        yield Cluster(nodes, switch)


@contextmanager
def _node(name: str, address: str) -> Iterator[Node]:
    # Shared memory too: two nodes have none in common.
    setup = f"hostname {name} && ip link set lo up && mount -t tmpfs shm /dev/shm"
    holder = subprocess.Popen(
        [*_UNSHARE, "sh", "-ec", f"{setup} && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_ENVIRONMENT,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "ready\n"
        (first,) = psutil.Process(holder.pid).children()
        yield Node(name, address, first.pid)
        # Leaving closes the pipe and waits.


def _plug_in(node: Node, switch: Node, port: str, address: str) -> None:
    # From outside their process namespaces, where ip finds both processes.
    enter = ["nsenter", "--target", str(switch.first_process), "--net", "ip", "link"]
    peer = ["peer", "name", INTERFACE, "netns", str(node.first_process)]
    link = [*enter, "add", port, "type", "veth", *peer]
    subprocess.run(link, check=True, env=_ENVIRONMENT)
    switch.run("ip", "link", "set", port, "master", "bridge", "up")
    node.run("ip", "address", "add", address, "dev", INTERFACE)
    node.run("ip", "link", "set", INTERFACE, "up")
