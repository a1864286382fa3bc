"""Export of real Megatron checkpoints to Hugging Face format."""

from __future__ import annotations

import json
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_tst.checkpoint.hf_export import ExportResult, export_to_huggingface
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from tests.llama_checkpoints import ITERATION, PADDED_VOCABULARY, VARIANTS, VOCABULARY
from tests.runs import SmallRun
from tests.zygote import Launcher
from tools.convert_megatron_to_hf import main

TENSOR_PARALLEL = "gqa-untied-tp2"


@pytest.fixture(scope="module")
def checkpoints(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``--save`` for each variant, with the logits that Megatron computed."""
    root = tmp_path_factory.mktemp("checkpoints")
    main_of_ranks = "tests.llama_checkpoints:main"
    launcher.run([str(root), *VARIANTS], root / "log.txt", main=main_of_ranks)
    launcher.run([str(root), TENSOR_PARALLEL], root / "log2.txt", world_size=2, main=main_of_ranks)
    return root


def save_tokenizer(folder: Path, size: int) -> Path:
    vocabulary = {"<s>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="t2"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture
def damaged(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint, to break."""
    return shutil.copytree(checkpoints / "gqa-untied", tmp_path / "copy") / f"iter_{ITERATION:07d}"


@pytest.mark.parametrize("variant", [*VARIANTS, TENSOR_PARALLEL])
def test_logits_equal_megatrons(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, variant: str
) -> None:
    export_to_huggingface(checkpoints / variant, tokenizer, tmp_path / "hf")
    expected = torch.load(checkpoints / variant / "expected.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    # The same fp32 arithmetic in another order; logits are of order 1, with an epsilon of 1e-7.
    assert expected["logits"].abs().max() > 1
    assert logits.shape[-1] == VOCABULARY
    assert (logits - expected["logits"][..., :VOCABULARY]).abs().max() <= 1e-5


def test_the_folder_is_complete(checkpoints: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    result = export_to_huggingface(checkpoints / "gqa-untied", tokenizer, output)
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000
    assert config["rms_norm_eps"] == 1e-6
    assert config["vocab_size"] == VOCABULARY
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert AutoConfig.from_pretrained(output).rope_parameters["rope_theta"] == 50_000
    assert len(AutoTokenizer.from_pretrained(output)) == VOCABULARY
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}
    assert (result.iteration, result.warnings) == (ITERATION, ())
    assert result.parameters == sum(
        weight.numel() for weight in load_file(output / "model.safetensors").values()
    )
    # Nothing unfinished is left behind.
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shards_and_dtype(checkpoints: Path, tokenizer: Path, tmp_path: Path) -> None:
    export = export_to_huggingface
    export(checkpoints / "gqa-tied", tokenizer, tmp_path / "one")
    options = {"dtype": "bfloat16", "max_shard_size": "20KB"}
    export(checkpoints / "gqa-tied", tokenizer, tmp_path / "many", **options)  # type: ignore[arg-type]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    loaded: dict[str, torch.Tensor] = {}
    for shard in shards:
        loaded |= load_file(tmp_path / "many" / shard)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert loaded.keys() == whole.keys() == index["weight_map"].keys()
    assert "lm_head.weight" not in whole
    for name, weight in whole.items():
        assert torch.equal(loaded[name], weight.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "many").dtype == torch.bfloat16


def test_an_existing_folder_is_replaced_only_when_asked(
    checkpoints: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def export(overwrite: bool) -> ExportResult:
        return export_to_huggingface(
            checkpoints / "gqa-untied", tokenizer, output, overwrite=overwrite
        )

    output = tmp_path / "hf"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists: pass --overwrite"):
        export(overwrite=False)
    with pytest.raises(ValueError, match="no exported model"):
        export(overwrite=True)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    shutil.rmtree(output)
    export(overwrite=False)
    (output / "stale.txt").touch()
    export(overwrite=True)
    assert not (output / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_real_run_in_phase_1(launcher: Launcher, small_run: SmallRun, tmp_path: Path) -> None:
    """A bf16 checkpoint with optimizer and random state, saved before the switch."""
    run = small_run.with_(tst_bag_size=4, tst_steps=5, exit_interval=2)
    launcher.run(run.argv, run.log)
    tokenizer = Path(f"{run.corpus}-tokenizer")
    result = export_to_huggingface(run.folder / "checkpoints", tokenizer, tmp_path / "hf")
    assert result.iteration == 2
    assert len(result.warnings) == 1
    assert "the switch is at step 5" in result.warnings[0]
    assert "bags of 4 tokens" in result.warnings[0]
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    stored = run.checkpoint(2)
    assert torch.equal(
        weights["model.embed_tokens.weight"], stored["embedding.word_embeddings.weight"]
    )
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert sum(p.numel() for p in model.parameters()) == result.parameters


def remove_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def truncate_shard(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def scramble_shard(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))


def remove_index(folder: Path) -> None:
    (folder / ".metadata").unlink()


def truncate_index(folder: Path) -> None:
    index = folder / ".metadata"
    index.write_bytes(index.read_bytes()[:200])


def interrupt_save(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def point_elsewhere(folder: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("99")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"\.distcp is missing"),
        (truncate_shard, r"\.distcp ends after \d+ bytes"),
        (scramble_shard, "cannot be read"),
        (remove_index, r"\.metadata does not exist"),
        (truncate_index, r"\.metadata cannot be read"),
        (interrupt_save, "has no metadata.json"),
        (point_elsewhere, "holds no torch_dist checkpoint"),
    ],
)
def test_a_damaged_checkpoint_gives_one_clear_error(
    damaged: Path, tokenizer: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(damaged)
    with pytest.raises(ValueError, match=message) as error:
        export_to_huggingface(damaged.parent, tokenizer, tmp_path / "hf")
    assert str(damaged.parent) in str(error.value)
    assert not (tmp_path / "hf").exists()


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_checkpoint_cannot_run_code(damaged: Path, tmp_path: Path, file: str) -> None:
    attack = Attack(tmp_path / "owned")
    if file == "common.pt":
        torch.save({"args": attack}, damaged / file)
    else:
        (damaged / file).write_bytes(pickle.dumps(attack))
    with pytest.raises(ValueError, match="cannot be read"):
        TorchDistCheckpoint(damaged).read_common()
    assert not attack.path.exists()


def test_arguments_of_older_checkpoints_are_read(damaged: Path) -> None:
    """They have the training arguments in a file of their own."""
    torch.save({"args": Namespace(num_layers=7), "iteration": 3}, damaged / "common.pt")
    assert TorchDistCheckpoint(damaged).read_common()["args"].num_layers == 7


@pytest.mark.parametrize("size", [PADDED_VOCABULARY + 1, 100])
def test_another_tokenizer_is_noticed(checkpoints: Path, tmp_path: Path, size: int) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", size)
    arguments = checkpoints / "gqa-untied", tokenizer, tmp_path / "hf"
    if size > PADDED_VOCABULARY:
        with pytest.raises(ValueError, match="257 entries but the checkpoint has 256"):
            export_to_huggingface(*arguments)
    else:
        assert "check that --tokenizer" in export_to_huggingface(*arguments).warnings[0]


def test_the_command(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(checkpoint: Path) -> int:
        folders = {"checkpoint": checkpoint, "tokenizer": tokenizer, "output": tmp_path / "hf"}
        paths = [f"--{name}={folder}" for name, folder in folders.items()]
        return main([*paths, "--dtype", "bfloat16"])

    assert run(checkpoints / "mha-tied" / f"iter_{ITERATION:07d}") == 0
    assert "vocabulary 250 of 256 rows" in capsys.readouterr().out
    assert run(checkpoints / "none") == 2
    assert capsys.readouterr().err.startswith("error: ")
