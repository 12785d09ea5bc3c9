#!/usr/bin/env bash
# Downloads models from a Hugging Face hub and exports them to .braid files.
#
# Each model of the table has the sub-commands download-MODEL and export-MODEL-DTYPE; an export downloads what is not
# there yet. What is there already, download or file, is not made again.
#
# Environment: MODELS_DIR     where the .braid files go (default: ./models)
#              NANOBRAID      the program (default: nanobraid)
#              NANOBRAID_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE: as for nanobraid (USER_GUIDE.md)
# Exit codes: 0 done, 1 a model could not be had or exported, 2 wrong arguments.
set -euo pipefail

# model                  repository                             dtypes
MODELS="
llama-2-7b               meta-llama/Llama-2-7b-hf               bf16 w8 w4
llama-2-7b-chat          meta-llama/Llama-2-7b-chat-hf          bf16 w8 w4
tinyllama-1.1b-chat      TinyLlama/TinyLlama-1.1B-Chat-v1.0     bf16 w8 w4
llama-3.2-1b             meta-llama/Llama-3.2-1B                bf16 w8 w4
llama-3.2-1b-instruct    meta-llama/Llama-3.2-1B-Instruct       bf16 w8 w4
llama-3.2-3b             meta-llama/Llama-3.2-3B                bf16 w8 w4
llama-3.2-3b-instruct    meta-llama/Llama-3.2-3B-Instruct       bf16 w8 w4
qwen2.5-0.5b-instruct    Qwen/Qwen2.5-0.5B-Instruct             bf16 w8 w4
qwen2.5-1.5b-instruct    Qwen/Qwen2.5-1.5B-Instruct             bf16 w8 w4
qwen2.5-7b-instruct      Qwen/Qwen2.5-7B-Instruct               bf16 w8 w4
qwen3-0.6b               Qwen/Qwen3-0.6B                        bf16 w8 w4
qwen3-1.7b               Qwen/Qwen3-1.7B                        bf16 w8 w4
qwen3-4b                 Qwen/Qwen3-4B                          bf16 w8 w4
qwen3-8b                 Qwen/Qwen3-8B                          bf16 w8 w4
smollm2-135m-instruct    HuggingFaceTB/SmolLM2-135M-Instruct    f32 bf16 w8 w4
smollm2-360m-instruct    HuggingFaceTB/SmolLM2-360M-Instruct    bf16 w8 w4
smollm2-1.7b-instruct    HuggingFaceTB/SmolLM2-1.7B-Instruct    bf16 w8 w4
mistral-7b-instruct-v0.3 mistralai/Mistral-7B-Instruct-v0.3     bf16 w8 w4
"

MODELS_DIR="${MODELS_DIR:-models}"
NANOBRAID="${NANOBRAID:-nanobraid}"

say() { echo "export_models.sh: $*" >&2; }

usage() {
    local model repository dtypes dtype
    cat <<END
usage: tools/export_models.sh SUB-COMMAND...

  help    this text
  all     every model of the list in every dtype
END
    while read -r model repository dtypes; do
        [[ -n $model ]] || continue
        printf '  download-%-32s %s\n' "$model" "$repository"
        for dtype in $dtypes; do
            printf '  export-%s-%s\n' "$model" "$dtype"
        done
    done <<<"$MODELS"
    echo
    echo "Files go to MODELS_DIR ($MODELS_DIR). Models of meta-llama and mistralai may need HF_TOKEN."
}

# Prints the folder of a repository; downloads it if it is not on this machine.
download() {
    local path
    if ! command -v "$NANOBRAID" >/dev/null; then
        say "no program $NANOBRAID: install it with 'pip install .[hub]', or set NANOBRAID"
        return 1
    fi
    if ! path=$("$NANOBRAID" pull "$1" </dev/null) || [[ ! -d $path ]]; then
        say "cannot get $1: the line above says why (no network, a gated model without HF_TOKEN, ...)"
        return 1
    fi
    printf '%s\n' "$path"
}

# export_one MODEL REPOSITORY DTYPE
export_one() {
    local out="$MODELS_DIR/$1-$3.braid" source
    if [[ -f $out ]]; then
        say "$out is there"
        return 0
    fi
    source=$(download "$2") || return 1
    mkdir -p "$MODELS_DIR" || return 1
    if ! "$NANOBRAID" export "$source" -o "$out" --dtype "$3" </dev/null; then
        say "cannot export $2 to $out"
        return 1
    fi
    say "wrote $out"
}

failed=0

# run_command SUB-COMMAND: does it, notes a failure in `failed`; returns 1 if there is no such sub-command.
run_command() {
    local model repository dtypes dtype found=1
    while read -r model repository dtypes; do
        [[ -n $model ]] || continue
        if [[ $1 == "download-$model" ]]; then
            found=0
            download "$repository" || failed=1
        elif [[ $1 == all ]] && ! download "$repository" >/dev/null; then
            found=0
            failed=1
            continue # said once, not for every dtype
        fi
        for dtype in $dtypes; do
            if [[ $1 == all || $1 == "export-$model-$dtype" ]]; then
                found=0
                export_one "$model" "$repository" "$dtype" || failed=1
            fi
        done
    done <<<"$MODELS"
    return "$found"
}

main() {
    local command
    if (($# == 0)); then
        usage >&2
        exit 2
    fi
    for command in "$@"; do
        if [[ $command == help || $command == --help || $command == -h ]]; then
            usage
        elif ! run_command "$command"; then
            say "no sub-command $command; 'help' lists them"
            exit 2
        fi
    done
    exit "$failed"
}

main "$@"
