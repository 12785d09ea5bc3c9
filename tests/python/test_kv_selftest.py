"""The self-test of quantized keys and values: what it finds on real weights, what it refuses, what it remembers."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import _core, _kv_selftest
from nanobraid.cli import main

Measure = Callable[[_core.Model, str, list[int]], dict[str, Any]]
RUINED = {
    "kl": 3.25,
    "floor_kl": 0.0,
    "cost": 3.25,
    "worst_kl": 9.0,
    "agreement": 0.1,
    "tokens": 512,
    "positions": 384,
    "seconds": 0.1,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered from other tests, and nothing is for them."""
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path: Path, kv_dtype: str, **options: Any) -> nb.LLM:
    return nb.LLM(path, kv_dtype=kv_dtype, num_threads=THREADS, max_model_len=64, **options)


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "kv_selftests").glob("*"))


def measured_by(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]) -> list[str]:
    """Replaces the measurement, and lists the formats that it is asked for."""
    asked: list[str] = []

    class Fake:
        def __init__(self, model: _core.Model) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def measure_kv_format(self, kv_dtype: str, tokens: list[int]) -> dict[str, Any]:
            asked.append(kv_dtype)
            return dict(result)

    check = _kv_selftest.check_kv_format
    monkeypatch.setattr(
        "nanobraid.llm.check_kv_format", lambda model, *rest, **options: check(Fake(model), *rest, **options)
    )
    return asked


# f32 activations: what the format costs, and nothing else. Healthy figures of this model: 0.0008 and 0.005.
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.0015), ("mixed", 0.009)])
def test_a_healthy_model_is_far_from_the_limit(model_path: Path, kv_dtype: str, most: float) -> None:
    with opened(model_path, kv_dtype, dtype="f32") as llm:
        found = llm.config["kv_selftest"]
    assert 1e-5 < found["kl"] <= most
    assert found["cost"] == found["kl"]
    assert found["floor_kl"] == 0
    assert found["limit"] == _core.kv_limits()[kv_dtype] >= 3 * most
    assert found["worst_kl"] > found["kl"]
    assert 0.9 < found["agreement"] < 1
    assert (found["tokens"], found["positions"]) == (512, 384)
    assert found["within_limit"] is True
    assert found["remembered"] is False


def test_roundings_of_int8_activations_are_not_held_against_the_format(model_path: Path) -> None:
    with opened(model_path, "int8", dtype="int8") as llm:
        found = llm.config["kv_selftest"]
    assert found["floor_kl"] > 0
    assert found["cost"] == pytest.approx(max(0, found["kl"] - found["floor_kl"]))
    assert found["cost"] < found["limit"] / 2


@pytest.mark.parametrize("kv_dtype", ["auto", "bf16", "f32"])
def test_plain_formats_are_not_tested(model_path: Path, own_cache: Path, kv_dtype: str) -> None:
    with opened(model_path, kv_dtype) as llm:
        assert llm.config["kv_selftest"] is None
    assert entries(own_cache) == []


def test_the_second_load_remembers(model_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(model_path, "int8") as llm:
        first = llm.config["kv_selftest"]
    (entry,) = entries(own_cache)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    asked = measured_by(monkeypatch, RUINED)
    with opened(model_path, "int8", max_num_seqs=2) as llm:
        assert llm.config["kv_selftest"] == {**first, "remembered": True}
    assert asked == []
    for other in ({"kv_dtype": "mixed"}, {"kv_dtype": "int8", "dtype": "f32"}):  # another format, other activations
        with pytest.raises(nb.UnsupportedError):
            opened(model_path, **other)
    assert asked == ["mixed", "int8"]
    assert len(entries(own_cache)) == 3


def test_a_new_version_and_a_new_core_measure_again(
    model_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured_by(monkeypatch, {**RUINED, "cost": 0.001})
    for name, value in (("__version__", "0.0.0"), ("_core_build", lambda: "another")):
        opened(model_path, "int8").close()
        monkeypatch.setattr(_kv_selftest, name, value)
        opened(model_path, "int8").close()
    assert len(asked) == 3
    assert len(entries(own_cache)) == 3


def test_damaged_entries_are_measured_again(model_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured_by(monkeypatch, {**RUINED, "cost": 0.001})
    opened(model_path, "int8").close()
    (entry,) = entries(own_cache)
    whole = entry.read_text()
    others: list[Any] = [[], {"found": {}}, {"found": json.loads(whole)["found"], "sha256": 3}]
    damaged = ["", whole[:-9], whole.replace("0.001", "0.002"), "[" * 9999, "\0", *map(json.dumps, others)]
    for number, text in enumerate(damaged, 2):
        entry.write_text(text)
        with opened(model_path, "int8") as llm:
            assert llm.config["kv_selftest"]["remembered"] is False, text[:40]
        assert len(asked) == number
        assert entry.read_text() == whole
    assert entries(own_cache) == [entry]  # nothing half-written beside it


def test_a_cache_that_cannot_be_written_only_costs_time(
    model_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.mkdir()
    (own_cache / "kv_selftests").write_text("a file where the folder should be")
    asked = measured_by(monkeypatch, {**RUINED, "cost": 0.001})
    for _ in range(2):
        opened(model_path, "int8").close()
    assert asked == ["int8", "int8"]


def test_a_harmful_format_is_refused_unless_forced(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured_by(monkeypatch, RUINED)
    for _ in ("measured", "remembered"):
        with pytest.raises(nb.UnsupportedError) as refused:
            opened(model_path, "int8")
        for part in ("'int8'", model_path.name, "3.25", "0.006", "force_kv_dtype=True", "--force-kv-dtype"):
            assert part in str(refused.value)
    with caplog.at_level(logging.WARNING), opened(model_path, "int8", force_kv_dtype=True) as llm:
        assert llm.config["kv_dtype"] == "int8"
        assert llm.config["kv_selftest"]["within_limit"] is False
        assert llm.generate("The sky is", nb.SamplingParams(max_tokens=2))[0].token_ids
    assert "3.25" in caplog.text
    with pytest.raises(nb.UnsupportedError):
        nb.AsyncEngine(model_path, kv_dtype="int8", num_threads=THREADS)
    with pytest.raises(nb.InvalidArgumentError, match="force_kv_dtype must be True, False or None, got 'yes'"):
        opened(model_path, "int8", force_kv_dtype="yes")


def test_the_command_line_refuses_and_forces(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_by(monkeypatch, RUINED)
    options = ["--model", str(model_path), "--kv-dtype", "int8", "--threads", "1", "--max-model-len", "64"]
    for command in (["generate", "Hello", "--max-tokens", "1"], ["bench", "--pp", "4", "--tg", "0"]):
        assert main([*command, *options]) == 2
        assert "--force-kv-dtype" in capsys.readouterr().err
        assert main([*command, *options, "--force-kv-dtype"]) == 0
        capsys.readouterr()


def test_doctor_and_inspect_show_results(model_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_path), "--json", "--check-kv", "mixed"]) == 0
    found = json.loads(capsys.readouterr().out)["kv_selftest"]
    assert found["kv_dtype"] == "mixed"
    assert 0 < found["cost"] < found["limit"]
    assert entries(own_cache) == []  # only looked at
    assert main(["inspect", str(model_path), "--check-kv", "bf16"]) == 2
    assert "int8, mixed" in capsys.readouterr().err
    opened(model_path, "int8").close()
    assert main(["inspect", str(model_path), "--check-kv", "int8"]) == 0
    assert "int8 keys and values" in capsys.readouterr().out
    (row,) = _kv_selftest.known_results()
    assert (row["model"], row["kv_dtype"]) == (model_path.name, "int8")
