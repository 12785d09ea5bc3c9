"""What an export did: per tensor and in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DTYPES = ("f32", "bf16", "f16", "w8", "w4", "keep")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of the new file.

    Attributes:
        name: As in the file.
        format: Its weight format.
        shape: Outermost first.
        bytes: In the file.
        relative_error: Root of sum (w - w')^2 / sum w^2, w the source's weights and w' those of the file.
        note: Why the format is another one than asked for; empty if it is not.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    relative_error: float
    note: str = ""

    @property
    def num_weights(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / max(self.num_weights, 1)


@dataclass(frozen=True)
class ExportSummary:
    """The whole export.

    Attributes:
        source: What was read.
        out: The file that was written.
        dtype: As asked for.
        tensors: In file order.
        source_bytes: Size of the source's weights on disk.
        file_bytes: Size of the new file.
        seconds: Wall time of everything.
        peak_rss_bytes: The most memory this process has held so far.
        calibration_text: Name of the text that was run through the model; empty if there was no need.
        calibration_tokens: Its tokens.
        calibration_seconds: Wall time of that pass.
        calibration_rss_bytes: The most memory held until the end of that pass.
        notes: Things to know, one a line.
    """

    source: Path
    out: Path
    dtype: str
    tensors: tuple[TensorSummary, ...]
    source_bytes: int
    file_bytes: int
    seconds: float
    peak_rss_bytes: int
    calibration_text: str = ""
    calibration_tokens: int = 0
    calibration_seconds: float = 0.0
    calibration_rss_bytes: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def num_weights(self) -> int:
        return sum(tensor.num_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, vectors included, without metadata and padding."""
        return 8.0 * sum(tensor.bytes for tensor in self.tensors) / max(self.num_weights, 1)
