"""What is opened of a Hugging Face folder, what is refused, and the text that a model generates."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from megatron_tst.commands import generate as generate_tool
from megatron_tst.evaluation.bits_per_byte import _encode as encode_text
from megatron_tst.evaluation.folder import LoadedModel, check_model_folder, load_model
from megatron_tst.evaluation.generation import generate
from tests.tiny_llama import CPU, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(check_model_folder(model), "auto", CPU)


def test_greedy_text_is_that_of_transformers(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("def f(", return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(model).generate(
        **prompt, max_new_tokens=20, do_sample=False
    )
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    options = ["--model", str(model), "--max-new-tokens", "20"]
    capsys.readouterr()
    assert generate_tool.main(["def f(", *options]) == 0
    assert capsys.readouterr().out == expected
    # As echo ends a line.
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(\n"))
    assert generate_tool.main(options) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert generate_tool.main(options) == 2
    assert "the prompt on standard input is not text" in capsys.readouterr().err


def test_sampled_text_depends_on_the_seed(loaded: LoadedModel) -> None:
    def sample(seed: int, top_p: float = 1.0) -> str:
        return generate(loaded, "def f(", 30, temperature=1.5, top_p=top_p, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    # So little is sampled from that the likeliest token is left.
    assert sample(1, top_p=1e-6) == generate(loaded, "def f(", 30)


def test_a_prompt_that_spells_a_control_token_is_text(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    continued = loaded.model.generate

    def watched(ids: Tensor, **options: Any) -> Any:
        seen.append(ids[0].tolist())
        return continued(ids, **options)

    monkeypatch.setattr(loaded.model, "generate", watched)
    prompt = f"a{loaded.tokenizer.eos_token}b"
    assert generate(loaded, prompt, 1).startswith(prompt)
    # As a corpus and the bits of a text have it.
    assert seen == [encode_text(loaded.tokenizer, prompt)]
    assert loaded.tokenizer.eos_token_id not in seen[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"--max-new-tokens 0: use 1 or more"),
        ({"temperature": -1.0}, r"--temperature -1: use 0, or a number from 0.01 to 100"),
        ({"temperature": 1e-40}, r"--temperature 1e-40: use 0"),
        ({"temperature": math.nan}, r"--temperature nan: use 0"),
        ({"seed": -1}, r"--seed -1: use a number from 0"),
        ({"seed": 2**70}, r"--seed \d+: use a number from 0"),
        ({"top_p": 0.0}, r"--top-p 0: use a number above 0"),
        ({"max_new_tokens": 60}, r"the prompt has 6 tokens .* made for 64: use 58 or fewer"),
        ({"prompt": ""}, r"the prompt is empty"),
    ],
)
def test_generation_refuses(loaded: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(loaded, **{"prompt": "def f(", **options})


def copy_without(model: Path, target: Path, *names: str) -> Path:
    shutil.copytree(model, target)
    for name in names:
        (target / name).unlink()
    return target


def test_folders_that_are_refused(model: Path, tmp_path: Path) -> None:
    pickled = copy_without(model, tmp_path / "pickled", "model.safetensors")
    # Opening it would fail: it is not looked into.
    (pickled / "pytorch_model.bin").write_bytes(b"not to be opened")
    own_code = copy_without(model, tmp_path / "own-code")
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "m.M"}}))
    sharded = copy_without(model, tmp_path / "sharded", "model.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "model-1.safetensors").touch()
    unlisted = copy_without(model, tmp_path / "unlisted", "model.safetensors")
    (unlisted / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    twofold = copy_without(model, tmp_path / "twofold")
    (twofold / "model.safetensors.index.json").write_text(json.dumps(index))
    named_file = copy_without(model, tmp_path / "named-file")
    elsewhere = {**config, "transformers_weights": "other.safetensors"}
    (named_file / "config.json").write_text(json.dumps(elsewhere))
    adapted = copy_without(model, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text("{}")
    broken = copy_without(model, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases = [
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path, "has no config.json: pass a Hugging Face folder"),
        (pickled, r"as pickles only \(pytorch_model.bin\), which can run any code"),
        (own_code, "brings code of its own"),
        (sharded, "model-2.safetensors is missing"),
        (unlisted, "index.json lists no weights"),
        (twofold, r"holds model.safetensors and model.safetensors.index.json, .* Remove the one"),
        (named_file, r"transformers_weights other.safetensors\)"),
        (adapted, "holds an adapter .* merge it"),
        (broken, "config.json is not JSON"),
        (copy_without(model, tmp_path / "empty", "model.safetensors"), "has no weights"),
        (copy_without(model, tmp_path / "mute", "tokenizer.json"), "has no tokenizer"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            check_model_folder(folder)
        assert str(folder) in str(caught.value)
        assert generate_tool.main(["x", "--model", str(folder)]) == 2


def test_an_index_of_the_single_file_is_no_choice(model: Path, tmp_path: Path) -> None:
    folder = copy_without(model, tmp_path / "indexed")
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_model_folder(folder).weights == ("model.safetensors",)


def test_a_model_is_loaded_in_the_dtype_asked_for(model: Path) -> None:
    folder = check_model_folder(model)
    assert load_model(folder, "bfloat16", CPU).model.dtype == torch.bfloat16
    assert load_model(folder, "auto", CPU).model.dtype == torch.float32


def test_folders_that_do_not_load(model: Path, tmp_path: Path) -> None:
    cut = copy_without(model, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:1000])
    more_layers = copy_without(model, tmp_path / "more-layers")
    config = json.loads((model / "config.json").read_text())
    (more_layers / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    unknown = copy_without(model, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))
    for folder, message in (
        (cut, "cannot be loaded"),
        (more_layers, r"9 weights are missing, such as model\.layers\.2"),
        (unknown, "cannot be loaded .* it needs a causal"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(check_model_folder(folder), "auto", CPU)


def test_a_model_that_does_not_say_its_context(model: Path, tmp_path: Path) -> None:
    """As those without position embeddings, which know no longest text."""
    config = BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2)
    folder = copy_without(model, tmp_path / "bloom", "model.safetensors")
    BloomForCausalLM(config).save_pretrained(folder)
    loaded = load_model(check_model_folder(folder), "auto", CPU)
    with pytest.raises(ValueError, match=r"bloom has no max_position_embeddings in config.json"):
        generate(loaded, "def f(")
