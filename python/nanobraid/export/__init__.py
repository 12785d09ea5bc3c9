"""Makes `.braid` files from Hugging Face folders, GGUF files and other `.braid` files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanobraid.export.summary import DTYPES, ExportSummary, TensorSummary

if TYPE_CHECKING:
    from nanobraid.export.exporter import export_model

__all__ = ["DTYPES", "ExportSummary", "TensorSummary", "export_model"]


def __getattr__(name: str) -> Any:
    if name == "export_model":
        from nanobraid.export import exporter  # importing numpy takes time

        return exporter.export_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
