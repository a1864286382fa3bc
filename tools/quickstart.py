"""Trains a baseline and a superposition run for equal FLOPs on this machine, and compares them.

Text: the Python sources installed in this environment. Everything runs on CPU cores, each arm on
its own; see docs/quickstart.md for the settings and a measured run.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_tst.study.execution import Execution, Slot
from megatron_tst.study.run_folder import RunFolder
from megatron_tst.study.runner import Progress as StudyProgress
from megatron_tst.study.runner import run_all

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def __init__(self, "


@dataclass(frozen=True)
class Settings:
    """Model, text and schedule of both arms; the defaults are the byte-level quickstart."""

    vocabulary: int = 256
    hidden: int = 64
    layers: int = 2
    heads: int = 1
    ffn: int = 160
    length: int = 128
    batch: int = 8
    steps: int = 12_000
    learning_rate: float = 1e-3
    bag_size: int = 2
    step_ratio: float = 0.3
    text_bytes: int = 40_000_000
    seed: int = 0

    def megatron_arguments(self, corpus: Path) -> list[str]:
        """Command line of an arm, without the superposition flags and the paths it writes."""
        text = f"""
            --num-layers {self.layers} --hidden-size {self.hidden} --ffn-hidden-size {self.ffn}
            --num-attention-heads {self.heads} --kv-channels {self.hidden // self.heads}
            --seq-length {self.length} --max-position-embeddings {self.length}
            --use-mcore-models --position-embedding-type rope --normalization RMSNorm --swiglu
            --disable-bias-linear --untie-embeddings-and-output-weights
            --attention-dropout 0 --hidden-dropout 0 --bf16 --make-vocab-size-divisible-by 1
            --micro-batch-size {self.batch} --global-batch-size {self.batch}
            --train-iters {self.steps} --lr {self.learning_rate} --min-lr 0
            --lr-decay-style WSD --lr-wsd-decay-style linear
            --lr-warmup-iters {self.steps // 20} --lr-wsd-decay-iters {self.steps // 10}
            --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
            --seed {self.seed + 1} --split 98,2,0
            --eval-interval {max(self.steps // 20, 1)}
            --eval-iters {min(max(self.steps // 4, 1), 100)}
            --eval-micro-batch-size {4 * self.batch} --eval-global-batch-size {4 * self.batch}
            --log-interval {max(self.steps // 200, 1)} --tensorboard-log-interval 10
            --save-interval {max(self.steps // 4, 1)} --tokenizer-type HuggingFaceTokenizer
        """
        paths = {"--tokenizer-model": f"{corpus}-tokenizer", "--data-path": str(corpus)}
        return text.split() + [part for pair in paths.items() for part in pair]


SUBWORDS = Settings(vocabulary=2048)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every step and returns the exit code."""
    options = _parse(arguments)
    console = Console()
    started = time.monotonic()
    settings = _settings(options)
    name = "quickstart-bpe" if options.bpe else "quickstart"
    output = options.output or ROOT / "runs" / name
    corpus = prepare_text(output, settings, is_byte_level=not options.bpe, console=console)
    arms = make_arms(output, settings, corpus)
    train(arms, console)
    folders = export(arms, corpus, output, console)
    evaluate_exports(folders, output)
    sample = generate_sample(folders[1], console)
    verify_export(arms[1], folders[1], console)
    report = write_comparison(arms, output / "report.html", sample)
    console.print(f"\n[bold]Report:[/] {report}")
    console.print(f"[bold]Hugging Face model:[/] {folders[1]}")
    console.print(f"Finished in {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bpe", action="store_true", help="subwords instead of bytes")
    parser.add_argument("--output", type=Path, help="default: runs/quickstart[-bpe]")
    parser.add_argument("--steps", type=int, help="optimizer steps of each arm")
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
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(SUBWORDS if options.bpe else Settings(), **given)


def prepare_text(output: Path, settings: Settings, is_byte_level: bool, console: Console) -> Path:
    """Tokenizes the installed Python sources once and returns the prefix of the corpus."""
    from megatron_tst.data.preprocessing import PreprocessConfig, preprocess

    tokens = "bytes" if is_byte_level else f"bpe{settings.vocabulary}"
    wanted = f"{tokens}-{settings.text_bytes}-seed{settings.seed}"
    prefix = output / "text" / wanted
    if prefix.with_name(f"{wanted}.json").exists():
        return prefix
    console.print("Tokenizing the Python sources of this environment ...")
    result = preprocess(
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
        )
    )
    console.print(f"{result.documents:,} files, {result.tokens:,} tokens.")
    return prefix


def make_arms(output: Path, settings: Settings, corpus: Path) -> list[Execution]:
    """The baseline and the TST run, in fresh folders."""
    superposed = [
        *("--tst-bag-size", str(settings.bag_size)),
        *("--tst-step-ratio", str(settings.step_ratio)),
    ]
    arms = []
    for name, flags in (("baseline", []), ("tst", superposed)):
        shutil.rmtree(output / name, ignore_errors=True)
        arguments = [*settings.megatron_arguments(corpus), *flags]
        arms.append(Execution(name, RunFolder(output / name), arguments, settings.steps))
    return arms


def train(arms: list[Execution], console: Console) -> None:
    """Runs the arms side by side, or one after the other on a single core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots = [Slot(cores=(core,)) for core in cores[: len(arms)]] or [Slot()]
    progress = Progress(
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:>6}  validation {task.fields[validation]:>6}"),
        TimeRemainingColumn(),
        console=console,
    )
    console.print("Training on real Megatron, both arms for the same FLOPs ...")
    with progress:
        tasks = {
            arm.name: progress.add_task(arm.name, total=arm.total_steps, loss="-", validation="-")
            for arm in arms
        }

        def show(state: StudyProgress) -> None:
            for arm in arms:
                progress.update(
                    tasks[arm.name],
                    completed=arm.log.step,
                    loss=_three_decimals(arm.log.loss),
                    validation=_three_decimals(arm.log.validation),
                )
                if state.states[arm.name] in ("failed", "diverged"):
                    log = arm.folder.log
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
                    sys.exit(f"{tail}\n\nThe {arm.name} run failed: see {log}")

        run_all(arms, slots, show)


def _three_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def export(arms: list[Execution], corpus: Path, output: Path, console: Console) -> list[Path]:
    """Converts the last checkpoint of each arm to Hugging Face format."""
    from megatron_tst.checkpoint.hf_export import export_to_huggingface

    console.print("Exporting to Hugging Face format ...")
    tokenizer = corpus.with_name(f"{corpus.name}-tokenizer")
    folders = [output / "huggingface" / arm.name for arm in arms]
    for arm, folder in zip(arms, folders, strict=True):
        export_to_huggingface(arm.folder.checkpoints, tokenizer, folder, overwrite=True)
    return folders


def evaluate_exports(folders: list[Path], output: Path) -> None:
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
        model=tst,
        compare=baseline,
        text=held_out,
        output=output / "evaluation.json",
        batch_size=64,
        device="cpu",
        overwrite=True,
    )
    # Not by the console, which would break long rows.
    print(markdown_table(*evaluate(config)), flush=True)


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
    from megatron_tst.checkpoint.hf_verify import LOGIT_TOLERANCE, largest_logit_difference

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


def write_comparison(arms: list[Execution], target: Path, sample: str) -> Path:
    """Writes the report and returns its path."""
    from megatron_tst.report.comparison import study_of_two
    from megatron_tst.report.html import write_report
    from megatron_tst.report.results import read_result

    baseline, tst = (read_result(arm.folder.path) for arm in arms)
    write_report([study_of_two(baseline, tst)], target, sample_text=sample)
    return target


if __name__ == "__main__":
    sys.exit(main())
