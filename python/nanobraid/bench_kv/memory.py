"""Memory as it is read: from the kernel for this process, from NVIDIA's driver for a device. Nothing is computed.

The peak of a process (VmHWM) can be set back to what it holds now by writing to /proc/self/clear_refs; where that is
not allowed, the peak is that of the whole life of the process, and `Meter.source` says so.
"""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

MIB = float(1 << 20)
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


def read_status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status (VmRSS, VmHWM); None where the kernel does not have it."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found) * 1024


class Meter:
    """The peak of this process from now on.

    Attributes:
        source: What `peak` is: ``VmHWM since the measured part began``, ``VmHWM of the whole process``, or ``ru_maxrss
            of the whole process``.
        before: Bytes resident when it was made, or 0 if the kernel does not say.
    """

    def __init__(self) -> None:
        self.before = read_status("VmRSS") or 0
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self.source = "VmHWM since the measured part began"
        except OSError:
            has_peak = read_status("VmHWM") is not None
            self.source = f"{'VmHWM' if has_peak else 'ru_maxrss'} of the whole process"

    def peak(self) -> int:
        """Bytes."""
        high = read_status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if high is None else high


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_used(index: int = 0, library: Any = None) -> int | None:
    """Bytes in use on a device, by all processes, as the driver says; None where there is none.

    Args:
        index: Number of the device.
        library: NVML; None opens the driver's.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        if nvml.nvmlInit_v2() != 0:
            return None
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            return None
        if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)
    except (OSError, AttributeError):
        return None


class Highest:
    """Reads a number again and again while a block runs, and keeps the highest.

    Args:
        read: What is asked; it must be safe to call from another thread.
        seconds: Between two readings.
    """

    def __init__(self, read: Callable[[], int], seconds: float = 0.002) -> None:
        self._read = read
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failed: BaseException | None = None
        self.value = 0

    def _run(self) -> None:
        try:
            while True:
                self.value = max(self.value, self._read())
                if self._over.wait(self._seconds):
                    return
        except BaseException as error:  # raised where the block ends
            self._failed = error

    def __enter__(self) -> Highest:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._failed is not None and error is None:
            raise self._failed
