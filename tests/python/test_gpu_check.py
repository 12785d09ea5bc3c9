"""``tools/gpu_check.sh`` where there is no GPU: what it does not run it names, and never calls passed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the script and a package of which nothing can be imported."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "gpu_check.sh", tmp_path / "tools")
    (tmp_path / "build" / "gpu" / "python" / "nanobraid").mkdir(parents=True)
    return tmp_path


def check(tree: Path, parts: str, **variables: str) -> tuple[int, str]:
    """Exit status and report."""
    environment = {**os.environ, "NANOBRAID_CHECK_PARTS": parts, "OUT": str(tree), **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", tree / "tools" / "gpu_check.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (tree / "gpu_check.txt").read_text()


def test_the_script_is_sound() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck")
    done = subprocess.run(["shellcheck", ROOT / "tools" / "gpu_check.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_missing_weights_are_named(tree: Path) -> None:
    code, report = check(tree, "default-model", NANOBRAID_CHECK_MODEL=str(tree / "none.gguf"))
    assert code == 2
    assert f"== default-model: NOT RUN: no weights of smollm2-135m in {tree / 'none.gguf'}" in report
    assert "NOT RUN: default-model" in report.splitlines()[-1]
    assert "passed" not in report


def test_pieces_of_weights_are_put_together_and_verified(tree: Path) -> None:
    weights = tree / "build" / "weights"
    weights.mkdir()
    for number, text in enumerate(["two ", "pieces"]):
        (weights / f"smollm2-135m.gguf.part{number}").write_text(text)
    code, report = check(tree, "default-model")
    assert (tree / "build" / "gpu" / "smollm2-135m.gguf").read_text() == "two pieces"
    assert code == 2
    assert "== default-model: NOT RUN" in report and "another checksum" in report


def test_without_a_package_parts_are_not_run(tree: Path) -> None:
    shutil.rmtree(tree / "build" / "gpu" / "python")
    code, report = check(tree, "random-models default-model benchmark")
    assert code == 2
    assert report.splitlines()[-1].endswith("NOT RUN: random-models default-model benchmark")


def test_a_part_that_fails_fails_the_check(tree: Path) -> None:
    code, report = check(tree, "device-tests")  # no such program
    assert code == 1
    assert "== device-tests: FAILED (127)" in report
    assert report.splitlines()[-1].endswith("FAILED: device-tests")


def test_without_time_nothing_is_begun(tree: Path) -> None:
    code, report = check(tree, "device-tests", NANOBRAID_CHECK_SECONDS="4")
    assert code == 2
    assert "== device-tests: NOT RUN: no time is left" in report
    assert not (tree / "build" / "gpu" / "device-tests.log").exists()
