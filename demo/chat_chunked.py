#!/usr/bin/env python3
"""A conversation about documents that are computed once.

Every answer is kept and the conversation goes on behind it. The documents are chunks: a new conversation (/clear, or
another /system message) does not compute them again.

    demo/chat_chunked.py --document notes.txt --document more.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nanobraid as nb

COMMANDS = "/system TEXT, /clear, /cache, /stats, /help, /exit"


class Chat:
    """One conversation at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.chunked = nb.ChunkedLLM(options.model, max_chunks=options.max_chunks, mode=options.mode)
        self.params = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self.documents = [self.register(path) for path in options.document]
        self.system = "You are a helpful assistant. Answer briefly."
        self.last: int | None = None  # the answer that the conversation goes on behind

    def register(self, path: Path) -> str:
        return self.chunked.register_chunk(path.read_text(), nb.ChunkType.CONTEXT, {"file": path.name}, pin=True)

    def ask(self, question: str) -> None:
        if self.last is not None:
            out = self.chunked.continue_output(self.last, question, self.params)
        else:
            out = self.chunked.generate_and_retain_output(
                system_chunk_id=self.chunked.register_chunk(self.system, nb.ChunkType.SYSTEM_PROMPT),
                query_chunk_id=self.chunked.register_chunk(question, nb.ChunkType.QUERY),
                context_chunk_ids=self.documents,
                sampling_params=self.params,
            )
        self.last = out.retained_seq_id
        print(out.text, flush=True)
        if out.reuse is not None:
            r = out.reuse
            told = f"{r.exact_prefix} cached, {r.isolated} from chunks, {r.recomputed + r.computed} computed"
            print(f"[{r.mode_served}: {told}; first token after {r.ttft_ms:.0f} ms]", file=sys.stderr, flush=True)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/system" and rest:
            self.system, self.last = rest, None
        elif name == "/clear":
            self.last = None
            self.chunked.release_all_retained_outputs()
            self.chunked.clear_chunks(nb.ChunkType.OUTPUT)
        elif name == "/stats":
            for key, value in self.chunked.get_chunk_stats().items():
                print(f"{key:20} {value}", file=sys.stderr)
        elif name == "/cache":
            for chunk in self.chunked.list_chunks():
                kv = f"{chunk.kv_bytes / 1e6:.1f} MB"
                print(
                    f"{chunk.chunk_type:14} {chunk.token_count:6} tokens {kv:>9}  {chunk.content_preview!r}",
                    file=sys.stderr,
                )
        else:
            print(f"There are {COMMANDS}.", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--document", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--mode", choices=("exact", "isolated", "blend"), default="isolated")
    parser.add_argument("--max-chunks", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    try:
        chat = Chat(parser.parse_args())
        for line in map(str.strip, sys.stdin):
            if line == "/exit":
                break
            if line.startswith("/"):
                chat.command(line)
            elif line:
                chat.ask(line)
    except (nb.NanobraidError, OSError) as error:
        sys.exit(f"chat_chunked: error: {error}")


if __name__ == "__main__":
    main()
