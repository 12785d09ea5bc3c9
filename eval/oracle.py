"""The independent oracle of the evaluation scripts: transformers in float32 over the same model file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Oracle:
    """A model run by transformers on CPU in float32.

    Args:
        path: A GGUF file (dequantized by transformers) or a Hugging Face folder.
    """

    def __init__(self, path: str | Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        path = Path(path)
        source: dict[str, Any] = (
            {"pretrained_model_name_or_path": str(path)}
            if path.is_dir()
            else {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        )
        self.model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """float32[T, vocab_size]: row i predicts token i + 1."""
        with self._torch.inference_mode():
            output = self.model(self._torch.tensor([token_ids]))
        return np.asarray(output.logits[0].numpy(), dtype=np.float32)

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The `num_tokens` most likely continuations, one after another; does not stop at any token."""
        with self._torch.inference_mode():
            past = None
            inputs = self._torch.tensor([token_ids])
            out: list[int] = []
            for _ in range(num_tokens):
                step = self.model(inputs, past_key_values=past, use_cache=True)
                past = step.past_key_values
                token = int(step.logits[0, -1].argmax())
                out.append(token)
                inputs = self._torch.tensor([[token]])
        return out


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row-wise, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(reference || other) of each row in nats, float64[T]."""
    p, q = log_softmax(reference), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))
