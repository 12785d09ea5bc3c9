#!/usr/bin/env bash
# Client libraries as they are published, each in a virtual environment of its own, against `nanobraid serve`.
#
#   tests/clients/run.sh           all; one line for each with version and result, exit code 1 if one failed
#   tests/clients/run.sh NAME...   these: openai3 openai2 anthropic langchain llama_index instructor litellm llm lm_eval ai_sdk router
#
# What cannot be installed here (no network, no npm) is skipped with the reason.
#
#   NANOBRAID_PYTHON       interpreter that has nanobraid[server] (python3)
#   NANOBRAID_CLIENTS_DIR  where the environments are made; they are kept (build/clients)
#   NANOBRAID_CLIENTS_LOG  folder for logs (NANOBRAID_CLIENTS_DIR/logs)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
NANOBRAID_PYTHON=$(command -v "${NANOBRAID_PYTHON:-python3}") || {
  echo "no ${NANOBRAID_PYTHON:-python3}" >&2
  exit 1
}
export NANOBRAID_PYTHON
folder=${NANOBRAID_CLIENTS_DIR:-$root/build/clients}
logs=${NANOBRAID_CLIENTS_LOG:-$folder/logs}
mkdir -p "$folder" "$logs"
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset OPENAI_API_KEY OPENAI_BASE_URL ANTHROPIC_API_KEY ANTHROPIC_BASE_URL ANTHROPIC_AUTH_TOKEN NANOBRAID_API_KEY

all=(openai3 openai2 anthropic langchain llama_index instructor litellm llm lm_eval ai_sdk router)

packages() {  # NAME: what pip installs
  case $1 in
    openai3) echo "openai>=3,<4" ;;
    openai2) echo "openai>=2,<3" ;;
    anthropic) echo "anthropic>=2,<3" ;;
    langchain) echo "langchain-openai>=1,<2" ;;
    llama_index) echo "llama-index-llms-openai-like>=0.8,<0.9" ;;
    instructor) echo "instructor>=1.17,<2" ;;
    litellm) echo "litellm>=1.106,<2 mcp" ;;
    llm) echo "llm>=0.36,<1" ;;
    lm_eval) echo "lm_eval[api]>=0.4.13,<0.5" ;;
    router) echo "vllm-router>=0.1.17,<0.2 openai>=3,<4" ;;
    *) return 1 ;;
  esac
}

script() {  # NAME
  case $1 in
    openai*) echo openai_client.py ;;
    *) echo "$1_client.py" ;;
  esac
}

install() {  # NAME: makes its environment; what it says goes to a log
  local name=$1 place=$folder/$1
  if [[ -e $place/complete ]]; then return; fi
  rm -rf "$place"
  if [[ $name == ai_sdk ]]; then
    mkdir -p "$place"
    npm install --prefix "$place" --no-fund --no-audit --loglevel=error ai@6 @ai-sdk/openai-compatible@2 zod@4
  else
    local wanted
    read -ra wanted <<<"$(packages "$name")"
    "$NANOBRAID_PYTHON" -m venv "$place"
    "$place/bin/pip" install --quiet "${wanted[@]}"
  fi >"$logs/$name-install.log" 2>&1 || return 1
  touch "$place/complete"
}

servers=()
stop() {
  if [[ ${#servers[@]} -gt 0 ]]; then
    kill "${servers[@]}" 2>/dev/null || true
    wait "${servers[@]}" 2>/dev/null || true
  fi
}
trap stop EXIT

serve() {  # LOG ARGUMENT...: starts a server, sets `started` to its address
  local log=$1
  shift
  "$NANOBRAID_PYTHON" -m nanobraid serve --port 0 "$@" >"$log" 2>&1 &
  local pid=$!
  servers+=("$pid")
  for _ in {1..600}; do
    started=$(grep -oE 'Ready at http://127\.0\.0\.1:[0-9]+' "$log" | head -1 | cut -d' ' -f3) || true
    if [[ -n $started ]]; then return; fi
    if ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.2
  done
  cat "$log" >&2
  return 1
}

main() {
  local wanted=("$@") name failed=0
  if [[ ${#wanted[@]} == 0 ]]; then wanted=("${all[@]}"); fi
  for name in "${wanted[@]}"; do
    if [[ " ${all[*]} " != *" $name "* ]]; then
      echo "no client $name; there are: ${all[*]}" >&2
      exit 2
    fi
  done
  for name in "${wanted[@]}"; do
    if [[ $name != router && ${#servers[@]} == 0 ]]; then
      serve "$logs/server.log"
      export NANOBRAID_URL=$started
      serve "$logs/small-server.log" --api-key a-key-of-the-tests --max-num-seqs 1 --max-waiting 1
      export NANOBRAID_SMALL_URL=$started
    fi
    if [[ $name == ai_sdk ]] && ! command -v npm >/dev/null; then
      echo "$name: skipped, there is no npm"
      continue
    fi
    if ! install "$name"; then
      echo "$name: skipped, not to be installed here: $(grep -v '^WARNING' "$logs/$name-install.log" | tail -1 | cut -c1-150)"
      continue
    fi
    local command=("$folder/$name/bin/python" "$here/$(script "$name")")
    if [[ $name == ai_sdk ]]; then command=(node "$here/ai_sdk_client.mjs" "$folder/ai_sdk"); fi
    # A client's environment must not see the sources that the server may run from.
    if timeout 300 env -u PYTHONPATH NANOBRAID_PYTHONPATH="${PYTHONPATH:-}" "${command[@]}" >"$logs/$name.out" 2>"$logs/$name.log"; then
      tail -1 "$logs/$name.out"
    else
      failed=1
      tail -30 "$logs/$name.log" >&2
      tail -1 "$logs/$name.out" | grep . || echo "$name: FAILED, see $logs/$name.log"
    fi
  done
  return $failed
}

main "$@"
exit
