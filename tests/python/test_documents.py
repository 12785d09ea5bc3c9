"""Every code block in the documents is true: Python and shell blocks run, C and C++ blocks compile.

Rules:
- Every block names its language: python, bash, console, cpp, c, json, toml, text. Anything else fails.
- python: runs as a program of its own, with the default model.
- What speaks to http://127.0.0.1:8000 speaks to a server that runs with the default model while the blocks are checked.
- bash: runs line after line under ``set -e``, in a scratch folder. Lines that would build or test everything are not
  run here but must be in `BUILD_LINES`: the test command and the continuous integration do just that.
- console: lines that begin with ``$`` run like bash; the other lines show output and are not compared.
- cpp, c: compiled with the headers of the project (``-fsyntax-only``); a block without ``main`` may be a fragment of
  declarations.
- json, toml: parsed. text: a drawing or output; nothing to check.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "USER_GUIDE.md",
    "SERVER.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "SECURITY.md",
    "eval/README.md",
)
LANGUAGES = ("python", "bash", "console", "cpp", "c", "json", "toml", "text")

# Lines that take the whole build or hours. They are patterns of complete lines; each is what a developer types to do
# what `.ci/run` and `tests/run.sh` do, or starts a program that waits for a person.
BUILD_LINES = tuple(
    re.compile(pattern)
    for pattern in (
        r"git clone \S+( \S+)?",
        r"cd [\w./-]+",
        r"python3? -m venv \S+( && \S+/pip install [\w.=<>\[\] -]+)?",
        r"(source|\.) \S+/activate",
        r"(\S+/)?pip install (-e )?('?\.(\[[\w,]+\])?'?|\"\.(\[[\w,]+\])?\")( -C\S+| -v)*",
        r"(\S+/)?pip install [\w.=<>\[\] -]+",
        r"python3? -m build --sdist",
        r"pip (install|wheel .*) dist/\S+\.tar\.gz( -C \S+)*",
        r"auditwheel repair .*",
        r"tests/run\.sh( --\w+)*",
        r"\.ci/run",
        r"\S+/build/bin/llama-quantize .*",
        r"(CC=\S+ |CXX=\S+ )*cmake (-S|-B|--build|--install|--preset) .*",
        r"ctest .*",
        r"pre-commit (install|run.*)",
        r"nanobraid chat",
        r"nanobraid serve( [\w./-]+| --[\w-]+)*",
        r"(\./)?build[\w-]*/\S+.*",
        r"(python3? )?eval/\S+.*",
        r"python3? (eval|tools)/\S+.*",
        r"(ruff|mypy|clang-format|pytest)( .*)?",
    )
)
BUILD_SHORTHANDS = ("pip install . && nanobraid generate",)


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}:{self.language or 'untagged'}"


def blocks_of(text: str, document: str) -> list[Block]:
    """All fenced blocks, also those indented under a list item."""
    blocks = []
    fence: re.Match[str] | None = None
    start = 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"( *)(```+|~~~+)\s*([^`]*)$", line)
        if fence is None:
            if mark:
                fence, start, lines = mark, number, []
        elif mark and mark[2].startswith(fence[2]) and not mark[3].strip():
            blocks.append(Block(document, start, fence[3].strip(), "\n".join(lines) + "\n"))
            fence = None
        else:
            lines.append(line.removeprefix(fence[1]))
    assert fence is None, f"{document}:{start}: the block never ends"
    return blocks


def present_documents() -> list[str]:
    return [document for document in DOCUMENTS if (ROOT / document).is_file()]


def all_blocks() -> list[Block]:
    return [b for document in present_documents() for b in blocks_of((ROOT / document).read_text(), document)]


def having(*languages: str) -> list[Block]:
    return [block for block in all_blocks() if block.language in languages]


def wrong_tags(blocks: list[Block]) -> list[str]:
    return [str(block) for block in blocks if block.language not in LANGUAGES]


def shell_lines(block: Block) -> list[str]:
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("$"))
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


def is_build_line(line: str) -> bool:
    return any(p.fullmatch(line) for p in BUILD_LINES) or any(line.startswith(text) for text in BUILD_SHORTHANDS)


def test_there_is_something_to_check() -> None:
    assert "USER_GUIDE.md" in present_documents()
    assert len(having("python")) >= 8
    assert len(having("bash")) >= 5


def test_every_block_names_a_known_language() -> None:
    assert wrong_tags(all_blocks()) == []


def test_untagged_and_unknown_blocks_would_be_found() -> None:
    text = "a\n```\nx\n```\n- b\n  ```rust\n  y\n  ```\n````text\n```\nnot a fence\n````\n"
    blocks = blocks_of(text, "d.md")
    assert [(b.line, b.language, b.text) for b in blocks] == [
        (2, "", "x\n"),
        (6, "rust", "y\n"),
        (9, "text", "```\nnot a fence\n"),
    ]
    assert wrong_tags(blocks) == ["d.md:2:untagged", "d.md:6:rust"]
    with pytest.raises(AssertionError, match="never ends"):
        blocks_of("```python\n", "d.md")


DOCUMENTED_SERVER = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def server_address(model_path: Path) -> Iterator[str]:
    """Where a server runs with the default model."""
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "nanobraid", "serve", "--port", "0", "--max-model-len", "2048"]
    process = subprocess.Popen([*command, "--no-access-log"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"Ready at http://(127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("the server did not start")
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0


def located(text: str, request: pytest.FixtureRequest) -> str:
    """A text whose server is the one that runs; it is started for the first that needs it."""
    if DOCUMENTED_SERVER not in text:
        return text
    return text.replace(DOCUMENTED_SERVER, request.getfixturevalue("server_address"))


@pytest.mark.parametrize("block", having("python"), ids=str)
def test_python_blocks_run(block: Block, model_path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "import openai" in block.text or "from openai" in block.text:
        pytest.importorskip("openai")
    script = tmp_path / "block.py"
    script.write_text(located(block.text, request))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("block", having("bash", "console"), ids=str)
def test_shell_blocks_run(block: Block, model_path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines = shell_lines(block)
    assert lines, f"{block} has no command"
    script = located("\n".join(line for line in lines if not is_build_line(line)), request)
    script = re.sub(r"^curl ", "curl --silent --show-error --fail ", script, flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n", "-c", "\n".join(lines)], check=False).returncode == 0, str(block)
    if not script:
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path},
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", having("bash", "console"), ids=str)
def test_files_named_in_shell_blocks_exist(block: Block) -> None:
    for line in shell_lines(block):
        for word in re.findall(r"(?:^|\s)((?:eval|tools|tests|demo|\.ci)/[\w./-]+)", line):
            assert (ROOT / word).exists(), f"{block} names {word}"


def test_what_is_not_run_is_stated() -> None:
    for line in (
        "pip install .",
        "pip install '.[test]'",
        "tests/run.sh --full",
        ".ci/run",
        "nanobraid chat",
        "nanobraid serve",
        "python -m venv ../other && ../other/bin/pip install something",
    ):
        assert is_build_line(line)
    for line in ("nanobraid generate x", "rm -rf /", "pip install . && rm x", "nanobraid chat --threads 2", "curl x"):
        assert not is_build_line(line)


def test_c_blocks_compile(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "a C++ compiler is needed to check the blocks in the documents"
    for block in having("cpp", "c"):
        source = tmp_path / f"block.{block.language}"
        source.write_text(block.text)
        standard = ["-std=c++20", "-x", "c++"] if block.language == "cpp" else ["-x", "c"]
        command = [compiler, *standard, "-fsyntax-only", "-I", str(ROOT / "cpp"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_data_blocks_parse() -> None:
    for block in having("json"):
        json.loads(block.text)
    for block in having("toml"):
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
        tomllib.loads(block.text)


@pytest.mark.parametrize("document", present_documents())
def test_links_to_files_and_headings_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / document).parent.joinpath(path).exists(), f"{document}: {target}"
        elif anchor:
            assert anchor in headings, f"{document}: {target}"
