"""Which documents a run leaves out: those of its command line and those of its checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training import print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_tst.common.errors import UsageError
from megatron_tst.data.blend import find_corpus
from megatron_tst.settings.arguments import has_bags


def leave_out_documents(args: Namespace, samples_read: int) -> None:
    """Adds the documents of ``--tst-exclude-documents`` to those that the checkpoint leaves out.

    Args:
        args: validated; ``tst_left_out`` holds what the checkpoint leaves out, and what this run
            does afterwards: the sample from which on, and pairs of a corpus and a document.
        samples_read: of the checkpoint.

    Raises:
        UsageError: a list that cannot be read or names what is not there, or a resume of a run
            whose order cannot be kept.
    """
    if args.tst_exclude_documents is not None:
        before = {tuple(pair) for _, pairs in args.tst_left_out for pair in pairs}
        new = [pair for pair in _read_list(args) if pair not in before]
        if new and samples_read and not has_bags(args):
            raise UsageError(
                f"--tst-exclude-documents {args.tst_exclude_documents} leaves {len(new)} documents "
                "out of a run of --tst-bag-size 1 that has begun, whose order is Megatron's and "
                "depends on all documents: start it again from its first step, or a new run from "
                "its weights with --finetune."
            )
        if new:
            args.tst_left_out = [*args.tst_left_out, [samples_read, [list(pair) for pair in new]]]
    for first_sample, pairs in args.tst_left_out:
        print_rank_0(f"> {len(pairs)} documents are left out from sample {first_sample} on")


def _read_list(args: Namespace) -> list[tuple[int, int]]:
    """The documents of the list in order, each as the place of its corpus and its index."""
    path = Path(args.tst_exclude_documents)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--tst-exclude-documents {path} cannot be read ({error}): pass a text file."
        ) from error
    blend, per_split = get_blend_and_blend_per_split(args)
    corpora: list[str] = (blend or (per_split or [None])[0] or ([], None))[0]
    counts = [len(IndexedDataset(corpus)) for corpus in corpora]
    found = set()
    for number, line in enumerate(lines, start=1):
        # Behind the document may stand what tst trace prints of it.
        entry = line.strip().split("  ")[0]
        if not entry or entry.startswith("#"):
            continue
        try:
            corpus, document = find_corpus(entry, corpora)
        except UsageError as error:
            raise UsageError(f"--tst-exclude-documents {path}, line {number}: {error}") from error
        if document >= counts[corpus]:
            raise UsageError(
                f"--tst-exclude-documents {path}, line {number}: {corpora[corpus]} has documents "
                f"0 to {counts[corpus] - 1}, and no {document}."
            )
        found.add((corpus, document))
    return sorted(found)
