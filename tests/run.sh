#!/usr/bin/env bash
# The test command: prepares what it needs, builds, runs every test and prints the summaries of ctest and pytest.
#
#   tests/run.sh           30 to 45 minutes on two cores from nothing, less when built before
#   tests/run.sh --full    property tests with their full counts, all fuzz targets for minutes, client libraries from the
#                          network against the server (tests/clients/run.sh)
#
# What it makes lies in build/ (package: what the Python package is built in, test: Release, asan: Debug with ASan and
# UBSan, tsan: with ThreadSanitizer, arm: for 64-bit ARM, logs), in build-fuzz/ and in the virtual environment .venv-test.
# Nothing else changes, but the model cache (the default model is downloaded once). Release runs every case of a test, but
# for a few that take very long; sanitizers and emulated processors run a share of the slow ones
# (tests/cpp/base/effort.h), with --full all.
#
#   PYTHON                 interpreter of the virtual environment (python3)
#   NANOBRAID_VENV         where the virtual environment is (.venv-test)
#   NANOBRAID_JOBS         jobs of builds, of ctest and of pytest (2)
#   NANOBRAID_TEST_BUDGET  seconds the run may take; fuzzing shrinks to what is left (1500, with --full none)
set -euo pipefail

full=0
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    *)
      echo "usage: $0 [--full]" >&2
      exit 2
      ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}") || {
  echo "no ${PYTHON:-python3}: Python 3.10 or newer is needed" >&2
  exit 1
}
venv=${NANOBRAID_VENV:-$root/.venv-test}
jobs=${NANOBRAID_JOBS:-2}
budget=${NANOBRAID_TEST_BUDGET:-1500}
logs=$root/build/logs
mkdir -p "$logs"
rm -f "$logs"/*.log

export CMAKE_BUILD_PARALLEL_LEVEL=$jobs PIP_DISABLE_PIP_VERSION_CHECK=1
if [[ $full == 1 ]]; then export NANOBRAID_TEST_FULL=1; else unset NANOBRAID_TEST_FULL; fi
# Paths inside the checkout do not count for the compiler cache, so that one checkout profits from another.
if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_CUDA_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
fi

# ---- parts ----

times=()
failed=()

# Runs a part, shows and keeps its output, remembers time and outcome. `set +e` and the subshell: a command that fails
# inside a part ends that part, not the run.
part() {  # NAME COMMAND...
  local name=$1 begin=$SECONDS status
  shift
  printf '\n== %s ==\n' "$name"
  set +e
  (
    set -e
    "$@"
  ) 2>&1 | tee "$logs/$name.log"
  status=${PIPESTATUS[0]}
  set -e
  if [[ $status == 0 ]]; then
    times+=("$(printf '%6d s  %s' $((SECONDS - begin)) "$name")")
  else
    times+=("$(printf '%6d s  %s  FAILED' $((SECONDS - begin)) "$name")")
    failed+=("$name")
  fi
}

# As above, but without it nothing else can run.
needed_part() {
  part "$@"
  if [[ ${#failed[@]} -gt 0 ]]; then
    summary
    exit 1
  fi
}

ctest_line='tests passed, .* tests failed out of'
pytest_line='^=+ .* in [0-9.]+s.* =+$'

closing_line() {  # NAME PATTERN: the last line of a part's output that matches, or failure
  local line
  line=$(grep -aE "$2" "$logs/$1.log" 2>/dev/null | tail -1)
  [[ -n $line ]] && printf '%s\n' "$line"
}

summary() {
  printf '\n== times ==\n'
  printf '%s\n' "${times[@]}"
  printf '%6d s  in all' "$SECONDS"
  if [[ $full == 0 ]]; then printf ', of a budget of %d s' "$budget"; fi
  printf '\n\n== summary ==\n'
  if [[ ${#failed[@]} -gt 0 ]]; then printf 'FAILED: %s\n' "${failed[*]}"; else echo "all parts passed"; fi
  echo "ASan and UBSan: $(closing_line ctest-asan "$ctest_line" || echo 'ctest did not run')"
  closing_line ctest "$ctest_line" || echo "ctest did not run"
  closing_line pytest "$pytest_line" || echo "pytest did not run"
}

# ---- what the parts do ----

tools() {
  command -v "${CXX:-c++}" >/dev/null || {
    echo "no ${CXX:-c++}: a C++20 compiler is needed" >&2
    return 1
  }
  local version='import sys; print(*sys.version_info[:3])'
  if [[ "$("$venv/bin/python" -c "$version" 2>/dev/null)" != "$("$python" -c "$version")" ]]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  if [[ ! -e /usr/src/googletest/CMakeLists.txt && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get install -qq -y --no-install-recommends googletest || echo "no googletest from apt; CMake will fetch it"
  fi
  if ! cmake --version 2>/dev/null | grep -qE 'version (3\.(2[4-9]|[3-9][0-9])|[4-9])'; then
    "$venv/bin/pip" install --quiet 'cmake>=3.24'
  fi
  command -v ninja >/dev/null || "$venv/bin/pip" install --quiet ninja
  "$venv/bin/python" --version
  cmake --version | head -1
  "${CXX:-c++}" --version | head -1
}

# What the installed package is made of. A package built from the same files need not be built again.
fingerprint() {
  find CMakeLists.txt pyproject.toml README.md cpp cuda python -type f ! -path '*/__pycache__/*' -print0 | sort -z |
    xargs -0 sha256sum | sha256sum
}

package() {
  local stamp=$venv/nanobraid.stamp
  if [[ "$(cat "$stamp" 2>/dev/null)" == "$(fingerprint)" ]]; then
    echo "installed before from the same files"
    return
  fi
  rm -f "$stamp"
  local before
  before=$(fingerprint)
  # Built inside build/ with the flags of the tests' Release build, so that the compiler cache serves one with the other.
  CXX=${CXX:-c++} "$venv/bin/pip" install --quiet --config-settings=build-dir="$root/build/package" \
    --config-settings=cmake.define.NANOBRAID_WERROR=ON '.[test,dev]'
  echo "$before" >"$stamp"
  "$venv/bin/nanobraid" doctor
}

build_tests() {  # FOLDER CMAKE_OPTION...
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja -DNANOBRAID_PYTHON=OFF "$@"
  cmake --build "$folder"
}

run_ctest() {  # FOLDER
  ctest --test-dir "$1" --output-on-failure --no-tests=error -j "$jobs"
}

# The kernel tables that sanitizers see, where not all: these are templates over a vector type, so one for each width of
# vectors has every access to memory that the others have.
sanitized_kernels() {
  if [[ $full == 1 || $(uname -m) != x86_64 ]]; then return; fi
  if grep -qw avx512_bf16 /proc/cpuinfo; then echo 'avx2;avx512bf16'; else echo 'avx2;avx512'; fi
}

# ThreadSanitizer over everything that threads share: the team, the engine's thread, its inbox and outboxes, loads.
tsan() {
  cmake -S . -B build/tsan -G Ninja -DNANOBRAID_PYTHON=OFF -DNANOBRAID_DEMOS=OFF -DNANOBRAID_CUDA=OFF -DCMAKE_BUILD_TYPE=Debug \
    -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" -DNANOBRAID_SANITIZE=thread -DNANOBRAID_KERNELS=avx2 -DNANOBRAID_PRECOMPILE=all
  cmake --build build/tsan --target thread_tests
  TSAN_OPTIONS="suppressions=$root/tests/tsan_suppressions.txt" timeout 600 build/tsan/thread_tests --gtest_brief=1
}

# In as many processes as there are jobs: the soak test and what waits go beside other tests. Files are
# handed out in long stretches (worksteal), so that what a module shares is made once, seldom twice.
# Plugins of other packages that happen to be installed are left out, and with them seconds of their imports.
# A run in the background is started with SIGINT ignored, and so would be every test of Ctrl-C.
run_pytest() {
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 NANOBRAID_BUILD_DIR="$root/build/test" "$venv/bin/python" -c '
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]])' -p xdist -n "$jobs" --dist worksteal --durations=30 --durations-min=4
}

run_ruff() {
  ruff check . && ruff format --check .
}

# Versions of clang-format disagree; the sources are in the format of 14.
format() {
  local tool
  for tool in clang-format-14 clang-format; do
    if "$tool" --version 2>/dev/null | grep -q 'version 14\.'; then
      find cpp cuda demo eval python tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$tool" --dry-run --Werror
      return
    fi
  done
  echo "no clang-format 14: formatting of C++ not checked"
}

demo() {
  local model text
  model=$(nanobraid pull smollm2-135m | tail -1)
  text=$(build/test/demo/generate --model "$model" --max-tokens 16 "The capital of France is")
  echo "$text"
  [[ $text == *Paris* ]]
}

# Each in an environment of its own; what cannot be had from the network is skipped and said.
run_clients() {
  NANOBRAID_PYTHON=$venv/bin/python tests/clients/run.sh
}

fuzz() {
  local targets seconds=600
  targets=$(find tests/fuzz -name '*_fuzz.cpp' | wc -l)
  if [[ $full == 0 ]]; then
    seconds=$(((budget - SECONDS) * jobs / (targets + jobs)))
    if [[ $seconds -gt 60 ]]; then seconds=60; fi
    if [[ $seconds -lt 10 ]]; then seconds=10; fi
  fi
  echo "$targets targets, $seconds s each"
  tests/fuzz/run.sh "$seconds"
}

# ---- the run ----

# In a function, so that bash has read it all before it begins: the file may be edited while it runs.
main() {
  if [[ $full == 1 ]]; then
    echo "full run: property tests with their full counts, fuzzing 600 s a target"
  else
    echo "budget $budget s: property tests with reduced counts, fuzzing at most 60 s a target (tests/run.sh --full: all)"
  fi

  export PATH=$venv/bin:$PATH
  needed_part tools tools
  needed_part package package
  # The CUDA library wherever there is nvcc, with or without a GPU: its machine code is looked at.
  local cuda=(-DNANOBRAID_CUDA=OFF)
  if command -v nvcc >/dev/null; then cuda=(-DNANOBRAID_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real"); fi
  needed_part build build_tests build/test -DNANOBRAID_PRECOMPILE=tests -DCMAKE_BUILD_TYPE=Release "${cuda[@]}"
  part ruff run_ruff
  part mypy mypy
  part format format
  # No other build has these flags, so the core loses nothing by precompiled headers, which the compiler cache passes by.
  # Debug, so that invariants are checked after every step; kernels at -O1, so that it ends. The tests are those of the
  # Release build: what they test is sanitized, they are not.
  part build-asan build_tests build/asan -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-Og -g1" \
    -DNANOBRAID_PRECOMPILE=all -DNANOBRAID_TEST_OBJECTS="$root/build/test" -DNANOBRAID_KERNELS="$(sanitized_kernels)" -DNANOBRAID_SANITIZE=address,undefined -DNANOBRAID_DEMOS=OFF -DNANOBRAID_CUDA=OFF
  part ctest run_ctest build/test
  if [[ " ${failed[*]} " != *" build-asan "* ]]; then part ctest-asan run_ctest build/asan; fi
  part tsan tsan
  part arm tests/arm.sh
  part demo demo
  part pytest run_pytest
  if [[ $full == 1 ]]; then part clients run_clients; fi
  if [[ -x tests/fuzz/run.sh ]]; then part fuzz fuzz; fi

  summary
  [[ ${#failed[@]} == 0 ]]
}

main
exit
