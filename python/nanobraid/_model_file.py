"""From what a user calls a model to the file that is loaded."""

from __future__ import annotations

import os
from pathlib import Path


def ensure_file(model: str | os.PathLike[str]) -> Path:
    """Returns the model's file: downloaded, or exported from a Hugging Face folder, if need be.

    Raises:
        NanobraidError: As `nanobraid.models.ensure`, or the folder cannot be exported.
    """
    from nanobraid import models

    path = models.ensure(model)
    if not path.is_dir():
        return path
    from nanobraid import _export_cache  # importing the exporter takes time and memory

    return _export_cache.model_file(path)
