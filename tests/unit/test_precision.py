"""The faster precision of machines with and without bf16, in studies and in evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_tst.commands.run_study import main
from megatron_tst.common import bf16
from megatron_tst.common.precision import describe_precision, faster_precision
from megatron_tst.evaluation.folder import check_model_folder, load_model
from megatron_tst.study.config import StudyConfig
from megatron_tst.study.precision import resolve_precision
from megatron_tst.study.study_file import read_study
from megatron_tst.study.study_folder import executions, open_study
from tests.studies import study_content, write_study
from tests.tiny_llama import CPU, save_tiny_llama

MACHINES = pytest.mark.parametrize(("isa", "precision"), [("AVX2", "fp32"), ("ALL", "bf16")])


@pytest.fixture(autouse=True)
def cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU. ONEDNN_MAX_CPU_ISA takes the instructions away again."""
    monkeypatch.setattr(bf16, "hardware_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def auto_study(folder: Path) -> Path:
    content = study_content(Path("corpus"))
    content["arguments"]["bf16"] = "auto"
    return write_study(folder / "study.yaml", content)


def started(study: Path, folder: Path) -> StudyConfig:
    resolved = resolve_precision(read_study(study), folder, starts_runs=True)
    with open_study(resolved, folder):
        pass
    return resolved


@MACHINES
def test_the_faster_precision(monkeypatch: pytest.MonkeyPatch, isa: str, precision: str) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert faster_precision(on_gpu=False) == precision
    assert describe_precision(on_gpu=False).startswith(f"{precision}, products of bf16 being ")
    assert describe_precision(on_gpu=True) == "bf16, there being a GPU"


@MACHINES
def test_a_study_takes_the_faster_precision_and_writes_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str, precision: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    study = started(auto_study(tmp_path), tmp_path / "out")
    for run in executions(study, tmp_path / "out"):
        assert ("--bf16" in run.arguments) == (precision == "bf16")
        assert "auto" not in run.arguments
        assert run.record["precision"] == precision
    written = json.loads((tmp_path / "out" / "study.json").read_text())["common"]["arguments"]
    assert written.get("bf16", False) == (precision == "bf16")


def test_a_gpu_trains_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert started(auto_study(tmp_path), tmp_path / "out").arguments["bf16"] is True


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("AVX2", "ALL", ["runs in fp32", "means bf16, products of bf16", "leave bf16 out"]),
        ("ALL", "AVX2", ["runs in bf16", "means fp32, products of bf16", "write bf16: true"]),
    ],
)
def test_a_study_does_not_go_on_in_another_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: str,
    second: str,
    words: list[str],
) -> None:
    study, folder = auto_study(tmp_path), tmp_path / "out"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", first)
    before = started(study, folder)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", second)
    assert main([str(study), "--output", str(folder)]) == 2
    message = capsys.readouterr().err
    for word in (f"error: --output {folder}", *words):
        assert word in message
    # What only reads the folder takes what is written down, as does the remedy.
    assert main([str(study), "--output", str(folder), "--list"]) == 0
    with open_study(before, folder):
        pass


def test_the_remedy_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    started(auto_study(tmp_path), tmp_path / "out")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    content = study_content(Path("corpus"))
    content["arguments"]["bf16"] = True
    fixed = write_study(tmp_path / "fixed.yaml", content)
    assert started(fixed, tmp_path / "out").arguments["bf16"] is True


def test_what_cannot_be_decided_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, output = auto_study(tmp_path), ["--output", str(tmp_path / "out")]
    assert main([str(study), *output, "--slurm", "timeout_min=1"]) == 2
    assert "--slurm with bf16: auto" in capsys.readouterr().err
    content = study_content(Path("corpus"), models={"tiny": {"num-layers": 1, "bf16": "auto"}})
    assert main([str(write_study(study, content)), *output]) == 2
    assert "models.tiny.bf16 is auto: write it under arguments" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@MACHINES
def test_a_stored_bf16_model_computes_in_the_faster_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str, precision: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    path = save_tiny_llama(tmp_path / "model")
    load_model(check_model_folder(path), "bfloat16", CPU).model.save_pretrained(path)
    folder = check_model_folder(path)
    found = load_model(folder, "auto", CPU)
    assert found.model.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert any("float32 here" in note for note in found.notes) == (precision == "fp32")
    assert load_model(folder, "bfloat16", CPU).model.dtype == torch.bfloat16
    exact = load_model(folder, "float32", CPU).model.state_dict()
    assert all(torch.equal(w.float(), exact[n]) for n, w in found.model.state_dict().items())
