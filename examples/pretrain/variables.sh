# Sourced first by the scripts beside it: the variables that a user sets, and what they may be.
# shellcheck shell=bash

usage() {
  cat >&2 <<USAGE
usage: DATA_PATH=... TOKENIZER=... OUTPUT_DIR=... [VARIABLE=...] $0 [Megatron and --tst-* arguments]

Arguments are appended to the ones of the script and win over them.

required
  DATA_PATH       corpus without .bin/.idx, or weights and corpora: "50 dclm 50 fineweb_edu";
                  mock: random ids, to measure speed before there is text
  TOKENIZER       folder or name of a Hugging Face tokenizer
  OUTPUT_DIR      checkpoints, TensorBoard and data cache; on a file system that all nodes see
what to train
  VARIANT         tst (default) or baseline
  MODEL           Megatron's model: hybrid (default, HybridModel) or gpt (GPTModel, which is deprecated)
  TRAIN_STEPS     optimizer steps; the decay of the learning rate is the last tenth of them
  PRECISION       mxfp8 (B200; default from 3B on), fp8 (H100) or bf16 (default below)
  CUDA_GRAPHS     1 (default below 3B): layers are replayed as CUDA graphs; 0: they are not
  FSDP            1: weights, gradients and optimizer in shards of torch FSDP2, in bf16 and without
                  CUDA graphs; 0 (default): the optimizer alone in shards
  NUM_QUERY_GROUPS, ROTARY_BASE   of the dense models, where the paper leaves them open
where
  NNODES, NODE_RANK, GPUS_PER_NODE, MASTER_ADDR, MASTER_PORT      as torchrun has them
  MICRO_BATCH_SIZE                                                sequences a GPU at a time
  STOCK_MEGATRON  folder of Megatron-LM, whose script does phase 2 (docs/stock-megatron.md)
checkpoints and logs
  SAVE_INTERVAL       steps between checkpoints (default 1000)
  ASYNC_SAVE          1 (default): written in the background; 0: training waits
  EXIT_DURATION_MINS  save and exit with 0 after so many minutes (default: never)
  WANDB_PROJECT       log to W&B too
DRY_RUN=1 prints the command and ends.
USAGE
}

fail() {
  echo "error: $*" >&2
  exit 2
}

for name in DATA_PATH TOKENIZER OUTPUT_DIR; do
  if [[ -z ${!name:-} ]]; then
    echo "error: $name is not set" >&2
    usage
    exit 2
  fi
done

VARIANT=${VARIANT:-tst}
[[ $VARIANT == tst || $VARIANT == baseline ]] || fail "VARIANT is '$VARIANT': use tst or baseline"
for name in CUDA_GRAPHS FSDP ASYNC_SAVE DRY_RUN; do
  [[ ${!name:-0} == [01] ]] || fail "$name is '${!name}': use 0 or 1"
done
# Such as 1e5 is none, and bash reads 010 as 8.
for name in TRAIN_STEPS NNODES MASTER_PORT MICRO_BATCH_SIZE SAVE_INTERVAL \
  EXIT_DURATION_MINS NUM_QUERY_GROUPS ROTARY_BASE; do
  [[ ${!name:-1} =~ ^[1-9][0-9]{0,11}$ ]] || fail "$name is '${!name}': use a whole number, 1 or more"
done
[[ ${NODE_RANK:-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
  fail "NODE_RANK is '$NODE_RANK': use a whole number, 0 or more"
# As torchrun takes it.
[[ ${GPUS_PER_NODE:-8} =~ ^(auto|gpu|cpu|[1-9][0-9]{0,8})$ ]] ||
  fail "GPUS_PER_NODE is '$GPUS_PER_NODE': use a whole number, 1 or more, or gpu for all of a node"
