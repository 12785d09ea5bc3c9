"""The text that tells an export which columns matter, and its way through the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanobraid import _core
from nanobraid.errors import core_errors

TEXT = Path(__file__).with_name("calibration.txt")
MAX_TOKENS = 2048
SEQUENCE_LEN = 256

# The statistics that belong to each matrix of a layer.
_COLUMNS_OF = {
    "attn_q": "qkv",
    "attn_k": "qkv",
    "attn_v": "qkv",
    "attn_output": "attention_out",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
    "ffn_down": "down",
}


@dataclass(frozen=True)
class Calibration:
    """Mean squares of the inputs of every matrix."""

    layers: list[dict[str, NDArray[np.float32]]]
    head: NDArray[np.float32]
    text: str
    num_tokens: int

    def importance(self, tensor: str) -> NDArray[np.float32] | None:
        """Of the columns of a tensor; None for one that no activation meets (an embedding beside a head)."""
        if tensor in ("output.weight", "token_embd.weight"):
            return self.head
        parts = tensor.split(".")
        if len(parts) != 4 or parts[2] not in _COLUMNS_OF:
            return None
        return self.layers[int(parts[1])][_COLUMNS_OF[parts[2]]]


def calibrate(
    file: _core.ModelFile, max_positions: int, vocab_size: int, progress: Callable[[int, int], None] | None
) -> Calibration:
    """Runs the calibration text through a model, a layer at a time.

    A model without a tokenizer gets random token ids instead, always the same; the name of the text says so.
    """
    length = min(SEQUENCE_LEN, max_positions)
    with core_errors():
        if "tokenizer.ggml.model" in file.metadata():
            name = TEXT.name
            ids = _spread(_core.encode_text(file, TEXT.read_text(encoding="utf-8")), length)
        else:
            name = "random token ids"
            ids = np.random.default_rng(0).integers(0, vocab_size, 2 * length).tolist()
        layers, head = _core.measure_inputs(file, ids, length, progress=progress)
    return Calibration(layers, head, name, len(ids))


def _spread(ids: list[int], length: int) -> list[int]:
    """At most `MAX_TOKENS` tokens, in sequences of `length` that stand evenly over the text."""
    count = max(min(MAX_TOKENS, len(ids)) // length, 1)
    starts = [round(i * max(len(ids) - length, 0) / max(count - 1, 1)) for i in range(count)]
    return [token for start in starts for token in ids[start : start + length]]
