"""Export of real Megatron checkpoints to Hugging Face format."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers.models
from megatron.core.safe_globals import register_safe_globals
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.synthetic_checkpoint import save_tokenizer, write_checkpoint
from megatron_tst.checkpoint.hf_export import (
    FILES_OF_CLASSES,
    TOKENIZER_FILES,
    ExportResult,
    export_to_huggingface,
)
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.commands.convert_megatron_to_hf import main
from megatron_tst.common.errors import UsageError
from megatron_tst.common.progress import INTERVAL_VARIABLE
from megatron_tst.training.resume import _saved_arguments
from tests.bpe_tokenizers import TEXTS, save_bpe
from tests.hf_verification import LARGE
from tests.llama_checkpoints import (
    ITERATION,
    PADDED_VOCABULARY,
    PARALLEL_VARIANTS,
    VARIANTS,
    VOCABULARY,
)
from tests.older_arguments import save_as_core_0_14
from tests.runs import SmallRun
from tests.zygote import Launcher

ARCHITECTURES = {
    **dict.fromkeys([*VARIANTS, *PARALLEL_VARIANTS], "LlamaForCausalLM"),
    "gqa-untied-qknorm": "Qwen3ForCausalLM",
    **{name: "Qwen3MoeForCausalLM" for name in (*VARIANTS, *PARALLEL_VARIANTS) if "moe" in name},
    **{name: "Qwen2MoeForCausalLM" for name in PARALLEL_VARIANTS if "shared" in name},
    **{name: "Glm4MoeForCausalLM" for name in PARALLEL_VARIANTS if "sigmoid" in name},
    "transformer-engine": "Qwen3MoeForCausalLM",
}


STALE = "model-00001-of-00002.safetensors"
"""Of an export in several files."""


@pytest.fixture
def damaged(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of one checkpoint, to break."""
    return shutil.copytree(checkpoints / "gqa-untied", tmp_path / "copy") / f"iter_{ITERATION:07d}"


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_logits_equal_megatrons(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, variant: str
) -> None:
    result = export_to_huggingface(checkpoints / variant, tokenizer, tmp_path / "hf")
    # Two norms and a projection, a layer, and a norm behind it.
    layer = 32 * (4 + 4) * 16 + 4 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    depth = layer + 2 * 32 * 32 + 3 * 32
    number = {"gqa-untied-mtp": f"{2 * depth:,}", "hybrid-gqa-untied-mtp": f"{depth:,}"}
    left_out = [text for text in result.warnings if "multi-token prediction were left out" in text]
    assert bool(left_out) == (variant in number)
    assert not left_out or f", {number[variant]} parameters (mtp.*)" in left_out[0]
    expected = torch.load(checkpoints / variant / "expected.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    # The same fp32 arithmetic in another order; logits are of order 1, with an epsilon of 1e-7.
    assert expected["logits"].abs().max() > 1
    assert logits.shape[-1] == VOCABULARY
    assert (logits - expected["logits"][..., :VOCABULARY]).abs().max() <= 1e-5
    assert type(model).__name__ == ARCHITECTURES[variant]


def test_the_folder_is_complete(checkpoints: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    result = export_to_huggingface(checkpoints / "gqa-untied", tokenizer, output)
    config = json.loads((output / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000
    assert config["rms_norm_eps"] == 1e-6
    assert config["vocab_size"] == VOCABULARY
    assert config["max_position_embeddings"] == 24
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


def test_generate_takes_what_the_exported_tokenizer_gives(
    checkpoints: Path, tmp_path: Path
) -> None:
    """With an end of document and nothing else, as preprocessing makes its tokenizers."""
    tokenizer = save_bpe(tmp_path / "t", None, size=100)
    export_to_huggingface(checkpoints / "gqa-untied", tokenizer, tmp_path / "hf")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    end = found.eos_token_id
    assert (found.bos_token_id, found.pad_token_id, model.config.bos_token_id) == (end, end, end)
    # Padding in the configuration would leave its row of the embedding without gradient.
    assert model.config.pad_token_id is None
    batch = found(["The", "The year 12"], padding=True, padding_side="left", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert model.generate(**batch, max_new_tokens=2, pad_token_id=end).shape[0] == 2
    assert model.generate(max_new_tokens=2).shape[0] == 1
    # The tokens of a text are the same ones as before.
    assert (
        found(TEXTS[0])["input_ids"]
        == AutoTokenizer.from_pretrained(tokenizer)(TEXTS[0])["input_ids"]
    )


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
    (output / STALE).touch()
    export(overwrite=True)
    assert not (output / STALE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_link_stays_and_its_folder_is_replaced(
    checkpoints: Path, tokenizer: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    for stale in (False, True):
        export_to_huggingface(checkpoints / "gqa-untied", tokenizer, link, overwrite=stale)
        assert link.is_symlink()
        assert not (tmp_path / "real" / STALE).exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
        (tmp_path / "real" / STALE).touch()


def test_what_is_read_is_not_overwritten(damaged: Path, tokenizer: Path, tmp_path: Path) -> None:
    """A folder that was exported, and in which something else was put."""
    output = damaged.parent
    (output / "config.json").touch()
    for source in (damaged, output):
        with pytest.raises(ValueError, match="which is read, so --overwrite does not remove it"):
            export_to_huggingface(source, tokenizer, output, overwrite=True)
    assert damaged.is_dir()
    # The tokenizer of the folder itself is copied before.
    own = shutil.copytree(tokenizer, tmp_path / "own")
    (own / "config.json").write_text("{}")
    export_to_huggingface(damaged, own, own, overwrite=True)
    assert len(AutoTokenizer.from_pretrained(own)) == VOCABULARY


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("iter_0000003/", "holds iter_0000003, which no export writes"),
        ("latest_checkpointed_iteration.txt", "holds latest_checkpointed_iteration.txt, which no"),
        ("model.bin", "holds model.bin, which no export writes"),
        ("tokenizer.model/", "holds tokenizer.model, which no export writes"),
        ("", "is no exported model \\(it has no weights\\)"),
    ],
)
def test_what_no_export_has_written_stays(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, name: str, said: str
) -> None:
    """Not even where it is the tokenizer, and whatever has a config.json."""
    own = shutil.copytree(tokenizer, tmp_path / "own")
    (own / "config.json").write_text("{}")
    if name:
        (own / "model.safetensors").touch()
        (own / name).mkdir() if name.endswith("/") else (own / name).touch()
    before = sorted(path.name for path in own.iterdir())
    for source in (tokenizer, own) if name else (tokenizer,):
        with pytest.raises(ValueError, match=f"{said}.* so --overwrite does not remove it"):
            export_to_huggingface(checkpoints / "gqa-untied", source, own, overwrite=True)
    assert sorted(path.name for path in own.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("200", r"txt names the checkpoint iter_0000200, .* not there \(found: iter_0000010\)"),
        ("release", r"txt names the checkpoint release, .* not there \(found: iter_0000010\)"),
        ("", r"txt is empty, as a run leaves it .* its checkpoints \(found: iter_0000010\)"),
        ("../x", r"txt holds '\.\./x' instead of the step of the last checkpoint"),
    ],
)
def test_a_tracker_that_names_no_checkpoint(
    damaged: Path, tokenizer: Path, tmp_path: Path, content: str, said: str
) -> None:
    tracker = damaged.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text(content)
    with pytest.raises(ValueError, match=said):
        export_to_huggingface(damaged.parent, tokenizer, tmp_path / "hf")
    # It is left to the run, which mends an empty one.
    assert tracker.read_text() == content


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_ended_leaves_nothing(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    # Enough layers to be met in the middle.
    write_checkpoint(tmp_path / "ck", replace(LARGE, layers=100, hidden=64, ffn=64))
    folder = tmp_path / "new"

    def end_this_process() -> None:
        while not list(folder.glob("*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signum)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell starts what runs in its background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=end_this_process, daemon=True).start()
    paths = {"checkpoint": tmp_path / "ck", "tokenizer": tokenizer, "output": folder / "hf"}
    arguments = [f"--{name}={path}" for name, path in paths.items()]
    try:
        code: object = main(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 128 + signum
    assert "interrupted: nothing was written\n" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_real_run_in_both_phases(launcher: Launcher, small_run: SmallRun, tmp_path: Path) -> None:
    """bf16 checkpoints with optimizer and random state: in phase 1, at the switch, at the end."""
    run = small_run.with_(bf16=True, tst_bag_size=4, tst_steps=4, train_iters=6, save_interval=2)
    launcher.run(run.argv, run.log)
    tokenizer = Path(f"{run.corpus}-tokenizer")
    for step in (2, 4, 6):
        folder = run.folder / "checkpoints" / f"iter_{step:07d}"
        result = export_to_huggingface(folder, tokenizer, tmp_path / f"hf{step}")
        assert result.iteration == step
        if step < 6:
            [warning] = result.warnings
            assert f"from step {step}, in phase 1 (the switch is at step 4)" in warning
            assert "bags of 4 tokens" in warning
            assert "mixtures of a bag" in warning
        else:
            assert not result.warnings
        weights = load_file(tmp_path / f"hf{step}" / "model.safetensors")
        assert torch.equal(
            weights["model.embed_tokens.weight"],
            run.checkpoint(step)["embedding.word_embeddings.weight"],
        )
        assert weights["model.norm.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf6")
    assert sum(p.numel() for p in model.parameters()) == result.parameters


def test_a_disk_that_is_too_small(
    checkpoints: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = checkpoints / "gqa-untied", tokenizer, tmp_path / "new" / "hf"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs [\d,]+ bytes .* has 1,000 free") as error:
        export_to_huggingface(*arguments)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export_to_huggingface(*arguments)
    # What it asked for is what it takes, but for two small files of settings.
    needed = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    taken = sum(file.stat().st_size for file in arguments[2].iterdir())
    assert needed <= taken < needed + 2000


def test_unsupported_settings_are_refused(damaged: Path, tokenizer: Path, tmp_path: Path) -> None:
    arguments = damaged, tokenizer, tmp_path / "hf"
    for size in ("5 apples", "0GB", "-5GB", "infGB", "0", ""):
        with pytest.raises(ValueError, match=f"--max-shard-size {size} is no size"):
            export_to_huggingface(*arguments, max_shard_size=size)
    common = TorchDistCheckpoint(damaged).read_common()
    common["args"].moe_latent_size, common["args"].num_experts = 2, 4
    torch.save(common, damaged / "common.pt")
    with pytest.raises(ValueError, match=r"--num-experts without --qk-layernorm, --moe-latent"):
        export_to_huggingface(*arguments)
    assert not list(tmp_path.glob("*hf*"))


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


def forget_a_shard(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def interrupt_save(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def save_as_torch_does(folder: Path) -> None:
    shutil.rmtree(folder)
    save({"model": {"weight": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)


def scramble_format(folder: Path) -> None:
    (folder / "metadata.json").write_text("[]")


def save_text_as_arguments(folder: Path) -> None:
    (folder / "common.pt").write_text("hello")


def save_no_arguments(folder: Path) -> None:
    torch.save({"iteration": 3}, folder / "common.pt")


def scramble_tracker(folder: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")


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
        (forget_a_shard, r"shards of 'decoder\.layers\.mlp\.linear_fc2\.weight' are missing"),
        (interrupt_save, "has no metadata.json"),
        (save_as_torch_does, "is a torch_dcp or fsdp_dtensor checkpoint, which no tool reads"),
        (scramble_format, r"metadata\.json names no format of a checkpoint"),
        (save_text_as_arguments, r"common\.pt: the training arguments cannot be read"),
        (save_no_arguments, r"common\.pt holds no training arguments"),
        (scramble_tracker, "instead of the step of the last checkpoint"),
        (point_elsewhere, "names the checkpoint iter_0000099, which is not there"),
    ],
)
def test_a_damaged_checkpoint_gives_one_clear_error(
    damaged: Path,
    tokenizer: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    damage(damaged)
    with pytest.raises(ValueError, match=message) as error:
        export_to_huggingface(damaged.parent, tokenizer, tmp_path / "new" / "hf")
    assert str(damaged.parent) in str(error.value)
    # Noticed before anything was written, also what is missing in the files of weights.
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_damage_that_only_reading_finds(checkpoints: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The first of two pipeline stages is intact and written by then."""
    copy = shutil.copytree(checkpoints / "gqa-untied-pp2", tmp_path / "copy")
    shard = max(copy.rglob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=rf"'decoder.* cannot be read from .*{shard.name}"):
        export_to_huggingface(copy, tokenizer, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


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


@pytest.mark.parametrize("variant", ["gqa-untied", "hybrid-gqa-untied-mtp"])
def test_arguments_by_their_old_names(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, variant: str
) -> None:
    """The model is that of the same checkpoint with today's names."""
    copy = Path(shutil.copytree(checkpoints / variant, tmp_path / "copy"))
    export_to_huggingface(copy, tokenizer, tmp_path / "today")
    folder = copy / f"iter_{ITERATION:07d}"
    before = vars(TorchDistCheckpoint(folder).read_common()["args"])
    save_as_core_0_14(folder)
    export_to_huggingface(copy, tokenizer, tmp_path / "old")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "today" / name).read_bytes()
    # As Megatron does before a run.
    register_safe_globals()
    saved = _saved_arguments(Namespace(), folder)
    for name in ("layernorm_epsilon", "hybrid_layer_pattern"):
        assert getattr(saved, name, None) == before[name]


def test_zero_centered_norms_are_refused_by_their_old_name(
    damaged: Path, tokenizer: Path, tmp_path: Path
) -> None:
    args = save_as_core_0_14(damaged, layernorm_zero_centered_gamma=True)
    assert args.apply_layernorm_1p
    assert not hasattr(args, "layernorm_zero_centered_gamma")
    with pytest.raises(UsageError, match="trained with --apply-layernorm-1p"):
        export_to_huggingface(damaged, tokenizer, tmp_path / "hf")


@pytest.mark.parametrize("name", ["padded_vocab_size", "make_vocab_size_divisible_by"])
def test_an_argument_that_is_absent_is_named(
    damaged: Path, tokenizer: Path, tmp_path: Path, name: str
) -> None:
    common = TorchDistCheckpoint(damaged).read_common()
    delattr(common["args"], name)
    torch.save(common, damaged / "common.pt")
    with pytest.raises(UsageError, match=f"in the checkpoint have no {name}: Megatron of another"):
        export_to_huggingface(damaged, tokenizer, tmp_path / "hf")


@pytest.mark.parametrize("size", [PADDED_VOCABULARY + 1, 100])
def test_another_tokenizer_is_noticed(checkpoints: Path, tmp_path: Path, size: int) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer", size)
    arguments = checkpoints / "gqa-untied", tokenizer, tmp_path / "hf"
    if size > PADDED_VOCABULARY:
        with pytest.raises(ValueError, match="257 entries but the checkpoint has 256"):
            export_to_huggingface(*arguments)
    else:
        assert "check that --tokenizer" in export_to_huggingface(*arguments).warnings[0]


def test_a_tokenizer_with_gaps_keeps_the_row_of_its_last_id(
    checkpoints: Path, tokenizer: Path, tmp_path: Path
) -> None:
    gaps = shutil.copytree(tokenizer, tmp_path / "gaps")
    definition = json.loads((gaps / "tokenizer.json").read_text())
    definition["model"]["vocab"][f"t{VOCABULARY - 1}"] = PADDED_VOCABULARY - 3
    (gaps / "tokenizer.json").write_text(json.dumps(definition))
    assert len(AutoTokenizer.from_pretrained(gaps)) == VOCABULARY
    result = export_to_huggingface(checkpoints / "gqa-untied", gaps, tmp_path / "hf")
    assert result.shape.vocabulary == PADDED_VOCABULARY - 2


@pytest.mark.parametrize("value", [None, "250", 250.0, True])
def test_a_vocabulary_size_that_is_no_number(
    checkpoints: Path, tokenizer: Path, tmp_path: Path, value: object
) -> None:
    own = Path(shutil.copytree(tokenizer, tmp_path / "own"))
    (own / "config.json").write_text(json.dumps({"vocab_size": value}))
    message = f"{own / 'config.json'} has vocab_size {json.dumps(value)}: write the number"
    with pytest.raises(UsageError, match=re.escape(message)):
        export_to_huggingface(checkpoints / "gqa-untied", own, tmp_path / "hf")


def test_a_tokenizer_in_files_of_its_class_is_exported_with_them(
    checkpoints: Path, tmp_path: Path
) -> None:
    """As those of BERT, which have vocab.txt and no tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "vocab.txt").write_text("\n".join(words))
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    export_to_huggingface(checkpoints / "gqa-untied", own, tmp_path / "hf")
    expected, found = (AutoTokenizer.from_pretrained(folder) for folder in (own, tmp_path / "hf"))
    assert found("a b g")["input_ids"] == expected("a b g")["input_ids"] == [2, 5, 6, 11, 3]
    # It is an export, whichever class the next one is of.
    for source in (own, save_bpe(tmp_path / "t", "GPT2Tokenizer", size=100)):
        export_to_huggingface(checkpoints / "gqa-untied", source, tmp_path / "hf", overwrite=True)


def test_an_export_is_known_by_the_files_of_every_class() -> None:
    models = Path(transformers.models.__file__).parent
    sources = [file.read_text() for file in models.glob("*/tokenization*.py")]
    named = {
        name
        for source in sources
        for text in re.findall(r"VOCAB_FILES_NAMES = (\{.*?\})", source, re.DOTALL)
        for name in re.findall(r':\s*"([^"]+)"', text)
    }
    assert len(named) > 10
    assert named <= {*TOKENIZER_FILES, *FILES_OF_CLASSES}


def test_the_class_of_an_exported_tokenizer_reads_as_training_did(
    checkpoints: Path, tmp_path: Path
) -> None:
    tokenizer = save_bpe(tmp_path / "t", "CohereTokenizer", size=100)
    result = export_to_huggingface(checkpoints / "gqa-untied", tokenizer, tmp_path / "hf")
    assert "gives other tokens" in result.warnings[-1]
    expected = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    wanted = [expected.encode(text).ids for text in TEXTS[:3]]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXTS[:3])["input_ids"] == wanted
    assert AutoTokenizer.from_pretrained(tokenizer)(TEXTS[:3])["input_ids"] != wanted


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
    ],
)
def test_a_tokenizer_that_does_not_load(
    checkpoints: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: str,
) -> None:
    """Code that comes with it is not run, and nobody is asked whether it may."""
    broken = shutil.copytree(tokenizer, tmp_path / "broken")
    (broken / file).write_text(content)
    (broken / "own.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match=f"--tokenizer {broken} holds no Hugging Face tokenizer"):
        export_to_huggingface(checkpoints / "gqa-untied", broken, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_command(
    checkpoints: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(checkpoint: Path, *options: str) -> int:
        folders = {"checkpoint": checkpoint, "tokenizer": tokenizer, "output": tmp_path / "hf"}
        paths = [f"--{name}={folder}" for name, folder in folders.items()]
        return main([*paths, "--dtype", "bfloat16", *options])

    assert run(checkpoints / "mha-tied" / f"iter_{ITERATION:07d}") == 0
    printed = capsys.readouterr()
    assert "vocabulary 250 of 256 rows" in printed.out
    assert "Exporting" not in printed.err
    # Without a terminal in lines, or in a bar on request.
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.0001")
    assert run(checkpoints / "gqa-tied", "--overwrite") == 0
    assert re.search(r"^Exporting: \d+ of \d+ parts", capsys.readouterr().err, re.M)
    assert run(checkpoints / "gqa-tied", "--overwrite", "--progress") == 0
    assert "━" in capsys.readouterr().err
    assert run(checkpoints / "none") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_factor_that_megatron_itself_drops_is_warned_of(
    damaged: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """In a checkpoint of Megatron's own script, not in one of this project."""
    for is_ours in (False, True):
        common = TorchDistCheckpoint(damaged).read_common()
        common["args"].use_rope_scaling, common["args"].rope_scaling_factor = True, 32.0
        if is_ours:
            common["args"].tst_bag_size = 1
        torch.save(common, damaged / "common.pt")
        result = export_to_huggingface(damaged, tokenizer, tmp_path / f"hf-{is_ours}")
        found = [text for text in result.warnings if "--rope-scaling-factor 32" in text]
        assert bool(found) != is_ours
        assert is_ours or "write 8 as the factor in config.json" in found[0]
