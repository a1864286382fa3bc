"""What must hold where Megatron is changed: run by tests/unit/test_upstream.py in a process."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import megatron_tst


def everything_that_is_changed() -> None:
    """All of Megatron that is ours once all is mended is in the table."""
    from megatron_tst.model.multi_token import superpose_multi_token
    from megatron_tst.training import (
        finished,
        fully_sharded,
        optimizer_sharding,
        optimizer_state,
        pretrain,
        random_state,
        schedule_state,
        step_hook,
    )
    from megatron_tst.upstream.patches import _patched
    from megatron_tst.upstream.symbols import SYMBOLS

    assert pretrain
    step_hook.run_after_each_step(lambda step: False, lambda: None)
    fully_sharded.mend_fully_sharded()
    optimizer_state.load_without_gradients()
    optimizer_sharding.mend_saved_optimizer()
    random_state.keep_random_state_of_each_rank()
    schedule_state.keep_learning_rate_schedule()
    finished.evaluate_only(Namespace(load="x"), 1, 1)
    superpose_multi_token(Namespace(mtp=Namespace(layers=[])))
    # Other modules may have imported what was put in the place of a symbol.
    installed = {id(patched.installed) for patched in _patched.values()}
    ours = [(path, value) for path, value in of_megatron() if is_ours(value)]
    unknown = [path for path, value in ours if id(value) not in installed]
    assert unknown == [], unknown
    table = {symbol.path for symbol in SYMBOLS if symbol.use in ("wrap", "replace")}
    assert set(_patched) <= table
    found = {path for path, _ in ours}
    assert len(found & table) > 25, found


def of_megatron() -> Iterator[tuple[str, Any]]:
    """All in the modules of Megatron and in the classes that are defined there."""
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.")]:
        for name, value in list(vars(module).items()):
            yield f"{module.__name__}:{name}", value
            if isinstance(value, type) and value.__module__ == module.__name__:
                for inner, method in list(vars(value).items()):
                    yield f"{module.__name__}:{name}.{inner}", method


def is_ours(value: Any) -> bool:
    """Whether a function or class is of this package, whatever name it goes by."""
    if isinstance(value, FunctionType):
        file = value.__code__.co_filename
        # What Megatron imports of torch is torch's, also where no GPU is.
        return file.startswith(megatron_tst.__path__[0]) and not file.endswith("emulation.py")
    return isinstance(value, type) and value.__module__.startswith("megatron_tst.")


def start_without_a_model() -> None:
    """The entry point says which release lacks what it imports."""
    from megatron.core.models.gpt import gpt_model

    from megatron_tst.pretrain import main

    # Without them the process would be replaced.
    os.environ["GLIBC_TUNABLES"] = ""
    for name in [name for name in sys.modules if name.startswith("megatron_tst.model.model")]:
        del sys.modules[name]
    sys.modules.pop("megatron_tst.training.pretrain", None)
    del gpt_model.GPTModel
    try:
        main()
    except RuntimeError as error:
        message = str(error)
        assert message.startswith("megatron.core.models.gpt.gpt_model.GPTModel does not"), message
        assert gpt_model.__file__ in message, message
        return
    raise AssertionError("it started")
