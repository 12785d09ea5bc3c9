#!/usr/bin/env python3
"""Four agents with characters of their own read one document, whose keys and values are there once.

The characters stand before the document, so that no prefix is shared: in the mode exact every agent computes the
document for itself. As a chunk it is computed once. Prints the time to the first token and the memory of both.

    demo/multi_agent.py --context-tokens 2000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nanobraid as nb

AGENTS = {
    "lawyer": "You are a careful lawyer. You look for duties and risks.",
    "engineer": "You are a practical engineer. You want to know what has to be done.",
    "teacher": "You are a patient teacher. You explain everything in simple words.",
    "critic": "You are a sharp critic. You look for what is unclear or missing.",
}
QUESTION = "In one sentence: what should a reader of this text know?"


def real_text() -> str:
    """A long text that is on this machine: a licence, or what a part of Python says about itself."""
    for name in ("/usr/share/common-licenses/GPL-3", "/usr/share/common-licenses/Apache-2.0"):
        if Path(name).is_file():
            return Path(name).read_text()
    return Path(argparse.__file__).read_text()


def ask(chunked: nb.ChunkedLLM, document: str, mode: str, max_tokens: int) -> list[nb.ChunkedOutput]:
    query = chunked.register_chunk(QUESTION, nb.ChunkType.QUERY)
    outs = []
    for name, character in AGENTS.items():
        system = chunked.register_chunk(character, nb.ChunkType.SYSTEM_PROMPT, {"agent": name})
        params = {"temperature": 0, "max_tokens": max_tokens}
        outs.append(chunked.generate_from_chunks(system, query, [document], params, mode=mode))  # type: ignore[call-overload]
    return outs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context-tokens", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    try:
        with nb.ChunkedLLM(options.model) as chunked:
            tokenizer = chunked.llm.tokenizer
            ids = tokenizer.encode(real_text(), add_special_tokens=False)[: options.context_tokens]
            document = chunked.register_chunk(tokenizer.decode(ids), nb.ChunkType.CONTEXT)
            exact = ask(chunked, document, "exact", options.max_tokens)
            begun = time.perf_counter()
            chunked.register_chunk(tokenizer.decode(ids), nb.ChunkType.CONTEXT, compute=True)  # once, for all agents
            once = 1e3 * (time.perf_counter() - begun)
            isolated = ask(chunked, document, "isolated", options.max_tokens)
            shared = chunked.get_chunk(document).kv_bytes

            print(
                f"document: {len(ids)} tokens, {shared / 1e6:.1f} MB of keys and values, computed once in {once:.0f} ms"
            )
            print(f"{'agent':10} {'exact':>10} {'isolated':>10} {'own KV':>8}  answer (isolated)")
            total = shared
            for name, slow, fast in zip(AGENTS, exact, isolated, strict=True):
                assert slow.reuse is not None and fast.reuse is not None
                own = chunked.llm.chunks.bytes_for(fast.reuse.computed + len(fast.token_ids))
                total += own
                times = f"{slow.reuse.ttft_ms:7.0f} ms {fast.reuse.ttft_ms:7.0f} ms"
                print(f"{name:10} {times} {own / 1e6:5.1f} MB  {' '.join(fast.text.split())[:60]}")
            longest = max(out.usage["total_tokens"] for out in exact)
            alone = chunked.llm.chunks.bytes_for(longest)
            print(
                f"keys and values of one agent alone {alone / 1e6:.1f} MB; of four that share {total / 1e6:.1f} MB, ",
                end="",
            )
            print(f"{total / alone:.2f} times that")
    except nb.NanobraidError as error:
        sys.exit(f"multi_agent: error: {error}")


if __name__ == "__main__":
    main()
