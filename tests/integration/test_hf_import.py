"""Import of Hugging Face models: what Megatron computes with them, and the way back."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import re
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
)
from megatron.training import checkpointing
from megatron.training.arguments import add_megatron_arguments
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tst.checkpoint import hf_import
from megatron_tst.checkpoint.hf_export import export_to_huggingface
from megatron_tst.checkpoint.hf_import import import_from_huggingface
from megatron_tst.checkpoint.hf_rope import rope_arguments
from megatron_tst.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_tst.checkpoint.torch_dist_writer import write_checkpoint
from megatron_tst.commands.convert_hf_to_megatron import main
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from tests.hf_imports import LARGE
from tests.hf_models import CONTEXT, KINDS, VOCABULARY
from tests.runs import SmallRun, assert_faultless
from tests.tiny_llama import save_tiny_llama
from tests.zygote import Launcher

PADDED_VOCABULARY = 256
GPT = ", GPTModel"
"""Behind the name of a model: imported for Megatron's GPTModel, not for its HybridModel."""
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Imported:
    """A folder, what the tool wrote and what it printed."""

    model: Path
    checkpoint: Path
    printed: str

    @property
    def arguments(self) -> list[str]:
        """The arguments for a launch script, as bash reads them."""
        return shlex.split(self.printed.partition("MODEL_ARGS=(")[2].rpartition(")")[0])


def convert(launcher: Launcher, folder: Path, cases: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of the tool for each of some command lines, one after the other."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / "cases.json"), str(folder / "results.json")]
    launcher.run(arguments, folder / "log.txt", main="tests.hf_imports:convert")
    return [tuple(result) for result in json.loads((folder / "results.json").read_text())]


@pytest.fixture(scope="module")
def imported(
    launcher: Launcher, hf_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Imported]:
    root = tmp_path_factory.mktemp("imported")
    cases = {
        kind + suffix: ["--model", str(folder), "--output", str(root / (kind + suffix)), *flags]
        for kind, folder in hf_models.items()
        for suffix, flags in (("", []), (GPT, ["--model-kind", "gpt"]))
    }
    padding = ["--pad-vocab-to-multiple-of", "64"]
    results = convert(launcher, root, [[*case, *padding] for case in cases.values()])
    assert [code for code, _ in results] == [0] * len(cases), results
    return {
        name: Imported(hf_models[name.removesuffix(GPT)], root / name, printed)
        for name, (_, printed) in zip(cases, results, strict=True)
    }


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: weight
        for file in folder.glob("*.safetensors")
        for name, weight in load_file(file).items()
    }


def separate(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each expert on its own, as transformers saves them."""
    found = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = weight
            continue
        for expert, fused in enumerate(weight):
            parts = (fused,) if kind == "down_proj" else fused.chunk(2)
            for part, each in zip(kind.removesuffix("_proj").split("_"), parts, strict=True):
                found[f"{prefix}.{expert}.{part}_proj.weight"] = each
    return found


@pytest.mark.parametrize("suffix", ["", GPT], ids=["HybridModel", "GPTModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_gives_the_same_bits(
    imported: dict[str, Imported], tmp_path: Path, kind: str, suffix: str
) -> None:
    case = imported[kind + suffix]
    # HybridModel does not scale positions as Llama 3.1 does.
    is_hybrid = not (suffix or kind.endswith("-llama3"))
    assert ("--hybrid-layer-pattern" in case.arguments) == is_hybrid
    assert_faultless(case.checkpoint / "release")
    # Its tokenizer has fewer entries than it has rows, and Megatron's checkpoint has more.
    result = export_to_huggingface(case.checkpoint, case.model, tmp_path / "back")
    if kind == "mistral":
        # Comes out as the class that computes the same.
        assert result.shape.architecture == "LlamaForCausalLM"
    assert result.shape.padded_vocabulary == PADDED_VOCABULARY
    assert result.iteration == 0
    # In a folder of Qwen2 transformers takes a class that reads this tokenizer otherwise.
    assert all("tokenizer_class" in warning for warning in result.warnings)
    expected, actual = separate(load_weights(case.model)), load_weights(tmp_path / "back")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype
        assert torch.equal(actual[name], weight), name
    before, after = (
        AutoConfig.from_pretrained(folder).to_dict() for folder in (case.model, tmp_path / "back")
    )
    # Written for other readers, or of no meaning for the weights.
    ignored = {"_name_or_path", "transformers_version", "use_cache", "rope_theta", "head_dim"}
    ignored |= {"pad_token_id", "output_router_logits", "num_experts"}
    if kind == "mistral":
        ignored |= {"architectures", "model_type", "sliding_window"}
    # Follows from the factor, and is in the file.
    if after["rope_parameters"]["rope_type"] == "yarn":
        factor = after["rope_parameters"].pop("attention_factor")
        assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert {name for name in before if before[name] != after.get(name)} <= ignored


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 1.0), (0.7, 0.7), (0.5, 0.0), (0.3, 1.2)])
def test_an_exported_yarn_comes_back(
    imported: dict[str, Imported], tmp_path: Path, mscale: float, all_dim: float
) -> None:
    """The factor of sines and cosines of Megatron is that of transformers, there and back."""
    middle = Path(shutil.copytree(imported["qwen3-yarn"].checkpoint, tmp_path / "middle"))
    common = TorchDistCheckpoint(middle / "release").read_common()
    common["args"].mscale, common["args"].mscale_all_dim = mscale, all_dim
    torch.save(common, middle / "release" / "common.pt")
    export_to_huggingface(middle, imported["qwen3-yarn"].model, tmp_path / "hf")
    import_from_huggingface(tmp_path / "hf", tmp_path / "back")
    wanted, found = (
        _yarn_get_concentration_factor(args.rotary_scaling_factor, args.mscale, args.mscale_all_dim)
        for args in (
            common["args"],
            TorchDistCheckpoint(tmp_path / "back" / "release").read_common()["args"],
        )
    )
    assert found == pytest.approx(wanted, rel=1e-12)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    _, of_transformers = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert of_transformers == pytest.approx(wanted, rel=1e-12)
    export_to_huggingface(tmp_path / "back", tmp_path / "hf", tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert again.rope_parameters == {
        **config.rope_parameters,
        "attention_factor": pytest.approx(wanted, rel=1e-12),
    }


def test_the_documentation_lists_what_a_checkpoint_does_not_bring(
    imported: dict[str, Imported],
) -> None:
    """Of the printed arguments, by what Megatron takes with --use-checkpoint-args."""
    source = inspect.getsource(checkpointing.load_args_from_checkpoint)
    taken = dict(re.findall(r"_set_arg\('(\w+)'(?:, force=(\w+))?\)", source))
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    names = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    defaults = parser.parse_args([])

    def is_taken(flag: str) -> bool:
        name = names[flag]
        # Without force only where the command line leaves it open.
        return name in taken and (taken[name] == "True" or getattr(defaults, name) is None)

    flags = {word for case in imported.values() for word in case.arguments if word in names}
    of_rope = {
        f"--{name}"
        for case in imported.values()
        for name in rope_arguments(AutoConfig.from_pretrained(case.model).rope_parameters)
    }
    lacking = {flag for flag in flags if not is_taken(flag)}
    assert lacking & of_rope > {"--use-rope-scaling", "--mscale"}
    page = (Path(__file__).parents[2] / "docs/conversion.md").read_text()
    listed = page.partition("works too, but Megatron does not take")[2].partition("that the tool")
    assert "the flags of\n  scaled RoPE" in listed[0]
    assert set(re.findall(r"`(--[\w-]+)`", listed[0])) == lacking - of_rope - {"--load"}


HYBRID = "as HybridModel"
"""In the place of arguments: those of the model as it was imported for HybridModel."""
# Kind, processes and arguments of the run besides those that the tool prints.
LAYOUTS: dict[str, tuple[str, int, str]] = {
    **{name: (name, 1, "") for kind in KINDS for name in (kind, kind + GPT)},
    **{
        f"{kind} imported for GPTModel, as HybridModel": (f"{kind}{GPT}", 1, HYBRID)
        for kind in ("llama", "qwen3moe")
    },
    f"llama{GPT}, TP 2": (f"llama{GPT}", 2, "--tensor-model-parallel-size 2"),
    f"qwen3moe-dense-tied{GPT}, PP 2": (
        f"qwen3moe-dense-tied{GPT}",
        2,
        "--pipeline-model-parallel-size 2",
    ),
    f"qwen3moe{GPT}, EP 2": (
        f"qwen3moe{GPT}",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "llama, TP 2": ("llama", 2, "--tensor-model-parallel-size 2"),
    "llama, TP 2, more padding": (
        "llama",
        2,
        "--tensor-model-parallel-size 2 --padded-vocab-size 384",
    ),
    "llama-mha-tied, PP 2": ("llama-mha-tied", 2, "--pipeline-model-parallel-size 2"),
    "qwen2-llama3, TP 2": ("qwen2-llama3", 2, "--tensor-model-parallel-size 2"),
    "qwen2-llama3, arguments from the checkpoint": ("qwen2-llama3", 1, "--use-checkpoint-args"),
    "qwen2-old-tied, PP 2": ("qwen2-old-tied", 2, "--pipeline-model-parallel-size 2"),
    "qwen3moe, PP 2": ("qwen3moe", 2, "--pipeline-model-parallel-size 2"),
    "qwen3moe, EP 2": (
        "qwen3moe",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "qwen3moe-fused-raw, TP 2, EP 2": (
        "qwen3moe-fused-raw",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall",
    ),
    "qwen3moe-dense-tied, PP 2": ("qwen3moe-dense-tied", 2, "--pipeline-model-parallel-size 2"),
    "qwen3moe-dense-tied, EP 2": (
        "qwen3moe-dense-tied",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "qwen2moe-bias, TP 2": (
        "qwen2moe-bias",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "qwen2moe-bias, PP 2": ("qwen2moe-bias", 2, "--pipeline-model-parallel-size 2"),
    "glm4moe-dense-bias, TP 2": (
        "glm4moe-dense-bias",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "glm4moe-dense-bias, PP 2": ("glm4moe-dense-bias", 2, "--pipeline-model-parallel-size 2"),
    "glm4moe-groups-qknorm, EP 2": (
        "glm4moe-groups-qknorm",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "qwen3moe, arguments from the checkpoint": ("qwen3moe", 1, "--use-checkpoint-args"),
    "qwen2moe-bias, arguments from the checkpoint": ("qwen2moe-bias", 1, "--use-checkpoint-args"),
    "glm4moe-groups-qknorm, arguments from the checkpoint": (
        "glm4moe-groups-qknorm",
        1,
        "--use-checkpoint-args",
    ),
}
NOT_FROM_THE_CHECKPOINT = (
    "--use-rope-scaling",
    "--rope-scaling-factor",
    "--norm-epsilon",
    "--qk-layernorm",
    "--moe-router-dtype",
    "--moe-shared-expert-gate",
    "--moe-router-num-groups",
    "--moe-router-group-topk",
    "--load",
)
"""Printed arguments that --use-checkpoint-args does not bring, and that change the logits."""


def launch_arguments(imported: dict[str, Imported], kind: str, extra: str) -> list[str]:
    case = imported[kind]
    if extra == HYBRID:
        # The last --load wins.
        other = imported[kind.removesuffix(GPT)].arguments
        return [*other, "--load", str(case.checkpoint)]
    arguments = case.arguments
    if "--use-checkpoint-args" in extra:
        arguments = []
        for line in case.printed.splitlines():
            if line.strip().startswith(NOT_FROM_THE_CHECKPOINT):
                arguments += shlex.split(line)
    return [*arguments, *extra.split()]


@pytest.fixture(scope="module")
def logits(
    launcher: Launcher, imported: dict[str, Imported], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Megatron's logits by layout."""
    root = tmp_path_factory.mktemp("logits")
    tokens = random_tokens().tolist()
    for size in (1, 2):
        cases = [
            {
                "arguments": launch_arguments(imported, kind, extra),
                "tokens": tokens,
                "output": str(root / f"{layout}.pt"),
            }
            for layout, (kind, processes, extra) in LAYOUTS.items()
            if processes == size
        ]
        (root / f"{size}.json").write_text(json.dumps(cases))
        main = "tests.hf_imports:compute_logits"
        launcher.run([str(root / f"{size}.json")], root / f"{size}.txt", size, main=main)
    return {layout: torch.load(root / f"{layout}.pt", weights_only=True) for layout in LAYOUTS}


def random_tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_it_and_computes_the_same_logits(
    hf_models: dict[str, Path], logits: dict[str, torch.Tensor], layout: str
) -> None:
    kind, _, extra = LAYOUTS[layout]
    folder = hf_models[kind.removesuffix(GPT)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(random_tokens()).logits
    actual = logits[layout]
    assert actual.shape[-1] == (384 if "384" in extra else PADDED_VOCABULARY)
    # The same fp32 arithmetic in another order; logits are of order 1, with an epsilon of 1e-7.
    assert expected.abs().max() > 1
    assert (actual[..., :VOCABULARY] - expected).abs().max() <= 1e-5
    # Rows of zeros, also those that Megatron adds.
    assert not actual[..., VOCABULARY:].any()


@pytest.fixture(scope="module")
def byte_model(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """A model of the shape and the tokenizer of small runs."""
    root = tmp_path_factory.mktemp("bytes")
    model, checkpoint = save_tiny_llama(root / "model"), root / "checkpoint"
    case = ["--model", str(model), "--output", str(checkpoint)]
    [(code, printed)] = convert(launcher, root, [case])
    assert code == 0, printed
    return Imported(model, checkpoint, printed)


LINE = b"All the samples are one: 32 byte"
"""As long as a sample of small runs, so that every batch of them is known."""


@pytest.fixture(scope="module")
def one_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    (folder / "text.jsonl").write_text(json.dumps({"text": LINE.decode() * 600}))
    config = PreprocessConfig(
        inputs=(folder / "text.jsonl",), output_prefix=folder / "text", byte_level=True, workers=1
    )
    preprocess(config)
    return folder / "text"


def line_loss(folder: Path) -> float:
    """The cross-entropy that transformers computes for a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[*LINE, LINE[0]]])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0]
    # Rows that pad the vocabulary count with a logit of zero.
    padded = torch.nn.functional.pad(logits, (0, PADDED_VOCABULARY - logits.shape[-1]))
    return float(torch.nn.functional.cross_entropy(padded, tokens[0, 1:]))


def small_run(corpus: Path, folder: Path, **overrides: Any) -> SmallRun:
    # Its layers come from the import.
    common: dict[str, Any] = {"num_layers": None, "split": "100,0,0", "eval_iters": 0}
    common["train_iters"] = 4
    return SmallRun(corpus, folder).with_(**(common | overrides))


OURS = "megatron_tst.training.pretrain:main"


@pytest.mark.parametrize(
    ("main", "processes", "overrides", "tolerance"),
    [
        # fp32, in another order.
        (OURS, 2, {"tensor_model_parallel_size": 2}, 1e-5),
        ("tests.stock_gpt:main", 2, {"pipeline_model_parallel_size": 2}, 1e-5),
        # Weights and activations are rounded to 8 bits of mantissa: 0.4% of logits of order 1.
        (
            "tests.stock_gpt:main",
            2,
            {"bf16": True, "use_distributed_optimizer": True},
            2e-2,
        ),
    ],
    ids=["ours, TP 2", "stock, PP 2", "stock, bf16, distributed optimizer"],
)
def test_training_goes_on_from_the_loss_of_transformers(
    launcher: Launcher,
    byte_model: Imported,
    one_line: Path,
    tmp_path: Path,
    main: str,
    processes: int,
    overrides: dict[str, Any],
    tolerance: float,
) -> None:
    # Saving takes longer than training here.
    run = small_run(one_line, tmp_path, save=None, **overrides)
    # The paste that the tool offers.
    launcher.run([*run.argv, *byte_model.arguments], run.log, processes, main=main)
    losses = run.scalars()["lm loss"]
    assert sorted(losses) == [1, 2, 3, 4]
    # Far from a model that knows nothing.
    assert abs(line_loss(byte_model.model) - math.log(PADDED_VOCABULARY)) > 0.5
    assert losses[1] == pytest.approx(line_loss(byte_model.model), abs=tolerance)
    assert losses[4] < losses[1]


def test_superposition_starts_from_it_and_is_resumed(
    launcher: Launcher, byte_model: Imported, corpus: Path, tmp_path: Path
) -> None:
    """Given as what to start from: the run finds its own checkpoints when it is started again."""
    run = small_run(corpus, tmp_path, tst_bag_size=4, tst_steps=3, save_interval=2, train_iters=6)
    start = [*byte_model.arguments[:-2], "--pretrained-checkpoint", str(byte_model.checkpoint)]
    assert byte_model.arguments[-2] == "--load"
    launcher.run([*run.argv, *start, "--exit-interval", "2"], run.log)
    launcher.run([*run.argv, *start], run.log)
    assert "attempting to finetune with checkpoint" in run.log.read_text()
    losses = run.scalars()["lm loss"]
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert all(map(math.isfinite, losses.values()))
    assert run.description()["superposition"]["bag_size"] == 4


def test_superposition_loads_it_as_a_release(
    launcher: Launcher, byte_model: Imported, corpus: Path, tmp_path: Path
) -> None:
    run = small_run(corpus, tmp_path, tst_bag_size=4, tst_steps=2, save=None)
    launcher.run([*run.argv, *byte_model.arguments], run.log)
    assert "loading release distributed checkpoint" in run.log.read_text()
    assert sorted(run.scalars()["lm loss"]) == [1, 2, 3, 4]


MIXTURES = ["qwen2moe-bias", "glm4moe-dense-bias"]


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_trained_over_the_switch_and_exported(
    launcher: Launcher, imported: dict[str, Imported], corpus: Path, tmp_path: Path, kind: str
) -> None:
    case = imported[kind]
    run = small_run(corpus, tmp_path, seq_length=CONTEXT, tst_bag_size=4, tst_steps=2).with_(
        # What the model has comes from the import.
        untie_embeddings_and_output_weights=None,
        make_vocab_size_divisible_by=64,
    )
    own = ["--tokenizer-model", f"{corpus}-tokenizer"]
    # The run loads what it has saved; the import is what it starts from.
    start = [*case.arguments[:-2], "--pretrained-checkpoint", str(case.checkpoint)]
    launcher.run([*run.argv, *start, *own], run.log)
    losses = run.scalars()["lm loss"]
    assert sorted(losses) == [1, 2, 3, 4]
    assert all(map(math.isfinite, losses.values()))
    result = export_to_huggingface(tmp_path / "checkpoints", case.model, tmp_path / "back")
    assert (result.iteration, result.warnings) == (4, ())
    before, after = separate(load_weights(case.model)), load_weights(tmp_path / "back")
    assert after.keys() == before.keys()
    trained = [name for name in after if ".mlp." in name or name.endswith("bias")]
    assert not [name for name in trained if torch.equal(after[name], before[name])]
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_an_import_holds_neither_the_model_nor_a_stack_of_layers(
    launcher: Launcher, tmp_path: Path
) -> None:
    results = tmp_path / "peak.json"
    launcher.run([str(tmp_path), str(results)], tmp_path / "log", main="tests.hf_imports:measure")
    gates_and_ups = LARGE.layers * 2 * LARGE.ffn * LARGE.hidden * 4
    # Of stacked layers and of numbered ones.
    assert max(json.loads(results.read_text())) < gates_and_ups / 2


def test_the_command(
    launcher: Launcher, hf_models: dict[str, Path], imported: dict[str, Imported], tmp_path: Path
) -> None:
    output, foreign = tmp_path / "out", tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    basic = ["--model", str(hf_models["llama-old"]), "--output"]
    scaled = ["--model", str(hf_models["qwen2-llama3"]), "--output"]
    found = convert(
        launcher,
        tmp_path / "work",
        [
            [*basic, str(output), "--dtype", "float32", "--progress"],
            [*basic, str(output)],
            [*basic, str(output), "--overwrite"],
            [*basic, str(foreign), "--overwrite"],
            [*basic, str(output), "--overwrite", "--pad-vocab-to-multiple-of", "0"],
            [*scaled, str(tmp_path / "new"), "--model-kind", "hybrid"],
        ],
    )
    assert [code for code, _ in found] == [0, 2, 0, 2, 2, 2]
    assert "Importing" in found[0][1]
    assert "exists: pass --overwrite" in found[1][1]
    assert "Importing" not in found[2][1]
    assert "vocabulary 250 in 250 rows" in found[2][1]
    assert "holds something else than an imported model" in found[3][1]
    assert "--pad-vocab-to-multiple-of 0 is not positive" in found[4][1]
    assert "rope_type llama3, which Megatron's HybridModel leaves out: pass" in found[5][1]
    # Nothing unfinished is left behind.
    assert {path.name for path in tmp_path.iterdir()} == {"out", "thesis", "work"}
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    assert TorchDistCheckpoint(output / "release").dtype(EMBEDDING) == torch.bfloat16


def test_the_printed_arguments_hold_in_any_folder(
    byte_model: Imported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(byte_model.model, "model")
    assert main(["--model", "model", "--output", "imported"]) == 0
    arguments = Imported(tmp_path, tmp_path, capsys.readouterr().out).arguments
    paths = dict(itertools.pairwise(arguments))
    assert paths["--load"] == str(tmp_path / "imported")
    assert paths["--tokenizer-model"] == str(tmp_path / "model")


def test_what_is_more_than_an_import_stays(hf_models: dict[str, Path], tmp_path: Path) -> None:
    model, output = hf_models["llama-old"], tmp_path / "out"
    import_from_huggingface(model, output)

    def refusal(source: Path = model) -> str:
        with pytest.raises(ValueError, match="so --overwrite does not remove it") as error:
            import_from_huggingface(source, output, overwrite=True)
        return str(error.value)

    # A run that saved into the folder, and whose tracker was set back.
    step = output / "iter_0000004"
    step.mkdir()
    assert "holds something else than an imported model (iter_0000004)" in refusal()
    step.rmdir()
    # What it is to be made of.
    own = shutil.copytree(model, output / "release" / "model")
    assert f"holds {own}, which is read" in refusal(own)
    shutil.rmtree(own)
    settings = output / "release" / "metadata.json"
    content = settings.read_text()
    settings.write_text(content.replace("torch_dist", "torch"))
    assert "holds no imported model" in refusal()
    settings.write_text(content)
    import_from_huggingface(model, output, overwrite=True)
    shutil.rmtree(output)
    shutil.copytree(model, output)
    assert f"is {output}, which is read" in refusal(output)
    assert (output / "config.json").is_file()


def test_a_link_stays_and_its_folder_is_replaced(
    hf_models: dict[str, Path], tmp_path: Path
) -> None:
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to(real)
    for overwrite in (False, True):
        import_from_huggingface(hf_models["llama-old"], link, overwrite=overwrite)
        assert link.is_symlink()
        assert (sorted(tmp_path.iterdir()), list(real.parent.iterdir())) == (
            [real.parent, link],
            [real],
        )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_import_that_is_ended_leaves_what_was_there(
    hf_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    is_there: bool,
) -> None:
    model, output = hf_models["llama-old"], tmp_path / "new" / "out"
    if is_there:
        import_from_huggingface(model, output, dtype="float32")

    def interrupted(*arguments: Any) -> None:
        write_checkpoint(*arguments)
        signal.raise_signal(signum)

    monkeypatch.setattr(hf_import, "write_checkpoint", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main([f"--model={model}", f"--output={output}", "--overwrite"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 128 + signum
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert list(output.parent.iterdir()) == [output] * is_there
    if is_there:
        assert TorchDistCheckpoint(output / "release").dtype(EMBEDDING) == torch.float32


def test_the_dtype_can_be_chosen(launcher: Launcher, byte_model: Imported, tmp_path: Path) -> None:
    output = tmp_path / "out"
    case = ["--model", str(byte_model.model), "--output", str(output), "--dtype", "bfloat16"]
    assert convert(launcher, tmp_path / "work", [case])[0][0] == 0
    weights = load_weights(byte_model.model)
    stored = TorchDistCheckpoint(output / "release").read(EMBEDDING)
    assert torch.equal(stored, weights["model.embed_tokens.weight"].bfloat16())


def test_the_bias_of_a_router_stays_in_fp32(hf_models: dict[str, Path], tmp_path: Path) -> None:
    model, middle, back = hf_models["glm4moe-dense-bias"], tmp_path / "middle", tmp_path / "back"
    import_from_huggingface(model, middle, dtype="bfloat16")
    export_to_huggingface(middle, model, back, dtype="bfloat16")
    before, after = load_weights(model), load_weights(back)
    for name, weight in before.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], weight if is_bias else weight.bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(back).dtype == torch.bfloat16


def test_a_disk_that_is_too_small(
    imported: dict[str, Imported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for case in imported.values():
        with pytest.raises(ValueError, match=r"needs [\d,]+ bytes .* has 1,000 free") as error:
            import_from_huggingface(case.model, tmp_path / "new", vocabulary_multiple=64)
        # What it asked for is what it takes, rounded up.
        needed = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
        taken = sum(file.stat().st_size for file in case.checkpoint.rglob("*") if file.is_file())
        assert taken <= needed < 1.5 * taken
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["qwen2-llama3", "llama-linear", "qwen3-yarn"])
def test_other_shapes_train_over_the_switch_and_come_out_again(
    launcher: Launcher,
    imported: dict[str, Imported],
    one_line: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    """The first loss is that of transformers: biases and scaled positions are there."""
    case = imported[kind]
    start = [*case.arguments, "--max-position-embeddings", "32"]
    plain = small_run(one_line, tmp_path / "plain", save=None)
    launcher.run([*plain.argv, *start], plain.log, 2)
    assert plain.scalars()["lm loss"][1] == pytest.approx(line_loss(case.model), abs=1e-5)
    run = small_run(one_line, tmp_path / "tst", tst_bag_size=2, tst_steps=2)
    launcher.run([*run.argv, *start], run.log)
    assert all(map(math.isfinite, run.scalars()["lm loss"].values()))
    export_to_huggingface(run.folder / "checkpoints", case.model, tmp_path / "out")
    before, after = (AutoConfig.from_pretrained(f) for f in (case.model, tmp_path / "out"))
    assert before.rope_parameters.items() <= after.rope_parameters.items()
    assert load_weights(tmp_path / "out").keys() == load_weights(case.model).keys()
