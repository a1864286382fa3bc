# Sourced last by the scripts beside it: what does not depend on the model, and the launch.
# shellcheck shell=bash
# VARIANT, LAYERS and the arrays that are not set here come from those scripts:
# shellcheck disable=SC2153,SC2154

# The value of an argument of the run, or nothing: the last one wins, as in Megatron's parser.
value_of() {
  local word previous='' value=''
  for word in "${TRAINER[@]}"; do
    case $word in
      "$1="*) value=${word#*=} ;;
      *) [[ $previous != "$1" ]] || value=$word ;;
    esac
    previous=$word
  done
  printf '%s' "$value"
}

# Over several lines too, as in a YAML file; read ends with 1 where there is no more to read.
read -r -d '' -a corpora <<<"$DATA_PATH" || true
CORPUS_ARGS=(--data-path "${corpora[@]}")
if [[ $DATA_PATH == mock ]]; then
  CORPUS_ARGS=(--mock-data)
fi

DATA_ARGS=(
  "${CORPUS_ARGS[@]}"
  --data-cache-path "$OUTPUT_DIR/data-cache"
  # Our choice; evaluations read 16 batches of it, the same ones each time.
  --split '9995,5,0'
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "$TOKENIZER"
  --num-workers 4
  # Attention is causal by itself; a mask of [b, 1, l, l] would be built, copied and not used.
  --no-create-attention-mask-in-dataloader
)

# HybridModel counts attention and MLP as a layer each.
case ${MODEL:=hybrid} in
  hybrid)
    half='*-' layers_of_one=2 pattern=''
    [[ -z ${MOE_ARGS[*]:-} ]] || half='*E'
    for ((layer = 0; layer < LAYERS; layer++)); do pattern+=$half; done
    MODEL_ARGS+=(--hybrid-layer-pattern "$pattern")
    ;;
  gpt)
    layers_of_one=1
    MODEL_ARGS+=(--num-layers "$LAYERS")
    ;;
  *) fail "MODEL is '$MODEL': use hybrid or gpt" ;;
esac

# Matrix products of the layers. Embedding, output layer, router, norms and losses stay in bf16 and
# fp32, whatever is chosen here.
case ${PRECISION:=mxfp8} in
  mxfp8) # Blackwell: blocks of 32 values share a scale, so e4m3 serves gradients too.
    FP8_ARGS=(
      --fp8-format e4m3
      --fp8-recipe mxfp8
      --fp8-param-gather
      --reuse-grad-buf-for-mxfp8-param-ag
    )
    ;;
  fp8) # Hopper: one scale a tensor, computed anew at each use; gradients need the range of e5m2.
    FP8_ARGS=(
      --fp8-format hybrid
      --fp8-recipe tensorwise
      --fp8-param-gather
    )
    ;;
  bf16) FP8_ARGS=() ;;
  *) fail "PRECISION is '$PRECISION': use mxfp8, fp8 or bf16" ;;
esac
if [[ $PRECISION != bf16 ]]; then
  FP8_ARGS+=(
    --first-last-layers-bf16
    --num-layers-at-start-in-bf16 "$layers_of_one"
    --num-layers-at-end-in-bf16 "$layers_of_one"
  )
  if [[ -n ${MOE_ARGS[*]:-} ]]; then
    # An expert gets any number of tokens, and these products take multiples of 16 or 32.
    FP8_ARGS+=(--moe-router-padding-for-quantization)
  fi
fi

if [[ ${FSDP:-0} == 1 ]]; then
  [[ $PRECISION == bf16 ]] || fail "FSDP=1 with PRECISION=$PRECISION was not tried: use PRECISION=bf16"
  [[ -z ${STOCK_MEGATRON:-} ]] || fail "FSDP=1: Megatron 0.19.2 alone neither saves nor resumes it right"
  [[ " ${PARALLEL_ARGS[*]} " != *' --expert-model-parallel-size '* ]] ||
    fail 'FSDP=1: Megatron has no expert parallelism with torch FSDP2'
  PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --use-torch-fsdp2
    --no-gradient-accumulation-fusion
  )
  CUDA_GRAPHS=0
fi

# All ranks collect garbage at the same steps, so that none waits for another that does.
RUNTIME_ARGS=(--manual-gc --manual-gc-interval 100)
if [[ ${CUDA_GRAPHS:-0} == 1 ]]; then
  RUNTIME_ARGS+=(--cuda-graph-impl transformer_engine --te-rng-tracker)
fi

CHECKPOINT_ARGS=(
  --save "$OUTPUT_DIR/checkpoints"
  --load "$OUTPUT_DIR/checkpoints"
  --save-interval "${SAVE_INTERVAL:-1000}"
  --ckpt-format torch_dist
  --ckpt-fully-parallel-load
  --ckpt-assume-constant-structure
  --dist-ckpt-strictness log_all
  # SIGTERM: finish the step, save, exit with 0.
  --exit-signal-handler
  # NaN guard: a NaN or Inf ends the run before anything is saved. Megatron's own default repeats
  # the step, saves, and exits.
  --rerun-mode disabled
)
if [[ ${ASYNC_SAVE:-1} == 1 ]]; then
  CHECKPOINT_ARGS+=(--async-save --use-persistent-ckpt-worker --async-strategy mcore)
fi
if [[ -n ${EXIT_DURATION_MINS:-} ]]; then
  CHECKPOINT_ARGS+=(--exit-duration-in-mins "$EXIT_DURATION_MINS")
fi

LOGGING_ARGS=(
  --tensorboard-dir "$OUTPUT_DIR/tensorboard"
  --log-interval 10
  --log-throughput
  --log-timers-to-tensorboard
  --log-validation-ppl-to-tensorboard
  --eval-interval 1000
  --eval-iters 16
)
if [[ -n ${WANDB_PROJECT:-} ]]; then
  LOGGING_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$(basename "$0" .sh)-$VARIANT")
fi

# Several bag sizes take the place of the one above.
[[ " $*" == *" --tst-schedule"* || " $*" == *" --tst-bag-sizes"* ]] && TST_ARGS=()

PROGRAM=(-m megatron_tst.pretrain)
if [[ -n ${STOCK_MEGATRON:-} ]]; then
  # Phase 2 without this project: docs/stock-megatron.md.
  PROGRAM=("$STOCK_MEGATRON/pretrain_$MODEL.py")
  TST_ARGS=()
else
  # Lets a resume have any other parallel layout. Megatron 0.19.2 by itself can save wrong master
  # weights and moments with it (docs/troubleshooting.md).
  CHECKPOINT_ARGS+=(--dist-ckpt-optim-fully-reshardable)
fi

TRAINER=(
  "${PROGRAM[@]}"
  "${MODEL_ARGS[@]}"
  "${MOE_ARGS[@]}"
  "${TRAINING_ARGS[@]}"
  "${TST_ARGS[@]}"
  "${PARALLEL_ARGS[@]}"
  "${FP8_ARGS[@]}"
  "${DATA_ARGS[@]}"
  "${RUNTIME_ARGS[@]}"
  "${CHECKPOINT_ARGS[@]}"
  "${LOGGING_ARGS[@]}"
  "$@"
)

if [[ -n ${LOCAL_RANK:-} ]]; then
  # Slurm or bcprun has started this rank, and says by RANK and WORLD_SIZE which one it is.
  COMMAND=(python "${TRAINER[@]}")
else
  NNODES=${NNODES:-1}
  if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ]]; then
    fail "NNODES is $NNODES: set MASTER_ADDR to the first node and NODE_RANK to 0 .. $((NNODES - 1))"
  fi
  DISTRIBUTED_ARGS=(
    --nnodes "$NNODES"
    --node-rank "${NODE_RANK:-0}"
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --master-addr "${MASTER_ADDR:-127.0.0.1}"
    --master-port "${MASTER_PORT:-29500}"
  )
  COMMAND=(torchrun "${DISTRIBUTED_ARGS[@]}" "${TRAINER[@]}")
fi

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${COMMAND[@]}"
  echo
  exit
fi

tensor=$(value_of --tensor-model-parallel-size)
context=$(value_of --context-parallel-size)
if [[ ${FSDP:-0} == 1 ]]; then
  # One connection keeps gathering from overlapping, and Megatron refuses it.
  unset CUDA_DEVICE_MAX_CONNECTIONS
elif [[ $PRECISION != mxfp8 ]] && ((${tensor:-1} * ${context:-1} > 1)); then
  # The order of kernels that tensor and context parallelism rely on, before Blackwell. Elsewhere
  # one connection only keeps communication from overlapping.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi
if [[ " ${TRAINER[*]} " != *' --use-nccl-ub '* ]]; then
  # Bags and tokens need blocks of other sizes: less fragmentation at the switch. Memory that NCCL
  # registers for itself cannot lie in such segments.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi
graphs=$(value_of --cuda-graph-impl)
if [[ ${graphs:-none} != none ]]; then
  # A graph that NCCL registers in such segments reads memory that is gone; Megatron asserts it.
  export NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0}
fi
# How long torchrun waits for ranks that save after a SIGTERM; by itself it kills them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-840}

mkdir -p "$OUTPUT_DIR"
exec "${COMMAND[@]}"
