"""Reports: every row of figures in table, CSV and advice; plots are documents that hold their points."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nanobraid.bench_kv import plots, report
from nanobraid.bench_kv.methods import DEFAULTS, make_case
from nanobraid.errors import InvalidArgumentError, ModelIOError

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, cache: float, kl: float, found: int = 2, **params: Any) -> dict[str, Any]:
    case = make_case(name, **params)
    cells = [
        {"length": 512, "depth": depth, "retrieved": min(found, 2), "of": 2, "asked": 2, "gold_logprob": -1.0}
        for depth in (0.0, 1.0)
    ]
    return {
        "label": case.label,
        "method": name,
        "status": "ok",
        "elapsed_sec": 2.0,
        "total_new_tokens": 64,
        "tokens_per_sec": 32.0,
        "cpu_mem_used_mb": 10 * cache,
        "gpu_peak_mb": None,
        "est_kv_cache_mb_avg": cache,
        "ttft_ms": 12.5,
        "latency_ms": 200.0,
        "ms_per_token": 6.0,
        "peak_rss_mb": 100 + 10 * cache,
        "memory_source": "VmHWM since the measured part began",
        "kv_cache_bytes": int(cache * 2**20),
        "kv_pool_bytes": 1 << 24,
        "backend": "avx2",
        "dtype": "int8",
        "kv_dtype": case.kv_dtype or "bf16",
        "kv_policy": case.policy or "full",
        "num_threads": 2,
        "max_model_len": 1056,
        "batch_size": 4,
        **{key: case.params.get(key) for key in DEFAULTS},
        "quality": {
            "perplexity": 15 + 10 * kl,
            "reference_perplexity": 15.0,
            "kl": kl,
            "kl_p99": 2 * kl,
            "kl_max": 9 * kl,
            "kl_second_half": 1.5 * kl,
            "top1_agreement": 0.96,
            "worst_text": "quarry",
            "token_agreement": 0.75,
            "text_similarity": 0.875,
            "first_difference": 3.0,
            "needles": cells,
        },
    }


@pytest.fixture
def found() -> dict[str, Any]:
    rows = [
        row("full_cache", 24.0, 0.0004),
        row("paged_attention", 12.0, 0.0004),
        row("quant_mixed", 5.0, 0.0072),
        row("sliding_window", 3.0, 0.9, found=0, window_size=64),
        row("sliding_window", 6.0, 0.27, found=1, window_size=256),
        row("chunked_cache", 7.0, 0.25, found=1),
        {"label": "quant_int4", "method": "quant_int4", "status": "refused", "message": "kv_dtype int4 | is not there"},
    ]
    return {
        "version": "0.1.0",
        "model": "tiny.gguf",
        "cpu": "a processor",
        "prompt_tokens": [64, 128, 256, 1024],
        "max_new_tokens": 32,
        "batch_size": 4,
        "rounds": 3,
        "seed": 42,
        "rows": rows,
    }


def test_csv_has_every_figure(found: dict[str, Any]) -> None:
    lines = list(csv.DictReader(io.StringIO(report.as_csv(found))))
    assert len(lines) == len(found["rows"])
    mixed = lines[2]
    assert (mixed["kl"], mixed["est_kv_cache_mb_avg"], mixed["needles_found"]) == ("0.0072", "5.0", "1.0")
    assert (lines[3]["window_size"], lines[3]["needles_found"]) == ("64", "0.0")
    assert (lines[6]["status"], lines[6]["kl"]) == ("refused", "")
    for name, value in found["rows"][2].items():
        if name not in ("quality", "gpu_peak_mb") and value is not None:
            assert mixed[name] == str(value), name


def test_the_table_has_a_cell_for_each_figure(found: dict[str, Any]) -> None:
    header, *rows = report.cells(found)
    assert all(len(line) == len(header) for line in rows)
    assert dict(zip(header, rows[2], strict=True)) == {
        "method": "quant_mixed",
        "tok/s": "32.0",
        "ms/token": "6.0",
        "TTFT ms": "12.5",
        "cache MB": "5.00",
        "peak MB": "50.0",
        "process MB": "150.0",
        "perplexity": "15.07",
        "KL": "0.00720",
        "KL, 2nd half": "0.01080",
        "top-1": "96.0 %",
        "same tokens": "75.0 %",
        "text": "87.5 %",
        "needles": "100 %",
    }
    assert rows[6][0] == "quant_int4: refused"
    for each in found["rows"]:
        each.pop("quality", None)
    assert report.cells(found)[0][-1] == "process MB"
    found["rows"][0]["gpu_peak_mb"] = 77.0
    assert report.cells(found)[1][-1] == "77.0"


def test_words_follow_the_stated_rules(found: dict[str, Any]) -> None:
    words = [report.verdict(kl) for kl in (0, 0.001, 0.0011, 0.01, 0.02, 0.1, 0.11)]
    assert words == ["negligible", "negligible", "small", "small", "noticeable", "noticeable", "large"]
    warning = "Do not use it where a single fact"
    assert "KL 0.00720 (small)" in report.advice("quant_mixed", found)
    assert "(42 % of paged_attention's)" in report.advice("quant_mixed", found)
    assert warning not in report.advice("quant_mixed", found)
    window = report.advice("sliding_window", found)
    assert "window_size=64" in window and "KL 0.90000 (large)" in window and "0 of 4 needles" in window
    assert window.count(warning) == 1
    assert "sliding_window, costs KL 0.27000" in report.advice("chunked_cache", found)
    assert report.advice("quant_int4", found).endswith("Not measured: refused, kv_dtype int4 | is not there.")


def test_the_saving_is_of_peaks_that_were_read(found: dict[str, Any]) -> None:
    text = report.saving(found)
    assert text is not None
    assert "220 MB against 340, 35 % less of the whole process" in text
    assert "120 MB against 240, 50 % less without the loaded model" in text
    found["rows"][0]["status"] = "failed"
    assert report.saving(found) is None


def test_the_document_has_a_paragraph_for_each_method(found: dict[str, Any]) -> None:
    text = report.as_markdown(found)
    assert len(re.findall(r"^\*\*\w+\.\*\* \S", text, re.MULTILINE)) == 6
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(found["rows"])
    assert len({line.count("|") for line in table}) == 1
    assert "A KL is called negligible up to 0.001" in text


def parsed(text: str | None) -> ElementTree.Element:
    assert text is not None
    return ElementTree.fromstring(text)


def test_plots_hold_their_points(found: dict[str, Any]) -> None:
    rows = found["rows"]
    points = parsed(plots.memory_against_kl(rows)).findall(f"{SVG}circle")
    assert len(points) == 6
    x = [float(point.attrib["cx"]) for point in points]
    y = [float(point.attrib["cy"]) for point in points]
    assert sorted(range(6), key=x.__getitem__) == [3, 2, 4, 5, 1, 0]  # more memory, farther right
    assert sorted(range(6), key=y.__getitem__)[:3] == [3, 4, 5]  # more divergence, higher up
    assert all(0 < at < 720 for at in x) and all(0 < at < 420 for at in y)

    window = parsed(plots.perplexity_against_window(rows))
    (line,) = window.findall(f"{SVG}polyline")
    (x64, y64), (x256, y256) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x64 < x256 and y64 < y256  # a lower perplexity stands lower
    assert "nothing forgotten: 15.00" in "".join(window.itertext())

    cells = parsed(plots.needle_map(rows)).findall(f"{SVG}rect")[1:]
    assert len(cells) == 6 * 2
    said = ["".join(cell.itertext()) for cell in cells]
    assert said.count("0 of 2") == 2 and said.count("1 of 2") == 4 and said.count("2 of 2") == 6
    assert len({cell.attrib["fill"] for cell in cells}) == 3


def test_plots_without_figures_are_left_out(found: dict[str, Any]) -> None:
    bare = copy.deepcopy(found)
    for each in bare["rows"]:
        each.pop("quality", None)
    assert set(report.files(bare)) == {"kv.json", "kv.csv", "kv.md"}
    exact = [row("paged_attention", 2.0, 0.0)]
    assert plots.memory_against_kl(exact) is None  # no place on a logarithmic axis
    one = [row("sliding_window", 2.0, 0.0, window_size=64)]
    parsed(plots.perplexity_against_window(one))
    unknown = copy.deepcopy(one)
    for cell in unknown[0]["quality"]["needles"]:
        cell.update(of=0, retrieved=0)
    assert {cell.attrib["fill"] for cell in parsed(plots.needle_map(unknown)).findall(f"{SVG}rect")[1:]} == {"#ccc"}


def test_a_report_is_written_and_read_again(found: dict[str, Any], tmp_path: Path) -> None:
    paths = report.write(found, tmp_path / "new" / "folder")
    assert {path.name for path in paths} == {
        "kv.json", "kv.csv", "kv.md", "kv-memory.svg", "kv-windows.svg", "kv-needles.svg",
    }  # fmt: skip
    again = report.read(tmp_path / "new" / "folder" / "kv.json")
    assert again == json.loads(json.dumps(found))
    assert report.files(again) == {path.name: path.read_text() for path in paths}
    found["rows"][0]["quality"]["kl"] = float("nan")
    with pytest.raises(ValueError):
        report.files(found)  # no figure that is not one


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelIOError, match="No such file"):
        report.read(tmp_path / "kv.json")
    for text, says in (
        ('{"rows": [{"method": "no_cache"}], "cpu": ""}', "it has no version, model"),
        ("{", "is not JSON"),
        ("[]", "no report"),
        ('{"rows": [{"method": "x"}]}', "no rows of known methods"),
    ):
        (tmp_path / "kv.json").write_text(text)
        with pytest.raises(InvalidArgumentError, match=says):
            report.read(tmp_path / "kv.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelIOError, match="file"):
        report.write({"rows": []}, tmp_path / "file")
