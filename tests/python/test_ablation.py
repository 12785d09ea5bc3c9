"""eval/ablation.py: rows off and on, small; what cannot be measured is listed with its reason, never left out."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).parents[2] / "eval"

# What the programs print, of times that a test knows.
PROGRAM = """#!{python}
import json, sys
from pathlib import Path
row = sys.argv[sys.argv.index("--rows") + 1]
if row == "linear_residual":
    print(json.dumps({{"row": row, "case": "8 rows", "backend": "x", "skipped": "no such kernel"}}))
elif row == "head":
    sys.exit("the operands differ")
else:
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1])
    print(json.dumps({{"row": row, "case": "8 rows", "backend": "x", "off": [30.0] * rounds, "on": [20.0] * rounds}}))
"""


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    sys.path.insert(0, str(EVAL))
    try:
        yield importlib.import_module("ablation"), importlib.import_module("ablation_setup")
    finally:
        sys.path.remove(str(EVAL))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "ablation_bench"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EVAL / "ablation.py"), "--quick", *map(str, args)]
    environment = {**os.environ, "NANOBRAID_CUDA_LIBRARY": "/nowhere/libnone.so"}  # no GPU, also where there is one
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def report(tmp_path: Path, *args: object) -> dict[str, Any]:
    path = tmp_path / "table.json"
    done = run(*args, "--out", path)
    assert done.returncode == 0, done.stderr[-2000:]
    parsed: dict[str, Any] = json.loads(path.read_text())
    for row in parsed["rows"]:  # the table says the same
        assert any(row["row"] in line and row["device"] in line for line in done.stdout.splitlines())
    return parsed


def test_rows_have_both_sides_of_every_round(model_path: Path, tmp_path: Path) -> None:
    wanted = ["fusion", "paged_kv", "prefix", "chunked_prefill", "batching"]
    got = report(tmp_path, "--model", model_path, "--device", "cpu", "--rounds", 2, "--rows", *wanted)
    assert list(dict.fromkeys(row["row"] for row in got["rows"])) == wanted
    for row in got["rows"]:
        rounds = row["every_round"]
        assert row["rounds"] == len(rounds["off"]) == len(rounds["on"]) == 2
        assert row["gain_quartiles"][0] <= row["gain"] <= row["gain_quartiles"][1]
        assert row["off_is"] and row["on_is"] and row["about"]
    paged, fit = (row for row in got["rows"] if row["row"] == "paged_kv")
    # Every one of the 8 requests holds the blocks of its tokens, and no more than a block beyond them.
    block_bytes = paged["off"] / 8 / (256 // 16)
    assert 8 * 2 * block_bytes <= paged["on"] <= 8 * (128 // 16 + 1) * block_bytes
    assert fit["off"] == 2 and fit["on"] > 2
    gap = next(row for row in got["rows"] if row["row"] == "chunked_prefill")
    assert "longest gap" in gap["case"] and gap["gain"] > 2  # 15 on a quiet machine
    assert got["devices"]["cpu"]["backend"] and got["date"] and got["cpu"] and got["read_gb_s_after"] > 0
    assert str(tmp_path) not in json.dumps(got) and "--out table.json" in got["command"]


def test_a_device_that_is_not_there_is_listed(tmp_path: Path, model_path: Path) -> None:
    got = report(tmp_path, "--model", model_path, "--device", "cuda", "--rows", "prefix", "all")
    assert [(row["row"], row["not_measured"]) for row in got["rows"]] == [
        ("prefix", "no such device, see above"),
        ("all", "no such device, see above"),
    ]
    assert "not available" in got["devices"]["cuda"]["not_usable"] and "nowhere/" not in json.dumps(got)


def test_operators_come_from_the_programs(tmp_path: Path, model_path: Path, programs: Path) -> None:
    rows = ("--device", "cpu", "--rows", "norm_qkv", "residual", "graphs")
    got = report(tmp_path, "--model", model_path, "--programs", programs, "--rounds", 3, *rows)
    fused, skipped, graphs = got["rows"]
    assert fused["case"] == "8 rows, us" and fused["gain"] == 1.5 and fused["rounds"] == 3
    assert skipped["not_measured"] == "no such kernel"
    assert "GPU" in graphs["not_measured"]
    without = report(tmp_path, "--model", model_path, "--device", "cpu", "--rows", "norm_qkv", "attention", "cascade")
    assert all("--programs" in row["not_measured"] for row in without["rows"])


def test_a_program_that_fails_is_no_row(model_path: Path, programs: Path) -> None:
    done = run("--model", model_path, "--device", "cpu", "--programs", programs, "--rows", "head")
    assert done.returncode != 0 and "the operands differ" in done.stderr
    done = run("--model", model_path, "--device", "cpu", "--programs", programs, "--rows", "cascade")
    assert done.returncode != 0 and "cascade_bench cannot be run" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "prefix", "warp"], "invalid choice: 'warp'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or one of"),
        (["--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["--out", "table.csv"], "--out must end in .json or .txt, got table.csv"),
        (["--programs", "nowhere"], "--programs: nowhere is not a folder"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and says in done.stderr


def test_a_gain_above_one_is_better(modules: tuple[Any, Any]) -> None:
    _, setup = modules
    times = setup.Case("time", [4.0, 6.0, 9.0], [2.0, 2.0, 3.0], False, "off", "on").summary()
    assert times["gain"] == 3 and times["gain_quartiles"] == [2.5, 3] and (times["off"], times["on"]) == (6, 2)
    speeds = setup.Case("speed", [2.0], [5.0], True, "off", "on").summary()
    assert speeds["gain"] == 2.5 and speeds["gain_quartiles"] == [2.5, 2.5]
    for off, on in (([], []), ([1.0, 2.0], [1.0]), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="cannot be compared"):
            setup.Case("broken", off, on, True, "off", "on").summary()


def test_sides_take_turns(modules: tuple[Any, Any], tmp_path: Path) -> None:
    _, setup = modules
    calls: list[tuple[str, int]] = []

    def side(name: str) -> Any:
        def measure(number: int) -> int:
            calls.append((name, number))
            return number

        return measure

    one = setup.Setup(tmp_path / "m.gguf", "cpu", 1, 3, True, None, tmp_path)
    assert one.alternate(side("off"), side("on")) == ([0, 1, 2], [0, 1, 2])
    warm, *rest = [("off", -1), ("on", -1)], calls[2:4], calls[4:6], calls[6:]
    assert calls[:2] == warm
    assert rest == [[("off", 0), ("on", 0)], [("on", 1), ("off", 1)], [("off", 2), ("on", 2)]]


def test_sides_that_do_not_differ_are_not_compared(modules: tuple[Any, Any]) -> None:
    rows = importlib.import_module("ablation_rows")
    _, setup = modules
    fused, composed = {"fused_ops": 5, "weight_bytes": 10}, {"fused_ops": 0, "weight_bytes": 10}
    off, on = ("m@auto@bf16", {"fusion": "off"}), ("m@auto@bf16", {"fusion": "auto"})
    rows._check_sides([composed, fused], off, on)
    for facts in ([composed, composed], [fused, fused]):
        with pytest.raises(setup.NotMeasured, match="fuses no operator"):
            rows._check_sides(facts, off, on)
    with pytest.raises(setup.NotMeasured, match="as one"):
        rows._check_sides([fused, fused], ("a.braid", {}), ("b.braid", {}))


def test_reports_name_no_place_of_a_machine(modules: tuple[Any, Any]) -> None:
    ablation, _ = modules
    assert ablation.command_of(["--out", "some/where/a.txt", "--rows", "all"]) == (
        "python eval/ablation.py --out a.txt --rows all"
    )
    assert ablation.without_paths("no a.so in /x/y/nanobraid: build 1/2 of it") == (
        "no a.so in nanobraid: build 1/2 of it"
    )


def test_every_row_is_one_of_the_document() -> None:
    sys.path.insert(0, str(EVAL))
    try:
        rows = importlib.import_module("ablation_rows").ROWS
    finally:
        sys.path.remove(str(EVAL))
    text = (EVAL / "README.md").read_text()
    assert all(f"`{name}`" in text for name in rows)
