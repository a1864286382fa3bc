"""A run of a GPTModel goes on as a HybridModel, and not the other way round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tst.report.results import read_result
from tests.integration.layouts import LAYOUTS, SHARDED_OPTIMIZER, arguments_of
from tests.integration.test_bad_input import assert_messages
from tests.runs import Check, SmallRun, assert_bit_equal, assert_faultless
from tests.zygote import Launcher

pytestmark = pytest.mark.slow

STOP, SWITCH, STEPS = 1, 2, 4
ONE = "one process"
# The distributed optimizer of bf16 weights, and the plain one of fp32.
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": {"bf16": True, **SHARDED_OPTIMIZER},
    "Qwen3-MoE": {},
}


@pytest.fixture(scope="module")
def saved(
    launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SmallRun]:
    """Runs of GPTModel that were not interrupted, with a checkpoint a step, by model."""
    runs = {}
    for model, settings in SETTINGS.items():
        run = SmallRun(corpus, tmp_path_factory.mktemp("gpt")).with_(
            **arguments_of(model, ONE),
            **settings,
            tst_bag_size=4,
            tst_steps=SWITCH,
            train_iters=STEPS,
            eval_iters=0,
            save_interval=1,
            micro_batch_size=1,
        )
        launcher.run(run.argv, run.log)
        runs[model] = run
    return runs


def as_hybrid(run: SmallRun, folder: Path, model: str, layout: str = ONE, **settings: Any) -> Any:
    """The same run in a folder of its own with a HybridModel, from a checkpoint of phase 1."""
    return run.with_(
        folder,
        **{"load": run.folder / "checkpoints", "ckpt_step": STOP, **settings},
        **arguments_of(f"{model}, hybrid", layout),
        save=folder / "checkpoints",
        tensorboard_dir=folder / "tensorboard",
    )


def as_gpt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of a HybridModel by the keys of a GPTModel, which stacks its layers."""
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = key.replace("final_norm", "final_layernorm")
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if match := re.search(r"layers\.(\d+)\.", name):
            layers = found.setdefault(name.replace(match[0], "layers."), {})
            layers[int(match[1])] = tensor
        else:
            found[name] = tensor
    return {
        name: torch.stack([value[layer] for layer in sorted(value)])
        if isinstance(value, dict)
        else value
        for name, value in found.items()
    }


@pytest.mark.parametrize("step", [STOP, SWITCH, STEPS - 1])
@pytest.mark.parametrize("model", SETTINGS)
def test_it_goes_on_bit_for_bit_in_each_phase_and_at_the_switch(
    launcher: Launcher, saved: dict[str, SmallRun], tmp_path: Path, model: str, step: int
) -> None:
    gpt = saved[model]
    run = as_hybrid(gpt, tmp_path, model, ckpt_step=step)
    launcher.run(run.argv, run.log)
    for tag in ("lm loss", "grad-norm", "learning-rate", "tst/data tokens"):
        expected = {at: value for at, value in gpt.scalars()[tag].items() if at > step}
        assert run.scalars()[tag] == expected, tag
    assert_faultless(run.checkpoint_folder(STEPS))
    assert_bit_equal(as_gpt(run.checkpoint(STEPS)), gpt.checkpoint(STEPS))


@pytest.mark.parametrize("model", SETTINGS)
def test_it_trains_as_the_gpt_model_of_its_seed(
    launcher: Launcher, saved: dict[str, SmallRun], tmp_path: Path, model: str
) -> None:
    gpt = saved[model]
    run = as_hybrid(gpt, tmp_path, model, load=None, ckpt_step=None, save_interval=STEPS)
    launcher.run(run.argv, run.log)
    for tag in ("lm loss", "grad-norm", "tst/data tokens"):
        assert run.scalars()[tag] == gpt.scalars()[tag], tag
    assert_bit_equal(as_gpt(run.checkpoint(STEPS)), gpt.checkpoint(STEPS))
    # So a report takes them for runs of one model and of the same settings.
    one, other = (read_result(r.folder, status="finished") for r in (gpt, run))
    assert (one.settings, one.data) == (other.settings, other.data)
    assert one.arguments == other.arguments


@pytest.mark.parametrize(
    ("model", "layout"),
    [("Llama", "TP 2 + SP"), ("Llama", "PP 2"), ("Qwen3-MoE", "PP 2")],
)
def test_it_goes_on_at_another_layout(
    launcher: Launcher, saved: dict[str, SmallRun], tmp_path: Path, model: str, layout: str
) -> None:
    gpt = saved[model]
    run = as_hybrid(gpt, tmp_path, model, layout)
    launcher.run(run.argv, run.log, LAYOUTS[layout].processes)
    found, expected = run.scalars(), gpt.scalars()
    # Sums run in another order: in bf16 a product is rounded to 8 bits before it is added.
    bound = 1e-3 if SETTINGS[model] else 1e-6
    for tag in ("lm loss", "grad-norm"):
        assert sorted(found[tag]) == list(range(STOP + 1, STEPS + 1))
        assert found[tag] == pytest.approx({s: expected[tag][s] for s in found[tag]}, rel=bound)


def test_a_new_run_from_its_weights_has_a_new_optimizer(
    launcher: Launcher, saved: dict[str, SmallRun], tmp_path: Path
) -> None:
    """Megatron alone would load its moments: both kinds of models begin alike here."""
    losses = []
    for name, settings in {
        "gpt": {},
        "hybrid": arguments_of("Llama, hybrid", ONE),
    }.items():
        folder = tmp_path / name
        run = saved["Llama"].with_(
            folder,
            **settings,
            pretrained_checkpoint=saved["Llama"].folder / "checkpoints",
            load=folder / "checkpoints",
            save=folder / "checkpoints",
            tensorboard_dir=folder / "tensorboard",
        )
        launcher.run(run.argv, run.log)
        losses.append(run.scalars()["lm loss"])
    assert sorted(losses[0]) == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]
    assert losses[0][1] < saved["Llama"].scalars()["lm loss"][1] - 0.05


def test_what_megatron_cannot_translate(
    check: Check, launcher: Launcher, saved: dict[str, SmallRun], tmp_path: Path
) -> None:
    dense, experts = saved["Llama"], saved["Qwen3-MoE"]
    hybrid = as_hybrid(dense, tmp_path / "hybrid", "Llama", load=None, ckpt_step=None)
    back = dense.with_(load=hybrid.folder / "checkpoints")
    sharded = dense.with_(tmp_path / "sharded", dist_ckpt_optim_fully_reshardable=None)
    # Layers that Megatron stores one by one.
    listed = experts.with_(tmp_path / "listed", moe_layer_freq="([1]*2)")
    for run in (hybrid, sharded, listed):
        first = run.with_(exit_interval=STOP, load=None, save=run.folder / "checkpoints")
        launcher.run(first.argv, run.log)
    cases: list[tuple[SmallRun, str | None]] = [
        (as_hybrid(dense, tmp_path, "Llama"), None),
        (as_hybrid(dense, tmp_path, "Llama", hidden_size=64), "--hidden-size 32, and .* 64"),
        (as_hybrid(dense, tmp_path, "Llama", window_size="8,0"), r"--window-size \(8, 0\) .* MLP"),
        (
            dense.with_(num_layers=None, hybrid_layer_pattern="*-*-*-"),
            "the pattern has 3 layers, .* checkpoint 2",
        ),
        (dense.with_(num_layers=None, hybrid_layer_pattern="*-*"), "has 2 attention .* and 1 MLP"),
        (as_hybrid(dense, tmp_path, "Qwen3-MoE"), "its layers are without experts"),
        (experts.with_(num_layers=None, hybrid_layer_pattern="*E*-"), "mixes dense .* and MoE"),
        (as_hybrid(listed, tmp_path, "Qwen3-MoE"), r"with --moe-layer-freq \[1, 1\] Megatron stor"),
        (as_hybrid(sharded, tmp_path, "Llama"), "without --dist-ckpt-optim-fully-reshardable"),
        (as_hybrid(sharded, tmp_path, "Llama", no_load_optim=True), None),
        (back, r"of a HybridModel \(.* \*-\*-\), and .* a GPTModel: .* not back\. Pass --hybrid"),
        (back.with_(finetune=True), "of a HybridModel .* not back"),
        (back.with_(load="none", pretrained_checkpoint=back.overrides["load"]), "^--pretrained.*"),
        (
            back.with_(num_layers=None, hybrid_layer_pattern="**--"),
            r"--hybrid-layer-pattern \*-\*-, and this command has \*\*--: the weights do not fit",
        ),
    ]
    messages = check([run for run, _ in cases])
    assert_messages(messages, [message for _, message in cases])
