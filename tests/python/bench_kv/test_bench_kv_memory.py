"""Memory is read, and rises with what is touched."""

from __future__ import annotations

import ctypes
import mmap
import time
from typing import Any

import pytest

from nanobraid.bench_kv import memory

SIZE = 64 << 20


def test_the_peak_rises_by_what_is_touched_not_by_what_is_mapped() -> None:
    mapped = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    meter = memory.Meter()
    if not meter.source.startswith("VmHWM since"):
        pytest.skip(f"this kernel does not let a process set its peak back: {meter.source}")
    start = meter.peak()
    assert start - meter.before < 8 << 20
    for page in range(0, SIZE // 2, mmap.PAGESIZE):
        mapped[page] = 1
    half = meter.peak()
    assert SIZE // 2 - (4 << 20) < half - start < SIZE // 2 + (8 << 20)
    for page in range(SIZE // 2, SIZE, mmap.PAGESIZE):
        mapped[page] = 1
    assert meter.peak() - half > SIZE // 2 - (4 << 20)
    mapped.close()
    assert meter.peak() - start > SIZE - (4 << 20)  # a peak stays
    assert memory.Meter().peak() < start + SIZE // 2  # until it is set back


def test_without_a_peak_of_the_kernel_it_is_that_of_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def write_text(self, text: str) -> int:
            raise PermissionError(13, "not allowed")

    monkeypatch.setattr(memory, "_CLEAR_REFS", Refusing())
    assert memory.Meter().source == "VmHWM of the whole process"
    monkeypatch.setattr(memory, "read_status", lambda field: None)
    meter = memory.Meter()
    assert meter.source == "ru_maxrss of the whole process"
    assert meter.peak() > 10 << 20


class FakeNvml:
    """As NVML answers: codes, and values through pointers."""

    def __init__(self, used: int, failing: str = "") -> None:
        self.used, self.failing = used, failing

    def nvmlInit_v2(self) -> int:
        return int(self.failing == "init")

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        return int(self.failing == "handle" or index != 0)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:
        info._obj.used = self.used
        return int(self.failing == "info")


def test_memory_of_a_device_is_what_its_driver_says() -> None:
    assert memory.gpu_used(library=FakeNvml(12345678901)) == 12345678901
    for failing in ("init", "handle", "info"):
        assert memory.gpu_used(library=FakeNvml(1, failing)) is None
    assert memory.gpu_used(index=3, library=FakeNvml(1)) is None
    assert memory.gpu_used(library=object()) is None
    assert ctypes.sizeof(memory._NvmlMemory) == 24


def test_the_highest_reading_is_kept_and_a_failed_one_is_raised() -> None:
    values = iter([3, 9, 4])
    with memory.Highest(lambda: next(values, 5), seconds=0.001) as highest:
        time.sleep(0.1)
    assert highest.value == 9

    def broken() -> int:
        raise ValueError("no reading")

    with pytest.raises(ValueError, match="no reading"), memory.Highest(broken):
        pass
