#!/usr/bin/env bash
# Submits a script of examples/pretrain to NGC Base Command.
set -euo pipefail

if (($# == 0)); then
  cat >&2 <<USAGE
usage: VARIABLE=... $0 SCRIPT [Megatron and --tst-* arguments]

required
  NGC_ORG, NGC_TEAM, ACE, INSTANCE   where: INSTANCE for example dgxa100.80g.8.norm, 8 GPUs
  IMAGE                              the image of the Dockerfile, pushed to the organisation
  DATASET_ID                         with corpus.bin, corpus.idx and tokenizer/; mounted at /data
  WORKSPACE_ID                       mounted at /runs; kept between jobs, so a run resumes from it
optional
  REPLICAS (1)                       nodes
  RUNTIME (7D)                       of a job; the same command again goes on
  VARIANT, PRECISION, TRAIN_STEPS, EXIT_DURATION_MINS ...          of the script
DRY_RUN=1 prints the command and ends.
USAGE
  exit 2
fi
for name in NGC_ORG NGC_TEAM ACE INSTANCE IMAGE DATASET_ID WORKSPACE_ID; do
  if [[ -z ${!name:-} ]]; then
    echo "error: $name is not set; $0 without arguments lists the variables" >&2
    exit 2
  fi
done
if [[ ${DRY_RUN:-0} != [01] ]]; then
  echo "error: DRY_RUN is '$DRY_RUN': use 0 or 1" >&2
  exit 2
fi

name=$(basename "$1" .sh)-${VARIANT:-tst}
replicas=${REPLICAS:-1}

environment=(
  DATA_PATH=/data/corpus
  TOKENIZER=/data/tokenizer
  "OUTPUT_DIR=/runs/$name"
)
for variable in VARIANT MODEL PRECISION CUDA_GRAPHS FSDP TRAIN_STEPS MICRO_BATCH_SIZE \
  SAVE_INTERVAL ASYNC_SAVE EXIT_DURATION_MINS NUM_QUERY_GROUPS ROTARY_BASE GPUS_PER_NODE \
  WANDB_PROJECT STOCK_MEGATRON; do
  if [[ -n ${!variable:-} ]]; then
    environment+=("$variable=${!variable}")
  fi
done
printf -v inner '%q ' env "${environment[@]}" "$@"
if ((replicas > 1)); then
  # bcprun starts a process a GPU on all replicas and sets RANK, LOCAL_RANK, WORLD_SIZE and
  # MASTER_ADDR, which the script takes.
  # shellcheck disable=SC2016  # the variables are those of the job
  printf -v command 'bcprun --nnodes $NGC_ARRAY_SIZE --npernode $NGC_GPUS_PER_NODE --cmd %q' "$inner"
else
  command=$inner
fi

JOB_ARGS=(
  --name "$name"
  --org "$NGC_ORG"
  --team "$NGC_TEAM"
  --ace "$ACE"
  --instance "$INSTANCE"
  --image "$IMAGE"
  --datasetid "$DATASET_ID:/data"
  --workspace "$WORKSPACE_ID:/runs:RW"
  # The log of the job; checkpoints and TensorBoard are in the workspace.
  --result /results
  --total-runtime "${RUNTIME:-7D}"
)
if ((replicas > 1)); then
  JOB_ARGS+=(--replicas "$replicas" --array-type PYTORCH)
fi
JOB_ARGS+=(--commandline "$command")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' ngc base-command job run "${JOB_ARGS[@]}"
  echo
  exit
fi
exec ngc base-command job run "${JOB_ARGS[@]}"
