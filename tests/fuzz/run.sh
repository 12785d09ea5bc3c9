#!/usr/bin/env bash
# Builds every fuzz target (tests/fuzz/*_fuzz.cpp) with libFuzzer, ASan and UBSan, and runs each for SECONDS,
# NANOBRAID_JOBS (2) at once.
#
#   tests/fuzz/run.sh SECONDS [TARGET...]      a target is a name without _fuzz.cpp, e.g. gguf
#
# Seeds are the files of tests/fuzz/corpus/TARGET/ and those that make_seeds.py writes; what is found goes to
# NANOBRAID_FUZZ_DIR (build-fuzz/), never into the source tree. Exits 1 if a target crashed, hung or did not build,
# 0 with a reason if there is no clang with libFuzzer.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[0-9]+$ || $1 -eq 0 ]]; then
  echo "usage: $0 SECONDS [TARGET...]" >&2
  exit 2
fi
seconds=$1
shift
jobs=${NANOBRAID_JOBS:-2}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${NANOBRAID_FUZZ_DIR:-$root/build-fuzz}
mkdir -p "$work"

# The first clang that can link libFuzzer.
find_clang() {
  local clang
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$work/probe.cpp"
  for clang in ${NANOBRAID_FUZZ_CXX:-clang++-14 clang++}; do
    if "$clang" -fsanitize=fuzzer,address,undefined "$work/probe.cpp" -o "$work/probe" 2>/dev/null; then
      echo "$clang"
      return
    fi
  done
}

clang=$(find_clang)
if [[ -z $clang ]]; then
  echo "skipped: no clang++ that links libFuzzer (apt: clang-14 and libclang-rt-14-dev)"
  exit 0
fi

# Sources that a target may use: those below the engine that clang-14 accepts. Objects are kept between runs.
flags=(-std=c++20 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -I "$root/cpp" -fsanitize=address,undefined
  -fno-sanitize-recover=all)
objects=() compiling=()
compile() {  # SOURCE OBJECT FLAG...
  local source=$1 object=$2
  shift 2
  local newer
  newer=$(find "$root"/cpp/{base,quant,text,io,kv} -name '*.h' -newer "$object" -print -quit 2>/dev/null || true)
  if [[ ! -f $object || $source -nt $object || -n $newer ]]; then
    "$clang" "${flags[@]}" "$@" -c "$source" -o "$object"
  fi
}
for source in "$root"/cpp/{base,quant,text,io}/*.cpp "$root/cpp/kv/store_record.cpp"; do
  object=$work/$(basename "$(dirname "$source")")_$(basename "$source" .cpp).o
  compile "$source" "$object" -fsanitize=fuzzer-no-link &
  compiling+=($!)
  objects+=("$object")
  if [[ ${#compiling[@]} -ge $jobs ]]; then
    wait "${compiling[0]}"
    compiling=("${compiling[@]:1}")
  fi
done
for pid in "${compiling[@]}"; do wait "$pid"; done

targets=("$@")
if [[ ${#targets[@]} -eq 0 ]]; then
  for source in "$root"/tests/fuzz/*_fuzz.cpp; do targets+=("$(basename "$source" _fuzz.cpp)"); done
fi

fuzz() {  # TARGET: its log ends in $work/TARGET.log
  local target=$1
  local seeds=("$work/seeds/$target")
  if [[ -d $root/tests/fuzz/corpus/$target ]]; then seeds+=("$root/tests/fuzz/corpus/$target"); fi
  local options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 -max_len=24576
    -artifact_prefix="$work/crashes/$target-" -print_final_stats=1)
  if [[ -f $root/tests/fuzz/$target.dict ]]; then options+=(-dict="$root/tests/fuzz/$target.dict"); fi
  "$work/${target}_fuzz" "${options[@]}" "$work/corpus/$target" "${seeds[@]}" >"$work/$target.log" 2>&1
}

report() {  # TARGET STATUS
  echo "== $1: $seconds s =="
  if [[ $2 == 0 ]]; then
    grep -E '^stat::(number_of_executed|average_exec|new_units|peak_rss)' "$work/$1.log" || true
  else
    failed+=("$1")
    tail -40 "$work/$1.log" 2>/dev/null || true
  fi
}

failed=()
built=()
for target in "${targets[@]}"; do
  mkdir -p "$work/corpus/$target" "$work/seeds/$target" "$work/crashes"
  python3 "$root/tests/fuzz/make_seeds.py" "$target" "$work/seeds/$target"
  program=$work/${target}_fuzz
  rm -f "$work/$target.log"
  if compile "$root/tests/fuzz/${target}_fuzz.cpp" "$program.o" -fsanitize=fuzzer-no-link &&
    "$clang" -fsanitize=fuzzer,address,undefined "$program.o" "${objects[@]}" -lpthread -o "$program"; then
    built+=("$target")
  else
    report "$target" 1
  fi
done

# As many at once as jobs, wave by wave: all run equally long.
for ((i = 0; i < ${#built[@]}; i += jobs)); do
  wave=("${built[@]:i:jobs}")
  pids=()
  for target in "${wave[@]}"; do
    fuzz "$target" &
    pids+=($!)
  done
  for k in "${!wave[@]}"; do
    status=0
    wait "${pids[k]}" || status=$?
    report "${wave[k]}" "$status"
  done
done

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "FAILED: ${failed[*]} (inputs in $work/crashes)" >&2
  exit 1
fi
