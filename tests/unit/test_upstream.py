"""Megatron is changed in one way, as a table says that is true of the installed release."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training import training

from megatron_tst.upstream import patches
from megatron_tst.upstream.patches import check, original, replace, replaced, wrap
from megatron_tst.upstream.symbols import SYMBOLS, Symbol
from tests import upstream_table
from tests.zygote import ROOT, Launcher

PACKAGE = ROOT / "megatron_tst"
LOAD = "megatron.training.training:load_checkpoint"
Found = tuple[str, str, str]
"""Use, file and path, as in the table."""


def imported(tree: ast.AST) -> dict[str, str]:
    """What a file imports of Megatron: paths by the names that it gives them."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            names |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
        if isinstance(node, ast.Import):
            of_megatron = (a for a in node.names if a.name.split(".")[0] == "megatron")
            names |= {a.asname or "megatron": a.name for a in of_megatron}
    return names


def root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def changes(tree: ast.AST) -> Iterator[int]:
    """Lines in which an attribute of what comes from Megatron is set or deleted."""
    names = imported(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [t for t in node.targets if isinstance(t, ast.Attribute)]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target] if isinstance(node.target, ast.Attribute) else []
        elif isinstance(node, ast.Call) and root(node.func) in ("setattr", "delattr"):
            targets = node.args[:1]
        yield from (target.lineno for target in targets if root(target) in names)


def uses(tree: ast.AST, file: str) -> Iterator[Found]:
    """Subclasses, methods that they override, private names, and what goes through the adapter."""
    names = imported(tree)
    calls = {"wrap": "wrap", "replace": "replace", "replaced": "replace"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for path in (names[root(base)] for base in node.bases if root(base) in names):
                yield "subclass", file, path
                yield from (("override", file, method) for method in overridden(node, path))
        if isinstance(node, ast.Call) and root(node.func) in calls and node.args:
            first = node.args[0]
            # Other paths are looked up in the table when the call is made.
            if isinstance(first, ast.Constant) and isinstance(node.func, ast.Name):
                yield calls[node.func.id], file, str(first.value)
    for path in names.values():
        if path.rpartition(":")[2].startswith("_"):
            yield "read", file, path


def overridden(node: ast.ClassDef, path: str) -> Iterator[str]:
    module, _, name = path.partition(":")
    base = getattr(import_module(module), name)
    for method in (n.name for n in node.body if isinstance(n, ast.FunctionDef)):
        if hasattr(base, method) and not method.startswith("__") and is_megatrons(base, method):
            yield f"{path}.{method}"


def is_megatrons(base: type, method: str) -> bool:
    owner = next(cls for cls in base.__mro__ if method in vars(cls))
    return owner.__module__.startswith("megatron.")


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "upstream":
            yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def test_nothing_of_megatron_is_set_outside_of_the_adapter() -> None:
    found = [f"{file}:{line}" for file, tree in sources() for line in changes(tree)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "training.load_checkpoint = None",
        "del training.load_checkpoint",
        "setattr(training, name, None)",
        "training.Class.method = None",
        "megatron.core.utils.x += 1",
    ],
)
def test_a_change_is_seen(line: str) -> None:
    source = (
        f"import megatron.core.utils\ndef f():\n  from megatron.training import training\n  {line}"
    )
    assert list(changes(ast.parse(source))) == [4]


def test_the_table_has_every_use() -> None:
    table = {(symbol.use, symbol.file, symbol.path) for symbol in SYMBOLS}
    assert len(table) == len(SYMBOLS)
    found = {use for file, tree in sources() for use in uses(tree, file)}
    assert found - table == set()
    assert {kind for kind, _, _ in found} == {"subclass", "override", "wrap", "replace", "read"}


def test_the_table_has_nothing_that_is_not_used() -> None:
    for symbol in SYMBOLS:
        text = (PACKAGE / symbol.file).read_text()
        # Of a class that is only read its attributes are there.
        names = symbol.attributes if symbol.use == "read" and symbol.attributes else ()
        for name in names or [symbol.name.rpartition(".")[2]]:
            assert name in text, (symbol.path, name)


@pytest.mark.parametrize("path", sorted({symbol.path for symbol in SYMBOLS}))
def test_the_installed_megatron_is_as_the_table_says(path: str) -> None:
    original(path)


def test_the_page_shows_the_table() -> None:
    _, table, _ = upstream_table.parts(upstream_table.PAGE.read_text())
    assert table == upstream_table.section(), "run python -m tests.upstream_table"


def with_entry(monkeypatch: pytest.MonkeyPatch, path: str, **needs: tuple[str, ...]) -> None:
    entry = Symbol(path, "wrap", "training/x.py", "for this test", **needs)
    monkeypatch.setattr(patches, "SYMBOLS", (entry,))


@pytest.mark.parametrize(
    "path",
    [
        "megatron.core.no_module:function",
        "megatron.core.utils:no_function",
        "megatron.core.utils:NoClass.method",
        "megatron.core.utils:GlobalMemoryBuffer.no_method",
    ],
)
def test_missing_symbol_of_any_kind_is_named(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    with_entry(monkeypatch, path)
    named = path.partition(":")[0] if "no_module" in path else path.replace(":", ".")
    with pytest.raises(RuntimeError, match=rf"^{named} does not exist in the installed megatron"):
        replace(path, print)


def test_another_signature_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    check()

    def load_checkpoint(ddp_model: Any, opt_param_scheduler: Any, optimizer: Any) -> None: ...

    monkeypatch.setattr(training, "load_checkpoint", load_checkpoint)
    for refuse in (check, lambda: wrap(LOAD, lambda upstream: upstream)):
        with pytest.raises(RuntimeError) as caught:
            refuse()
        message = str(caught.value)
        assert message.startswith(
            "megatron.training.training.load_checkpoint(ddp_model, opt_param_scheduler, optimizer) "
            "does not take optimizer, opt_param_scheduler in the installed megatron-core "
        )
        assert (
            f"({training.__file__}), and megatron_tst/training/schedule_state.py relies" in message
        )
        assert "checked with megatron-core 0.19.2 and 0.20.0" in message


def test_an_attribute_that_nothing_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "megatron.core.datasets.gpt_dataset:GPTDataset"
    with_entry(monkeypatch, path, attributes=("cached_loss_mask", "no_such_mask"))
    with pytest.raises(RuntimeError, match=r"GPTDataset has no no_such_mask in the installed"):
        original(path)


def test_a_path_that_is_not_in_the_table_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="not in the table"):
        wrap("megatron.training.training:train_step", lambda upstream: upstream)


def tag(name: str) -> Callable[[Any], Any]:
    def make(upstream: Any) -> Any:
        @functools.wraps(upstream)
        def tagged() -> list[str]:
            return [name, *upstream()]

        return tagged

    make.__qualname__ = name
    return make


def test_wraps_stack_in_the_order_in_which_they_came_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_entry(monkeypatch, LOAD)

    def upstream() -> list[str]:
        return ["upstream"]

    monkeypatch.setattr(training, "load_checkpoint", upstream)
    load: Any = lambda: training.load_checkpoint()  # noqa: E731
    for name in ("first", "second", "first", "second", "second"):
        wrap(LOAD, tag(name))
    assert load() == ["second", "first", "upstream"]
    replace(LOAD, lambda: ["replacement"])
    replace(LOAD, lambda: ["other replacement"])
    assert load() == ["second", "first", "other replacement"]
    assert original(LOAD) is upstream
    with replaced(LOAD, lambda: ["for a while"]):
        assert load() == ["for a while"]
    wrap(LOAD, tag("third"))
    assert load() == ["third", "second", "first", "other replacement"]
    # What somebody else sets is Megatron's.
    monkeypatch.setattr(training, "load_checkpoint", lambda: ["another"])
    wrap(LOAD, tag("second"))
    assert load() == ["second", "another"]


def test_an_import_that_fails_names_the_release() -> None:
    assert GPTModel.__module__ == "megatron.core.models.gpt.gpt_model"
    with (
        pytest.raises(RuntimeError, match=r"gpt_model\.NoModel does not exist in the installed"),
        patches.naming_what_is_missing(),
    ):
        exec("from megatron.core.models.gpt.gpt_model import NoModel")
    with pytest.raises(ImportError, match="no_such_package"), patches.naming_what_is_missing():
        import_module("no_such_package")


@pytest.mark.parametrize("main", ["everything_that_is_changed", "start_without_a_model"])
def test_in_a_process_that_trains(launcher: Launcher, tmp_path: Path, main: str) -> None:
    launcher.run([], tmp_path / "log", main=f"tests.upstream_checks:{main}")
