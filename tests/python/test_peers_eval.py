"""What eval/bench_cpu_peers.py reads from other programs and calculates. It is not run here: it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import bench_cpu_peers

    return bench_cpu_peers


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import peers

    return peers


def row(flash: int, prompt: int, new: int, speed: float, depth: int = 0) -> dict[str, Any]:
    return {"flash_attn": flash, "n_prompt": prompt, "n_gen": new, "n_depth": depth, "avg_ts": speed}


def test_llama_bench_output(peers: Any) -> None:
    rows = [
        row(0, 512, 0, 900.5),
        row(0, 0, 128, 230),
        row(1, 512, 0, 850),
        row(1, 0, 128, 240),
    ]
    assert peers.parse_llama_bench(json.dumps(rows), 512, 128, 0) == {
        "fa off": {"prefill": 900.5, "decode": 230.0},
        "fa on": {"prefill": 850.0, "decode": 240.0},
    }
    assert peers.parse_llama_bench(json.dumps(rows[1::2]), 0, 128, 0)["fa on"] == {"decode": 240.0}
    for wrong in (rows[:3], rows[:2], [row(0, 512, 0, 1, depth=64), *rows], [row(0, 256, 0, 1), *rows]):
        with pytest.raises(peers.PeerError):
            peers.parse_llama_bench(json.dumps(wrong), 512, 128, 0)


def test_peak_is_that_of_the_child(peers: Any) -> None:
    held = bytearray(300 << 20)
    held[::4096] = b"x" * len(held[::4096])  # resident, and none of the child's business
    small = peers.peak_mib([sys.executable, "-S", "-c", "pass"])
    large = peers.peak_mib([sys.executable, "-S", "-c", "a = b'x' * (100 << 20)"])
    assert 1 < small < 100
    assert 90 < large - small < 140
    with pytest.raises(peers.PeerError, match="ended with 3: no such luck"):
        peers.peak_mib([sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"])


def test_missing_program_is_named(peers: Any, tmp_path: Path) -> None:
    with pytest.raises(peers.PeerError, match="llama-bench does not exist"):
        peers.LlamaCpp(tmp_path, 2).speed(tmp_path / "x.gguf", 1, 1, 0)


def test_a_peer_that_refuses_a_file_says_why(peers: Any, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho loading >&2\necho unsupported quantization >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(peers.PeerError, match="unsupported quantization"):
        peers.OpenVino(script, tmp_path / "x.gguf", 2)


def test_openvino_answers_line_by_line(peers: Any, tmp_path: Path) -> None:
    script = tmp_path / "python"
    answers = f"""#!{sys.executable}
import json, sys
print("a line of its tokenizer", flush=True)
print(json.dumps({{"version": "1", "open_s": 2.5}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({{"prefill": asked["pp"] * 2.0, "decode": asked["tg"] * 3.0}}), flush=True)
"""
    script.write_text(answers)
    script.chmod(0o755)
    side = peers.OpenVino(script, tmp_path / "x.gguf", 2)
    try:
        assert side.about == {"version": "1", "open_s": 2.5}
        assert side.speed(512, 128, 1) == {"its defaults": {"prefill": 1024.0, "decode": 384.0}}
    finally:
        side.close()


def test_best_configuration_by_median(bench: Any) -> None:
    rounds = [{"off": {"decode": a}, "on": {"decode": b}} for a, b in ((1, 2), (9, 3), (2, 4))]
    assert bench.best_of(rounds, "decode") == ("on", 3)
    rounds = [{"off": {"memory": a}, "on": {"memory": b}} for a, b in ((1, 2), (9, 3), (5, 4))]
    assert bench.best_of(rounds, "memory") == ("on", 3)


def test_verdicts(bench: Any) -> None:
    faster = bench.Row("speed", "decode", "x", 1.3, 1.65)
    assert [bench.verdict(faster, ratio) for ratio in (1.29, 1.3, 1.64, 1.65)] == ["below", "must", "must", "aim"]
    smaller = bench.Row("memory", "memory", "x", 0.95, 0.8)
    assert [bench.verdict(smaller, ratio) for ratio in (0.96, 0.95, 0.81, 0.8)] == ["below", "must", "must", "aim"]
    assert bench.verdict(bench.Row("speed", "decode", "x"), 5) == ""


def test_work_of_the_default_model(bench: Any, model_path: Path) -> None:
    command = [sys.executable, "-m", "nanobraid", "inspect", "--json", str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    work = bench.work_of(json.loads(done.stdout)["tensors"])
    # 30 layers of 576 wide: q and o 576, k and v 192, three of 1536.
    assert work.ops_per_token == 2 * 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert 96e6 < work.bytes_per_token < 98e6  # the file less its metadata: the embedding is the head


def test_a_table_beside_the_head_is_not_read(bench: Any) -> None:
    tensors = [["token_embd.weight", "F32", [8, 4], 128], ["blk.0.attn_q.weight", "F32", [4, 4], 64]]
    assert bench.work_of(tensors) == bench.Work(192, 32)
    assert bench.work_of([*tensors, ["output.weight", "F32", [8, 4], 128]]) == bench.Work(192, 32)
    assert bench.work_of([*tensors, ["blk.0.attn_q.bias", "F32", [4], 16]]) == bench.Work(208, 32)


def test_shares_of_the_limits(bench: Any) -> None:
    stdout = "backend x\nceiling int8_dot_gop_s   900.0\nceiling read_2m_all_gb_s 40.5\nceilings are not ceiling 5\n"
    ceilings = bench.parse_ceilings(stdout)
    assert ceilings == {"int8_dot_gop_s": 900.0, "read_2m_all_gb_s": 40.5}
    limits = bench.limits_of({"read_gb_s": 30.0, **ceilings}, {"read_gb_s": 35.0, **ceilings, "int8_dot_gop_s": 800.0})
    assert limits == {"read_gb_s": 40.5, "int8_dot_gop_s": 900.0, "read_2m_all_gb_s": 40.5}
    assert bench.limits_of({"read_gb_s": 30.0}, {"read_gb_s": 35.0}) == {"read_gb_s": 35.0}  # without op_bench
    rounds = [
        {"read_gb_s": read, "read_2m_all_gb_s": other} for read, other in ((10.0, 40.0), (30.0, 20.0), (50.0, 9.0))
    ]
    assert bench.median_ceilings(rounds) == {"read_gb_s": 40.0, "read_2m_all_gb_s": 20.0}
    work = bench.Work(bytes_per_token=81_000_000, ops_per_token=900_000_000)
    assert bench.shares(bench.Row("speed", "decode", "x"), 250, work, limits) == {"of_read": pytest.approx(0.5)}
    assert bench.shares(bench.Row("speed", "prefill", "x"), 600, work, limits) == {"of_int8": pytest.approx(0.6)}
    assert bench.shares(bench.Row("deep", "decode", "x"), 250, work, limits) == {}


def test_rows_are_chosen_by_pattern(bench: Any, tmp_path: Path) -> None:
    names = [row.name for row in bench.chosen_rows(["decode*Q4_0", "memory*"], [])]
    assert names == ["decode:smollm2-Q4_0", "decode:qwen2.5-0.5b-Q4_0", "decode-4k:smollm2-Q4_0", "memory:smollm2-Q4_1"]
    file = tmp_path / "mine.gguf"
    assert [row.metric for row in bench.chosen_rows(["*mine.gguf"], [file])] == ["prefill", "decode"]
    assert bench.find_file(str(file), []) is None
    file.touch()
    assert bench.find_file(str(file), []) == file
    assert bench.find_file("mine", [tmp_path / "no", tmp_path]) == file
    assert len({row.name for row in bench.ROWS}) == len(bench.ROWS)


def test_a_row_of_the_report(bench: Any) -> None:
    row = bench.Row("start", "first_token", "x", 0.6, 0.3)
    rounds = [
        {
            "llama.cpp": {"fa off": {"first_token": 0.5}, "fa on": {"first_token": theirs}},
            "nanobraid": {"its defaults": {"first_token": ours}},
        }
        for ours, theirs in ((0.1, 0.4), (0.2, 0.3), (0.9, 0.9))
    ]
    result = bench.result_of(row, rounds, {}, 0.5)
    assert result["sides"]["llama.cpp"]["configuration"] == "fa on"
    assert result["ratios"] == {"llama.cpp": pytest.approx(0.5)}
    assert result["verdict"] == "must"
    assert result["sides"]["nanobraid"]["all"] == {"its defaults": [0.1, 0.2, 0.9]}
    line = bench.line_of(row, result)
    assert "ratio  0.50" in line and "0.40 (fa on)" in line and "must 0.6, aim 0.3: must" in line
    assert bench.line_of(row, {"skipped": "no file"}).endswith("not measured: no file")
