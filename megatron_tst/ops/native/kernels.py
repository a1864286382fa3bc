"""Compiles ``kernels.cpp`` for this machine, and calls it.

A training step of a small model spends more time between its matrix products than in them: hundreds
of small torch operators. The kernels do what lies between two products in one pass.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tst.common.atomic_files import replacing
from megatron_tst.common.errors import UsageError

SWITCH = "MEGATRON_TST_CPU_KERNELS"
"""Environment variable: ``torch`` keeps to torch's operators."""

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd"),
    # Neither changes a result of finite arguments; loops with a square root need the first.
    *("-fno-math-errno", "-fno-trapping-math"),
)
_COMPILERS = ("c++", "g++", "clang++")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Rows are computed in parts of so many values.
_PART = 32
_C_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}


class Kernels:
    """The compiled functions, for contiguous tensors of one dtype on one thread.

    Args:
        library: what was compiled.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._functions: dict[tuple[str, torch.dtype], Any] = {}

    def serves(self, *tensors: Tensor) -> bool:
        """Whether the tensors are of one dtype that the kernels have."""
        dtype = tensors[0].dtype
        return dtype in _DTYPES and all(tensor.dtype == dtype for tensor in tensors)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[..., h], [h] -> ``x / rms(x) * weight`` and ``1 / rms(x)`` of each row, float32 [n]."""
        hidden = x.shape[-1]
        rows = x.numel() // hidden
        y = torch.empty_like(x)
        inverse = x.new_empty(rows, dtype=torch.float32)
        self._call("rms_norm", x, weight, y, inverse, rows, hidden, float(eps))
        return y, inverse

    def rms_norm_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight.

        Args:
            grad: of what ``rms_norm`` gave, [..., h].
            x: [..., h].
            weight: [h].
            inverse: from ``rms_norm``.
            residual: [..., h], added to the gradient of x; None: nothing is.
        """
        hidden = x.shape[-1]
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros(2, hidden)
        rows = x.numel() // hidden
        name = "rms_norm_gradient"
        self._call(name, grad, x, weight, inverse, residual, grad_x, grad_weight, rows, hidden)
        return grad_x, grad_weight[0].to(weight.dtype)

    def split_heads(
        self, mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of Megatron's joint projection, with rotated query and key.

        Args:
            mixed: [l, b, g (r + 2) d]: of each group its r queries, its key and its value.
            cosine: [l, d], of the angle of each position and dimension.
            sine: [l, d].
            groups: g.

        Returns:
            [b g, l r, d], [b g, l, d] and [b g, l, d]. The heads of a group lie side by side.
        """
        length, batch, width = mixed.shape
        size = cosine.shape[-1]
        heads = width // (groups * size) - 2
        query = mixed.new_empty(batch * groups, length * heads, size)
        key, value = mixed.new_empty(2, batch * groups, length, size)
        shape = (length, batch, groups, heads, size)
        self._call("split_heads", mixed, cosine, sine, query, key, value, *shape)
        return query, key, value

    def join_head_gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine: Tensor,
        sine: Tensor,
        shape: tuple[int, int, int, int, int],
    ) -> Tensor:
        """Gradient of ``mixed`` from those of what ``split_heads`` gave; shape: l, b, g, r, d."""
        length, batch, groups, heads, size = shape
        mixed = query.new_empty(length, batch, groups * (heads + 2) * size)
        self._call("join_head_gradients", query, key, value, cosine, sine, mixed, *shape)
        return mixed

    def causal_softmax_(self, scores: Tensor, first: int, heads: int, scale: float) -> Tensor:
        """In place: scores [n, q heads, k] of positions ``first`` to ``first`` + q - 1.

        Returns:
            The probabilities of ``scale * scores``; 0 for keys behind a position.
        """
        scratch = torch.empty(scores.shape[-1] + _PART)
        shape = (*scores.shape, first, heads)
        self._call("causal_softmax", scores, *shape, float(scale), scratch)
        return scores

    def causal_softmax_gradient_(
        self, probabilities: Tensor, grad: Tensor, first: int, heads: int, scale: float
    ) -> Tensor:
        """In place: the gradient of the probabilities becomes that of the scores."""
        shape = (*grad.shape, first, heads)
        name = "causal_softmax_gradient"
        self._call(name, probabilities, grad, *shape, float(scale))
        return grad

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 f] -> ``silu(gate) * up`` [..., f]."""
        width = gate_and_up.shape[-1] // 2
        out = gate_and_up.new_empty(*gate_and_up.shape[:-1], width)
        self._call("swiglu", gate_and_up, out, out.numel() // width, width)
        return out

    def swiglu_gradient(self, grad: Tensor, gate_and_up: Tensor) -> Tensor:
        """[..., f], [..., 2 f] -> [..., 2 f]."""
        width = grad.shape[-1]
        out = torch.empty_like(gate_and_up)
        rows = grad.numel() // width
        self._call("swiglu_gradient", grad, gate_and_up, out, rows, width)
        return out

    def multi_hot_loss(
        self, logits: Tensor, columns: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``logsumexp(z) - sum_i c_i z[column_i]`` of each row, and the former.

        Args:
            logits: [n, v].
            columns: [n, s] int64.
            coefficients: [n, s] float32; targets of coefficient 0 have no part.

        Returns:
            [n] and [n], float32.
        """
        rows, width = logits.shape
        loss, log_sum_exp = torch.empty(2, rows)
        shape = (rows, width, columns.shape[1])
        self._call("multi_hot_loss", logits, columns, coefficients, loss, log_sum_exp, *shape)
        return loss, log_sum_exp

    def multi_hot_gradient(
        self,
        logits: Tensor,
        columns: Tensor,
        coefficients: Tensor,
        log_sum_exp: Tensor,
        scale: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Writes ``scale * (softmax(z) - sum_i c_i onehot(column_i))`` into ``out`` [n, v].

        Args:
            logits: [n, v]; ``out`` may be the same.
            columns: [n, s] int64.
            coefficients: [n, s] float32.
            log_sum_exp: [n] float32.
            scale: [n] float32.
            out: as the logits.
        """
        scratch = torch.empty(columns.shape[1])
        shape = (*logits.shape, columns.shape[1])
        operands = (columns, coefficients, log_sum_exp, scale, out, scratch)
        self._call("multi_hot_gradient", logits, *operands, *shape)
        return out

    def bag_mean(self, table: Tensor, tokens: Tensor, divisors: Tensor | None) -> Tensor:
        """Mean of the rows of each bag, added up in float32: [v, h], [n, s] -> [n, h].

        Args:
            table: [v, h].
            tokens: [n, s] int64 rows; a negative one counts as a row of zeros.
            divisors: [n] float32; None: s.
        """
        (bags, bag_size), hidden = tokens.shape, table.shape[1]
        out = table.new_empty(bags, hidden)
        scratch = torch.empty(hidden)
        self._call("bag_mean", table, tokens, divisors, out, scratch, bags, bag_size, hidden)
        return out

    def bag_mean_gradient(
        self, grad: Tensor, tokens: Tensor, divisors: Tensor | None, rows: int
    ) -> Tensor:
        """Gradient [v, h] of the table from that of the means [n, h]; rows: v."""
        bags, bag_size = tokens.shape
        hidden = grad.shape[1]
        out = grad.new_empty(rows, hidden)
        rooms = (torch.empty(hidden), tokens.new_empty(bags * bag_size), tokens.new_empty(rows + 1))
        shape = (bags, bag_size, rows, hidden)
        self._call("bag_mean_gradient", grad, tokens, divisors, out, *rooms, *shape)
        return out

    def add_widened_(self, total: Tensor, addend: Tensor) -> None:
        """In place: float32 ``total`` plus ``addend``, of as many elements."""
        self._call("add_widened", addend, total, total.numel())

    def _call(self, name: str, first: Tensor, *others: Tensor | int | float | None) -> None:
        operands = (first, *others)
        function = self._functions.get((name, first.dtype))
        if function is None:
            function = getattr(self._library, f"{name}_{_DTYPES[first.dtype]}")
            function.argtypes = [_C_TYPES.get(type(value), ctypes.c_void_p) for value in operands]
            function.restype = None
            self._functions[name, first.dtype] = function
        function(*map(_argument, operands))


def _argument(value: Tensor | int | float | None) -> int | float | None:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    return value


def kernels() -> Kernels | None:
    """The kernels, or None where torch's operators serve: see :func:`describe_kernels`."""
    return _choose()[0]


def compiled_kernels() -> Kernels:
    """The kernels, for code that :func:`kernels` has sent here."""
    compiled = kernels()
    assert compiled is not None
    return compiled


def describe_kernels() -> str:
    """Which of the two this process uses, and why."""
    return _choose()[1]


@functools.cache
def _choose() -> tuple[Kernels | None, str]:
    asked_for = os.environ.get(SWITCH, "compiled")
    if asked_for not in ("compiled", "torch"):
        raise UsageError(f"{SWITCH} is {asked_for!r}: set it to compiled or torch, or unset it.")
    if asked_for == "torch":
        return None, f"torch ({SWITCH}=torch)"
    if torch.get_num_threads() > 1:
        # They run on one.
        return None, f"torch ({torch.get_num_threads()} threads a process)"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None, f"torch (no compiler: {', '.join(_COMPILERS)})"
    try:
        return Kernels(_compiled(compiler)), f"compiled ({Path(compiler).name})"
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return None, f"torch (cannot compile: {' '.join(str(reason).split())[:200]})"


def compiled_library(source: Path) -> Path | None:
    """The library of another source; None where it cannot be compiled for all instructions."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None or "-march=native" not in _instructions():
        return None
    try:
        return _compiled(compiler, source)
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled(compiler: str, source: Path | None = None) -> Path:
    """Compiles a source, unless this machine has done so before, and returns the library."""
    source = source or _SOURCE
    command = [compiler, *_FLAGS, *_instructions()]
    identity = repr((source.read_bytes(), command, _version(compiler), _cpu()))
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    library = _cache_folder() / name
    if not library.exists():
        # Several ranks may do this at once.
        with replacing(library) as built:
            subprocess.run(
                [*command, str(source), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            )
    return library


def _instructions() -> tuple[str, ...]:
    """Options for the instructions of this CPU, or the fewer that torch is told to use."""
    if os.uname().machine != "x86_64":
        return ("-mcpu=native",)
    limits = {"avx2": ("-march=x86-64-v3",), "default": ()}
    return limits.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ("-march=native",))


def _version(compiler: str) -> str:
    done = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def _cpu() -> str:
    """What tells CPUs apart that share a home folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "megatron-tst"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
