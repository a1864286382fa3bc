"""A checkpoint of any phase continues at another parallel layout, optimizer state included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.layouts import LAYOUTS, arguments_of
from tests.runs import Check, SmallRun, assert_faultless
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

SWITCH, STEPS, BAG_SIZE = 2, 4, 4
STOPS = {"phase 1": 1, "switch": SWITCH, "phase 2": 3}

# Model and layout of the run that saves, and the layouts that continue from each of its stops.
ROUTES: dict[tuple[str, str], dict[str, str]] = {
    ("Llama", "TP 2 + SP, PP 2"): {
        "phase 1": "CP 2",
        "switch": "one process",
        "phase 2": "PP 2, interleaved",
    },
    ("Llama", "TP 2 + SP, DP 2, distributed optimizer"): {
        "phase 1": "CP 2, DP 2, distributed optimizer",
        "switch": "PP 2, interleaved, DP 2, distributed optimizer",
        "phase 2": "DP 2, distributed optimizer",
    },
    ("Llama", "FSDP2 over 2"): {
        "phase 1": "TP 2 + SP, FSDP2 over 2",
        "switch": "one process",
        "phase 2": "FSDP2 over 4",
    },
    ("Qwen3-MoE", "DP 2"): {"switch": "FSDP2 over 2"},
    ("Llama, hybrid", "PP 2"): {"phase 1": "TP 2 + SP", "switch": "CP 2", "phase 2": "one process"},
    ("Qwen3-MoE", "PP 2, EP 2"): {
        "phase 1": "EP 4",
        "switch": "TP 2 + SP, EP 2, ETP 2",
        "phase 2": "CP 2, EP 2",
    },
    ("Qwen3-MoE", "EP 2, DP 2, distributed optimizer"): {
        "phase 1": "EP 4, distributed optimizer",
        "switch": "TP 2 + SP, EP 2, distributed optimizer",
    },
    ("Llama, hybrid", "DP 2, distributed optimizer"): {
        "switch": "CP 2, DP 2, distributed optimizer"
    },
    ("Qwen3-MoE, hybrid", "EP 2, DP 2, distributed optimizer"): {
        "phase 1": "TP 2 + SP, EP 2, distributed optimizer",
        "phase 2": "EP 4, distributed optimizer",
    },
    ("Llama, MTP 2", "PP 2"): {
        "phase 1": "TP 2 + SP",
        "switch": "PP 2, interleaved",
        "phase 2": "one process",
    },
}
# As many as the layout with the most stages needs, of each run that saves.
LAYERS = {
    saved: max(2, *(LAYOUTS[layout].stages for layout in (saved[1], *stops.values())))
    for saved, stops in ROUTES.items()
}
CASES = [
    (*saved, stop, resumed) for saved, stops in ROUTES.items() for stop, resumed in stops.items()
]


@pytest.fixture(scope="module")
def saved_run(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], SmallRun]:
    """Runs that were not interrupted, with a checkpoint every step, made when needed."""
    runs: dict[tuple[str, str], SmallRun] = {}

    def get(model: str, layout: str) -> SmallRun:
        if (model, layout) not in runs:
            run = SmallRun(corpus, tmp_path_factory.mktemp("saved")).with_(
                **arguments_of(model, layout, LAYERS[model, layout]),
                tst_bag_size=BAG_SIZE,
                tst_steps=SWITCH,
                train_iters=STEPS,
                eval_iters=0,
                save_interval=1,
                micro_batch_size=1,
            )
            launcher.run(run.argv, run.log, world_size=LAYOUTS[layout].processes)
            assert_faultless(*(run.checkpoint_folder(step) for step in STOPS.values()))
            runs[model, layout] = run
        return runs[model, layout]

    return get


@pytest.mark.parametrize(("model", "layout", "stop", "resumed"), CASES)
def test_a_checkpoint_continues_at_another_layout(
    launcher: Launcher,
    saved_run: Callable[[str, str], SmallRun],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    model: str,
    layout: str,
    stop: str,
    resumed: str,
) -> None:
    saved = saved_run(model, layout)
    one_of_its_own = dict.fromkeys(LAYOUTS[layout].arguments)
    run = saved.with_(
        tmp_path,
        **{**one_of_its_own, **arguments_of(model, resumed, LAYERS[model, layout])},
        load=saved.folder / "checkpoints",
        ckpt_step=STOPS[stop],
        save_interval=STEPS,
    )
    launcher.run(run.argv, run.log, world_size=LAYOUTS[resumed].processes)
    assert "loading distributed checkpoint" in run.log.read_text()
    for tag in ("lm loss", "grad-norm", "tst/data tokens"):
        actual, expected = run.scalars()[tag], saved.scalars()[tag]
        assert sorted(actual) == list(range(STOPS[stop] + 1, STEPS + 1))
        # fp32: sums run in another order.
        assert actual == pytest.approx({s: expected[s] for s in actual}, rel=1e-6), tag
    weights, expected_weights = run.checkpoint(STEPS), saved.checkpoint(STEPS)
    names = [name for name in expected_weights if not name.startswith("optimizer")]
    for name in names:
        difference = (weights[name] - expected_weights[name]).norm()
        assert difference < 1e-5 * expected_weights[name].norm(), name
    record_property("kind", "resumed")
    for name, value in zip(
        ("model", "saved at", "stopped in", "resumed at"),
        (model, layout, stop, resumed),
        strict=True,
    ):
        record_property(name, value)


def test_experts_move_to_one_rank_without_optimizer_state_only(
    check: Check, saved_run: Callable[[str, str], SmallRun]
) -> None:
    saved = saved_run("Qwen3-MoE", "PP 2, EP 2")
    run = saved.with_(expert_model_parallel_size=1, load=saved.folder / "checkpoints")
    refused, taken = check([run, run.with_(no_load_optim=True)])
    assert refused is not None
    assert "--expert-model-parallel-size 2, and this command has 1: " in refused
    assert taken is None
