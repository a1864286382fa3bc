"""Wraps and replaces what Megatron has under a name, and checks that it is what we know.

Nothing else in this package sets an attribute of a module or class of Megatron. Each call names an
entry of :mod:`megatron_tst.upstream.symbols`, which is compared with the installed Megatron first.

Several wraps of a symbol stack: the one that was installed first is the innermost, and a
replacement lies below all of them. A wrap that is installed again takes its own place anew.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_tst.upstream.symbols import SYMBOLS, VERSIONS, Symbol

Maker = Callable[[Any], Any]
"""Makes of what Megatron has what is to be there instead."""

_REPLACEMENT = "replacement"


@dataclass
class _Patched:
    """A symbol that was changed: what Megatron has there, what is there, and what made it so."""

    original: Any
    installed: Any = None
    makers: dict[str, Maker] = field(default_factory=dict)


_patched: dict[str, _Patched] = {}


def wrap(path: str, make: Maker) -> None:
    """Puts what ``make`` makes of a symbol in its place. Idempotent.

    Args:
        path: of an entry of the table, ``module:name``.
        make: takes what was there before, and is told from other wraps by its name.

    Raises:
        RuntimeError: the installed Megatron has no such symbol, or another than the table says.
    """
    _install(path, f"{make.__module__}.{make.__qualname__}", make)


def replace(path: str, replacement: Any) -> None:
    """As :func:`wrap`, with something that takes the symbol's place whatever is there."""
    _install(path, _REPLACEMENT, lambda _: replacement)


@contextmanager
def replaced(path: str, replacement: Any) -> Iterator[None]:
    """As :func:`replace`, wraps included, while the context is open."""
    owner, name = _found(path)
    # Not by getattr, which unwraps a static method.
    before = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


def original(path: str) -> Any:
    """What Megatron itself has under a path of the table, whatever was put in its place."""
    owner, name = _found(path)
    return _present(path, owner, name).original


def check() -> None:
    """Compares the table with all that is imported. Imports nothing.

    Raises:
        RuntimeError: naming symbol, file and version.
    """
    for symbol in SYMBOLS:
        module = sys.modules.get(symbol.module)
        if module is not None:
            _compare(symbol, module)


@contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Around imports: one of Megatron that fails says which release is installed.

    Raises:
        RuntimeError: a module or name of Megatron that is imported is not there.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        name = ".".join(filter(None, (error.name, error.name_from)))
        raise _is_other(f"{name} does not exist", error.path, "this package") from error


def _install(path: str, key: str, make: Maker) -> None:
    owner, name = _found(path)
    patched = _present(path, owner, name)
    patched.makers[key] = make
    value = patched.original
    for key in sorted(patched.makers, key=lambda key: key != _REPLACEMENT):
        value = patched.makers[key](value)
    setattr(owner, name, value)
    patched.installed = value
    _patched[path] = patched


def _present(path: str, owner: Any, name: str) -> _Patched:
    """What is known of a symbol; nothing where somebody else has set it since."""
    present = getattr(owner, name)
    known = _patched.get(path)
    return known if known is not None and known.installed is present else _Patched(present)


def _found(path: str) -> tuple[Any, str]:
    """The module or class that has a symbol, and its name there, once it is as we know it."""
    entries = [symbol for symbol in SYMBOLS if symbol.path == path]
    assert entries, f"{path} is not in the table of megatron_tst/upstream/symbols.py"
    first = entries[0]
    with naming_what_is_missing():
        module = import_module(first.module)
    for symbol in entries:
        _compare(symbol, module)
    *parents, name = first.name.split(".")
    return functools.reduce(getattr, parents, module), name


def _compare(symbol: Symbol, module: Any) -> None:
    """Raises where a symbol is not as its entry says."""
    file, dotted = getattr(module, "__file__", None), f"{symbol.module}.{symbol.name}"
    try:
        found = functools.reduce(getattr, symbol.name.split("."), module)
    except AttributeError as error:
        raise _is_other(f"{dotted} does not exist", file, symbol.user) from error
    known = _patched.get(symbol.path)
    if known is not None and known.installed is found:
        return  # Compared before it was changed.
    if symbol.parameters:
        taken = list(inspect.signature(found).parameters)
        # In this order: what stands between them has a default or is passed on.
        rest = iter(taken)
        missing = [name for name in symbol.parameters if name not in rest]
        if missing:
            what = f"{dotted}({', '.join(taken)}) does not take {', '.join(symbol.parameters)}"
            raise _is_other(what, file, symbol.user)
    missing = [name for name in symbol.attributes if not _has_attribute(found, name)]
    if missing:
        raise _is_other(f"{dotted} has no {', '.join(missing)}", file, symbol.user)


def _has_attribute(cls: type, name: str) -> bool:
    """Whether objects of a class have an attribute: its own, or one that a method names."""
    if hasattr(cls, name):
        return True
    methods = (value for base in cls.__mro__ for value in vars(base).values())
    codes = (getattr(inspect.unwrap(m), "__code__", None) for m in methods if callable(m))
    return any(name in code.co_names for code in codes if code is not None)


def _is_other(what: str, file: str | None, user: str) -> RuntimeError:
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        installed = "of an unknown version"
    return RuntimeError(
        f"{what} in the installed megatron-core {installed} ({file or 'no file'}), and {user} "
        f"relies on it: it was checked with megatron-core {' and '.join(VERSIONS)}. Install the "
        "version pinned in pyproject.toml."
    )
