"""Names ``org/name[:quant]``: which files they mean, where they are found, and downloads from a loopback hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, serve

import nanobraid as nb
from nanobraid import cli, models
from nanobraid.models import _hub, _known, _repo
from nanobraid.models._repo import Repo, choose

FOLDER = "org/folder"
GGUF = "org/name-GGUF"
GATED = "org/gated"
VARIABLES = ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "NANOBRAID_OFFLINE", "XDG_CACHE_HOME")


def content(name: str, num_bytes: int = 3000) -> bytes:
    """Content that differs from file to file."""
    block = hashlib.sha256(name.encode()).digest()
    return (block * (num_bytes // len(block) + 1))[:num_bytes]


def repo_of(*names: str) -> dict[str, bytes]:
    return {name: content(name) for name in names}


def sharded() -> dict[str, bytes]:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    small = {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}", "tokenizer.json": b"{}"}
    return small | repo_of(*shards)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches below the folder that is returned: `cache` and `hf`."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOBRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_known, "installed_file", lambda known: None)
    return tmp_path


@pytest.fixture
def hub(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    hub = Hub(
        repos={
            FOLDER: {
                **repo_of("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
                **repo_of("special_tokens_map.json", "chat_template.jinja", "model.safetensors", "README.md"),
                **repo_of("pytorch_model.bin", "modeling.py", "tokenizer.py", "original/consolidated.safetensors"),
            },
            GGUF: repo_of("name-Q8_0.gguf", "name-Q4_K_M.gguf", "name-IQ4_XS.gguf", "mmproj-Q4_K_M.gguf", "README.md"),
            GATED: repo_of("a.Q4_0.gguf"),
        },
        gated={GATED},
    )
    with serve(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub.time, "sleep", lambda seconds: None)


def partial_files(caches: Path) -> list[Path]:
    return sorted((caches / "cache" / "hub").glob("*/incomplete/*"))


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "HuggingFaceTB/SmolLM2-135M", "a/b:Q4_K_M", "a.b/c_d:IQ4_XS"])
def test_repository_names(name: str) -> None:
    repo = Repo.parse(name)
    assert repo is not None
    assert str(repo) == name


@pytest.mark.parametrize(
    "name",
    [
        *("a", "a/b/c", "../b", "a/..", "./a", "a/b:", ":Q4", "a/b:c:d", "a/-b", "a/b-", "a--b/c", "a/b..c", "a b/c"),
        *("~/a", f"a/{'b' * 96}", "ä/b", "/a/b", "a/b:../c"),
    ],
)
def test_what_is_no_repository_name(name: str) -> None:
    assert Repo.parse(name) is None


SAFE = ("config.json", "model.safetensors")
CHOICES = {
    # (files, quant) -> what is opened (None: the folder)
    "safetensors win": ((*SAFE, "m-Q4_K_M.gguf"), None, None),
    "a quant wants a GGUF": ((*SAFE, "m-Q8_0.gguf"), "Q8_0", "m-Q8_0.gguf"),
    "Q4_K_M is the default": (("m-Q2_K.gguf", "m-Q4_K_M.gguf"), None, "m-Q4_K_M.gguf"),
    "else the first": (("m-Q8_0.gguf", "m-Q5_0.gguf"), None, "m-Q5_0.gguf"),
    "case does not matter": (("m.q8_0.gguf",), "Q8_0", "m.q8_0.gguf"),
    "a folder per quant": (("Q8_0/m-00001-of-00001.gguf", "m.gguf"), "Q8_0", "Q8_0/m-00001-of-00001.gguf"),
    "the dot separates": (("m-1.5.Q8_0.gguf", "m-1.5.IQ4_XS.gguf"), "IQ4_XS", "m-1.5.IQ4_XS.gguf"),
    "not a part of a name": (("m-IQ4_0.gguf", "m-Q4_0.gguf", "m-Q4_0_4_4.gguf"), "Q4_0", "m-Q4_0.gguf"),
    "no vision encoder": (("mmproj-m-F16.gguf", "m-F16.gguf"), "F16", "m-F16.gguf"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_choice_of_files(case: str) -> None:
    files, quant, opened = CHOICES[case]
    assert choose(files, Repo("o", "n", quant)).opened == opened


def test_parts_of_a_split_file_come_together() -> None:
    parts = [f"m-Q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    choice = choose(reversed(parts), Repo("o", "n", "Q4_0"))
    assert choice.files == tuple(parts)
    with pytest.raises(nb.ModelNotFoundError, match="no GGUF files"):
        choose(parts[:2], Repo("o", "n", "Q4_0"))


def test_choices_that_fail_list_what_there_is() -> None:
    with pytest.raises(nb.ModelNotFoundError, match=r"no GGUF file Q4_1; it has m-Q4_0, m-Q8_0"):
        choose(["m-Q8_0.gguf", "m-Q4_0.gguf"], Repo("o", "n", "Q4_1"))
    with pytest.raises(nb.InvalidArgumentError, match=r"any of a-Q4_0, b-Q4_0"):
        choose(["b-Q4_0.gguf", "a-Q4_0.gguf", "c-Q8_0.gguf"], Repo("o", "n", "Q4_0"))
    with pytest.raises(nb.InvalidArgumentError, match=r"any of a-Q4_K_M, b-Q4_K_M"):
        choose(["b-Q4_K_M.gguf", "a-Q4_K_M.gguf"], Repo("o", "n"))
    with pytest.raises(nb.ModelNotFoundError, match=r"no safetensors .*it has \.bin files"):
        choose(["pytorch_model.bin", "config.json"], Repo("o", "n"))


def test_only_the_files_of_the_folder_that_are_needed() -> None:
    files = [*sharded(), "consolidated.safetensors", "adapter_model.safetensors", "sub/model.safetensors", "a.py"]
    choice = choose(files, Repo("o", "n"))
    assert choice.files[-2:] == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert set(choice.files) == set(sharded())


# --- what is on this machine ---------------------------------------------------------------------------------------


def test_the_order_of_places(caches: Path) -> None:
    hub = Hub(repos={FOLDER: repo_of(*SAFE)})
    theirs = hub.copy_to_cache(FOLDER, caches / "hf")
    assert models.resolve(FOLDER) == theirs
    ours = hub.copy_to_cache(FOLDER, caches / "cache" / "hub")
    assert models.resolve(FOLDER) == ours


def test_where_the_hugging_face_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")]
    order += [("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub")]
    for name, _ in order:
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, rest in order:
        assert models.hugging_face_dir() == tmp_path / name / rest
        monkeypatch.delenv(name)


def test_an_existing_file_or_folder_comes_first(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(repos={FOLDER: repo_of(*SAFE)}).copy_to_cache(FOLDER, caches / "hf")
    monkeypatch.chdir(caches)
    (caches / FOLDER).mkdir(parents=True)
    assert models.resolve(FOLDER).parent.name == "snapshots"  # a folder without config.json is not a model
    (caches / FOLDER / "config.json").touch()
    assert models.resolve(FOLDER) == Path(FOLDER)


@pytest.mark.parametrize("missing", ["model-00002-of-00002.safetensors", "config.json", "model.safetensors.index.json"])
def test_incomplete_snapshots_do_not_count(caches: Path, missing: str) -> None:
    hub = Hub(repos={FOLDER: sharded()})
    snapshot = hub.copy_to_cache(FOLDER, caches / "hf", only=set(sharded()) - {missing})
    if missing.endswith("index.json"):
        assert models.resolve(FOLDER) == snapshot  # all shards are there by their numbers
        return
    with pytest.raises(nb.ModelNotFoundError, match=r"model-00002|no safetensors"):
        models.resolve(FOLDER)


def test_a_hostile_index_is_not_followed(caches: Path) -> None:
    repo = sharded() | {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'}
    Hub(repos={FOLDER: repo}).copy_to_cache(FOLDER, caches / "hf")
    with pytest.raises(nb.ModelNotFoundError, match=r"\.\./\.\./x is missing"):
        models.resolve(FOLDER)


def test_links_without_a_file_do_not_count(caches: Path) -> None:
    snapshot = Hub(repos={GGUF: repo_of("a-Q8_0.gguf")}).copy_to_cache(GGUF, caches / "hf")
    assert models.resolve(f"{GGUF}:Q8_0") == snapshot / "a-Q8_0.gguf"
    (snapshot / "a-Q8_0.gguf").resolve().unlink()
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(f"{GGUF}:Q8_0")


def test_the_main_branch_comes_before_other_snapshots(caches: Path) -> None:
    hub = Hub(repos={FOLDER: repo_of(*SAFE)})
    hub.copy_to_cache(FOLDER, caches / "hf")
    hub.repos[FOLDER]["config.json"] = b"{ }"
    newer = hub.copy_to_cache(FOLDER, caches / "hf")
    os.utime(newer, (1, 1))
    assert models.resolve(FOLDER) == newer
    (newer / "model.safetensors").unlink()
    assert models.resolve(FOLDER) != newer


def test_failure_lists_everything(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(repos={FOLDER: repo_of("a-Q8_0.gguf")}).copy_to_cache(FOLDER, caches / "hf")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(nb.ModelNotFoundError) as caught:
        models.resolve(f"{FOLDER}:Q4_0")
    says = str(caught.value)
    for words in (str(Path(f"{FOLDER}:Q4_0").absolute()), str(caches / "cache"), str(caches / "hf"), "it has a-Q8_0"):
        assert words in says
    assert "HF_HUB_OFFLINE forbids" in says
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(nb.ModelNotFoundError, match=f"nanobraid pull {FOLDER}:Q4_0"):
        models.resolve(f"{FOLDER}:Q4_0")


def test_names_of_files_in_the_cache(caches: Path) -> None:
    (caches / "cache" / "models").mkdir(parents=True)
    for name in ("mine.gguf", "mine.braid"):
        (caches / "cache" / "models" / name).touch()
    assert models.resolve("mine").name == "mine.braid"


# --- downloads -----------------------------------------------------------------------------------------------------


def test_a_folder_is_downloaded_with_what_it_needs(hub: Hub, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.ensure(FOLDER)
    needed = {name for name in hub.repos[FOLDER] if not name.endswith((".py", ".bin", ".md")) and "/" not in name}
    assert {entry.name for entry in path.iterdir()} == needed
    assert all((path / name).read_bytes() == hub.repos[FOLDER][name] for name in needed)
    assert path.is_relative_to(caches / "cache" / "hub")
    assert hub.fetched()[-1] == "model.safetensors"
    said = capsys.readouterr()
    assert said.out == ""
    for words in (FOLDER, "7 files", "license mit", hub.endpoint, str(path)):
        assert words in said.err
    assert not partial_files(caches)

    num_requests = len(hub.requests)
    assert models.ensure(FOLDER) == models.resolve(FOLDER) == models.pull(FOLDER) == path
    assert len(hub.requests) == num_requests


@pytest.mark.parametrize(("quant", "file"), [("", "name-Q4_K_M"), (":Q8_0", "name-Q8_0"), (":iq4_xs", "name-IQ4_XS")])
def test_one_gguf_file_is_downloaded(hub: Hub, quant: str, file: str) -> None:
    seen: list[tuple[int, int]] = []
    path = models.pull(GGUF + quant, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == content(f"{file}.gguf")
    assert set(hub.fetched()) == {f"{file}.gguf"}
    assert seen[-1] == (3000, 3000)
    assert models.resolve(GGUF + quant) == path


def test_all_parts_of_a_split_gguf(hub: Hub) -> None:
    parts = [f"big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.repos["org/big"] = repo_of(*parts, "big-Q2_K.gguf")
    path = models.pull("org/big:Q8_0")
    assert path.name == parts[0]
    assert sorted(entry.name for entry in path.parent.iterdir()) == parts
    (path.parent / parts[2]).unlink()
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve("org/big:Q8_0")
    hub.requests.clear()
    assert models.pull("org/big:Q8_0") == path
    assert set(hub.fetched()) == {parts[2]}


def test_the_token_is_for_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nb.DownloadError, match=r"org/gated is gated.*HF_TOKEN"):
        models.pull(GATED)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(nb.DownloadError, match="gated"):
        models.pull(GATED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    assert models.pull(GATED).read_bytes() == content("a.Q4_0.gguf")
    assert {r.authorization for r in hub.requests if r.host == "127.0.0.1"} == {f"Bearer {TOKEN}"}
    assert [r.authorization for r in hub.requests if r.host == "localhost"] == [None]


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(nb.ModelNotFoundError, match=r"no repository org/nothing, or it is private: HF_TOKEN"):
        models.pull("org/nothing")
    with pytest.raises(nb.ModelNotFoundError, match=r"no GGUF file Q5_0; it has name-IQ4_XS, name-Q4_K_M, name-Q8_0"):
        models.ensure(f"{GGUF}:Q5_0")
    with pytest.raises(nb.ModelNotFoundError, match="org/name"):
        models.pull("not a name")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "NANOBRAID_OFFLINE"])
def test_offline_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    for fetch in (models.pull, models.ensure):
        with pytest.raises(nb.DownloadError, match=f"{variable} forbids"):
            fetch(FOLDER)
    assert hub.requests == []


def test_without_huggingface_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(nb.DownloadError, match=r"pip install 'nanobraid\[hub\]'"):
        models.ensure(FOLDER)
    assert hub.requests == []


def test_a_hub_that_does_not_answer(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(nb.DownloadError, match=r"cannot ask http://127\.0\.0\.1:1 for org/folder"):
        models.ensure(FOLDER)


def test_a_cut_connection_is_resumed(hub: Hub, quick: None) -> None:
    hub.cut_after, hub.cuts = 1000, 2
    assert models.pull(f"{GGUF}:Q8_0").read_bytes() == content("name-Q8_0.gguf")
    assert [r.range for r in hub.requests if r.host == "localhost"] == [None, "bytes=1000-", "bytes=2000-"]


def test_the_next_call_goes_on_where_one_ended(hub: Hub, quick: None, caches: Path) -> None:
    hub.cut_after, hub.cuts = 1000, 1

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull(f"{GGUF}:Q8_0", interrupt)
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(f"{GGUF}:Q8_0")
    assert len(partial_files(caches)) == 1
    hub.requests.clear()
    assert models.pull(f"{GGUF}:Q8_0").read_bytes() == content("name-Q8_0.gguf")
    assert [r.range for r in hub.requests if r.host == "localhost"] == ["bytes=1000-"]
    assert not partial_files(caches)


def test_a_hub_that_knows_no_ranges(hub: Hub, quick: None) -> None:
    hub.cut_after, hub.cuts, hub.without_range = 1000, 1, True
    assert models.pull(f"{GGUF}:Q8_0").read_bytes() == content("name-Q8_0.gguf")


def test_a_connection_that_never_gets_further(hub: Hub, quick: None, caches: Path) -> None:
    hub.cut_after, hub.cuts = 0, 1000
    with pytest.raises(nb.DownloadError, match="after 0 of 3000 bytes"):
        models.pull(f"{GGUF}:Q8_0")
    assert len(hub.requests) < 20


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_wrong_checksum_keeps_nothing(hub: Hub, caches: Path, file: str) -> None:
    hub.corrupt.add(file)
    with pytest.raises(nb.DownloadError, match=f"{file}.*checksum"):
        models.pull(FOLDER)
    assert not partial_files(caches)
    assert not list((caches / "cache").rglob(file))
    with pytest.raises(nb.ModelNotFoundError):
        models.resolve(FOLDER)
    hub.corrupt.clear()
    assert (models.pull(FOLDER) / file).read_bytes() == content(file)


def test_a_wrong_size_keeps_nothing(hub: Hub, quick: None, caches: Path) -> None:
    hub.listed_size["name-Q8_0.gguf"] = 2000
    with pytest.raises(nb.DownloadError, match="longer than the 2000 bytes"):
        models.pull(f"{GGUF}:Q8_0")
    assert not partial_files(caches)
    hub.listed_size["name-Q8_0.gguf"] = 2**60
    with pytest.raises(nb.DownloadError, match="MB are free"):
        models.pull(f"{GGUF}:Q8_0")


@pytest.mark.parametrize("name", ["../../../escape-Q8_0.gguf", "/tmp/escape-Q8_0.gguf"])
def test_a_listing_cannot_write_elsewhere(hub: Hub, name: str) -> None:
    hub.repos["org/evil"] = repo_of(name)
    with pytest.raises(nb.ModelNotFoundError, match="no "):
        models.pull("org/evil:Q8_0")
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written(hub: Hub, caches: Path) -> None:
    (caches / "cache").write_text("a file where the folder should be")
    with pytest.raises(nb.DownloadError, match="cannot store org/folder"):
        models.pull(FOLDER)


def _pull(name: str) -> str:
    return str(models.pull(name))


def test_downloads_at_the_same_time_fetch_once(hub: Hub) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        paths = pool.map(_pull, [FOLDER] * 3)
    assert len(set(paths)) == 1
    assert hub.fetched().count("tokenizer.json") == 1


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_asks_first(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--model", f"{GGUF}:Q8_0"]) == 2
    says = capfd.readouterr().err
    for words in ("no terminal to ask", f"nanobraid pull {GGUF}:Q8_0", "--yes", "0.0 MB"):
        assert words in says
    assert hub.fetched() == []
    assert cli.main(["generate", "x", "--model", f"{GGUF}:Q8_0", "-y"]) == 2  # what comes is no GGUF file
    assert "downloading" in capfd.readouterr().err
    assert set(hub.fetched()) == {"name-Q8_0.gguf"}


@pytest.mark.parametrize(("answer", "loads"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_the_answer_counts(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], answer: str, loads: bool
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.main(["generate", "x", "--model", f"{GGUF}:Q8_0"]) == 2
    assert "[y/N]" in capfd.readouterr().err
    assert bool(hub.fetched()) == loads


def test_pull_prints_the_path(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", FOLDER]) == 0
    said = capsys.readouterr()
    assert said.out == f"{models.resolve(FOLDER)}\n"
    assert "downloading org/folder" in said.err
    assert cli.main(["pull", "org/nothing"]) == 2


def test_models_lists_what_is_found(hub: Hub, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert "no models" in capsys.readouterr().err
    ours = models.pull(f"{GGUF}:Q8_0")
    hub.repos["org/big"] = repo_of("big-Q8_0-00001-of-00002.gguf", "big-Q8_0-00002-of-00002.gguf", "big-Q2_K.gguf")
    theirs = hub.copy_to_cache("org/big", caches / "hf")
    folder = hub.copy_to_cache(FOLDER, caches / "hf")
    hub.copy_to_cache(GGUF, caches / "hf", only={"name-Q8_0.gguf"})  # the same again: ours comes first
    (caches / "cache" / "models").mkdir()
    (caches / "cache" / "models" / "mine.braid").write_bytes(b"x" * 10)
    capsys.readouterr()
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    facts = {name: (row["kind"], row["num_bytes"], row["where"], row["path"]) for name, row in rows.items()}
    assert facts == {
        "mine": ("braid", 10, "cache", str(caches / "cache" / "models" / "mine.braid")),
        f"{GGUF}:Q8_0": ("gguf", 3000, "cache", str(ours)),
        "org/big:Q2_K": ("gguf", 3000, "HF cache", str(theirs / "big-Q2_K.gguf")),
        "org/big:Q8_0": ("gguf", 6000, "HF cache", str(theirs / "big-Q8_0-00001-of-00002.gguf")),
        FOLDER: ("hf folder", 7 * 3000, "HF cache", str(folder)),
    }
    for name, row in rows.items():
        assert models.resolve(name) == Path(row["path"])
        assert row["exported"] == []
    assert cli.main(["models"]) == 0
    assert "org/big:Q2_K" in capsys.readouterr().out


def test_similar_names_are_suggested(caches: Path) -> None:
    Hub(repos={FOLDER: repo_of(*SAFE)}).copy_to_cache(FOLDER, caches / "hf")
    with pytest.raises(nb.ModelNotFoundError, match="did you mean 'org/folder'"):
        models.resolve("org/foldr")


def test_doctor_says_what_is_found(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.pull(f"{GGUF}:Q8_0")
    capsys.readouterr()
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["models_found"] == [f"{GGUF}:Q8_0: {path}"]
    assert facts["models_to_pull"] == ["smollm2-135m"]
    assert facts["hub"] == hub.endpoint


def test_a_folder_is_not_inspected(caches: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Hub(repos={FOLDER: repo_of(*SAFE)}).copy_to_cache(FOLDER, caches / "hf")
    assert cli.main(["inspect", FOLDER]) == 2
    assert "nanobraid export" in capfd.readouterr().err


def test_snapshots_of_a_cache_that_is_not_there(tmp_path: Path) -> None:
    assert _repo.snapshots(tmp_path / "none") == []
