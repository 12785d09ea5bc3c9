#!/usr/bin/env bash
# The kernels for 64-bit ARM: cross-compiled, and run on emulated processors with and without their extensions.
#
#   tests/arm.sh           builds build/arm, runs the operator tests against the reference and a tiny engine
#
# Needs g++-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user and GoogleTest's sources; says so and does nothing where
# one is missing. What is emulated tells whether results are right, never how fast they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=()
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[[ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ]] || missing+=("the C library for aarch64")
[[ -e /usr/src/googletest/CMakeLists.txt ]] || missing+=(/usr/src/googletest)
if [[ ${#missing[@]} -gt 0 ]]; then
  printf 'skipped, the kernels for ARM were not tested. Missing: '
  printf '%s; ' "${missing[@]}"
  echo
  exit 0
fi

# The kernels are compiled with -O3 all the same; the rest only has to end soon.
cmake -S . -B build/arm -G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/tools/aarch64-linux-gnu.cmake" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DNANOBRAID_PYTHON=OFF -DNANOBRAID_DEMOS=OFF -DNANOBRAID_CUDA=OFF \
  -DNANOBRAID_PRECOMPILE=all
cmake --build build/arm --target cross_tests
python3 tools/check_isa_symbols.py build/arm/CMakeFiles/nb_kernels_*.dir/cpp/ops/cpu/isa/kernels_*.o

export NANOBRAID_TEST_EMULATED=1  # a share of the cases, unless everything is asked for

emulate() {  # PROCESSOR ARGUMENT...
  qemu-aarch64 -cpu "$1" -L /usr/aarch64-linux-gnu build/arm/cross_tests "${@:2}"
}

# Which NEON tables the program finds usable: those it has tests for.
expect_tables() {  # PROCESSOR TABLES
  local found
  found=$(emulate "$1" --gtest_list_tests --gtest_filter='Backends/Linear.RefusesWrongShapes/*' | grep -oE '/neon\w*' | sort)
  found=$(tr -d '/' <<<"$found" | xargs)
  echo "$1: $found"
  [[ $found == "$2" ]] || {
    echo "$1 should have: $2" >&2
    return 1
  }
}

# Fails unless at least one test ran and all passed.
check() {  # PROCESSOR FILTER
  local log
  log=build/arm/$1.log
  if ! emulate "$1" --gtest_filter="$2" >"$log" 2>&1 || ! grep -qE '^\[  PASSED  \] [1-9]' "$log"; then
    grep -vE '^\[ RUN  |^\[       OK|^\[---' "$log"
    echo "$1: FAILED" >&2
    return 1
  fi
  echo "$1: $(tail -1 "$log")"
}

expect_tables max 'neon neon_dotprod neon_i8mm'
expect_tables neoverse-n1 'neon neon_dotprod'
expect_tables cortex-a72 'neon'

# The tables differ in int8 products only; what is left is tested once. Left out, since they take minutes here: windows
# and shared prefixes, and fused operators one by one (a whole layer of them is compared with the reference).
tests_of() {  # TABLE PATTERN...: the filter that leaves tests of one table
  local table=$1 filter='Backends.AreListedAndForced' pattern
  shift
  for pattern in "$@"; do filter+=":$pattern/$table"; done
  echo "$filter-*FusedOperatorsEqualTheirParts*"
}
products=('Backends/Linear.Int8*' 'Backends/Linear.RowsDoNot*')
everything=('Backends/Linear.*' 'Backends/Ops.*' 'Backends/Attention.MatchesReference' 'Backends/Attention.RowsDoNot*'
  'Engine/EveryKvFormat.TokensAreTheSame*')
# A pattern that no test has any more would go unseen beside the others.
for pattern in "${everything[@]}" "${products[@]}"; do
  emulate max --gtest_list_tests --gtest_filter="$pattern/neon_i8mm" | grep /neon_i8mm >/dev/null || {
    echo "no test is called $pattern/neon_i8mm" >&2
    exit 1
  }
done
check cortex-a72 "$(tests_of neon "${everything[@]}")" &
plain=$!
check neoverse-n1 "$(tests_of neon_dotprod "${products[@]}")" &
dotprod=$!
status=0
check max "$(tests_of neon_i8mm "${everything[@]}")" || status=1
wait "$plain" || status=1
wait "$dotprod" || status=1
exit "$status"
