"""Tasks of lm-eval, bits per byte and generation on a Hugging Face folder, against transformers."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tst.evaluation.bits_per_byte import bits_per_byte, read_documents
from megatron_tst.evaluation.folder import LoadedModel, check_model_folder, load_model
from megatron_tst.evaluation.generation import generate
from tests.tiny_llama import CONTEXT, save_tiny_llama
from tools import evaluate as evaluate_tool
from tools import generate as generate_tool

CPU = torch.device("cpu")
WORDS = ["red", "green", "dark blue", "yellow", "grey", "a bright white", "pink"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(check_model_folder(model), "auto", CPU)


def log_probabilities(loaded: LoadedModel, tokens: list[int]) -> list[float]:
    """Of each token but the first, from all before it, in one pass."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]].tolist()


# Multiple choice.


def make_questions(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"question": f"{draw.choice(WORDS)} and {i} is", "choices": draw.sample(WORDS, 4), "gold": i % 4}
        for i in range(count)
    ]  # fmt: skip


def write_task(folder: Path, name: str, questions: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {folder / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3.0
""")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "colours", make_questions(40))
    write_task(folder, "few_colours", make_questions(10))
    write_task(folder, "shades", make_questions(20))
    (folder / "group.yaml").write_text("""
group: all_colours
task: [colours, few_colours]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
""")
    return folder


def accuracies(loaded: LoadedModel, questions: list[dict[str, Any]]) -> tuple[float, float]:
    """By the log-probability of an answer, and by that a character."""
    right = [0, 0]
    for question in questions:
        prompt = loaded.tokenizer.encode(f"Q: {question['question']}")
        scores = []
        for choice in question["choices"]:
            tokens = prompt + loaded.tokenizer.encode(f" {choice}")
            scores.append(sum(log_probabilities(loaded, tokens)[len(prompt) - 1 :]))
        lengths = [len(choice) for choice in question["choices"]]
        for i, values in enumerate(
            (scores, [score / n for score, n in zip(scores, lengths, strict=True)])
        ):
            right[i] += values.index(max(values)) == question["gold"]
    return right[0] / len(questions), right[1] / len(questions)


def run(*arguments: object) -> int:
    return evaluate_tool.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def results(
    model: Path, other_model: Path, tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Both models on the group of local tasks and on two texts."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("Grün ist the colour of money." * 5, newline="")
    (folder / "text" / "b.txt").write_bytes(b"one\r\ntwo")
    code = run(
        *("--model", model, "--compare", other_model, "--output", folder / "both.json"),
        *("--tasks-dir", tasks_dir, "--tasks", "all_colours", "shades"),
        *("--text", folder / "text", "--batch-size", 3),
    )
    assert code == 0
    found: dict[str, Any] = json.loads((folder / "both.json").read_text())
    return found


def test_accuracies_are_those_computed_by_hand(
    results: dict[str, Any], model: Path, other_model: Path
) -> None:
    for path, entry in ((model, results), (other_model, results["compared_with"])):
        by_hand = load_model(check_model_folder(path), "auto", CPU)
        for task, count in (("colours", 40), ("few_colours", 10), ("shades", 20)):
            found, expected = entry["tasks"][task], accuracies(by_hand, make_questions(count))
            metrics = found["metrics"]
            assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == expected
            assert found["main_metric"] == "acc_norm"
            assert found["samples"] == count
            assert found["version"] == 3.0
            share = metrics["acc"]["value"]
            stderr = math.sqrt(share * (1 - share) / (count - 1))
            assert metrics["acc"]["stderr"] == pytest.approx(stderr)
        group = entry["tasks"]["all_colours"]["metrics"]["acc"]["value"]
        parts = [entry["tasks"][name]["metrics"]["acc"]["value"] for name in ("colours", "few_colours")]  # fmt: skip
        assert group == pytest.approx((40 * parts[0] + 10 * parts[1]) / 50)
    # The models differ, so that a mix-up would show.
    assert results["tasks"] != results["compared_with"]["tasks"]


def test_results_say_how_they_were_obtained(results: dict[str, Any], model: Path) -> None:
    assert results["model"]["folder"] == str(model)
    assert results["model"]["sha256"] == check_model_folder(model).sha256()
    assert results["model"]["sha256"] != results["compared_with"]["model"]["sha256"]
    loaded = load_model(check_model_folder(model), "auto", CPU)
    assert results["model"]["parameters"] == loaded.model.num_parameters()
    assert (results["model"]["dtype"], results["model"]["revision"]) == ("float32", None)
    assert results["settings"]["tasks"] == ["all_colours", "shades"]
    assert results["settings"]["shots"] == 0
    assert results["versions"]["lm-eval"] == "0.4.13"
    assert results["date"].endswith("+00:00")


def test_the_table_compares_with_standard_errors(
    results: dict[str, Any],
    model: Path,
    other_model: Path,
    tasks_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One task and a limit, against the JSON of the other model."""
    options = ("--tasks-dir", tasks_dir, "--tasks", "shades", "--limit", 8)
    earlier, output = tmp_path / "other.json", tmp_path / "this.json"
    assert run("--model", other_model, "--output", earlier, *options) == 0
    capsys.readouterr()
    assert run("--model", model, "--output", output, "--compare", earlier, *options) == 0
    found = json.loads(output.read_text())
    assert found["tasks"]["shades"]["samples"] == 8
    assert found["compared_with"]["tasks"] == json.loads(earlier.read_text())["tasks"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"| task | metric | {model} | {other_model} | difference |"
    for line, metric in zip(lines[2:], ("acc_norm", "acc"), strict=True):
        values = [entry["tasks"]["shades"]["metrics"][metric] for entry in (found, found["compared_with"])]  # fmt: skip
        (a, a_err), (b, b_err) = ((100 * v["value"], 100 * v["stderr"]) for v in values)
        expected = f"| shades | {metric} | {a:.1f} ± {a_err:.1f} | {b:.1f} ± {b_err:.1f} | {a - b:+.1f} ± {math.hypot(a_err, b_err):.1f} |"  # noqa: E501
        assert line == expected
    # Another limit is another test.
    code = run(
        "--model", model, "--output", output, "--overwrite", "--compare", earlier, *options[:-2]
    )
    assert code == 2
    message = "was made with limit 8, and this command has None: evaluate both models with the same"
    assert message in capsys.readouterr().err


# Bits per byte.


def bits_by_hand(loaded: LoadedModel, text: str, window: int, stride: int) -> float:
    tokens = [loaded.tokenizer.eos_token_id, *loaded.tokenizer.encode(text)]
    total = 0.0
    for position in range(1, len(tokens)):
        # The first window reaches to position ``window``, each further one by ``stride``.
        steps = max(-(-(position - window) // stride), 0)
        end = min(window + steps * stride, len(tokens) - 1)
        begin = max(end - window, 0)
        total -= log_probabilities(loaded, tokens[begin : position + 1])[-1]
    return total / math.log(2)


TEXTS = (
    "Grün ist the colour of money. " * 7,
    "one\r\ntwo",
    "x",
    "y" * CONTEXT,
    "z" * (CONTEXT + 1),
)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (20, 20), (20, 7), (1, 1)])
def test_bits_per_byte_are_those_computed_by_hand(
    loaded: LoadedModel, window: int | None, stride: int | None
) -> None:
    found = bits_per_byte(loaded, TEXTS, window, stride, batch_size=3)
    width = window or CONTEXT
    bits = [bits_by_hand(loaded, text, width, stride or width // 2) for text in TEXTS]
    sizes = [len(text.encode()) for text in TEXTS]
    # float32 in another order of batches.
    assert found.bits == pytest.approx(sum(bits), rel=1e-6)
    assert (found.bytes, found.tokens, found.documents) == (sum(sizes), sum(sizes), len(TEXTS))
    assert found.value == pytest.approx(sum(bits) / sum(sizes), rel=1e-6)
    residuals = [b - found.value * size for b, size in zip(bits, sizes, strict=True)]
    spread = math.sqrt(sum(r * r for r in residuals) / (len(TEXTS) - 1) * len(TEXTS))
    assert found.stderr == pytest.approx(spread / sum(sizes), rel=1e-4)


def test_bits_per_byte_do_not_depend_on_batches_or_on_windows_that_hold_the_text(
    loaded: LoadedModel,
) -> None:
    expected = bits_per_byte(loaded, TEXTS).bits
    for batch_size in (2, 64):
        assert bits_per_byte(loaded, TEXTS, batch_size=batch_size).bits == pytest.approx(
            expected, rel=1e-6
        )
    short = TEXTS[1]
    for window, stride in ((len(short) + 1, 1), (CONTEXT, CONTEXT)):
        found = bits_per_byte(loaded, [short], window, stride)
        assert found.bits == pytest.approx(bits_per_byte(loaded, [short]).bits, rel=1e-6)
        assert found.stderr is None


def test_without_a_token_in_front_the_first_counts_as_any(loaded: LoadedModel) -> None:
    class NoEnd:
        """The tokenizer, without an end of document."""

        bos_token_id = eos_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.tokenizer, name)

        def __len__(self) -> int:
            return 256

    text = "abc"
    found = bits_per_byte(LoadedModel(loaded.model, NoEnd()), [text])
    rest = sum(log_probabilities(loaded, loaded.tokenizer.encode(text))) / math.log(2)
    assert found.bits == pytest.approx(8 - rest, rel=1e-6)


def test_results_hold_the_bits_of_the_text(results: dict[str, Any], loaded: LoadedModel) -> None:
    texts = list(read_documents(Path(results["settings"]["text"])).values())
    assert [len(text.encode()) for text in texts] == [5 * 30, 8]
    expected = bits_per_byte(loaded, texts)
    assert results["text"]["bits_per_byte"] == pytest.approx(expected.value, rel=1e-6)
    assert results["text"]["window"] == CONTEXT
    assert results["text"]["documents"] == 2


# Generation.


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
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    assert generate_tool.main(options) == 0
    assert capsys.readouterr().out == expected


def test_sampled_text_depends_on_the_seed(loaded: LoadedModel) -> None:
    def sample(seed: int, top_p: float = 1.0) -> str:
        return generate(loaded, "def f(", 30, temperature=1.5, top_p=top_p, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    # So little is sampled from that the likeliest token is left.
    assert sample(1, top_p=1e-6) == generate(loaded, "def f(", 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"--max-new-tokens 0: use 1 or more"),
        ({"temperature": -1.0}, r"--temperature -1: use 0 or more"),
        ({"top_p": 0.0}, r"--top-p 0: use a number above 0"),
        ({"max_new_tokens": 60}, r"the prompt has 6 tokens .* made for 64: use 58 or fewer"),
        ({"prompt": ""}, r"the prompt is empty"),
    ],
)
def test_generation_refuses(loaded: LoadedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(loaded, **{"prompt": "def f(", **options})


# What is refused, before anything is loaded.


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
    broken = copy_without(model, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases = [
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path, "has no config.json: pass a Hugging Face folder"),
        (pickled, r"as pickles only \(pytorch_model.bin\), which can run any code"),
        (own_code, "brings code of its own"),
        (sharded, "model-2.safetensors is missing"),
        (broken, "config.json is not JSON"),
        (copy_without(model, tmp_path / "empty", "model.safetensors"), "has no weights"),
        (copy_without(model, tmp_path / "mute", "tokenizer.json"), "has no tokenizer"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            check_model_folder(folder)
        assert str(folder) in str(caught.value)
        assert generate_tool.main(["x", "--model", str(folder)]) == 2


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


def test_commands_that_are_refused(
    model: Path,
    tasks_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("megatron_tst.evaluation.evaluate.load_model", load)
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    (tmp_path / "no-tasks").mkdir()
    gone = tmp_path / "gone"
    gone.mkdir()
    write_task(gone, "gone", make_questions(3))
    (gone / "gone.jsonl").unlink()
    output, text = tmp_path / "out.json", tmp_path / "text.txt"
    text.write_text("some text")
    local = ("--tasks-dir", tasks_dir, "--tasks")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--output", tmp_path / "there.json"), "exists: choose another file, or pass --overwrite"),
        (("--output", tmp_path / "no" / "out.json"), "no does not exist"),
        (("--text", tmp_path / "nothing.txt"), "nothing.txt does not exist"),
        (("--text", tmp_path / "empty.txt"), "holds no text"),
        (("--text", tmp_path / "latin.txt"), "latin.txt is not text in UTF-8 (byte 2)"),
        (("--text", text, "--limit", 0), "--limit 0: use 1 or more"),
        (("--text", text, "--batch-size", 0), "--batch-size 0: use 1 or more"),
        (("--text", text, "--device", "nonsense"), "--device nonsense cannot be used"),
        (("--text", text, "--compare", tmp_path / "there.json"), "there.json is no result of"),
        (("--text", text, "--compare", tmp_path / "no-tasks"), "no-tasks has no config.json"),
        (("--tasks-dir", tmp_path / "nowhere"), "nowhere is not a folder"),
        (("--tasks-dir", tmp_path / "no-tasks"), "holds no task file"),
        (("--tasks-dir", gone), "--tasks gone: its data cannot be loaded"),
        ((*local, "all_colours", "colours"), "Duplicate task 'colours'"),
    ]
    for arguments, message in cases:
        given = arguments if "--output" in arguments else (*arguments, "--output", output)
        assert run("--model", model, *given) == 2, arguments
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
        assert not output.exists()


def test_windows_that_the_model_cannot_have(loaded: LoadedModel) -> None:
    for window, stride, message in (
        (CONTEXT + 1, None, f"--window 65: use 1 to {CONTEXT}"),
        (8, 9, "--stride 9: use 1 to 8"),
        (8, 0, "--stride 0: use 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_byte(loaded, ["text"], window, stride)
