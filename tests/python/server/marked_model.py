"""A small random model of single bytes and some pairs, some of whose control tokens mark tool calls and thoughts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny_hf


def marked_model(folder: Path, control: list[str], template: str = "") -> Path:
    """Writes the model with these control tokens behind ``<|end|>``, its end of sequence; returns its file."""
    vocabulary = tiny_hf.vocabulary(300)
    shown, merges = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.merges"]
    specials = ["<|end|>", *control]
    added = [
        {
            "id": len(shown) + i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, text in enumerate(specials)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(shown)}, "merges": merges}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }
    config = tiny_hf.config_of(
        "llama", vocab_size=len(shown) + len(specials), eos_token_id=len(shown), max_position_embeddings=2048
    )
    tiny_hf.write_folder(folder, config, tiny_hf.tensors_of(config, seed=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {"eos_token": "<|end|>", "chat_template": template or "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    out = folder / "model.braid"
    command = [sys.executable, "-m", "nanobraid", "export", str(folder), "-o", str(out), "--dtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    return out
