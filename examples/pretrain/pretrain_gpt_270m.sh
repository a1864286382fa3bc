#!/usr/bin/env bash
# 270M, dense: the shape of SmolLM2-135M with Llama 3's vocabulary (arXiv 2605.06546).
# Published on 8 B200 and DCLM: 20,000 steps in 34 GPU hours, baseline 3.212, TST 3.142; with
# TRAIN_STEPS=100000, 170 GPU hours, baseline 3.092, TST 3.048.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
# Products this narrow are bound by memory and launches: FP8 gains little, graphs much. Not measured.
PRECISION=${PRECISION:-bf16}
CUDA_GRAPHS=${CUDA_GRAPHS:-1}
TRAIN_STEPS=${TRAIN_STEPS:-20000}

LAYERS=30
MODEL_ARGS=(
  --transformer-impl transformer_engine
  --hidden-size 576
  --ffn-hidden-size 1536
  --num-attention-heads 9
  --kv-channels 64
  # Our choice: 9 groups are multi-head attention (267,225,408 parameters, which fit the name); 3 as
  # SmolLM2 has them make 253,954,368.
  --group-query-attention
  --num-query-groups "${NUM_QUERY_GROUPS:-9}"
  --position-embedding-type rope
  # Our choice: Llama 3's; SmolLM2 has 10000.
  --rotary-base "${ROTARY_BASE:-500000}"
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
  --seq-length 2048
  --max-position-embeddings 2048
  --global-batch-size 1024
  --micro-batch-size "${MICRO_BATCH_SIZE:-16}"
  --optimizer adam
  --adam-beta1 0.9
  --adam-beta2 0.95
  --lr 2e-3
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
