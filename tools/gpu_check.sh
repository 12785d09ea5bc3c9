#!/usr/bin/env bash
# Checks the CUDA backend on a machine with a GPU: builds it, runs the C++ tests, the tests of the kernels on the device,
# and those under compute-sanitizer. One report; exit 1 if a part failed. Meant for under 9 minutes on 16 cores.
#
#   tools/gpu_check.sh           the report is $OUT/gpu_check.txt, or build/gpu/gpu_check.txt without OUT
#
# Needs nvcc, cmake, a C++20 compiler, GoogleTest (see CMakeLists.txt), and compute-sanitizer for the last part.
#
#   NANOBRAID_JOBS             jobs of the build and of ctest (the number of cores)
#   NANOBRAID_KERNEL_TESTS     which tests of kernels run, as a filter of GoogleTest (all that use the device)
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
jobs=${NANOBRAID_JOBS:-$(nproc)}
build=build/gpu
report=${OUT:-$build}/gpu_check.txt
mkdir -p "$build" "$(dirname "$report")"
# Tests of the emulator itself, and of tiles that only a test asks for, have nothing to do on a device.
filter=${NANOBRAID_KERNEL_TESTS:--Emulator*:Reduce*:Gemm*:ReferenceOnDevice*}
failed=()

say() { printf '%s\n' "$*" | tee -a "$report"; }

# Runs a part with a limit, keeps its output beside the report, and its last lines in it.
part() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS log=$build/$1.log status
  shift 2
  timeout "$limit" bash -c '"$@"' part "$@" >"$log" 2>&1  # in a shell of its own, which knows the functions below
  status=$?
  say "== $name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s"
  tail -n "$([[ $status == 0 ]] && echo 4 || echo 40)" "$log" | tee -a "$report"
  if [[ $status != 0 ]]; then failed+=("$name"); fi
  return "$status"
}

configure_and_build() {
  local generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native \
    -DCMAKE_CUDA_FLAGS=-lineinfo -DNANOBRAID_CUDA=ON -DNANOBRAID_PYTHON=OFF -DNANOBRAID_DEMOS=OFF &&
    cmake --build "$build" -j "$jobs"
}

device_tests() {  # the tests of the kernels, on the GPU instead of the emulator
  NANOBRAID_TEST_DEVICE=cuda:0 "$build/cuda_emulation_tests" --gtest_brief=1 --gtest_filter="$filter"
}

sanitized() {  # TOOL
  NANOBRAID_TEST_DEVICE=cuda:0 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$build/cuda_emulation_tests" --gtest_brief=1 --gtest_filter="$filter"
}

main() {
  printf 'GPU check of %s, %s\n' "$(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')" "$(date -u +%FT%TZ)" \
    | tee "$report"
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>&1 | tee -a "$report"
  if part build 240 configure_and_build; then
    part cpp-tests 150 ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error
    part device-tests 60 device_tests
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck initcheck; do part "$tool" 60 sanitized "$tool"; done
    else
      say "== compute-sanitizer: not here, not run"
      failed+=(compute-sanitizer)
    fi
  fi
  say "in all $SECONDS s; $([[ ${#failed[@]} == 0 ]] && echo 'all parts passed' || echo "FAILED: ${failed[*]}")"
  [[ ${#failed[@]} == 0 ]]
}

export build jobs filter
export -f configure_and_build device_tests sanitized
main
