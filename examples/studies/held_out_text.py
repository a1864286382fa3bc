"""Writes a sample of the validation text of a corpus, as text.

    python examples/studies/held_out_text.py runs/studies/text/prose --split 97,3,0 \\
      --characters 524288 --output held-out.txt

Megatron parts a corpus by documents, in the order in which they are stored: --split is that of the
run. The sample is pieces of equal length at equal distances in the whole of the validation text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_tst.corpus.tokenizer import load_tokenizer


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="path without .bin and .idx; its tokenizer lies beside it")
    parser.add_argument("--split", default="97,3,0", help="of the run")
    parser.add_argument("--characters", type=int, default=1 << 19, help="of the sample")
    parser.add_argument("--piece", type=int, default=1024, help="characters of a piece")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    corpus = IndexedDataset(args.corpus)
    tokenizer = Tokenizer.from_str(load_tokenizer(Path(f"{args.corpus}-tokenizer")).definition)
    train, validation, _ = parse_and_normalize_split(args.split)
    count = len(corpus.sequence_lengths)
    first, last = round(train * count), round((train + validation) * count)
    text = "\n\n".join(
        tokenizer.decode(corpus[document].tolist(), skip_special_tokens=True)
        for document in range(first, last)
    )
    pieces = args.characters // args.piece
    distance = len(text) / pieces
    begins = [round(piece * distance) for piece in range(pieces)]
    sample = "".join(text[begin : begin + args.piece] for begin in begins)
    args.output.write_bytes(sample.encode())
    print(f"{args.output}: {len(sample)} of {len(text)} characters of {last - first} documents")


if __name__ == "__main__":
    main()
