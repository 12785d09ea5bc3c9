#!/usr/bin/env bash
# Checks the CUDA backend on a machine with a GPU and writes one report: the build, the C++ tests, the tests of kernels
# on the device, the same under compute-sanitizer, random models of known shapes and the default model's real weights
# against the processor, and a short benchmark. Ends within 9 minutes: a part gets what is left of them.
#
#   tools/gpu_check.sh           the report is $OUT/gpu_check.txt, or build/gpu/gpu_check.txt without OUT
#
# Exit: 0 all parts passed; 1 a part failed; 2 none failed, but one was not run, and the report names it.
#
# Needs nvcc, cmake, a C++20 compiler and GoogleTest (see CMakeLists.txt). Besides: compute-sanitizer; Python with numpy
# and pybind11 for the models; with torch (and transformers, for the peer) for the benchmark; and the weights of
# smollm2-135m in the cache of nanobraid, in NANOBRAID_CHECK_MODEL, or as build/weights/smollm2-135m.gguf.part*, pieces
# to be put together where transfers are small (split -b 48M).
#
#   NANOBRAID_JOBS             jobs of the build and of ctest (the number of cores)
#   NANOBRAID_KERNEL_TESTS     which tests of kernels run, as a filter of GoogleTest (all that use the device)
#   NANOBRAID_CHECK_PARTS      only these parts, by the names of the report (all)
#   NANOBRAID_CHECK_MODEL      the file with the weights of the default model
#   NANOBRAID_CHECK_SECONDS    instead of 9 minutes
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
jobs=${NANOBRAID_JOBS:-$(nproc)}
build=build/gpu
report=${OUT:-$build}/gpu_check.txt
seconds=${NANOBRAID_CHECK_SECONDS:-535}
mkdir -p "$build" "$(dirname "$report")"
# Tests of the emulator itself, and of tiles that only a test asks for, have nothing to do on a device.
filter=${NANOBRAID_KERNEL_TESTS:--Emulator*:Reduce*:Gemm*:ReferenceOnDevice*}
default_model=smollm2-135m
default_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
random_models=$build/models
failed=()
not_run=()

say() { printf '%s\n' "$*" | tee -a "$report"; }

wanted() { [[ -z ${NANOBRAID_CHECK_PARTS:-} || " $NANOBRAID_CHECK_PARTS " == *" $1 "* ]]; }

skip() {  # NAME WHY
  say "== $1: NOT RUN: $2"
  not_run+=("$1")
}

# Runs a part with a limit, keeps its output beside the report, and its last lines in it.
part() {  # NAME SECONDS LINES COMMAND...
  local name=$1 limit=$2 lines=$3 begin=$SECONDS log=$build/$1.log status
  shift 3
  if ((limit > seconds - SECONDS)); then limit=$((seconds - SECONDS)); fi
  if ((limit < 5)); then
    skip "$name" "no time is left"
    return 1
  fi
  # In a shell of its own, which knows the functions below. What ignores the first signal gets the second.
  timeout -k 5 "$limit" bash -c '"$@"' part "$@" >"$log" 2>&1
  status=$?
  say "== $name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s"
  tail -n "$([[ $status == 0 ]] && echo "$lines" || echo 40)" "$log" | tee -a "$report"
  if [[ $status != 0 ]]; then failed+=("$name"); fi
  return "$status"
}

configure_and_build() {
  local generator=() python=(-DNANOBRAID_PYTHON=OFF)
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  if has_module pybind11; then
    python=(-DNANOBRAID_PYTHON=ON "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)"
      "-DPython_EXECUTABLE=$(command -v python3)")
  fi
  cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native \
    -DCMAKE_CUDA_FLAGS=-lineinfo -DNANOBRAID_CUDA=ON -DNANOBRAID_DEMOS=OFF -DNANOBRAID_WERROR=OFF "${python[@]}" &&
    cmake --build "$build" -j "$jobs" && make_package
}

# The package as an installed one would lie, if its extension was built.
make_package() {
  local extension=("$build"/_core*.so)
  [[ -f ${extension[0]} ]] || return 0
  mkdir -p "$build/python" && cp -r python/nanobraid "$build/python/" &&
    cp "${extension[0]}" "$build/libnanobraid_cuda.so" "$build/python/nanobraid/"
}

has_module() { python3 -c "import $1" >/dev/null 2>&1; }

# Python with the package of this build, and a cache of exports that goes with the build.
python_here() { PYTHONPATH=$build/python${PYTHONPATH:+:$PYTHONPATH} python3 "$@"; }

device_tests() {  # the tests of the kernels, on the GPU instead of the emulator
  NANOBRAID_TEST_DEVICE=cuda:0 "$build/cuda_emulation_tests" --gtest_brief=1 --gtest_filter="$filter"
}

sanitized() {  # TOOL
  NANOBRAID_TEST_DEVICE=cuda:0 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$build/cuda_emulation_tests" --gtest_brief=1 --gtest_filter="$filter"
}

# Folders of random weights: one shape whole, for the benchmark, and a few layers of the others.
make_random_models() {
  local name layers status=0 made=()
  for name in llama-3.2-1b:16 qwen3-0.6b:4 tinyllama-1.1b:4 qwen2.5-1.5b:4; do
    layers=${name#*:}
    name=${name%:*}
    python3 tools/make_random_model.py --like "$name" --layers "$layers" --dtype bf16 "$random_models/$name" &
    made+=($!)
  done
  for name in "${made[@]}"; do wait "$name" || status=1; done
  return "$status"
}

compare_random_model() {  # NAME
  NANOBRAID_CACHE=$build/cache python_here eval/compare_devices.py --model "$random_models/$1" --tokens 256 \
    --context 128 --new 16 --json "$build/$1.json"
}

# Prints the file with the default model's weights; fails with a word why there is none.
find_weights() {
  local file=$build/$default_model.gguf pieces=(build/weights/"$default_model".gguf.part*)
  if [[ -n ${NANOBRAID_CHECK_MODEL:-} ]]; then
    file=$NANOBRAID_CHECK_MODEL
  elif [[ -f ${pieces[0]} ]]; then
    cat "${pieces[@]}" >"$file"
  else
    file=$(python_here -c "import nanobraid.models as m; print(m.resolve('$default_model'))" 2>/dev/null) || file=
  fi
  if [[ ! -f $file ]]; then
    echo "no weights of $default_model${file:+ in $file}" >&2
    return 1
  fi
  if [[ $(sha256sum "$file" | cut -d' ' -f1) != "$default_sha256" ]]; then
    echo "$file is not the file of $default_model: another checksum" >&2
    return 1
  fi
  echo "$file"
}

compare_default_model() {  # FILE
  python_here eval/compare_devices.py --model "$1" --tokens 2048 --max-kl 1e-3 --new 48 \
    --json "$build/default-model.json"
}

benchmark() {  # OPTION...
  NANOBRAID_CACHE=$build/cache python_here eval/bench_gpu.py --models "$random_models/llama-3.2-1b" --prompt 1024 "$@"
}

streaming() {  # weights from pinned host memory, against the rate of copies
  NANOBRAID_CACHE=$build/cache python_here eval/streaming.py --device cuda --like llama-3.2-1b --layers 16 \
    --shares 0.6 --repeat 2 --folder "$build"
}

# What needs the package.
check_models() {
  local name weights
  wanted random-models && if part random-models 120 4 make_random_models; then
    for name in llama-3.2-1b qwen3-0.6b tinyllama-1.1b qwen2.5-1.5b; do
      part "$name" 60 40 compare_random_model "$name"
    done
  fi
  if wanted default-model; then
    if weights=$(find_weights 2>"$build/weights.txt"); then
      part default-model 90 40 compare_default_model "$weights"
    else
      skip default-model "$(cat "$build/weights.txt")"
    fi
  fi
  if wanted benchmark || wanted benchmark-peer || wanted streaming; then
    if [[ ! -f $random_models/llama-3.2-1b/model.safetensors ]]; then
      skip benchmark "no model of that shape: part random-models makes it"
    elif ! has_module torch; then
      skip benchmark "Python has no torch"
    else
      wanted streaming && part streaming 90 4 streaming
      wanted benchmark && part benchmark 60 12 benchmark --no-peer --rounds 2 --new 64 --json "$build/benchmark.json"
      if wanted benchmark-peer; then
        if ! has_module transformers; then
          skip benchmark-peer "Python has no transformers"
        else
          part benchmark-peer 120 12 benchmark --rounds 1 --new 64 --batches 1 --json "$build/benchmark-peer.json"
        fi
      fi
    fi
  fi
}

main() {
  local tool name
  printf 'GPU check of %s, %s\n' "$(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')" "$(date -u +%FT%TZ)" \
    | tee "$report"
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>&1 | tee -a "$report"
  local is_built=1
  wanted build && { part build 240 4 configure_and_build || is_built=0; }
  if ((is_built)); then
    wanted device-tests && part device-tests 60 4 device_tests
    if [[ -d $build/python/nanobraid ]]; then
      check_models
    else
      for name in random-models default-model streaming benchmark; do
        wanted "$name" && skip "$name" "no Python package: pybind11 is not there, or nothing was built"
      done
    fi
    wanted cpp-tests && part cpp-tests 150 4 ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error
    for tool in memcheck racecheck initcheck; do
      wanted "$tool" || continue
      if command -v compute-sanitizer >/dev/null; then
        part "$tool" 60 4 sanitized "$tool"
      else
        skip "$tool" "no compute-sanitizer"
      fi
    done
  fi
  local outcome='all parts passed'
  if [[ -n ${NANOBRAID_CHECK_PARTS:-} ]]; then outcome="of $NANOBRAID_CHECK_PARTS: $outcome"; fi
  if ((${#not_run[@]} > 0)); then outcome="NOT RUN: ${not_run[*]}"; fi
  if ((${#failed[@]} > 0)); then outcome="FAILED: ${failed[*]}${not_run[*]:+; NOT RUN: ${not_run[*]}}"; fi
  say "in all $SECONDS s; $outcome"
  if ((${#failed[@]} > 0)); then return 1; fi
  if ((${#not_run[@]} > 0)); then return 2; fi
  return 0
}

export build jobs filter random_models default_model
export -f configure_and_build make_package has_module python_here device_tests sanitized make_random_models \
  compare_random_model compare_default_model benchmark streaming
main
