"""`StreamingConfig`: the tokens of a model in memory, within a budget, and what is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import cli
from nanobraid.streaming import stream_line

MAKE_MODEL = Path(__file__).resolve().parents[2] / "tools" / "make_random_model.py"
PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time there was"]
GREEDY = nb.SamplingParams(temperature=0.0, max_tokens=12, logprobs=2)
SAMPLED = nb.SamplingParams(temperature=0.9, seed=5, max_tokens=12)

Load = Any


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture
def load(model_path: Path, cache: Path) -> Load:
    def load(**fields: Any) -> nb.LLM:
        config = nb.StreamingConfig(**{"cache_dir": cache, **fields})
        return nb.LLM(model_path, num_threads=THREADS, max_model_len=1024, streaming_config=config)

    return load


@pytest.fixture
def streamed(load: Load) -> Iterator[nb.LLM]:
    with load(keep_first_k=2) as llm:
        yield llm


def test_gives_the_tokens_of_a_model_in_memory(llm: nb.LLM, streamed: nb.LLM) -> None:
    for params in (GREEDY, SAMPLED):
        expected = llm.generate(PROMPTS, params)
        actual = streamed.generate(PROMPTS, params)
        assert [output.token_ids for output in actual] == [output.token_ids for output in expected]
        assert [output.outputs[0].logprobs for output in actual] == [output.outputs[0].logprobs for output in expected]
    pieces = [piece.text for piece in streamed.stream(PROMPTS[0], GREEDY)]
    assert "".join(pieces) == llm.generate(PROMPTS[0], GREEDY)[0].text
    # A prompt whose beginning is in the prefix cache.
    for text in (" ".join(PROMPTS) * 5, " ".join(PROMPTS) * 5 + " the end of"):
        assert streamed.generate(text, GREEDY)[0].token_ids == llm.generate(text, GREEDY)[0].token_ids


def test_composes_and_scores_as_in_memory(llm: nb.LLM, streamed: nb.LLM) -> None:
    segments = ["Read this.", *(nb.Segment(text * 4, chunk=True) for text in PROMPTS[:2]), PROMPTS[3]]
    # Blending runs the first layer, chooses tokens, and then runs the others.
    for reuse in (nb.Isolated(), nb.Blend(0.3)):
        expected, actual = (one.compose(segments, GREEDY, reuse=reuse) for one in (llm, streamed))
        assert actual.token_ids == expected.token_ids
        assert (actual.reuse.isolated, actual.reuse.recomputed) == (expected.reuse.isolated, expected.reuse.recomputed)
        assert actual.reuse.isolated > 0
    for chunk in llm.chunks.list():  # of the shared engine
        llm.chunks.remove(chunk.id)
    text = " ".join(PROMPTS)
    assert streamed.score(text).logprobs == llm.score(text).logprobs


def test_says_what_it_did(streamed: nb.LLM, cache: Path) -> None:
    assert streamed.stats()["streamed_layers"] == streamed.config["num_layers"] - 2
    streamed.generate(PROMPTS[0], GREEDY)
    stats = streamed.stats()
    (file,) = cache.glob("*.layers")
    per_step = stats["streamed_bytes"] / stats["streamed_reads"] * stats["streamed_layers"]
    assert 0 < per_step < file.stat().st_size
    # Of three slots one may keep its layer from one step to the next.
    assert stats["streamed_reads"] >= (stats["streamed_layers"] - 1) * stats["steps"]
    assert stats["streamed_seconds"] > 0.0
    assert stats["streamed_wait_seconds"] > 0.0
    assert stats["streamed_errors"] == 0
    assert stats["streamed_gb_per_s"] == pytest.approx(stats["streamed_bytes"] / stats["streamed_seconds"] / 1e9)
    assert stats["weight_resident_bytes"] == stats["weight_budget_bytes"] < streamed.config["weight_bytes"]
    assert "28 layers streamed" in stream_line(stats)
    assert streamed.config["streaming_config"]["keep_first_k"] == 2


def test_a_budget_is_kept_and_used(load: Load) -> None:
    with load() as llm:
        least = llm.stats()["weight_resident_bytes"]
        whole = llm.config["weight_bytes"]
    budget = (least + whole) // 2
    with load(budget_bytes=budget) as llm:
        stats = llm.stats()
        assert budget - whole / 30 < stats["weight_resident_bytes"] <= budget  # within a layer
        assert 0 < stats["streamed_layers"] < 30
    with load(budget_bytes=2 * whole) as llm:
        assert llm.stats()["streamed_layers"] == 0
        assert stream_line(llm.stats()) == ""


def test_refuses_by_name(load: Load, model_path: Path) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=r"budget_bytes is 1000000, but \d+ are needed: .* 3 slots of"):
        load(budget_bytes=1_000_000)
    with pytest.raises(nb.InvalidArgumentError, match=r"keep_last_k must be .*, got 31"):
        load(keep_last_k=31)
    for fields, message in (
        ({"budget_bytes": 0}, "budget_bytes .*got 0"),
        ({"budget_bytes": 1.5}, "budget_bytes .*got 1.5"),
        ({"cache_bytes": 0}, "cache_bytes .*got 0"),
        ({"cache_bytes": "1GB"}, "cache_bytes .*got '1GB'"),
        ({"cache_bytes": 0}, "cache_bytes .*got 0"),
        ({"cache_bytes": "1GB"}, "cache_bytes .*got '1GB'"),
        ({"keep_first_k": -1}, "keep_first_k .*got -1"),
        ({"prefetch_layers": 65}, "prefetch_layers .*64.*got 65"),
        ({"cache_dir": 3}, "cache_dir .*got 3"),
    ):
        with pytest.raises(nb.InvalidArgumentError, match=message):
            nb.StreamingConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(nb.InvalidArgumentError, match="streaming_config must be a StreamingConfig"):
        nb.LLM(model_path, streaming_config={"budget_bytes": 10**9})  # type: ignore[arg-type]
    with pytest.raises(nb.ModelIOError, match="cannot create the directory"):
        load(cache_dir=model_path / "below")


def damage(file: Path) -> None:
    with file.open("r+b") as out:
        out.seek(file.stat().st_size // 2)
        changed = bytes(byte ^ 0x55 for byte in out.read(64))
        out.seek(-64, os.SEEK_CUR)
        out.write(changed)


def test_a_layer_that_is_damaged_while_it_is_read_is_packed_again(load: Load, llm: nb.LLM, tmp_path: Path) -> None:
    expected = llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    with load(cache_dir=tmp_path) as broken:
        assert broken.generate(PROMPTS[0], GREEDY)[0].token_ids == expected
        (file,) = tmp_path.glob("*.layers")
        good = file.read_bytes()
        damage(file)
        assert broken.generate(PROMPTS[0], GREEDY)[0].token_ids == expected
        assert file.read_bytes() == good
        damage(file)  # once more: now the disk is not trusted
        with pytest.raises(
            nb.FormatError, match=r"blob \d+ is damaged; it was packed again before.*load the model again"
        ):
            broken.generate(PROMPTS[0], GREEDY)
        assert not file.exists()
        with pytest.raises(nb.FormatError, match=r"blob \d+ is damaged"):
            broken.generate(PROMPTS[1], GREEDY)
        assert broken.stats()["streamed_errors"] >= 2
    with load(cache_dir=tmp_path) as again:
        assert again.generate(PROMPTS[0], GREEDY)[0].token_ids == expected


def test_the_folder_of_packed_layers_has_a_limit(load: Load, tmp_path: Path) -> None:
    with load(cache_dir=tmp_path) as user:
        (file,) = tmp_path.glob("*.layers")
        size = file.stat().st_size
        old = tmp_path / "old-rows-0.layers"
        old.write_bytes(bytes(size))
        os.utime(old, (0, 0))
        assert user.config["streaming_config"]["cache_bytes"] is None
    with load(cache_dir=tmp_path, cache_bytes=2 * size) as user:
        assert old.exists()
    with pytest.raises(
        nb.InvalidArgumentError, match=rf"streaming_config.cache_bytes is {size - 1}, but .* {size} bytes"
    ):
        load(cache_dir=tmp_path, cache_bytes=size - 1)
    assert old.exists()
    with load(cache_dir=tmp_path, cache_bytes=2 * size - 1) as user:
        assert not old.exists()
        assert file.exists()
        assert user.generate(PROMPTS[0], GREEDY)[0].token_ids


def test_a_full_disk_is_an_error_with_numbers_and_leaves_nothing(load: Load) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = Path(tempfile.mkdtemp())
    size = ["-o", "size=1m"]
    if subprocess.run(
        ["mount", "-t", "tmpfs", *size, "tmpfs", str(folder)], check=False, capture_output=True
    ).returncode:
        folder.rmdir()
        pytest.skip("this machine lets nobody mount")
    try:
        with pytest.raises(nb.ModelIOError, match=r"no room for \d+ bytes in .*No space left on device"):
            load(cache_dir=folder)
        assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_the_command_line(
    model_path: Path, cache: Path, llm: nb.LLM, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOBRAID_CACHE", str(cache / "own"))
    own = ["--model", str(model_path), "--num-threads", str(THREADS), "--max-model-len", "64"]
    expected = llm.generate(PROMPTS[0], nb.SamplingParams(temperature=0.0, max_tokens=5))[0].text
    arguments = ["generate", PROMPTS[0], "--max-tokens", "5", *own, "--stream-weights", "least"]
    assert cli.main([*arguments, "--stream-keep-last", "27", "--stream-prefetch", "1"]) == 0
    assert capfd.readouterr().out.strip() == expected.strip()
    assert len(list((cache / "own" / "streamed").glob("*.layers"))) == 1
    assert (
        cli.main(["bench", "--pp", "16", "--tg", "2", "--repeat", "1", "--json", *own, "--stream-weights", "least"])
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["streamed_layers"] == 30
    assert result["weight_resident_bytes"] < result["weight_bytes"]
    assert cli.main([*arguments[:-1], "1000"]) == 2
    assert "budget_bytes is 1000" in capfd.readouterr().err
    assert cli.main([*arguments, "--stream-cache-bytes", "1000"]) == 2
    assert "cache_bytes is 1000, but" in capfd.readouterr().err
    assert cli.main(["generate", PROMPTS[0], *own, "--stream-prefetch", "1"]) == 2
    assert "--stream-prefetch is given without --stream-weights" in capfd.readouterr().err


_RUN = """
import sys, nanobraid as nb
config = nb.StreamingConfig(budget_bytes=int(sys.argv[2]), cache_dir=sys.argv[3])
with nb.LLM(sys.argv[1], streaming_config=config, num_threads=1, max_model_len=64, kv_cache_bytes=1 << 24) as llm:
    llm.generate("a b c", nb.SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    stats = llm.stats()
    print(stats["peak_rss_bytes"], stats["weight_resident_bytes"], llm.config["weight_bytes"], stats["streamed_layers"])
"""

#: Of a process beside its weights: the interpreter with nanobraid, tables, the memory of steps, and what is read before
#: it is packed. A process of a model of a few hundred kB takes half of it.
MARGIN_BYTES = 150 << 20


def test_the_memory_of_the_process_is_the_budget_and_a_margin(tmp_path: Path) -> None:
    model = tmp_path / "random.gguf"
    shape = ["--like", "tinyllama-1.1b", "--layers", "6", "--vocab-size", "2048"]
    subprocess.run([sys.executable, str(MAKE_MODEL), str(model), "--format", "gguf", *shape], check=True)
    budget = 320 << 20
    found = []
    for _ in range(2):  # the first one packs
        arguments = [sys.executable, "-c", _RUN, str(model), str(budget), str(tmp_path / "streamed")]
        result = subprocess.run(arguments, check=True, capture_output=True, text=True, env={**os.environ})
        peak, resident, whole, layers = (int(word) for word in result.stdout.split())
        found.append((peak, resident, whole, layers))
        assert resident <= budget < whole - MARGIN_BYTES
        assert layers > 0
        assert peak <= budget + MARGIN_BYTES, found
