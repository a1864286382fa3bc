"""The preflight, and the names in checkpoints, with the real modules of Transformer Engine.

They are built on the meta device in a process that poses as a rank of a cluster of GPUs.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from megatron_tst.preflight.engine_path import ENGINE_FOLDER
from megatron_tst.preflight.model_checks import fp8_multiple
from tests.preflight_checked import MODELS, VARIANTS, Checked

pytestmark = [
    pytest.mark.skipif(
        not (ENGINE_FOLDER.is_dir() or find_spec("transformer_engine")),
        reason="needs Transformer Engine: make setup-te",
    ),
    pytest.mark.slow,
]

PRECISIONS = {"mxfp8": "MXFP8BlockScaling", "fp8": "Float8CurrentScaling", "bf16": None}
"""With the recipe of Transformer Engine."""
LAYERS = {"270m": 30, "600m": 32, "3b": 36, "10b_a1b": 32}
PARAMETERS = {
    "270m": 267_225_408,
    "600m": 600_208_320,
    "3b": 3_337_766_912,
    "10b_a1b": 10_489_144_832,
}
SPLIT = {
    "3b": "--pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --sequence-parallel",
    "10b_a1b": "--pipeline-model-parallel-size 4 --expert-model-parallel-size 4",
}
DENSE = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERTS = "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"
IMPORTS = {
    "llama": DENSE,
    "llama-mha-tied": "--pipeline-model-parallel-size 2",
    "qwen3-tied": DENSE,
    "qwen3moe": EXPERTS,
}
SIZES = [(64, 96), (64, 100), (48, 64), (16, 32), (24, 64), (256, 128), (128, 192), (1536, 4096)]
RECIPES = ("mxfp8", "blockwise", "tensorwise")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    checked = Checked(tmp_path_factory.mktemp("preflight"), with_engine=True)
    for model in MODELS:
        for precision in PRECISIONS:
            for variant in VARIANTS:
                script = checked.script(model, VARIANT=variant, PRECISION=precision)
                checked.add(f"{model} {variant} {precision}", script)
            checked.measure(f"recipes {model} {precision}", "engine_models.recipes", script, 64)
        script = checked.script(model)
        checked.measure(f"keys {model}", "engine_models.model_keys", script, 64)
        checked.measure(f"saved {model}", "engine_models.saved_keys", script, 64)
    for model, layout in SPLIT.items():
        script = [*checked.script(model), *layout.split()]
        checked.add(f"{model} split", script)
        checked.measure(f"keys {model} split", "engine_models.model_keys", script, 64)
        checked.measure(f"saved {model} split", "engine_models.saved_keys", script, 64)
    for kind, layout in IMPORTS.items():
        folder = str(checked.folder)
        checked.measure(kind, "engine_models.imported_keys", folder, kind, layout.split())
    for precision in ("mxfp8", "fp8"):
        script = checked.script("3b", PRECISION=precision)
        checked.measure(f"{precision} on H100", "engine_models.refusal", script, [9, 0])
    for recipe in RECIPES:
        for size in SIZES:
            checked.measure(f"{recipe} {size}", "engine_models.quantizable", recipe, size)
    checked.run()
    return checked


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_launches_pass_and_have_as_many_parameters_as_without(
    checked: Checked, model: str, variant: str, precision: str
) -> None:
    name = f"{model} {variant} {precision}"
    assert checked.found[name]["fits"], checked.found[name]["findings"]
    assert not checked.texts(name, "error") + checked.texts(name, "warning")
    assert any("built with Transformer Engine" in text for text in checked.texts(name, "note"))
    assert checked.found[name]["parameters"]["total"] == PARAMETERS[model]


@pytest.mark.parametrize("model", SPLIT)
def test_a_pipeline_has_the_same_model(checked: Checked, model: str) -> None:
    found = checked.found[f"{model} split"]
    assert [rank["pipeline_rank"] for rank in found["ranks"]] == [0, 1, 2, 3]
    assert found["parameters"]["total"] == PARAMETERS[model]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_recipes_are_those_of_the_scripts(checked: Checked, model: str, precision: str) -> None:
    recipe = PRECISIONS[precision]
    # The first and the last layer stay in bf16.
    expected = [None, *[recipe] * (LAYERS[model] - 2), None]
    assert checked.measured[f"recipes {model} {precision}"] == expected


@pytest.mark.parametrize("model", [*MODELS, *(f"{model} split" for model in SPLIT)])
def test_superposed_models_have_the_keys_of_stock_ones(checked: Checked, model: str) -> None:
    keys = checked.measured[f"keys {model}"]
    assert set(keys["stock_types"]) == {"GPTModel"}
    assert set(keys["superposed_types"]) == {"SuperpositionGPTModel"}
    assert keys["superposed"] == keys["stock"]
    classes = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    if model.startswith("10b_a1b"):
        classes |= {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    assert classes <= set(keys["classes"])


@pytest.mark.parametrize("model", [*MODELS, *(f"{model} split" for model in SPLIT)])
def test_weight_map_has_every_saved_tensor_in_its_shape(checked: Checked, model: str) -> None:
    saved = checked.measured[f"saved {model}"]
    assert saved["tensors"] == saved["expected"]
    assert all("._extra_state/" in key for key in saved["objects"])


@pytest.mark.parametrize("kind", IMPORTS)
def test_imported_checkpoints_have_all_that_is_asked_for(checked: Checked, kind: str) -> None:
    keys = checked.measured[kind]
    assert keys["asked_tensors"].items() <= keys["tensors"].items()
    assert set(keys["asked_objects"]) <= set(keys["keys"])
    # Beyond it there is only the other name of the norm before experts.
    more = keys["tensors"].keys() - keys["asked_tensors"].keys()
    expected = {"decoder.layers.mlp.linear_fc1.layer_norm_weight"} if "moe" in kind else set()
    assert more == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_multiples_of_dimensions_are_those_of_the_engine(
    checked: Checked, recipe: str, size: tuple[int, int]
) -> None:
    expected = all(length % fp8_multiple(recipe) == 0 for length in size)
    assert checked.measured[f"{recipe} {size}"] == expected


def test_a_recipe_that_the_gpu_lacks_is_refused_by_the_engine(checked: Checked) -> None:
    assert "10.0 or higher required for MXFP8" in checked.measured["mxfp8 on H100"]
    assert checked.measured["fp8 on H100"] is None
