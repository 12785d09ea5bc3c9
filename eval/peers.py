"""Other engines as sides of bench_cpu_peers.py: how their programs are called and what their output says.

llama.cpp: its own benchmarks with their warm-up, 2 MB pages for malloc, f16 keys and values, and every configuration a
user would try. A measurement answers {configuration: {metric: value}}; which of them is the peer's best is for the
caller to find. OpenVINO GenAI: a process of its own environment (openvino_side.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Measured = dict[str, dict[str, float]]

ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
FLASH_ATTENTION = ("off", "on")
LOAD_MODES = ("mmap", "none")
PROMPT = "The capital of France is"
NEW_TOKENS = 32  # of the answer whose memory is measured

# Runs a command and says its peak resident size. A process of its own: what the kernel counts for a child begins with
# the size of the process that started it.
PEAK = """
import os, sys
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
print("peak_kib", usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class PeerError(RuntimeError):
    """A peer did not start, refused the file or said something we cannot read."""


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command's output; PeerError with the end of what it said when it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode != 0:
        raise PeerError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done


def peak_mib(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Peak resident size of a command, as the kernel counts it."""
    return parse_peak(run([sys.executable, "-S", "-c", PEAK, *command], environment).stderr)


def parse_peak(stderr: str) -> float:
    lines = [line for line in stderr.splitlines() if line.startswith("peak_kib ")]
    if not lines:
        raise PeerError(f"no peak was printed: {stderr[-400:]}")
    return int(lines[-1].split()[1]) / 1024


def parse_llama_bench(stdout: str, pp: int, tg: int, depth: int) -> Measured:
    """`llama-bench -o json`: prefill and decode of each setting of flash attention."""
    result: Measured = {}
    for row in json.loads(stdout):
        if row["n_depth"] != depth:
            raise PeerError(f"llama-bench measured after {row['n_depth']} tokens, not {depth}")
        metrics = result.setdefault("fa on" if row["flash_attn"] in (1, True) else "fa off", {})
        if (row["n_prompt"], row["n_gen"]) == (pp, 0):
            metrics["prefill"] = float(row["avg_ts"])
        elif (row["n_prompt"], row["n_gen"]) == (0, tg):
            metrics["decode"] = float(row["avg_ts"])
        else:
            raise PeerError(f"llama-bench measured {row['n_prompt']} and {row['n_gen']} tokens")
    wanted = {name for name, count in (("prefill", pp), ("decode", tg)) if count}
    if len(result) != len(FLASH_ATTENTION) or any(set(metrics) != wanted for metrics in result.values()):
        raise PeerError(f"llama-bench said too little: {result}")
    return result


class LlamaCpp:
    """llama.cpp's programs in one folder."""

    name = "llama.cpp"

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads

    def program(self, name: str) -> str:
        """Path of one of its programs; PeerError if it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise PeerError(f"{path} does not exist: build llama.cpp's target {name}")
        return str(path)

    def speed(self, file: Path, pp: int, tg: int, depth: int) -> Measured:
        """tokens/s of a prompt of `pp` and of `tg` tokens one by one, after `depth` tokens; 0 leaves one out."""
        command = [self.program("llama-bench"), "-m", str(file), "-t", str(self.threads), "-r", "1", "-o", "json"]
        command += ["-p", str(pp), "-n", str(tg), "-d", str(depth), "-fa", ",".join(FLASH_ATTENTION)]
        return parse_llama_bench(run(command, ENVIRONMENT).stdout, pp, tg, depth)

    def _completion(self, file: Path, flash: str, load: str, context: int, new_tokens: int) -> list[str]:
        command = [self.program("llama-completion"), "-m", str(file), "-t", str(self.threads), "-c", str(context)]
        command += ["-n", str(new_tokens), "--temp", "0", "-fa", flash, "-lm", load]
        return [*command, "--no-warmup", "-no-cnv", "--no-display-prompt", "--ignore-eos"]

    def first_token(self, file: Path, context: int) -> Measured:
        """Seconds from the start of a process to the first byte of its answer."""
        result: Measured = {}
        for flash in FLASH_ATTENTION:
            for load in LOAD_MODES:
                command = [*self._completion(file, flash, load, context, 4), "-p", PROMPT]
                with tempfile.TemporaryFile() as log:
                    begin = time.perf_counter()
                    with subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env={**os.environ, **ENVIRONMENT},
                    ) as process:
                        assert process.stdout is not None
                        first = process.stdout.read(1)
                        seconds = time.perf_counter() - begin
                        process.stdout.read()
                    log.seek(0)
                    if not first or process.returncode != 0:
                        raise PeerError(f"llama-completion: {log.read().decode(errors='replace')[-400:]}")
                result[f"fa {flash}, load {load}"] = {"first_token": seconds}
        return result

    def memory(self, file: Path, context: int, prompt: Path) -> Measured:
        """MiB of a process that reads the text of a file and answers."""
        result: Measured = {}
        for flash in FLASH_ATTENTION:
            for load in LOAD_MODES:
                command = [*self._completion(file, flash, load, context, NEW_TOKENS), "-f", str(prompt)]
                result[f"fa {flash}, load {load}"] = {"memory": peak_mib(command, ENVIRONMENT)}
        return result


class OpenVino:
    """OpenVINO GenAI with one file open; prefill and decode only."""

    name = "OpenVINO GenAI"

    def __init__(self, python: Path, file: Path, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("openvino_side.py")), str(file), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.about = self._read()
        except PeerError:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # its tokenizers print there too
                return dict(json.loads(line))
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise PeerError(" ".join(lines[-3:])[-400:] or f"ended with {self._process.returncode}")

    def speed(self, pp: int, tg: int, seed: int) -> Measured:
        """tokens/s of random prompts, which follow from `seed`; 0 leaves one out."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and _read says why
            print(json.dumps({"pp": pp, "tg": tg, "seed": seed}), file=self._process.stdin, flush=True)
        return {"its defaults": self._read()}

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()
