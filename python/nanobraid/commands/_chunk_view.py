"""Chunks and their figures as tables on stderr: with rich on a terminal, in plain text elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from nanobraid.chunked import Chunk
from nanobraid.commands._terminal import note, printable, table
from nanobraid.llm import LLM

_BAR = 30
_STYLES = {"system_prompt": "cyan", "context": "green", "query": "yellow", "output": "magenta"}


def size_text(num_bytes: int) -> str:
    """Bytes for a person."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes else "-"


def _show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        note(title)
        note(table([header, *rows], "  "))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        is_last = i == len(header) - 1  # the one that is cut where the terminal is narrow
        width = None if is_last else max(len(row[i]) for row in [header, *rows])
        shown.add_column(name, overflow="ellipsis", no_wrap=True, min_width=width)
    for row, style in zip(rows, styles, strict=True):
        shown.add_row(*(Text(cell) for cell in row), style=style)
    Console(stderr=True).print(shown)


def show_chunks(chunks: Sequence[Chunk], roles: Sequence[Sequence[str]], stats: dict[str, Any]) -> None:
    """Shows registered chunks, with what each is in the next prompt, and the memory of their keys and values."""
    if not chunks:
        note("There are no chunks. /system, /context and /query make some.")
        return
    header = ("type", "in prompt", "id", "tokens", "uses", "hits", "KV", "text")
    rows = [
        (
            chunk.chunk_type.value,
            ", ".join([*role, "pinned"] if chunk.pinned else role) or "-",
            chunk.chunk_id[:8],
            str(chunk.token_count),
            str(chunk.access_count),
            str(chunk.kv_hits),
            size_text(chunk.kv_bytes),
            printable(chunk.content_preview),
        )
        for chunk, role in zip(chunks, roles, strict=True)
    ]
    used, budget = stats["kv_bytes"], stats["budget_bytes"]
    filled = round(_BAR * used / budget) if budget else 0
    bar = "#" * filled + "." * (_BAR - filled)
    title = f"{len(chunks)} chunks, KV {used / 1e6:.1f} of {budget / 1e6:.1f} MB [{bar}]"
    _show(title, header, rows, [_STYLES[chunk.chunk_type.value] for chunk in chunks])


def show_figures(title: str, figures: dict[str, Any]) -> None:
    """Shows names and values."""
    rows = [(name, _value(value)) for name, value in figures.items()]
    _show(title, ("figure", "value"), rows, [""] * len(rows))


def memory_figures(llm: LLM) -> dict[str, Any]:
    """What keys and values take, and the process."""
    stats, config = llm.stats(), llm.config
    per_token = stats["kv_bytes_per_token"]
    return {
        "kv_dtype": config["kv_dtype"],
        "KV of a token": f"{per_token / 1e3:.1f} kB",
        f"KV of {config['max_model_len']} tokens": size_text(round(per_token * config["max_model_len"])),
        "KV kept for reuse": size_text((stats["blocks_owned"] + stats["blocks_cached"]) * stats["kv_block_bytes"]),
        "peak memory of the process": size_text(stats["peak_rss_bytes"]),
    }


def guess_figures(llm: LLM) -> dict[str, Any]:
    """What guesses of coming tokens did, if the engine guesses."""
    if llm.config["speculative_config"] is None:
        return {}
    stats = llm.stats()
    return {
        "verified": stats["draft_tokens"],
        "right": stats["accepted_draft_tokens"],
        "share": stats["draft_acceptance"],
        "tokens of a step": stats["tokens_per_decode"],
        "seconds saved (estimate)": stats["draft_saved_seconds"],
    }


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
