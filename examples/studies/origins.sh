#!/usr/bin/env bash
# Trains and measures one seed of docs/results/origins.md, on one core; done steps are not done again.
#   make study STUDY=long      # once, for the text; it may be stopped when the runs begin
#   for seed in 0 1 2; do examples/studies/origins.sh $seed; done
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:?the seed of examples/studies/long.yaml: 0, 1 or 2}
runs=runs/origins text=runs/studies/text/prose switch=3810 last=12700
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore PYTHONPATH=$PWD
python=.venv/bin/python

# The arguments of the study at 127k parameters.
common=(
  --use-mcore-models --position-embedding-type rope --normalization RMSNorm --swiglu
  --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
  --hidden-dropout 0 --make-vocab-size-divisible-by 1 --seq-length 128
  --max-position-embeddings 128 --micro-batch-size 8 --global-batch-size 8 --min-lr 0
  --lr-decay-style WSD --lr-wsd-decay-style linear --adam-beta1 0.9 --adam-beta2 0.95
  --weight-decay 0.1 --clip-grad 1.0 --split '97,3,0' --data-path "$text"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$text-tokenizer" --bf16 --num-layers 2
  --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 1 --kv-channels 64
  --eval-interval 1059 --eval-iters 64 --eval-micro-batch-size 64 --eval-global-batch-size 64
  --train-iters "$last" --lr 0.002 --lr-warmup-iters 635 --lr-wsd-decay-iters 1270
  --seed $((seed + 1))
)
bags=(--tst-bag-size 2 --tst-step-ratio 0.3)
each_step=(--log-interval 1 --tensorboard-log-interval 1 --save-interval 10 --exit-interval 4810)
rest=(--log-interval 50 --tensorboard-log-interval 50 --save-interval "$last")

train() { # ARM MODULE FLAGS...: goes on from the last checkpoint in the folder of the arm
  local out=$runs/$1-seed$seed module=$2
  shift 2
  if [[ -e $out/checkpoints/iter_00$last/metadata.json ]]; then return; fi
  mkdir -p "$out"
  echo "$(date +%T) $out"
  "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m "$module" "${common[@]}" \
    --tensorboard-dir "$out/tensorboard" --data-cache-path "$out/cache" \
    --save "$out/checkpoints" --load "$out/checkpoints" "$@" >>"$out/log.txt" 2>&1
}

whole() { # ARM FLAGS...: each step is logged to 1000 steps after the switch
  local checkpoints=$runs/$1-seed$seed/checkpoints arm=$1 after
  shift
  if [[ ! -e $checkpoints/iter_0004810/metadata.json ]]; then
    train "$arm" megatron_tst.pretrain "$@" "${each_step[@]}"
  fi
  for folder in "$checkpoints"/iter_*; do
    after=$((10#${folder##*_} - switch))
    if [[ ! " 0 20 50 100 200 1000 8890 " == *" $after "* ]]; then rm -r "$folder"; fi
  done
  train "$arm" megatron_tst.pretrain "$@" "${rest[@]}"
}

from_switch() { # ARM MODULE FLAGS...: phase 2 of s = 2 in another way
  local checkpoints=$runs/$1-seed$seed/checkpoints arm=$1 module=$2
  shift 2
  if [[ ! -e $checkpoints/iter_000$switch ]]; then
    mkdir -p "$checkpoints"
    cp -r "$runs/s2-seed$seed/checkpoints/iter_000$switch" "$checkpoints"
    printf %s "$switch" >"$checkpoints/latest_checkpointed_iteration.txt"
  fi
  train "$arm" "$module" "${bags[@]}" "${rest[@]}" "$@"
}

whole s2 "${bags[@]}"
whole baseline
# The warm-up is a line from a rate below zero at step 0 through zero at the switch.
from_switch warm-up megatron_tst.pretrain --override-opt_param-scheduler \
  --lr-warmup-iters $((switch + 200)) --lr-warmup-init=-0.0381
from_switch fresh megatron_tst.pretrain --no-load-optim
BETA2=0.9 from_switch beta2-0.9 benchmarks.other_beta2

if [[ ! -e $runs/held-out.txt ]]; then
  "$python" examples/studies/held_out_text.py "$text" --characters 262144 \
    --output "$runs/held-out.txt"
fi
if [[ ! -e $runs/seed$seed.csv ]]; then
  "$python" tools/explain_gain.py --text "$runs/held-out.txt" --tokenizer "$text-tokenizer" \
    --output "$runs/seed$seed.csv" --arm baseline "$runs/baseline-seed$seed" \
    --arm "s = 2" "$runs/s2-seed$seed" --arm "warm-up" "$runs/warm-up-seed$seed" \
    --arm "fresh moments" "$runs/fresh-seed$seed" --arm "beta2 0.9" "$runs/beta2-0.9-seed$seed"
fi
