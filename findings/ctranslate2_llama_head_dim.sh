#!/usr/bin/env bash
# CTranslate2 4.8.5: a Llama whose heads are not hidden size / heads wide is converted and cannot run.
#
# Behaviour: the converter's loader of Llama does not hand on head_dim, as that of Qwen3 does. It
# converts the folder without a word, the model loads, and the first prompt fails.
# Expected: the logits of transformers, or a refusal by the converter.
# Seen: heads of 16 (64 / 4) run; heads of 32 end with ValueError "axis 2 has dimension 256 but expected 128".
#
# Exit code 0: the behaviour is there. FINDINGS_PYTHON (with ctranslate2) skips the installation; no
# GPU is needed.
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
  "$python" -m pip install --quiet torch==2.14.1 numpy==2.5.5 ctranslate2==4.8.5 transformers==5.23.0
fi

cat >"$folder/finding.py" <<'PYTHON'
import sys

import ctranslate2
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def run(head_dim):
    folder = f"{sys.argv[1]}/{head_dim}"
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    config = LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = models.BPE(vocab={f"t{token}": token for token in range(256)}, merges=[])
    tokenizer = Tokenizer(vocabulary)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t0", eos_token="t0"
    ).save_pretrained(folder)
    TransformersConverter(folder).convert(f"{folder}/converted")
    generator = ctranslate2.Generator(f"{folder}/converted", compute_type="float32")
    print(f"heads of {head_dim}: converted and loaded")
    try:
        generator.forward_batch([[1, 2, 3]])
    except ValueError as error:
        print(f"heads of {head_dim}: {error}")
        return False
    return True


print("ctranslate2", ctranslate2.__version__)
assert ctranslate2.__version__ == "4.8.5"
assert run(16)
sys.exit(run(32))
PYTHON
"$python" -W ignore "$folder/finding.py" "$folder" 2>/dev/null
