#!/usr/bin/env bash
# megatron-core 0.19.2: --rope-scaling-factor has no effect on GPT models.
#
# Behaviour: the parser takes the factor, and gpt_config_from_args hands on --use-rope-scaling without
# it. The configuration of the model keeps its default of 8. Llama 3.1 has 8; Llama 3.2 has 32.
# Expected: the factor of the command line.
# Seen: 8.0 for --rope-scaling-factor 32. A model of Llama 3.2's shape is trained on other
#   positions than it was made for, without a message. NVIDIA/Megatron-LM issue 6305; mended on main.
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON skips the installation; no GPU is needed.
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
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5 "megatron-core[training]==0.19.2"
fi

cat >"$folder/finding.py" 2>/dev/null<<'PYTHON'
import argparse
from importlib.metadata import version

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments

print("megatron-core", version("megatron-core"))
assert version("megatron-core") == "0.19.2"
flags = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 128
--position-embedding-type rope --no-rope-fusion --use-rope-scaling --rope-scaling-factor 32"""
args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags.split())
# What Megatron's own validation fills in before.
vars(args).update(
    {"kv_channels": 16, "ffn_hidden_size": 256, "padded_vocab_size": 128, "params_dtype": None}
)
config = gpt_config_from_args(args)
print(f"asked for {args.rope_scaling_factor}, got {config.rope_scaling_factor}")
assert (config.rope_scaling, args.rope_scaling_factor) == (True, 32.0)
raise SystemExit(config.rope_scaling_factor != 8.0)
PYTHON
"$python" -W ignore "$folder/finding.py" 2>/dev/null
