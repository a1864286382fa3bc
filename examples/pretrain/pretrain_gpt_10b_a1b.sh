#!/usr/bin/env bash
# 10B-A1B, mixture of experts: a scaled-down Qwen3-MoE with its vocabulary (arXiv 2605.06546).
# 10,489,144,832 parameters, of which a token uses 962,700,800 without embeddings.
# Published on 64 B200 (NNODES=8), half DCLM and half FineWeb-Edu: baseline 125,000 steps in 12,311
# GPU hours, 2.252; TST 49,983 steps in 4,768 GPU hours, 2.236.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/variables.sh"
case $VARIANT in
  tst)
    TRAIN_STEPS=${TRAIN_STEPS:-49983}
    # Phase 1 reads 1.68T tokens in the first 12,483 steps, 2T in all. Bags of 8 and more are
    # predicted with power-law weights unless --tst-target-weighting says otherwise.
    TST_ARGS=(--tst-bag-size 16 --tst-step-ratio 0.24975)
    ;;
  baseline)
    TRAIN_STEPS=${TRAIN_STEPS:-125000}
    TST_ARGS=()
    ;;
esac

LAYERS=32
MODEL_ARGS=(
  --transformer-impl transformer_engine
  --hidden-size 1536
  --ffn-hidden-size 4096
  --num-attention-heads 24
  --kv-channels 128
  --group-query-attention
  --num-query-groups 4
  --qk-layernorm
  --position-embedding-type rope
  --rotary-base 50000
  --rotary-percent 1.0
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0
  --hidden-dropout 0
  # The tokenizer has 151,669 ids.
  --padded-vocab-size 151936
)

MOE_ARGS=(
  --num-experts 128
  --moe-ffn-hidden-size 512
  --moe-router-topk 8
  # Without --moe-router-pre-softmax: the softmax of the chosen logits is Qwen3's renormalised one.
  --moe-router-score-function softmax
  --moe-router-dtype fp32
  --moe-router-load-balancing-type global_aux_loss
  --moe-aux-loss-coeff 1e-3
  --moe-grouped-gemm
  --moe-permute-fusion
  --moe-router-fusion
  # Faster between NVLink domains, where it is installed:
  # --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep
  --moe-token-dispatcher-type alltoall
)

TRAINING_ARGS=(
  --bf16
  --train-iters "$TRAIN_STEPS"
  # 2^23 tokens a batch as published; their division into sequences is our choice.
  --seq-length 8192
  --max-position-embeddings 8192
  --global-batch-size 1024
  --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
  --optimizer adam
  --adam-beta1 0.9
  --adam-beta2 0.95
  --lr 3e-4
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

PARALLEL_ARGS=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  # The GPUs of one node; data parallel over all of them otherwise.
  --expert-model-parallel-size 8
  --expert-tensor-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
  --ddp-average-in-collective
)

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$@"
