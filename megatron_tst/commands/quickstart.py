"""Trains a baseline and a superposition run for equal FLOPs on this machine, and compares them.

Text: the Python sources installed in this environment. Everything runs on CPU cores, each arm on
its own; see docs/quickstart.md for the settings and a measured run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from megatron_tst.common.command_parser import command_parser
from megatron_tst.common.errors import command
from megatron_tst.common.precision import describe_precision, faster_precision
from megatron_tst.common.progress import TaskProgress
from megatron_tst.study.execution import Execution
from megatron_tst.study.pace import Plan
from megatron_tst.study.quickstart import SUBWORDS, Settings, TimeLimit, train_in_time

PROMPT = "def __init__(self, "
PLANNED_MINUTES = 12.0
# A wheel has no documentation.
_RESULTS_PAGE = Path(__file__).parents[2] / "docs" / "results.md"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every step and returns the exit code."""
    options = _parse(arguments)
    console = Console()
    started = time.monotonic()
    settings = _settings(options)
    name = "quickstart-bpe" if options.bpe else "quickstart"
    output = options.output or Path("runs") / name
    corpus = prepare_text(output, settings, is_byte_level=not options.bpe, console=console)
    console.print(f"Precision: {_described_precision(options.precision)}.", soft_wrap=True)
    console.print("Training on real Megatron, both arms for the same FLOPs ...")
    limit = TimeLimit(started, options.minutes, may_shorten=options.steps is None)
    arms, plan = train_in_time(output, settings, corpus, limit, console)
    folders = export(arms, corpus, output, console)
    evaluate_exports(folders, output, console)
    sample = generate_sample(folders[1], console)
    verify_export(arms[1], folders[1], console)
    report = write_comparison(arms, output / "report.html", sample, plan)
    console.print(f"\n[bold]Report:[/] {report}")
    console.print(f"[bold]Hugging Face model:[/] {folders[1]}")
    console.print(f"Finished in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__.splitlines()[0])
    parser.add_argument("--bpe", action="store_true", help="subwords instead of bytes")
    parser.add_argument("--output", type=Path, help="default: runs/quickstart[-bpe]")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each arm, whatever time they take"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=PLANNED_MINUTES,
        help="time for everything; on a machine that is too slow for it both arms get fewer steps, "
        "unless --steps is given (default: %(default)g)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of both arms; auto is fp32 on a CPU without bf16 instructions",
    )
    parser.add_argument("--lr", type=float, help="peak learning rate of both arms")
    parser.add_argument("--bag-size", type=int, help="tokens a bag in phase 1 of the TST arm")
    parser.add_argument("--step-ratio", type=float, help="share of phase 1 in the TST arm")
    parser.add_argument("--text-bytes", type=int, help="size of the corpus")
    parser.add_argument("--seed", type=int, help="seed of weights and data order of both arms")
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace) -> Settings:
    chosen = {
        "steps": options.steps,
        "learning_rate": options.lr,
        "bag_size": options.bag_size,
        "step_ratio": options.step_ratio,
        "text_bytes": options.text_bytes,
        "seed": options.seed,
        "precision": options.precision,
    }
    if options.precision == "auto":
        # The arms have cores, and no GPU.
        chosen["precision"] = faster_precision(on_gpu=False)
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(SUBWORDS if options.bpe else Settings(), **given)


def _described_precision(asked: str) -> str:
    return describe_precision(on_gpu=False) if asked == "auto" else f"{asked} (--precision)"


def prepare_text(output: Path, settings: Settings, is_byte_level: bool, console: Console) -> Path:
    """Tokenizes the installed Python sources once and returns the prefix of the corpus."""
    from megatron_tst.corpus.preprocessing import PreprocessConfig
    from megatron_tst.corpus.preprocessing_progress import preprocess_with_progress

    tokens = "bytes" if is_byte_level else f"bpe{settings.vocabulary}"
    wanted = f"{tokens}-{settings.text_bytes}-seed{settings.seed}"
    prefix = output / "text" / wanted
    if prefix.with_name(f"{wanted}.json").exists():
        return prefix
    console.print("Tokenizing the Python sources of this environment ...")
    result = preprocess_with_progress(
        PreprocessConfig(
            inputs=(Path(sysconfig.get_paths()["purelib"]),),
            output_prefix=prefix,
            byte_level=is_byte_level,
            train_bpe=None if is_byte_level else settings.vocabulary,
            extensions=(".py",),
            shuffle_seed=settings.seed,
            max_bytes=settings.text_bytes,
            workers=os.cpu_count() or 1,
            overwrite=True,
        ),
        console,
    )
    console.print(f"{result.documents:,} files, {result.tokens:,} tokens.")
    return prefix


def export(arms: list[Execution], corpus: Path, output: Path, console: Console) -> list[Path]:
    """Converts the last checkpoint of each arm to Hugging Face format."""
    from megatron_tst.checkpoint.hf_export import export_to_huggingface

    console.print("Exporting to Hugging Face format ...")
    tokenizer = corpus.with_name(f"{corpus.name}-tokenizer")
    folders = [output / "huggingface" / arm.name for arm in arms]
    for arm, folder in zip(arms, folders, strict=True):
        export_to_huggingface(arm.folder.checkpoints, tokenizer, folder, overwrite=True)
    return folders


def evaluate_exports(folders: list[Path], output: Path, console: Console) -> None:
    """Measures bits per byte of both models on text that no arm has read, and prints the table."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from megatron_tst.evaluation.evaluate import EvaluationConfig, evaluate
    from megatron_tst.evaluation.results import markdown_table

    disable_progress_bar()
    # Threads that share their cores with other work wait for each other, and the model is small.
    torch.set_num_threads(1)
    # The corpus is made of installed packages, this is a part of Python itself.
    held_out = output / "text" / "standard-library-http"
    shutil.rmtree(held_out, ignore_errors=True)
    shutil.copytree(
        Path(sysconfig.get_paths()["stdlib"]) / "http",
        held_out,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    baseline, tst = folders
    config = EvaluationConfig(
        compare=baseline,
        text=held_out,
        output=output / "evaluation.json",
        batch_size=64,
        device="cpu",
        overwrite=True,
    )
    with TaskProgress(console) as display:
        results = evaluate(config, tst, display)
    # Not by the console, which would break long rows.
    print(markdown_table(*results), flush=True)


def generate_sample(folder: Path, console: Console) -> str:
    """Prints and returns a text that an exported model generates."""
    from megatron_tst.evaluation.folder import check_model_folder, device_of, load_model
    from megatron_tst.evaluation.generation import generate

    loaded = load_model(check_model_folder(folder), "auto", device_of("cpu"))
    text = generate(loaded, PROMPT, max_new_tokens=100, temperature=0.7)
    console.print("A sample of the exported TST model:", style="bold")
    console.print(text, markup=False, highlight=False)
    return text


def verify_export(arm: Execution, folder: Path, console: Console) -> None:
    """Compares the logits of an exported model with those of Megatron's."""
    from megatron_tst import cpu
    from megatron_tst.checkpoint.hf_verify import LOGIT_TOLERANCE, largest_logit_difference

    cpu.activate()
    # It recommends another model class for every model that is built.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Megatron's, of libraries for GPUs.
        warnings.simplefilter("ignore")
        difference = largest_logit_difference(arm.folder.checkpoints, folder)
    if not difference <= LOGIT_TOLERANCE:
        sys.exit(
            f"{folder} and the checkpoint of {arm.folder.path} differ by {difference} in a logit."
        )
    console.print(f"Largest difference between its logits and Megatron's: {difference:.1e}.")


def write_comparison(arms: list[Execution], target: Path, sample: str, plan: Plan | None) -> Path:
    """Writes the report, and what was planned beside it; returns the path of the report."""
    from megatron_tst.report.comparison import study_of_two
    from megatron_tst.report.families import with_differing_arguments
    from megatron_tst.report.html import write_report
    from megatron_tst.report.results import read_result

    baseline, tst = with_differing_arguments([read_result(arm.folder.path) for arm in arms])
    note = None
    if plan is not None:
        target.with_name("pace.json").write_text(json.dumps(asdict(plan), indent=1) + "\n")
        note = plan.sentences() if plan.is_shortened else None
    study = study_of_two(baseline, tst)
    page = _RESULTS_PAGE if _RESULTS_PAGE.exists() else None
    write_report([study], target, sample_text=sample, note=note, results_page=page)
    return target
