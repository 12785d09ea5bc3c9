"""What a prompt made of chunks would cost now: the figures of `ChunkedLLM.preview_composition`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanobraid._chunk_base import ids_of, kv_key
from nanobraid._chunk_kv import ChunkKv
from nanobraid._chunk_prompt import Piece, segments_of
from nanobraid._chunk_registry import Chunk
from nanobraid.composition import Reuse, reuse_options, used_chunks
from nanobraid.llm import LLM


def preview(
    llm: LLM,
    kv: ChunkKv,
    pieces: Sequence[Piece],
    roles: tuple[Chunk, Sequence[Chunk], Chunk],
    *,
    reuse: Reuse,
    cache_salt: str,
) -> dict[str, Any]:
    """Returns the figures; see `ChunkedLLM.preview_composition`."""
    segments = segments_of(pieces)
    ids = [token for segment in segments for token in ids_of(segment)]
    options = reuse_options(reuse)
    used = used_chunks(segments, reuse)
    keys = [kv_key(segment) for segment in used]
    lead = len(ids)
    if keys:
        lead = 0
        for segment in segments:
            if segment is used[0]:
                break
            lead += len(segment.content)
    lengths = [len(tokens) for tokens, _ in keys]
    recomputed = 0
    if options["reuse"] == "blend" and keys:
        ratio = options["ratio"]
        by_chunk = options["select"] == "first"
        recomputed = sum(_share(ratio, n) for n in lengths) if by_chunk else _share(ratio, sum(lengths))
    # Whatever is cached, the last token of a prompt is computed.
    whole_blocks = llm.chunks.cached_prefix(ids[: min(lead, len(ids) - 1)], cache_salt=cache_salt)
    isolated = sum(lengths) - recomputed
    computed = len(ids) - whole_blocks - sum(lengths)
    known = kv.infos()
    missing = [key for key in dict.fromkeys(keys) if key not in known]
    chunk_bytes = sum(kv.bytes_of(key) for key in dict.fromkeys(keys))
    own_bytes = llm.chunks.bytes_for(len(ids) - sum(lengths) + recomputed)
    system, contexts, query = roles
    parts = {
        "system": system.token_count,
        "contexts": [chunk.token_count for chunk in contexts],
        "query": query.token_count,
    }
    named = system.token_count + query.token_count + sum(chunk.token_count for chunk in contexts)
    return {
        "total_tokens": len(ids),
        "chunks": {**parts, "template": len(ids) - named},
        "mode": options["reuse"] if keys else "exact",
        "exact_prefix": whole_blocks,
        "isolated": isolated,
        "recomputed": recomputed,
        "computed": computed,
        "to_encode": sum(len(tokens) + len(anchor) for tokens, anchor in missing),
        "num_runs": len(keys) + 1,
        "num_levels": 3 if keys else 2,
        "memory_bytes": chunk_bytes + own_bytes,
        "chunk_bytes": chunk_bytes,
        "own_bytes": own_bytes,
    }


def _share(ratio: float, count: int) -> int:
    """As the engine rounds it."""
    return math.ceil(ratio * count - 1e-9)
