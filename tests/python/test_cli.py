"""The command line, run as a user runs it: output, exit codes, one-line errors, and a conversation on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_threads import OTHER_THREADS, THREADS

import nanobraid as nb

COMMAND = [sys.executable, "-m", "nanobraid"]
PROMPT = "The capital of France is"


def run(*arguments: str | Path, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nanobraid: error: ")
    assert re.search(says, lines[0]), lines[0]
    assert done.stdout == ""


# --- what works --------------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt(model_path: Path) -> None:
    done = run("generate", PROMPT, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
    assert done.stdout.endswith("\n")
    assert done.stderr == ""
    assert run("generate", "--max-tokens", "8", stdin=PROMPT + "\n").stdout == done.stdout
    assert run("generate", "-", "--max-tokens", "8", stdin=PROMPT).stdout == done.stdout
    assert run("generate", PROMPT, "--max-tokens", "8", "--threads", str(OTHER_THREADS)).stdout == done.stdout
    assert run("generate", PROMPT, "--max-tokens=8", "--model", model_path).stdout == done.stdout


def test_generate_defaults_to_64_greedy_tokens(llm: nb.LLM) -> None:
    done = run("generate", "Once upon a time", "--ignore-eos")
    (out,) = llm.generate("Once upon a time", nb.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    assert done.stdout == out.text + "\n"


def test_sampling_options_reach_the_engine(llm: nb.LLM) -> None:
    params = nb.SamplingParams(
        temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3, max_tokens=20,
        stop_token_ids=[5], logit_bias={100: 2.0},
    )  # fmt: skip
    arguments = "--temperature 0.8 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --seed 3"
    arguments += " --max-tokens 20 --stop-token-ids 5 --logit-bias 100=2"
    done = run("generate", PROMPT, *arguments.split())
    assert done.stdout == llm.generate(PROMPT, params)[0].text + "\n"


def test_generate_streams(model_path: Path) -> None:
    arguments = ["generate", "Once upon a time", "--max-tokens", "1000", "--ignore-eos"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 100)
        assert first  # long before all thousand are done:
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b""
    assert len(first + rest) < 4000


def test_a_reader_that_goes_away_ends_it_quietly(model_path: Path) -> None:
    arguments = ["generate", "Once upon a time", "--max-tokens", "1000", "--ignore-eos"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_bench_json(model_path: Path) -> None:
    done = run("bench", "--pp", "32", "--tg", "8", "--repeat", "2", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pp_tok_s"] > 0
    assert result["tg_tok_s"] > 0
    assert (result["pp"], result["tg"], result["repeat"], result["num_threads"]) == (32, 8, 2, 1)
    assert {"backend", "dtype", "kv_dtype", "model", "tg_gb_s", "weight_bytes"} <= set(result)
    assert (len(result["pp_seconds"]), len(result["tg_seconds"])) == (2, 2)


def test_bench_table(model_path: Path) -> None:
    done = run("bench", "--pp", "16", "--tg", "0", "--repeat", "1")
    assert re.search(r"^pp16 +\d+\.\d", done.stdout, re.MULTILINE)
    assert "tg" not in done.stdout.replace("test", "")
    assert "KV" in done.stderr


def test_bench_after_context(model_path: Path) -> None:
    done = run("bench", "--pp", "16", "--tg", "4", "--repeat", "1", "--depth", "64", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["depth"], len(result["pp_seconds"]), len(result["tg_seconds"])) == (64, 1, 1)


def test_inspect(model_path: Path) -> None:
    done = run("inspect", model_path)
    assert done.returncode == 0, done.stderr
    assert "general.architecture" in done.stdout
    assert "token_embd.weight" in done.stdout
    info = json.loads(run("inspect", "smollm2-135m", "--json").stdout)
    assert info["version"] == 3
    assert len(info["tensors"]) == 272
    assert all(size > 0 for _, _, shape, size in info["tensors"] for _ in shape)


def test_inspect_measures_fused_operators(model_path: Path) -> None:
    done = run("inspect", model_path, "--check-fusion", "cpu")
    assert done.returncode == 0, done.stderr
    assert "norm_qkv fused (scores off by 0 in layer 0, bound 0.062, values off by 0 in layer 0" in done.stdout
    assert "head fused (logits off by 0, bound 0.0078)" in done.stdout
    fusion = json.loads(run("inspect", model_path, "--json", "--check-fusion", "scalar").stdout)["fusion"]
    assert fusion["backend"] == "scalar"
    assert [row["quantity"] for row in fusion["errors"]] == ["scores", "values", "residual", "down", "logits"]
    assert all(row["error"] == 0.0 for row in fusion["errors"])
    assert "fusion" not in json.loads(run("inspect", model_path, "--json").stdout)


def test_doctor(model_path: Path) -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for word in (nb.__version__, "backends", "reference", "cuda", "cpu features", "cache", str(model_path), "threads"):
        assert word in done.stdout
    facts = json.loads(run("doctor", "--json").stdout)
    assert "scalar" in facts["backends"]
    assert re.match(r"smollm2-135m on \w+", facts["fusion"][0])
    assert [line.split(" (")[0] for line in facts["fusion"][1:]] == [
        "norm_qkv fused",
        "linear_residual fused",
        "norm_gate_up fused",
        "head fused",
    ]
    assert all("off by 0" in line for line in facts["fusion"][1:])


def test_pull(model_path: Path) -> None:
    done = run("pull")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2-135m" in done.stdout
    assert "Apache-2.0" in done.stdout
    assert run("pull", "smollm2-135m").stdout == f"{model_path}\n"


def test_version_and_help() -> None:
    assert run("--version").stdout == f"nanobraid {nb.__version__}\n"
    done = run()
    assert done.returncode == 2
    for command in ("generate", "chat", "bench", "inspect", "doctor", "pull", "models"):
        assert command in done.stderr
        assert run(command, "--help").returncode == 0


def test_log_level(model_path: Path) -> None:
    done = run("generate", "x", "--max-tokens", "1", "--log-level", "info")
    assert "nanobraid: INFO: loaded" in done.stderr
    assert re.search(r"KV cache: \d+ bytes reserved for \d+ tokens", done.stderr)
    assert "nanobraid: INFO: loaded" in run("--log-level", "info", "generate", "x", "--max-tokens", "1").stderr
    assert "nanobraid: INFO: loaded" in run("generate", "x", "--max-tokens", "1", NANOBRAID_LOG="info").stderr
    done = run("pull", NANOBRAID_LOG="loud")
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert "NANOBRAID_LOG" in done.stderr


# --- wrong input: one line and exit code 2; from Python the right class ------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--temperature", "-1"], "temperature must be.*got -1.0"),
        (["generate", "x", "--temperature", "nan"], "temperature must be.*got nan"),
        (["generate", "x", "--top-p", "0"], "top_p must be.*got 0.0"),
        (["generate", "x", "--top-p", "1.1"], "top_p must be.*got 1.1"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be.*got 0"),
        (["generate", "x", "--max-tokens", "ten"], "--max-tokens.*'ten'"),
        (["generate", "x", "--stop-token-ids", "a"], "--stop-token-ids"),
        (["generate", "x", "--logit-bias", "a"], "--logit-bias"),
        (["generate", "x", "--stop-token-ids", "99999999"], "stop_token_ids must hold token ids in"),
        (["generate", "x", "--dtype", "fp3"], "dtype must be one of"),
        (["generate", "x", "--device", "cuda"], "cuda"),
        (["generate", "x", "--num-threads", "0"], "num_threads"),
        (["generate", "word " * 9000], r"too long: \d+ tokens.*exceed the context"),
        (["generate", "x", "--model", "no-such-model"], "no model 'no-such-model': tried.*smollm2-135m"),
        (["generate", "x", "--model", "smollm2"], "did you mean 'smollm2-135m'"),
        (["generate", "x", "--model", "org/name"], "no model 'org/name': tried.*HF_HUB_OFFLINE forbids"),
        (["generate", "x", "--model", ""], "model must be"),
        (["generate", "x", "--max-tok", "5"], "unrecognized arguments"),
        (["generate"], "the prompt is empty"),
        (["bench", "--pp", "0", "--tg", "0"], "nothing to measure"),
        (["bench", "--repeat", "0"], "--repeat"),
        (["bench", "--depth", "17"], "--depth must be a multiple of 16"),
        (["inspect"], "FILE"),
        (["inspect", "/nowhere/x.gguf"], "no model '/nowhere/x.gguf'"),
        (["pull", "gpt-4"], "no known model 'gpt-4'"),
        (["fly"], "no such command.*fly"),
    ],
)
def test_wrong_arguments(model_path: Path, arguments: list[str], says: str) -> None:
    assert_one_line_error(run(*arguments, HF_HUB_OFFLINE="1"), says)


def damage(model_path: Path, folder: Path, how: str) -> Path:
    path = folder / f"{how}.gguf"
    head = model_path.read_bytes()[: 1 << 21]
    contents = {
        "empty": b"",
        "one_byte": b"G",
        "wrong_magic": b"GGML" + head[4:],
        "version_0": head[:4] + (0).to_bytes(4, "little") + head[8:],
        "version_1": head[:4] + (1).to_bytes(4, "little") + head[8:],
        "version_99": head[:4] + (99).to_bytes(4, "little") + head[8:],
        "big_endian": head[:4] + (3).to_bytes(4, "big") + head[8:],
        "cut_in_header": head[:20],
        "cut_in_metadata": head[:100_000],
        "cut_in_tensors": head,
        "text": b"Once upon a time there was a model that was only a text.\n" * 10,
    }
    path.write_bytes(contents[how])
    return path


DAMAGES = {
    "empty": "empty",
    "one_byte": "",
    "wrong_magic": "magic|GGUF",
    "version_0": "version",
    "version_1": "version",
    "version_99": "version",
    "big_endian": "version|endian",
    "cut_in_header": "",
    "cut_in_metadata": "",
    "cut_in_tensors": "",
    "text": "magic|GGUF",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files(model_path: Path, tmp_path: Path, how: str) -> None:
    path = damage(model_path, tmp_path, how)
    says = DAMAGES[how]
    assert_one_line_error(run("generate", "x", "--model", path), f"{path.name}.*({says})")
    assert_one_line_error(run("inspect", path), f"{path.name}.*({says})")
    for opening in (nb.LLM, nb.Tokenizer):
        with pytest.raises((nb.FormatError, nb.UnsupportedError), match=path.name):
            opening(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert_one_line_error(run("generate", "x", "--model", tmp_path / "none.gguf"), "none.gguf")
    assert_one_line_error(run("generate", "x", "--model", tmp_path), "is a folder")
    with pytest.raises(nb.ModelNotFoundError):
        nb.LLM(tmp_path / "none.gguf")


def test_a_file_without_permission() -> None:
    program = (
        "import os, sys, nanobraid as nb, nanobraid.models\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"  # root may read every file
        "try: nb.Tokenizer(sys.argv[1])\n"
        "except nb.ModelIOError as error: print(isinstance(error, OSError), error)"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "secret.gguf"
        path.write_bytes(b"GGUF")
        path.chmod(0)
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("True"), done.stderr
    assert "secret.gguf" in done.stdout


def test_a_traceback_only_on_request() -> None:
    done = run("generate", "x", "--model", "no-such-model", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nanobraid: error: ")


def test_invalid_utf8() -> None:
    done = subprocess.run(
        [*COMMAND, "generate", b"caf\xe9"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert_one_line_error(done, "surrogate")
    raw = subprocess.run([*COMMAND, "generate"], input=b"caf\xe9", capture_output=True, check=False)
    assert raw.returncode == 2
    assert b"not UTF-8" in raw.stderr


# --- chat --------------------------------------------------------------------------------------------------------


class Terminal:
    """Runs a command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.process_id, self._fd = pty.fork()
        if self.process_id == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*COMMAND, *arguments])
        self.seen = ""

    def read_until(self, what: str, timeout: float = 60) -> str:
        """Reads until `what` appears in the text not returned yet; returns that text up to and including it."""
        deadline = time.monotonic() + timeout
        while what not in self.seen:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no {what!r} in {self.seen!r}"
            if select.select([self._fd], [], [], remaining)[0]:
                try:
                    block = os.read(self._fd, 4096)
                except OSError:  # the other side has closed
                    block = b""
                assert block, f"ended without {what!r}: {self.seen!r}"
                self.seen += block.decode("utf-8", "replace")
        head, _, self.seen = self.seen.partition(what)
        return head + what

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, timeout: float = 30) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the other side has closed
                    self.seen += os.read(self._fd, 4096).decode("utf-8", "replace")
            pid, status = os.waitpid(self.process_id, os.WNOHANG)
            if pid:
                self.process_id = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running: {self.seen!r}")

    def close(self) -> None:
        if self.process_id:
            os.kill(self.process_id, signal.SIGKILL)
            os.waitpid(self.process_id, 0)
        os.close(self._fd)


@pytest.fixture
def chat(model_path: Path) -> Iterator[Terminal]:
    terminal = Terminal("chat", "--temperature", "0", "--threads", str(THREADS))
    terminal.read_until("> ")
    yield terminal
    terminal.close()


def test_a_conversation_of_three_turns_with_an_interruption(chat: Terminal) -> None:
    chat.write("What is the capital of France? Answer in one sentence.\n")
    assert "Paris" in chat.read_until("\n> ")
    chat.write("Write a very long story about a dragon and a knight.\n")
    chat.read_until("knight.\r\n")
    chat.read_until(" ")
    time.sleep(0.2)
    chat.write("\x03")
    chat.read_until("[stopped]\r\n> ")
    chat.write("What is 2+2?\n")
    assert len(chat.read_until("\n> ").partition("\n")[2]) > len("\n> ")
    chat.write("/exit\n")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen


def test_commands_of_the_conversation(chat: Terminal) -> None:
    chat.write("/help\n")
    text = chat.read_until("> ")
    for word in ("/help", "/clear", "/exit", "Ctrl-C", "Ctrl-D"):
        assert word in text
    chat.write("/fly\n")
    assert "Unknown command /fly" in chat.read_until("> ")
    chat.write("/clear\n")
    assert "forgotten" in chat.read_until("> ")
    chat.write("\n")
    chat.read_until("> ")
    chat.write("\x04")
    assert chat.wait() == 0


def test_ctrl_c_at_the_empty_prompt_leaves(chat: Terminal) -> None:
    time.sleep(0.5)
    chat.write("\x03")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen


def test_ctrl_c_on_a_begun_line_only_drops_the_line(chat: Terminal) -> None:
    chat.write("half a questi")
    chat.read_until("questi")
    time.sleep(0.5)  # a signal that meets readline while it echoes is seen only with the next key
    chat.write("\x03")
    chat.read_until("> ")
    chat.write("/exit\n")
    assert chat.wait() == 0


def test_a_question_that_is_too_long_does_not_end_the_conversation(model_path: Path) -> None:
    arguments = ("chat", "--temperature", "0", "--max-model-len", "128", "--max-tokens", "8")
    done = run(*arguments, stdin="word " * 500 + "\nHello\n/exit\n")
    assert done.returncode == 2
    assert "too long" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.strip()


def test_old_turns_are_forgotten_when_the_context_is_full(model_path: Path) -> None:
    arguments = ("chat", "--temperature", "0", "--max-model-len", "160", "--max-tokens", "16")
    done = run(*arguments, stdin="Tell me something about cats and dogs.\n" * 6)
    assert done.returncode == 0, done.stderr
    assert "forgotten" in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.strip()]) >= 6


def test_the_conversation_is_remembered(llm: nb.LLM) -> None:
    questions = ["What is the capital of France? Answer in one sentence.", "And what is it famous for?"]
    params = nb.SamplingParams(temperature=0, max_tokens=30)
    messages: list[dict[str, str]] = []
    expected = ""
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, params).text
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    done = run("chat", "--temperature", "0", "--max-tokens", "30", stdin="\n".join(questions) + "\n")
    assert done.stdout == expected
    forgetting = run("chat", "--temperature", "0", "--max-tokens", "30", stdin="\n/clear\n".join(questions) + "\n")
    assert forgetting.stdout != expected


def test_the_system_message_counts(model_path: Path) -> None:
    question = "What is your name?\n"
    plain = run("chat", "--temperature", "0", "--max-tokens", "30", stdin=question)
    system = run(
        "chat", "--temperature", "0", "--max-tokens", "30", "--system", "Your name is Bob. You are a pirate.",
        stdin=question,
    )  # fmt: skip
    assert plain.returncode == system.returncode == 0
    assert plain.stdout != system.stdout
