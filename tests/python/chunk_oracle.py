"""What composed prompts mean, as slow and obvious float64 numpy: the oracles of exact, isolated and blended reuse.

Chunks are encoded one by one in forward passes of their own, their keys are really rotated to where the chunk stands,
and every query row sees a mask of all T keys. `isolated_by_mask` and `blend_by_mask` say the same for chunks without an
anchor in another way: one forward pass at global positions under a block mask, no key ever moved.

`Oracle.defect` plants one of the known errors of such engines, for tests that must notice it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hf_weights import Array, frequencies, read_folder, rope_of
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]

DEFECTS = {
    "future_seen": "recomputed rows under a causal mask aligned to the last key: they see what follows them",
    "unscaled_move": "keys moved with the frequencies that the model had before its RoPE scaling",
    "factor_twice": "keys moved through the table of cos and sin that carries YaRN's attention factor",
    "moved_in_place": "keys stored again in bf16 after each of 64 moves",
    "not_moved": "keys left at their local positions",
    "off_by_one": "keys moved one position too far",
    "sink_kept": "first tokens visible although they were to be masked",
    "first_chunk_hidden": "the first token also masked of a chunk at position 0",
    "anchor_global": "an anchored chunk encoded at its global positions, far from its anchor",
    "chunk_dropped": "the last chunk not attended to",
}


@dataclass(frozen=True)
class Segment:
    """A piece of a composed prompt: plain tokens, or a chunk, encoded behind its anchor tokens alone."""

    tokens: tuple[int, ...]
    is_chunk: bool = False
    anchor: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placed:
    """A chunk at its place, and how many of its tokens are used: all but the prompt's last token, which is computed."""

    segment: Segment
    begin: int
    count: int

    @property
    def positions(self) -> range:
        return range(self.begin, self.begin + self.count)


@dataclass(frozen=True)
class Composed:
    """The rows that a composed prompt computes, and the keys and values that later tokens see.

    `positions` int[R] ascending; `logits` float64[R, V]; `keys` and `values` float64[L, T, Hkv, D], keys rotated to
    their places in the prompt; `hidden` bool[T]: what no row may attend to.
    """

    positions: Positions
    logits: Array
    keys: Array
    values: Array
    hidden: Mask

    def logits_at(self, position: int) -> Array:
        """The row of a computed position, float64[V]."""
        (row,) = np.flatnonzero(self.positions == position)
        return np.asarray(self.logits[row])


def tokens_of(segments: Sequence[Segment]) -> list[int]:
    """The prompt that the segments make; anchors are no part of it."""
    return [token for segment in segments for token in segment.tokens]


def approximate_chunks(segments: Sequence[Segment]) -> list[Placed]:
    """Every chunk whose keys differ from those of full prefill: one at position 0 without an anchor is exact."""
    out, begin, last = [], 0, len(tokens_of(segments)) - 1
    for segment in segments:
        if not segment.tokens or (segment.anchor and not segment.is_chunk):
            raise ValueError("a segment has tokens, and only a chunk has an anchor")
        count = min(len(segment.tokens), last - begin)
        if segment.is_chunk and (begin > 0 or segment.anchor) and count > 0:
            out.append(Placed(segment, begin, count))
        begin += len(segment.tokens)
    return out


def as_served(segments: Sequence[Segment], sink: str) -> list[Segment]:
    """The segments with chunks of which masking first tokens would leave nothing as plain ones, which are computed."""
    if sink != "mask":
        return list(segments)
    begins, last = np.cumsum([0, *(len(segment.tokens) for segment in segments)]), len(tokens_of(segments)) - 1
    return [
        Segment(segment.tokens) if begin > 0 and min(len(segment.tokens), last - begin) <= 1 else segment
        for segment, begin in zip(segments, begins, strict=False)
    ]


def share_of(ratio: float, count: int) -> int:
    """ceil(ratio * count) of the ratio as it is written: 0.55 of 100 is 55, although 0.55 * 100 is more in binary."""
    return math.ceil(ratio * count - 1e-9)


def select_first(segments: Sequence[Segment], count: int) -> list[int]:
    """The first `count` positions of every approximate chunk, or all where it is shorter."""
    return [position for chunk in approximate_chunks(segments) for position in chunk.positions[:count]]


def select_first_share(segments: Sequence[Segment], ratio: float) -> list[int]:
    """The first ceil(ratio * n) positions of every approximate chunk of n tokens."""
    chunks = approximate_chunks(segments)
    return [position for chunk in chunks for position in chunk.positions[: share_of(ratio, chunk.count)]]


class Oracle:
    """A model of a Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3, whatever its facts are."""

    def __init__(self, folder: Path, defect: str | None = None) -> None:
        if defect is not None and defect not in DEFECTS:
            raise ValueError(f"no defect {defect}")
        self.defect = defect
        self.config, self.tensors = read_folder(folder)
        self.heads = int(self.config["num_attention_heads"])
        self.kv_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self.dim = int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)
        self.num_layers = int(self.config["num_hidden_layers"])
        rope = rope_of(self.config)
        self.frequencies, self.factor = frequencies(rope, self.dim)
        self.unscaled = frequencies({"rope_theta": rope["rope_theta"], "rope_type": "default"}, self.dim)[0]
        self.windows = [self._window_of(layer) for layer in range(self.num_layers)]
        if unread := [name for name in self.tensors if not self._is_read(name)]:
            raise ValueError(f"the oracle does not know {unread[0]}")

    # The model, row by row.

    def full(self, tokens: Sequence[int]) -> Array:
        """Ordinary causal prefill: logits float64[T, V]."""
        return self.compose([Segment(tuple(tokens))], (), "keep").logits

    def prefill(self, tokens: Sequence[int]) -> tuple[Array, Array, Array]:
        """Logits float64[T, V] of ordinary causal prefill; its keys and values, float64[L, T, Hkv, D]."""
        positions = np.arange(len(tokens))
        return self.masked_forward(tokens, positions, positions[:, None] >= positions[None, :])

    def masked_forward(self, tokens: Sequence[int], positions: Positions, visible: Mask) -> tuple[Array, Array, Array]:
        """One pass over tokens at any positions under any mask bool[T, T], windows of the model on top."""
        x = self.tensors["model.embed_tokens.weight"][list(tokens)]
        keys, values = [], []
        for layer in range(self.num_layers):
            q, k, v = self._project(layer, x, positions)
            x = self._finish_layer(layer, x, self._attend(q, k, v, visible & self._in_window(layer, positions)))
            keys.append(k)
            values.append(v)
        return self._head(x), np.stack(keys), np.stack(values)

    # The three modes.

    def isolated(self, segments: Sequence[Segment], sink: str) -> Composed:
        """Chunks as they were encoded alone; plain tokens are computed and see all that stands before them.

        sink: "mask" hides the first token of every chunk that does not stand at position 0, "keep" hides nothing.
        """
        return self.compose(segments, (), sink)

    def blend(self, segments: Sequence[Segment], selected: Sequence[int], sink: str) -> Composed:
        """As isolated, but chunk tokens at the positions `selected` are computed in the prompt, as plain ones are."""
        return self.compose(segments, selected, sink)

    def compose(self, segments: Sequence[Segment], selected: Sequence[int], sink: str) -> Composed:
        of_chunks = {position for chunk in approximate_chunks(segments) for position in chunk.positions}
        if outside := set(selected) - of_chunks:
            raise ValueError(f"position {min(outside)} is no token of an approximate chunk")
        segments = as_served(segments, sink)
        tokens = tokens_of(segments)
        stored, keys, values = self._stored(segments, len(tokens))
        stored[list(selected)] = False
        hidden = self._hidden(segments, sink) & stored
        if self.defect == "chunk_dropped":
            hidden[approximate_chunks(segments)[-1].positions] = True
        rows = np.flatnonzero(~stored)
        everywhere = np.arange(len(tokens))
        limits = rows
        if self.defect == "future_seen":
            limits = np.arange(len(rows)) + len(tokens) - len(rows)
        x = self.tensors["model.embed_tokens.weight"][[tokens[row] for row in rows]]
        for layer in range(self.num_layers):
            q, keys[layer, rows], values[layer, rows] = self._project(layer, x, rows)
            visible = (everywhere[None, :] <= limits[:, None]) & ~hidden[None, :]
            visible &= self._in_window(layer, everywhere)[rows]
            x = self._finish_layer(layer, x, self._attend(q, keys[layer], values[layer], visible))
        return Composed(rows, self._head(x), keys, values, hidden)

    def deviations(self, segments: Sequence[Segment]) -> dict[int, float]:
        """Squared distance, over heads and channels, of the keys of layer 1 from those stored, per chunk position.

        Layer 0 runs for all tokens with ordinary causal attention, so that what enters layer 1 is right.
        """
        if self.num_layers < 2:
            raise ValueError("the deviation is measured at layer 1")
        tokens = tokens_of(segments)
        everywhere = np.arange(len(tokens))
        x = self.tensors["model.embed_tokens.weight"][tokens]
        q, k, v = self._project(0, x, everywhere)
        causal = everywhere[:, None] >= everywhere[None, :]
        x = self._finish_layer(0, x, self._attend(q, k, v, causal & self._in_window(0, everywhere)))
        fresh = self._project(1, x, everywhere)[1]
        stored, keys, _ = self._stored(segments, len(tokens))
        squares = ((fresh - keys[1]) ** 2).sum(axis=(1, 2))
        return {int(position): float(squares[position]) for position in np.flatnonzero(stored)}

    def select_deviation(self, segments: Sequence[Segment], ratio: float) -> list[int]:
        """The ceil(ratio * n) of all n approximate chunk tokens that deviate most, ascending; ties to the lower."""
        found = self.deviations(segments)
        ranked = sorted(found, key=lambda position: (-found[position], position))
        return sorted(ranked[: share_of(ratio, len(found))])

    # The same once more for chunks without an anchor: one forward pass, no key moved.

    def isolated_by_mask(self, segments: Sequence[Segment], sink: str) -> Composed:
        """A pass over the whole prompt at global positions in which a chunk's tokens see their own chunk alone."""
        segments = as_served(segments, sink)
        tokens, owner = self._owners(segments)
        everywhere = np.arange(len(tokens))
        hidden = self._hidden(segments, sink)
        same = owner[:, None] == owner[None, :]
        visible = np.where(owner[:, None] >= 0, same, ~hidden[None, :])
        visible &= everywhere[:, None] >= everywhere[None, :]
        logits, keys, values = self.masked_forward(tokens, everywhere, visible)
        rows = np.flatnonzero(owner < 0)
        return Composed(rows, logits[rows], keys, values, hidden)

    def blend_by_mask(self, segments: Sequence[Segment], selected: Sequence[int], sink: str) -> Composed:
        """A pass over the prompt twice side by side: the chunks as stored, and the rows that are computed."""
        segments = as_served(segments, sink)
        tokens, owner = self._owners(segments)
        count = len(tokens)
        everywhere = np.arange(count)
        computed = owner < 0
        computed[list(selected)] = True
        hidden = self._hidden(segments, sink) & ~computed
        before = everywhere[:, None] >= everywhere[None, :]
        visible = np.zeros((2 * count, 2 * count), np.bool_)
        visible[:count, :count] = before & (owner[:, None] == owner[None, :])
        visible[count:, :count] = before & ~(computed | hidden)[None, :]
        visible[count:, count:] = before & (computed[None, :] | np.eye(count, dtype=np.bool_))
        logits, keys, values = self.masked_forward([*tokens, *tokens], np.tile(everywhere, 2), visible)
        rows = np.flatnonzero(computed)
        both = np.where(
            computed[None, :, None, None], [keys[:, count:], values[:, count:]], [keys[:, :count], values[:, :count]]
        )
        return Composed(rows, logits[count:][rows], both[0], both[1], hidden)

    # Chunks.

    def encode(self, segment: Segment, begin: int = 0) -> tuple[Array, Array]:
        """Keys at local positions and values of a chunk's own tokens behind its anchor, float64[L, n, Hkv, D]."""
        anchor = len(segment.anchor)
        tokens = [*segment.anchor, *segment.tokens]
        positions = np.arange(len(tokens))
        visible = positions[:, None] >= positions[None, :]
        if self.defect == "anchor_global":
            positions = np.concatenate([positions[:anchor], begin + np.arange(len(segment.tokens))])
        _, keys, values = self.masked_forward(tokens, positions, visible)
        return keys[:, anchor:], values[:, anchor:]

    def move(self, keys: Array, offset: int) -> Array:
        """Keys rotated on by `offset` positions: a pure rotation, whatever factor the model's table carries."""
        used = self.unscaled if self.defect == "unscaled_move" else self.frequencies
        if self.defect == "moved_in_place":
            for step in np.random.default_rng(3).integers(-2000, 2000, 64):
                keys, offset = as_bf16(rotate(keys, step * used)), offset - int(step)
        moved = rotate(keys, offset * used)
        return moved * self.factor if self.defect == "factor_twice" else moved

    def _stored(self, segments: Sequence[Segment], count: int) -> tuple[Mask, Array, Array]:
        """Which positions come from chunks; their keys at their places, and values, in arrays of the whole prompt."""
        stored = np.zeros(count, np.bool_)
        keys, values = np.zeros((2, self.num_layers, count, self.kv_heads, self.dim))
        for chunk in self._chunks(segments):
            where = slice(chunk.begin, chunk.positions.stop)
            local, own = (rows[:, : chunk.count] for rows in self.encode(chunk.segment, chunk.begin))
            values[:, where] = own
            offset = chunk.begin - len(chunk.segment.anchor)
            if self.defect == "not_moved" or (self.defect == "anchor_global" and chunk.segment.anchor):
                offset = 0
            keys[:, where] = self.move(local, offset + (self.defect == "off_by_one"))
            stored[where] = True
        return stored, keys, values

    def _owners(self, segments: Sequence[Segment]) -> tuple[list[int], NDArray[np.int64]]:
        """The prompt, and per token the number of its approximate chunk, -1 for the others."""
        tokens = tokens_of(segments)
        owner = np.full(len(tokens), -1)
        for number, chunk in enumerate(approximate_chunks(segments)):
            if chunk.segment.anchor:
                raise ValueError("a pass at global positions says nothing about anchored chunks")
            owner[chunk.positions] = number
        return tokens, owner

    def _hidden(self, segments: Sequence[Segment], sink: str) -> Mask:
        if sink not in ("mask", "keep"):
            raise ValueError(f"sink {sink}: there are mask and keep")
        hidden = np.zeros(len(tokens_of(segments)), np.bool_)
        if sink == "mask" and self.defect != "sink_kept":
            for chunk in self._chunks(segments):
                hidden[chunk.begin] = chunk.begin > 0 or self.defect == "first_chunk_hidden"
        return hidden

    def _chunks(self, segments: Sequence[Segment]) -> list[Placed]:
        chunks = approximate_chunks(segments)
        if self.defect == "first_chunk_hidden" and segments[0].is_chunk and not segments[0].anchor:
            return [Placed(segments[0], 0, len(segments[0].tokens)), *chunks]
        return chunks

    # One layer.

    def _project(self, layer: int, x: Array, positions: Positions) -> tuple[Array, Array, Array]:
        prefix = f"model.layers.{layer}.self_attn."
        normed = self._norm(x, f"model.layers.{layer}.input_layernorm.weight")
        out = []
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            rows = normed @ self.tensors[f"{prefix}{name}_proj.weight"].T + self.tensors.get(
                f"{prefix}{name}_proj.bias", 0.0
            )
            split = rows.reshape(len(x), heads, self.dim)
            if f"{prefix}{name}_norm.weight" in self.tensors:
                split = self._norm(split, f"{prefix}{name}_norm.weight")
            if name != "v":
                split = self.factor * rotate(split, positions[:, None, None] * self.frequencies)
            out.append(split)
        return out[0], out[1], out[2]

    def _attend(self, q: Array, k: Array, v: Array, visible: Mask) -> Array:
        """Softmax attention of rows [R, Hq, D] over keys [T, Hkv, D] where visible [R, T]: [R, Hq * D]."""
        out = np.zeros_like(q)
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            scores = np.where(visible, q[:, head] @ k[:, group].T / math.sqrt(self.dim), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
        return out.reshape(len(q), -1)

    def _finish_layer(self, layer: int, x: Array, attended: Array) -> Array:
        prefix = f"model.layers.{layer}."
        x = x + attended @ self.tensors[f"{prefix}self_attn.o_proj.weight"].T
        normed = self._norm(x, f"{prefix}post_attention_layernorm.weight")
        gate = normed @ self.tensors[f"{prefix}mlp.gate_proj.weight"].T
        up = normed @ self.tensors[f"{prefix}mlp.up_proj.weight"].T
        return np.asarray(x + (gate / (1 + np.exp(-gate)) * up) @ self.tensors[f"{prefix}mlp.down_proj.weight"].T)

    def _head(self, x: Array) -> Array:
        output = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return np.asarray(self._norm(x, "model.norm.weight") @ output.T)

    def _norm(self, x: Array, weight: str) -> Array:
        size = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return np.asarray(x / size * self.tensors[weight])

    # Facts.

    def _window_of(self, layer: int) -> int | None:
        """How many positions up to its own a row of the layer sees; None: all."""
        window = self.config.get("sliding_window")
        if not window or self.config.get("use_sliding_window") is False:
            return None
        kinds = self.config.get("layer_types")
        if kinds is not None:
            return int(window) if kinds[layer] == "sliding_attention" else None
        return int(window) if layer >= self.config.get("max_window_layers", 0) else None

    def _in_window(self, layer: int, positions: Positions) -> Mask:
        """By positions in the composition, whatever they were when a chunk was encoded."""
        window = self.windows[layer]
        near = positions[:, None] - positions[None, :]
        return np.asarray(near < window) if window is not None else np.ones_like(near, np.bool_)

    def _is_read(self, name: str) -> bool:
        kind = name.split(".", 3)[3] if name.startswith("model.layers.") else name
        return kind in READ


READ = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
READ |= {f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")}
READ |= {"self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
READ |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
READ |= {"input_layernorm.weight", "post_attention_layernorm.weight"}


def rotate(x: Array, angles: Array) -> Array:
    """Half-split rotation of the last axis of x by angles [..., D / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def as_bf16(x: Array) -> Array:
    """Rounded to bf16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(bits.view(np.float32), np.float64)
