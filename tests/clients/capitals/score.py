"""Reads ``[[context, continuation], ...]`` from stdin and writes how likely the continuations are by `LLM.score`."""

from __future__ import annotations

import json
import sys

import nanobraid as nb


def main() -> int:
    scores = []
    with nb.LLM(sys.argv[1], max_model_len=1024) as llm:
        for context, continuation in json.load(sys.stdin):
            num_context = len(llm.tokenizer.encode(context, add_special_tokens=False))
            ids = llm.tokenizer.encode(context + continuation, add_special_tokens=False)
            scores.append(sum(value for value in llm.score(ids).logprobs[num_context:] if value is not None))
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
