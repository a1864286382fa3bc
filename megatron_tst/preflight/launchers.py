"""What starts processes, and where in its words the command stands that it starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

PYTHONS = {"python", "python3", *(f"python3.{minor}" for minor in range(6, 20))}
# Start a command on other machines as it stands, so that a shell among them can be read here.
_PARALLEL = {
    "srun": "srun",
    "mpirun": "mpirun",
    "mpiexec": "mpirun",
    "mpiexec.hydra": "mpirun",
    "orterun": "mpirun",
    "prterun": "mpirun",
}
# Start training, or what cannot be read from here, with these as their first word.
_ALWAYS: set[str] = set()
_STARTING = {
    "torchrun": _ALWAYS,
    "deepspeed": _ALWAYS,
    "accelerate": {"launch"},
    "sbatch": _ALWAYS,
    "salloc": _ALWAYS,
    "bcprun": _ALWAYS,
    "aprun": _ALWAYS,
    "jsrun": _ALWAYS,
    "flux": {"run", "submit", "batch", "alloc"},
    "ngc": {"batch", "base-command"},
    "ssh": _ALWAYS,
    "pdsh": _ALWAYS,
    "clush": _ALWAYS,
    "docker": {"run", "exec", "start", "create", "compose", "container", "stack", "service"},
    "podman": {"run", "exec", "start", "create", "container", "play", "kube"},
    "apptainer": {"exec", "run", "shell", "instance", "test"},
    "singularity": {"exec", "run", "shell", "instance", "test"},
    "enroot": {"start", "exec", "batch"},
    "kubectl": {"run", "exec", "apply", "create", "replace"},
    "tst": {"quickstart", "study"},
}
# Run a command behind their options with another PATH.
_WRAPPERS = {"sudo", "uv", "conda", "mamba", "micromamba", "poetry", "pixi"}
# Other machines' environment, which is not that of the script.
_FOREIGN = {
    *("docker", "podman", "apptainer", "singularity", "enroot"),
    *("ssh", "pdsh", "clush", "kubectl", "ngc", "bcprun"),
}
# Of srun.
_CONTAINERS = ("--container", "--container-image", "--container-name")
_LAUNCHING_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "torch.distributed.elastic",
}
# Options without a value; all others of these launchers take one.
_FLAGS = {
    "srun": """
        --bcast --contiguous --disable-status --exclusive --exact --help --hold --immediate
        --interactive --kill-on-bad-exit --label --multi-prog --no-allocate --no-kill --overcommit
        --overlap --oversubscribe --preserve-env --pty --quiet --quit-on-interrupt --reboot
        --resv-ports --spread-job --test-only --unbuffered --use-min-nodes --verbose --version --x11
        --nice --propagate
        --container-mount-home --no-container-mount-home --container-remap-root
        --no-container-remap-root --container-writable --container-readonly
        --container-entrypoint --no-container-entrypoint
        -E -H -I -K -k -l -O -Q -s -u -v -V -X -Z
    """,
    "mpirun": """
        --allow-run-as-root -allow-run-as-root --tag-output -tag-output --oversubscribe
        -oversubscribe --nooversubscribe --report-bindings -report-bindings --verbose -v --quiet -q
        --display-map -display-map --display-allocation --bynode -bynode --byslot -byslot
        --nolocal -nolocal --novm --enable-recovery --disable-recovery --timestamp-output
        --bind-to-core --bind-to-socket --bind-to-none --do-not-launch --index-argv-by-rank
        --use-hwthread-cpus -use-hwthread-cpus -l -prepend-rank -genvall -envall -genvnone -envnone
        -s-all -verbose
    """,
}
_TWO_VALUES = {"--mca", "-mca", "--gmca", "-gmca", "--prtemca", "--pmixmca", "-genv", "-env"}
SHELLS = {"bash", "sh", "dash", "zsh", "ksh"}
# Ask a node something, and change nothing.
QUERIES = {
    "hostname",
    "echo",
    "printf",
    "true",
    "env",
    "printenv",
    "uname",
    "date",
    "pwd",
    "nvidia-smi",
}


def as_command(path: str, arguments: Sequence[str]) -> list[str]:
    """A command by its name.

    That of a Python is its script, where that stands for a command: ``python "$(which torchrun)"``,
    and ``torchrun`` itself, which names its Python in its first line.
    """
    name = PurePath(path).name
    if name in PYTHONS:
        place = _python_options(arguments)
        script = PurePath(*arguments[place : place + 1])
        is_console_script = script.is_absolute() and script.parent == PurePath(path).parent
        if is_console_script or script.name in stand_ins():
            return [script.name, *arguments[place + 1 :]]
    return [name, *arguments]


def stand_ins() -> list[str]:
    """The names that a script must not find on PATH."""
    return sorted({*PYTHONS, *_PARALLEL, *_STARTING, *_WRAPPERS})


def needs_stand_in(name: str, *, is_installed: bool) -> bool:
    """Whether a name of :func:`stand_ins` is put on PATH.

    The machine that checks may lack launchers; of the rest scripts ask whether they are there.
    """
    return is_installed or name in {"python", "python3", *_PARALLEL, *_STARTING}


def is_parallel(name: str) -> bool:
    """Whether it starts the command behind its options, on every node."""
    return name in _PARALLEL


def starts_something(name: str, arguments: Sequence[str]) -> bool:
    """Whether a command starts processes that preflight must not start."""
    words = [word for word in arguments if not word.startswith("-")]
    if name in _STARTING:
        asked = _STARTING[name]
        return not asked or bool(asked.intersection(words[:3]))
    if name in PYTHONS:
        return _is_launching_python(arguments)
    names = {PurePath(word).name for word in words}
    return name in _WRAPPERS and bool(names & {*_PARALLEL, *_STARTING} - {"tst"})


def _is_launching_python(arguments: Sequence[str]) -> bool:
    place = _python_options(arguments)
    flag, module = [*arguments[place : place + 2], "", ""][:2]
    is_launch = module in _LAUNCHING_MODULES or module.startswith(("deepspeed", "accelerate"))
    return flag.startswith("-") and flag.endswith("m") and is_launch


def _python_options(arguments: Sequence[str]) -> int:
    """The number of words in front of its script, of ``-m`` or of ``-c``."""
    place = 0
    while arguments[place : place + 1] and re.fullmatch("-.*(?<![cm])", arguments[place]):
        place += 2 if arguments[place] in ("-W", "-X") else 1
    return place


def is_question_to_python(arguments: Sequence[str]) -> bool:
    """Whether Python is given its program in a word, and not as a file or module."""
    return any(word in ("-c", "-V", "--version") for word in arguments[:3])


def has_own_environment(command: Sequence[str]) -> bool:
    """Whether the program gets an environment other than that of the script."""
    return any(
        PurePath(word).name in _FOREIGN or word.partition("=")[0] in _CONTAINERS for word in command
    )


def exported_variables(options: Sequence[str]) -> dict[str, str]:
    """Those that options of a launcher set: srun's ``--export``, MPI's ``-x`` and ``-genv``."""
    found = {}
    for previous, word, following in zip(["", *options], options, [*options[1:], ""], strict=False):
        if previous in ("-genv", "-env"):
            found[word] = following
        elif previous in ("-x", "--export") or word.startswith("--export="):
            parts = [part.partition("=") for part in word.removeprefix("--export=").split(",")]
            found.update({name: value for name, equals, value in parts if equals})
    return {name: value for name, value in found.items() if name.isidentifier()}


def started_command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command behind the options of a launcher such as srun."""
    flags = set(_FLAGS[_PARALLEL[name]].split())
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        word = arguments[place]
        is_attached = "=" in word or (name == "srun" and word[1] != "-" and len(word) > 2)
        if word == "--":
            return list(arguments[place + 1 :])
        place += 1 if word in flags or is_attached else 3 if word in _TWO_VALUES else 2
    return list(arguments[place:])
