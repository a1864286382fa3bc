"""What is said of a setting once, beside its field: help, choices, place in studies and reports.

The command line, study files, reports, results tables and the check of a resume derive theirs from
it. Imports no torch, no Megatron.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_tst.common.errors import UsageError

_METADATA = "megatron_tst"
_KINDS: dict[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


@dataclass(frozen=True)
class Setting:
    """A field of a configuration, for all who name it.

    Attributes:
        name: of the field, and the key in study files and results tables.
        kind: int, float or str.
        is_optional: whether it may be None.
        default: of the field.
        help: for the command line.
        choices: what a text may be; empty where any value is one.
        label: how a report names a value that is not the default, with ``{}`` for the value; empty
            where the report names it in its own way.
        is_method: whether it decides what is trained: a resume must have the same value, and
            reports tell runs apart by it.
        is_axis: whether the runs of a study may differ in it.
        orders_text: whether it decides which text a sample holds, and in which form.
    """

    name: str
    kind: type
    is_optional: bool
    default: Any
    help: str
    choices: Collection[str]
    label: str
    is_method: bool
    is_axis: bool
    orders_text: bool

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return FLAGS.name(self.name)

    @property
    def argument(self) -> str:
        """The name among parsed arguments."""
        return f"tst_{self.name}"

    def named(self, value: object) -> str:
        """How a report names a value; empty for the default, and where it has its own way."""
        return self.label.format(value) if self.label and value != self.default else ""

    def check(self, value: object) -> None:
        """Raises a :class:`SettingError` for a value of another type, or that is no choice."""
        if value is None and self.is_optional:
            return
        kind, wording = _KINDS[self.kind]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SettingError(f"{{{self.name}}} is {{value!r}}: use {wording}.", value=value)
        if self.choices and value not in self.choices:
            raise SettingError(
                f"{{{self.name}}} is {{value!r}}: choose one of {', '.join(self.choices)}.",
                value=value,
            )


def said(
    help: str,
    *,
    choices: Collection[str] = (),
    label: str = "",
    is_method: bool = True,
    is_axis: bool = True,
    orders_text: bool = False,
) -> dict[str, Any]:
    """Metadata of a dataclass field: what a :class:`Setting` says of it beyond its type.

    Choices may be a mapping that grows; those of a ``Literal`` need not be given.
    """
    said = {"help": help, "choices": choices, "label": label}
    uses = {"is_method": is_method, "is_axis": is_axis, "orders_text": orders_text}
    return {_METADATA: {**said, **uses}}


@cache
def settings_of(configuration: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(configuration)
    found = {}
    for field in dataclasses.fields(configuration):
        kind, is_optional, literals = _read_type(hints[field.name])
        said = dict(field.metadata[_METADATA])
        said["choices"] = said["choices"] or literals
        found[field.name] = Setting(field.name, kind, is_optional, field.default, **said)
    return found


def _read_type(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Its plain type, whether None is allowed, and the values of a ``Literal``."""
    if isinstance(hint, types.UnionType):
        (some,) = (part for part in get_args(hint) if part is not types.NoneType)
        return _read_type(some)[0], True, _read_type(some)[2]
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return hint, False, ()


# --- errors in the words of who set the value -----------------------------------------------------


@dataclass(frozen=True)
class Words:
    """How settings are named to those who set them in one place.

    Attributes:
        name: of a setting.
        assigned: a setting with a value.
    """

    name: Callable[[str], str]
    assigned: Callable[[str, str], str]


def _flag(name: str) -> str:
    return f"--tst-{name.replace('_', '-')}"


FLAGS = Words(_flag, lambda name, value: f"{_flag(name)} {value}")
KEYS = Words(str, lambda name, value: f"{name}: {value}")
PYTHON = Words(str, lambda name, value: f"{name}={value}")


class SettingError(UsageError):
    """A setting that cannot be; its message is in the words of Python, or in those of others.

    Args:
        message: with ``{name}`` for a setting and ``{name:value}`` for one with a value, which may
            be another field.
        **values: further fields.
    """

    def __init__(self, message: str, **values: object) -> None:
        self._message, self._values = message, values
        super().__init__(self.worded(PYTHON))

    def worded(self, words: Words) -> str:
        """The message for those who use these words."""
        return self._message.format_map(_Fields(words, self._values))


class _Fields(dict[str, object]):
    def __init__(self, words: Words, values: dict[str, object]) -> None:
        super().__init__(values)
        self._words = words

    def __missing__(self, name: str) -> _Named:
        return _Named(name, self._words)


@dataclass(frozen=True)
class _Named:
    name: str
    words: Words

    def __format__(self, value: str) -> str:
        return self.words.assigned(self.name, value) if value else self.words.name(self.name)


@contextmanager
def worded(words: Words) -> Iterator[None]:
    """Puts errors about settings into these words.

    Raises:
        UsageError: in place of a :class:`SettingError`.
    """
    try:
        yield
    except SettingError as error:
        raise UsageError(error.worded(words)) from error
