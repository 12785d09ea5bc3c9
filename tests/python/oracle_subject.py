"""Tiny models for tests that compare the engine with the slow oracle of `chunk_oracle`."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_chunk_oracle import MODELS
from tiny_hf import tensors_of, vocabulary, write_folder

from nanobraid.export import export_model, hf_folder


class Subject:
    """A tiny model as a folder for the oracle and as a file for the engine."""

    def __init__(self, name: str, folder: Path) -> None:
        config = MODELS[name]
        self.folder = write_folder(folder / name, config, tensors_of(config, seed=5))
        self.path = folder / f"{name}.braid"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_folder, "_tokenizer", lambda _: vocabulary(300))
            export_model(self.folder, self.path, "f32")
