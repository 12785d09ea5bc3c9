"""What the compiler made of the CUDA kernels: registers, local memory, and where loads stand in the machine code.

Looks into libnanobraid_cuda.so with NVIDIA's disassembler (PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, in the
extra `test`); no GPU is needed, nvcc is. Every kernel needs a row in BUDGETS. A gate asks for what it wants to see, so
that a disassembly that says nothing passes none.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from kernel_coverage import global_functions, library_sources  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a")
WAITING = "sm_90a"  # programmatic dependent launch begins with sm_90

# Kernel, as a pattern for its name with template arguments, and the most registers a thread may take. 64 leave room for
# 8 blocks of 128 threads on an SM. `streams`: asks for 16-byte pieces of its weights before it waits for the kernel
# before; the others load nothing before.


@dataclass(frozen=True)
class Budget:
    pattern: str
    registers: int
    streams: bool = False


GEMV = r"(?:linear|linear_residual|norm_qkv|norm_gate_up|head)_kernel"

BUDGETS = (
    Budget(r"embed_kernel<(float|Bf16|Fp16|SignedByte)>", 24),
    Budget(r"rms_norm_kernel", 32),
    Budget(r"prepare_kernel", 24),
    Budget(r"rope_kernel", 24),
    Budget(r"kv_write_kernel", 32),
    Budget(r"kv_write_tokens_kernel", 64),
    Budget(r"key_deviation_kernel<(float|Bf16|Fp16)>", 40),
    Budget(r"key_deviation_kernel<Code8>", 48),
    Budget(r"key_deviation_kernel<Sealed>", 56),
    Budget(r"summarize_kv_kernel<.*>", 64),
    Budget(r"kv_seal_kernel", 64),
    Budget(r"silu_mul_kernel", 24),
    Budget(r"argmax_kernel", 32),
    Budget(rf"{GEMV}<.*, 1>", 64, streams=True),
    Budget(rf"{GEMV}<(float|Bf16|Fp16), .*, [24]>", 114, streams=True),
    Budget(rf"{GEMV}<(float|Bf16|Fp16), .*, 8>", 152, streams=True),
    Budget(rf"{GEMV}<SignedByte, .*, [24]>", 128, streams=True),
    Budget(rf"{GEMV}<SignedByte, .*, 8>", 168, streams=True),
    Budget(r"finish_heads_kernel<(0|false)>", 32),
    Budget(r"finish_heads_kernel<(1|true)>", 64),
    Budget(r"head_argmax_kernel", 32),
    Budget(r"gemm_bf16_kernel<\w+, MmaTile<128, .*", 240, streams=True),  # two blocks of 128 threads on an SM
    Budget(r"gemm_bf16_kernel<Bf16, MmaTile<(32|64), .*", 128, streams=True),
    Budget(r"gemm_bf16_kernel<SignedByte, MmaTile<(32|64), .*", 144, streams=True),
    Budget(r"gemm_f32_kernel<.*", 128, streams=True),
    Budget(r"attention_decode_kernel<.*, 4, (0|false)>", 128),
    Budget(r"attention_decode_kernel<(float|Bf16|Fp16|Code8), .*, 4, (1|true)>", 128),
    Budget(r"attention_decode_kernel<Sealed, .*, 4, (1|true)>", 160),
    Budget(r"attention_decode_kernel<.*, (Bf16|Fp16|Code8), \d+, 8, (0|false)>", 168),
    Budget(r"attention_decode_kernel<.*, (float|Code4), \d+, 8, (0|false)>", 200),
    Budget(r"attention_decode_kernel<.*, \d+, 8, (1|true)>", 224),  # with policies
    Budget(r"attention_prefill_kernel<.*, (64|96|128), (0|1|false|true)>", 255),  # two blocks of 128 threads on an SM
    Budget(r"attention_merge_kernel", 32),
    Budget(r"sample_kernel<(256|1024)>", 64),
)


@dataclass
class Kernel:
    name: str
    architecture: str
    resources: dict[str, int] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture})"

    def places(self, pattern: str) -> list[int]:
        """Where instructions that match stand."""
        return [i for i, line in enumerate(self.code) if re.match(pattern, line)]


def checked(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def cuobjdump(*arguments: str | Path) -> str:
    folders = {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}
    path = os.pathsep.join(str(found) for folder in folders for found in folder.glob("nvidia/*/bin"))
    path += os.pathsep + os.environ.get("PATH", "")
    if not all(shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")):
        pytest.skip("there are no cuobjdump and nvdisasm (pip install 'nanobraid[test]')")
    return checked("env", f"PATH={path}", "cuobjdump", *arguments)


def has_all(library: Path) -> bool:
    listed = cuobjdump("--list-elf", library)
    return all(f".{architecture}.cubin" in listed for architecture in ARCHITECTURES)


@pytest.fixture(scope="module")
def library() -> Path:
    """The up-to-date library of the build folder of the tests, if it has both architectures, else one of our own."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc, so no library of CUDA kernels")
    given = Path(os.environ.get("NANOBRAID_BUILD_DIR", ROOT / "build")) / "libnanobraid_cuda.so"
    if given.is_file():
        checked("cmake", "--build", given.parent, "--target", "nanobraid_cuda")
        if has_all(given):
            return given
    build = ROOT / "build" / "cuda-gates"
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(a[3:] + '-real' for a in ARCHITECTURES)}"]
    if shutil.which("ccache"):
        options += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")]
    options += [f"-DNANOBRAID_{what}=OFF" for what in ("PYTHON", "TESTS", "DEMOS")]
    checked("cmake", "-S", ROOT, "-B", build, "-DNANOBRAID_CUDA=ON", "-DNANOBRAID_WERROR=ON", *options)
    checked("cmake", "--build", build, "--target", "nanobraid_cuda")
    assert has_all(build / given.name)
    return build / given.name


def short_names(mangled: list[str]) -> list[str]:
    """`embed_kernel<Bf16>` from what the linker calls it."""
    shown = checked("c++filt", *mangled).splitlines()
    names = []
    for name in shown:
        found = re.search(
            r"(\w+(?:<.*>)?)\(", re.sub(r"\(anonymous namespace\)::|\b\w+::|\((?:\w+::)*\w+\)(?=-?\d)", "", name)
        )
        assert found, name
        names.append(found.group(1))
    assert len(names) == len(mangled)
    return names


def read_kernels(library: Path, architecture: str) -> Iterator[Kernel]:
    kernels: dict[str, Kernel] = {}
    current = None
    for line in cuobjdump("-arch", architecture, "-res-usage", library).splitlines():
        if found := re.match(r"\s*Function (\S+):", line):
            current = kernels.setdefault(found.group(1), Kernel("", architecture))
        elif current is not None and "REG:" in line:
            current.resources = {key: int(value) for key, value in re.findall(r"(\w+(?:\[0\])?):(\d+)", line)}
    current = None
    for line in cuobjdump("-arch", architecture, "-sass", library).splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            current = kernels[found.group(1)]
        elif current is not None and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", line)):
            current.code.append(found.group(1))
    for kernel, name in zip(kernels.values(), short_names([*kernels]), strict=True):
        kernel.name = name
        yield kernel


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Kernel]:
    found = [kernel for architecture in ARCHITECTURES for kernel in read_kernels(library, architecture)]
    for kernel in found:
        assert {"REG", "STACK", "LOCAL", "SHARED"} <= kernel.resources.keys(), kernel
        assert len(kernel.code) > 10, f"{kernel}: no machine code"
        assert kernel.places("EXIT"), f"{kernel}: no machine code"
    return found


def budget_of(kernel: Kernel) -> Budget:
    rows = [row for row in BUDGETS if re.fullmatch(row.pattern, kernel.name)]
    assert len(rows) == 1, f"{kernel} needs one row in BUDGETS, has {len(rows)}"
    return rows[0]


def test_every_kernel_has_a_budget_and_every_budget_a_kernel(kernels: list[Kernel]) -> None:
    for architecture in ARCHITECTURES:
        names = {kernel.name for kernel in kernels if kernel.architecture == architecture}
        used = {budget_of(kernel).pattern for kernel in kernels if kernel.architecture == architecture}
        assert used == {row.pattern for row in BUDGETS}
        assert {name.split("<")[0] for name in names} == set(global_functions("".join(library_sources().values())))


def test_registers_and_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        used = kernel.resources["REG"]
        assert 0 < used <= budget_of(kernel).registers, f"{kernel} takes {used} registers"
        assert kernel.resources["STACK"] == kernel.resources["LOCAL"] == 0, f"{kernel}: {kernel.resources}"
        assert not kernel.places(r"(LDL|STL)\b"), f"{kernel} uses local memory"


def test_kernels_trigger_wait_and_only_then_write(kernels: list[Kernel]) -> None:
    for kernel in (kernel for kernel in kernels if kernel.architecture == WAITING):
        triggers, waits = kernel.places(r"PREEXIT\b"), kernel.places(r"ACQBULK\b")
        assert triggers, f"{kernel} never lets the next kernel start"
        assert waits, f"{kernel} never waits for the kernel before"
        assert triggers[0] < waits[0], kernel
        for place in kernel.places(r"(STG?|ATOMG?|REDG?)\b"):
            assert place > waits[0], f"{kernel} writes before it waits: {kernel.code[place]}"


def test_only_streamed_weights_are_loaded_before_the_wait(kernels: list[Kernel]) -> None:
    for kernel in (kernel for kernel in kernels if kernel.architecture == WAITING):
        wait = kernel.places(r"ACQBULK\b")[0]
        early = [kernel.code[place] for place in kernel.places(r"(LDG?|LDGSTS|UBLKCP)\b") if place < wait]
        if budget_of(kernel).streams:
            wide = [line for line in early if re.match(r"(LDG\.E\S*\.128|LDGSTS\S*\.128|UBLKCP)", line)]
            assert wide, f"{kernel} does not ask for its weights before it waits"
        else:
            assert not early, f"{kernel} loads before it waits: {early}"


# ---- sources ----


def test_assembly_and_launches_stand_in_one_file_each() -> None:
    sources = library_sources()
    assert {name for name, text in sources.items() if re.search(r"\b(asm|__asm__)\b", text)} == {"ptx.cuh"}
    assert {name for name, text in sources.items() if "cudaLaunchKernel" in text} == {"launch.cuh"}
    assert not {name for name, text in sources.items() if "<<<" in text}


def test_a_launch_names_its_kernel() -> None:
    text = "".join(library_sources().values())
    launches = re.findall(r'launch\(\s*\{\.name = "(\w+)"[^;]*?\}\s*,\s*(\w+)', text)
    assert {named for named, _ in launches} == {started for _, started in launches} == set(global_functions(text))
    assert [pair for pair in launches if pair[0] != pair[1]] == []


# ---- what the emulator has run ----


def test_every_kernel_has_run_on_the_emulator() -> None:
    build = Path(os.environ.get("NANOBRAID_BUILD_DIR", ROOT / "build"))
    program = build / "cuda_emulation_tests"
    if not program.is_file():
        pytest.skip(f"{program} is not built")
    told = checked(sys.executable, ROOT / "tools" / "kernel_coverage.py", program, build / "cuda_emulation" / "runs")
    assert re.search(r"^(\d+) of \1 kernels have run$", told, re.MULTILINE), told


# ---- the library ----


def test_the_library_shows_one_symbol_and_needs_no_driver(library: Path) -> None:
    symbols = [line.split()[-1] for line in checked("nm", "-D", "--defined-only", library).splitlines()]
    assert symbols == ["nb_device_plugin"]
    needed = re.findall(r"NEEDED.*\[(.*)\]", checked("readelf", "-d", library))
    assert "libc.so.6" in needed
    assert not [name for name in needed if "cuda" in name]


def has_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def test_the_library_loads_and_says_what_there_is(library: Path) -> None:
    code = "from nanobraid import _core; print(_core.cuda_status()); print(_core.available_backends())"
    environment = {**os.environ, "NANOBRAID_CUDA_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, backends = done.stdout.splitlines()
    if has_gpu():
        assert status.startswith("usable: "), status
        assert "cuda:0" in backends
    else:
        assert re.fullmatch(r"not usable: no NVIDIA (driver|GPU.*)", status), status
        assert "cuda:0" not in backends
