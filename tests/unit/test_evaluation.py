"""Tasks of lm-eval and text, evaluated by the command on tiny models."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tst.commands import evaluate as evaluate_tool
from megatron_tst.corpus.preprocessing import PreprocessConfig, preprocess
from megatron_tst.evaluation.bits_per_byte import bits_per_byte, read_documents
from megatron_tst.evaluation.folder import LoadedModel, check_model_folder, load_model
from tests.tiny_llama import CPU, log_probabilities, save_tiny_llama

WORDS = ["red", "green", "dark blue", "yellow", "grey", "a bright white", "pink"]
MANY, SOME, FEW = 24, 12, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("other"), seed=1)


def make_questions(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "question": f"{draw.choice(WORDS)} and {i} is",
            "choices": draw.sample(WORDS, 4),
            "gold": i % 4,
        }
        for i in range(count)
    ]


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
    write_task(folder, "colours", make_questions(MANY))
    write_task(folder, "few_colours", make_questions(FEW))
    write_task(folder, "shades", make_questions(SOME))
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
        *("--text", folder / "text", "--batch-size", 3, "--window", 40, "--stride", 10),
    )
    assert code == 0
    found: dict[str, Any] = json.loads((folder / "both.json").read_text())
    return found


def test_accuracies_are_those_computed_by_hand(
    results: dict[str, Any], model: Path, other_model: Path
) -> None:
    for path, entry in ((model, results), (other_model, results["compared_with"])):
        by_hand = load_model(check_model_folder(path), "auto", CPU)
        for task, count in (("colours", MANY), ("few_colours", FEW), ("shades", SOME)):
            found, expected = entry["tasks"][task], accuracies(by_hand, make_questions(count))
            metrics = found["metrics"]
            assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == expected
            assert found["main_metric"] == "acc_norm"
            assert found["samples"] == count
            assert found["version"] == 3.0
            share = metrics["acc"]["value"]
            stderr = math.sqrt(share * (1 - share) / (count - 1))
            assert metrics["acc"]["stderr"] == pytest.approx(stderr)
        of_group, of_many, of_few = (
            entry["tasks"][name]["metrics"]["acc"]["value"]
            for name in ("all_colours", "colours", "few_colours")
        )
        assert of_group == pytest.approx((MANY * of_many + FEW * of_few) / (MANY + FEW))
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
        (a, a_err), (b, b_err) = (
            [100 * entry["tasks"]["shades"]["metrics"][metric][key] for key in ("value", "stderr")]
            for entry in (found, found["compared_with"])
        )
        difference = f"{a - b:+.1f} ± {math.hypot(a_err, b_err):.1f}"
        values = f"{a:.1f} ± {a_err:.1f} | {b:.1f} ± {b_err:.1f}"
        assert line == f"| shades | {metric} | {values} | {difference} |"
    # Another limit is another test.
    code = run(
        "--model", model, "--output", output, "--overwrite", "--compare", earlier, *options[:-2]
    )
    assert code == 2
    message = "was made with limit 8, and this command has None: evaluate both models with the same"
    assert message in capsys.readouterr().err


def test_results_hold_the_bits_of_the_text(results: dict[str, Any], model: Path) -> None:
    texts = list(read_documents(Path(results["settings"]["text"])).values())
    assert [len(text.encode()) for text in texts] == [5 * 30, 8]
    expected = bits_per_byte(load_model(check_model_folder(model), "auto", CPU), texts, 40, 10)
    assert results["text"]["bits_per_byte"] == pytest.approx(expected.value, rel=1e-6)
    assert (results["text"]["window"], results["text"]["stride"]) == (40, 10)
    assert results["text"]["documents"] == 2


def test_a_file_is_read_as_one_of_a_corpus(tmp_path: Path) -> None:
    text = "größe\r\n"
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    assert read_documents(tmp_path) == {tmp_path / "marked.txt": text}
    preprocess(PreprocessConfig((tmp_path,), tmp_path / "out", byte_level=True, append_eod=False))
    assert np.fromfile(tmp_path / "out.bin", np.uint16).tolist() == list(text.encode())


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
    (tmp_path / "half.json").write_text('{"format": 1, "settings": {}}')
    longer = tmp_path / "longer"
    longer.mkdir()
    for file in model.iterdir():
        (longer / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (longer / "config.json").unlink()
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    (tmp_path / "utf-16.txt").write_bytes("text".encode("utf-16-le"))
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
        (("--text", tmp_path / "utf-16.txt"), "utf-16.txt has a NUL character, so this is no text"),
        (("--text", text, "--limit", 0), "--limit 0: use 1 or more"),
        (("--text", text, "--batch-size", 0), "--batch-size 0: use 1 or more"),
        (("--text", text, "--device", "nonsense"), "--device nonsense cannot be used"),
        (("--text", text, "--compare", tmp_path / "there.json"), "there.json is no result of"),
        (("--text", text, "--compare", tmp_path / "half.json"), "half.json is no result of"),
        (("--text", text, "--compare", tmp_path / "no-tasks"), "no-tasks has no config.json"),
        (("--text", text, "--compare", longer), "contexts of 64 and 128 tokens, which makes"),
        (("--text", text, "--window", 65), "--window 65: a model has a context of 64 tokens"),
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


def test_a_task_that_nobody_has(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All task files of lm-eval are read, for what it could have meant."""
    assert run("--model", model, "--output", "out.json", "--tasks", "hellasvag") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--tasks hellasvag is no task of lm-eval or --tasks-dir (close: hellaswag" in error


def test_data_of_the_hub_without_a_network(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published tasks are known, and the message names the ways to get their data."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("--model", model, "--output", tmp_path / "out.json", "--batch-size", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--tasks hellaswag: its data cannot be loaded" in error
    assert "set HF_HOME to a folder" in error
    assert "--tasks-dir" in error
