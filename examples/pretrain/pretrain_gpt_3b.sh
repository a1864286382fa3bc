#!/usr/bin/env bash
# 3B, dense: the shape of SmolLM3-3B, without its NoPE layers, with Llama 3's
# vocabulary (arXiv 2605.06546). 3,337,766,912 parameters.
# Published on 64 B200 (NNODES=8) and DCLM: 20,000 steps in 247 GPU hours, TST 2.676; baseline 2.808
# for equal FLOPs; 2.677 with TRAIN_STEPS=36000 (443 hours) for equal loss; 2.640 with
# TRAIN_STEPS=50000 (622 hours) for equal data.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
TRAIN_STEPS=${TRAIN_STEPS:-20000}

LAYERS=36
MODEL_ARGS=(
  --transformer-impl transformer_engine
  --hidden-size 2048
  --ffn-hidden-size 11008
  --num-attention-heads 16
  --kv-channels 128
  --group-query-attention
  --num-query-groups 4
  --position-embedding-type rope
  # Our choice: SmolLM3's; Llama 3 has 500000.
  --rotary-base "${ROTARY_BASE:-50000}"
  --rotary-percent 1.0
  --normalization RMSNorm
  --norm-epsilon 1e-5
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
  --make-vocab-size-divisible-by 128
)

TRAINING_ARGS=(
  --bf16
  --train-iters "$TRAIN_STEPS"
  # 2^21 tokens a batch as published; their division into sequences is our choice.
  --seq-length 4096
  --max-position-embeddings 4096
  --global-batch-size 512
  --micro-batch-size "${MICRO_BATCH_SIZE:-2}"
  --optimizer adam
  --adam-beta1 0.9
  --adam-beta2 0.95
  --lr 2e-4
  --min-lr 0
  --lr-decay-style WSD
  --lr-wsd-decay-style linear
  --lr-warmup-iters 2000
  --lr-wsd-decay-iters "$((TRAIN_STEPS / 10))"
  # Our choice.
  --weight-decay 0.1
  --clip-grad 1.0
  --seed 1234
)

case $VARIANT in
  # Phase 1 reads 75B tokens in the first 6,000 steps, 105B in all.
  tst) TST_ARGS=(--tst-bag-size 6 --tst-step-ratio 0.3) ;;
  baseline) TST_ARGS=() ;;
esac

PARALLEL_ARGS=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --ddp-average-in-collective
)

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
