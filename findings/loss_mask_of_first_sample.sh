#!/usr/bin/env bash
# megatron-core 0.19.2, torch 2.14.1: a GPTDataset masks in every sample what it masked in the first.
#
# Behaviour: GPTDataset keeps the loss mask of the first sample that is read and then writes the
# zeros of that sample's padding into it. Every later sample gets a copy: its loss leaves out the
# positions at which the first one had padding. Which positions these are depends on the sample
# that is read first, so that a resumed run trains on other ones.
# Expected: a sample without padding has a loss mask of ones.
# Seen: with the padded sample read first, all four samples have the mask [1, 0, 1, 1]; with another
#   one read first, only the padded one has it.
# Reported as Megatron-LM issue 1711; pull request 6981 is open.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON=/path/to/python skips the installation
# (torch 2.14.1 and megatron-core 0.19.2 must be in its environment; no GPU is needed).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [[ -z $python ]]; then
  for base in python3.12 python3 ~/.pyenv/versions/3.12*/bin/python; do
    "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && break
  done
  "$base" -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5 packaging==26.3 megatron-core==0.19.2
fi

cat >"$folder/finding.py" <<'PYTHON'
import sys

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

PAD, END = 98, 99
prefix = f"{sys.argv[1]}/text"
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
builder.add_document(torch.tensor([1, 2, PAD, *range(4, 18)]), [17])
builder.finalize(f"{prefix}.idx")


def dataset():
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=100, eod_id=END, pad_id=PAD
    )
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=4, blend=([prefix], None), split="1,0,0",
        path_to_cache=f"{sys.argv[1]}/cache", tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, (4, 0, 0), lambda: True, config).build()[0]


def masks(order):
    data = dataset()
    return {index: data[index]["loss_mask"].int().tolist() for index in order}


padded = next(index for index in range(4) if PAD in dataset()._query_document_sample_shuffle_indices(index)[0][1:])
others = [index for index in range(4) if index != padded]
first, last = masks([padded, *others]), masks([*others, padded])
print("padded sample first:", list(first.values()))
print("padded sample last: ", list(last.values()))
assert all(mask == [1, 0, 1, 1] for mask in first.values()), "the behaviour has changed"
assert all(last[index] == [1, 1, 1, 1] for index in others), "the behaviour has changed"
PYTHON
CUDA_VISIBLE_DEVICES='' "$python" -W ignore "$folder/finding.py" "$folder"
