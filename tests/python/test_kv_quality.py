"""`eval/kv_quality.py` on the default model: that it runs, that what must be exact is, and what it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "eval" / "kv_quality.py"
CONTROLS = ("control", "control, 15 %")


def test_one_text_of_each_plan(model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--model", str(model_path), "--texts", "1", "--greedy", "4"]
    modes = ["mask", "mask, 15 %", "prefix, 100 %"]
    if os.environ.get("NANOBRAID_TEST_FULL") == "1":
        modes += ["mask, first 15 %", "prefix"]
    done = subprocess.run(
        [*command, "--json", str(path), "--modes", *modes], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(path.read_text())
    assert report["failed"] == []
    assert (report["dtype"], report["kv_dtype"]) == ("f32", "f32")
    for plan in ("rag", "doc"):
        rows = report["plans"][plan]["rows"]
        assert set(rows) == {"full", "full, chunks reversed", "full, bf16 keys and values", *CONTROLS, *modes}
        for name in (*CONTROLS, "prefix, 100 %"):
            assert rows[name]["kl_max"] <= report["exact_kl"]
        assert 0 < rows["mask, 15 %"]["kl"] < rows["mask"]["kl"]
        assert 0.15 <= rows["mask, 15 %"]["recomputed"] < 0.16
        assert rows["prefix, 100 %"]["recomputed"] == 1
        assert rows["full, bf16 keys and values"]["kl"] < rows["mask"]["kl"]
        assert f"| mask, 15 % | 15 % | {rows['mask, 15 %']['kl']:.4f} |" in done.stdout
