"""The process of one measurement: ``python -m nanobraid.bench_kv.worker`` reads a job from stdin, writes its result.

Both are one JSON object. An error of the engine is a result too; `run` raises it in the process that asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanobraid.bench_kv.config import QualityConfig
from nanobraid.bench_kv.methods import Case
from nanobraid.bench_kv.quality import QualityJob
from nanobraid.bench_kv.speed import SpeedJob
from nanobraid.errors import InternalError, NanobraidError, error_of

Job = SpeedJob | QualityJob


def run(job: Job) -> dict[str, Any]:
    """Runs a job in a process of its own, which ends with it.

    Raises:
        NanobraidError: What the process raised; or `InternalError`, if it ended without a result.
    """
    # The child must import the package that this process has imported.
    folder = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (folder, os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "nanobraid.bench_kv.worker"],
        input=json.dumps({"kind": type(job).__name__, **dataclasses.asdict(job)}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    try:
        result = json.loads(done.stdout)
    except ValueError:
        said = " ".join(done.stderr.split())[-500:]
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = f"signal {signal.Signals(-done.returncode).name}"
        raise InternalError(f"the process of {job.case.label} ended with {how}: {said}") from None
    if "error" in result:
        raise error_of(result["code"], result["error"])
    return dict(result)


def _job_of(values: dict[str, Any]) -> Job:
    kind = values.pop("kind")
    values["case"] = Case(**values["case"])
    if kind == "QualityJob":
        values["config"] = QualityConfig(**values["config"])
        return QualityJob(**values)
    return SpeedJob(**values)


def main() -> int:
    from nanobraid.bench_kv import quality, speed

    job = _job_of(json.load(sys.stdin))
    try:
        result = quality.measure(job) if isinstance(job, QualityJob) else speed.measure(job)
    except NanobraidError as error:
        result = {"error": str(error), "code": error.code}
    json.dump(result, sys.stdout, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
