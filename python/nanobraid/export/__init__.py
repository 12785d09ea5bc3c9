"""Makes `.braid` files from Hugging Face folders, GGUF files and other `.braid` files."""

from __future__ import annotations

from nanobraid.export.exporter import DTYPES, export_model
from nanobraid.export.summary import ExportSummary, TensorSummary

__all__ = ["DTYPES", "ExportSummary", "TensorSummary", "export_model"]
