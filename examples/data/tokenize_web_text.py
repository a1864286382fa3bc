"""Tokenizes DCLM or FineWeb-Edu with datatrove, on this machine or on a Slurm cluster.

Each task writes a part of the corpus, and a last one joins the parts: see the README beside this.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
except ImportError as error:
    sys.exit(f"error: {error}; pip install 'megatron-tst[data]'")

from megatron_tst.corpus.datatrove_steps import MergeMegatronParts, WriteMegatronPart

# Where the data set is published, the reader of its format, and its files.
DATASETS = {
    "dclm": ("hf://datasets/mlfoundations/dclm-baseline-1.0", JsonlReader, "**/*.jsonl.zst"),
    "fineweb-edu": ("hf://datasets/HuggingFaceFW/fineweb-edu/data", ParquetReader, "**/*.parquet"),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, with paths and Slurm settings from the environment where they are not given."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument

    def add_path(name: str, meaning: str, default: str | None = None) -> None:
        variable = "TST_" + name.strip("-").replace("-", "_").upper()
        value = os.environ.get(variable, default)
        add(name, default=value, required=value is None, help=f"{meaning} (also ${variable})")

    add("dataset", choices=DATASETS)
    add_path("--input", "folder of the files, local or remote; default: where it is published", "")
    add_path("--output-prefix", "corpus without extension")
    add_path("--tokenizer", "tokenizer.json, or a folder with one")
    add("--eod-token", help="end-of-document token (default: the tokenizer's eos_token)")
    add("--tasks", type=int, default=8, help="parts of the work (default: %(default)s)")
    add("--workers", type=int, default=-1, help="tasks at a time (default: no limit)")
    add("--max-bad-documents", type=int, default=0, help="of a task, to leave out")
    add("--limit", type=int, default=-1, help="documents a task, for a trial (default: all)")
    add("--slurm", action="store_true", help="submit to Slurm instead of running here")
    group = parser.add_argument_group("Slurm")
    environment = os.environ.get
    group.add_argument("--partition", default=environment("TST_PARTITION"))
    group.add_argument("--account", default=environment("TST_ACCOUNT"))
    group.add_argument("--qos", default=environment("TST_QOS", ""))
    group.add_argument("--time", default="08:00:00", help="of a task (default: %(default)s)")
    group.add_argument("--memory-gb", type=int, default=4, help="of a task (default: %(default)s)")
    group.add_argument("--environment", default=environment("TST_ENVIRONMENT", ""), help="command")
    options = parser.parse_args(arguments)
    # The tasks may run in another folder.
    options.output_prefix = str(Path(options.output_prefix).absolute())
    options.tokenizer = str(Path(options.tokenizer).absolute())
    if options.slurm and not options.partition:
        parser.error("--slurm needs --partition (or $TST_PARTITION)")
    return options


def make_pipelines(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The steps of each task, and of the one that joins the parts."""
    published, reader, pattern = DATASETS[options.dataset]
    folder = f"{options.output_prefix}.parts"
    source = options.input or published
    read = reader(source, glob_pattern=pattern, limit=options.limit, add_file_path=False)
    # datatrove's filters go between these two.
    write = WriteMegatronPart(
        folder, options.tokenizer, options.eod_token, max_bad_documents=options.max_bad_documents
    )
    return [read, write], [MergeMegatronParts(folder, options.tasks, options.output_prefix)]


def make_executor(options: argparse.Namespace) -> LocalPipelineExecutor | SlurmPipelineExecutor:
    """The executor of the last task, which starts the others first."""
    parts, merge = make_pipelines(options)
    logs = Path(f"{options.output_prefix}.logs")
    if not options.slurm:
        first = LocalPipelineExecutor(
            parts, options.tasks, options.workers, str(logs / "parts"), start_method="spawn"
        )
        return LocalPipelineExecutor(merge, logging_dir=str(logs / "merge"), depends=first)
    settings = {
        "time": options.time,
        "partition": options.partition,
        "mem_per_cpu_gb": options.memory_gb,
        "qos": options.qos,
        "env_command": options.environment,
        "sbatch_args": {"account": options.account} if options.account else {},
    }
    first = SlurmPipelineExecutor(
        parts,
        options.tasks,
        workers=options.workers,
        job_name="tokenize",
        logging_dir=str(logs / "parts"),
        **settings,
    )
    return SlurmPipelineExecutor(
        merge, 1, job_name="merge", logging_dir=str(logs / "merge"), depends=first, **settings
    )


if __name__ == "__main__":
    make_executor(parse_arguments()).run()
