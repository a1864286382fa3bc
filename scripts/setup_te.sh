#!/usr/bin/env bash
# Builds Transformer Engine for the preflight, where neither a GPU nor a CUDA toolkit is needed.
#
# It goes into a folder of its own in .venv, which training does not see: Megatron takes other ways
# where it finds Transformer Engine, on CPUs too.
#
# Its kernels come compiled; its half for PyTorch comes as C++ that is compiled here, against the
# headers of CUDA, cuDNN and NCCL, which are in wheels beside torch's libraries. Inside of a
# container that brings Transformer Engine this is not to be run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=.venv/bin/python
readonly folder=.venv/transformer-engine
readonly stamp=.venv/installed-te
readonly log=.venv/build-te.log

say() { echo "setup-te: $*"; }
fail() {
  echo "setup-te: $*" >&2
  exit 1
}
ask() { "$python" -c "$1" 2>/dev/null; }
install() {
  "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --quiet \
    --constraint constraints.txt "$@" 2> >(sed '/^WARNING: /d' >&2)
}

# Named in full below: of a name without a version pip would take the newest.
version=$(sed -n 's/^transformer_engine_torch==//p' constraints.txt)
[[ $version ]] || fail "constraints.txt has no transformer_engine_torch==VERSION: add it."
ask '' || fail ".venv is missing: run 'make setup'."

# What a build fits. pip would not build again for another torch.
wanted=$({
  pwd -P
  "$python" --version
  grep -E '^(torch|transformer_engine\w*|nvidia-(cudnn|nccl)\S*)==' constraints.txt
} | sha256sum)
[[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]] || exit 0
rm -f "$stamp"

compiler=${CXX:-c++}
command -v "$compiler" >/dev/null ||
  fail "no C++ compiler ('$compiler'): install g++ (Debian/Ubuntu: apt-get install g++), or name one in CXX."
[[ -f $(ask 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
  fail "the headers of $("$python" --version) are missing (Debian/Ubuntu: apt-get install python3-dev)."
cuda=$(ask 'import torch; print(torch.version.cuda)') || fail "torch does not import: run 'make setup'."
[[ $cuda == 13.* ]] ||
  fail "torch in .venv is built for CUDA $cuda, and the pinned Transformer Engine for CUDA 13:" \
    "install the torch of constraints.txt."

export MAX_JOBS=${MAX_JOBS:-$(nproc)}
say "building Transformer Engine $version with $MAX_JOBS compilers at a time:" \
  "about 15 minutes of one core's time, up to 3 GB of memory each (MAX_JOBS=1: one at a time)"
started=$SECONDS

# nvcc compiles nothing: it is asked for its version.
install 'cuda-toolkit[cccl,crt,nvcc]' ninja pybind11 wheel
nvidia=$(ask 'import nvidia; print(next(iter(nvidia.__path__)))')
for header in cudnn/include/cudnn nccl/include/nccl cu13/include/{cuda_runtime,crt/host_config}; do
  [[ -f $nvidia/$header.h ]] ||
    fail "$nvidia/$header.h is missing, of a wheel that torch brings: remove .venv and run 'make setup'."
done

# Without pip's cache, which may have a build for another torch, and without looking for a finished
# one elsewhere.
if ! PATH=$PWD/.venv/bin:$PATH \
  CUDA_HOME=$nvidia/cu13 \
  NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
  NVTE_FRAMEWORK=pytorch \
  NVTE_PYTORCH_FORCE_BUILD=TRUE \
  install --verbose --no-cache-dir --no-deps --no-build-isolation --upgrade --target "$folder" \
  {transformer_engine_torch,transformer_engine,transformer_engine_cu13}"==$version" >"$log" 2>&1; then
  grep -m 5 -E 'error:|Error:|Killed' "$log" >&2 || tail -n 20 "$log" >&2
  fail "the build has failed; all of its output is in $log."
fi
say "compiled after $((SECONDS - started)) s"
# What its Python half imports, beside what torch and Megatron bring.
install einops onnx onnxscript nvdlfw-inspect
# Its library links the driver's, which is missing without a GPU, and calls nothing of it there.
"$compiler" -shared -fPIC -Wl,-soname,libcuda.so.1 -x c /dev/null -o "$folder/libcuda.so.1"

"$python" -c 'from megatron_tst.preflight.engine_path import make_engine_importable
make_engine_importable()
import transformer_engine.pytorch' >"$log" 2>&1 || {
  tail -n 3 "$log" >&2
  fail "Transformer Engine was built and does not import."
}
echo "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "Transformer Engine is ready after $((SECONDS - started)) s"
