"""The native demos on the default model, with right and wrong input; the fixed chat formats against jinja2."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_hf import config_of, tensors_of, write_folder

import nanobraid as nb
from nanobraid.export import export_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from make_random_model import byte_tokenizer

BUILD = os.environ.get("NANOBRAID_BUILD_DIR")
pytestmark = pytest.mark.skipif(not BUILD, reason="NANOBRAID_BUILD_DIR names no build folder with native programs")

DEMOS = (
    "generate",
    "chat_demo",
    "batched_infer_multi_prompts",
    "sampling_strategies_demo",
    "prefix_caching_benchmark",
    "compose_chunks",
)
PROMPT = "The capital of France is"
GREEDY = nb.SamplingParams(temperature=0, max_tokens=12)


def run(name: str, *arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[bytes]:
    assert BUILD
    return subprocess.run(
        [Path(BUILD) / "demo" / name, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )


def text_of(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()  # strict: output is UTF-8


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_with_quantized_keys_and_values(model_path: Path) -> None:
    options = ["--model", model_path, "--max-tokens", "12", "--kv-dtype"]
    with nb.LLM(model_path, kv_dtype="int8", max_model_len=256) as quantized:
        expected = PROMPT + quantized.generate(PROMPT, GREEDY)[0].text + "\n"
    assert text_of(run("generate", *options, "int8", PROMPT)) == expected
    assert text_of(run("generate", *options, "int8", "--force-kv-dtype", PROMPT)) == expected
    done = run("generate", *options, "int3", PROMPT)
    assert done.returncode == 2
    assert "KV format 'int3' is not offered" in done.stderr.decode()


def test_generate_gives_the_text_of_the_package(llm: nb.LLM, model_path: Path) -> None:
    done = run("generate", "--model", model_path, "--max-tokens", "12", PROMPT)
    assert text_of(done) == PROMPT + llm.generate(PROMPT, GREEDY)[0].text + "\n"
    assert re.search(rb"start to first token \d+ ms, then [\d.]+ tokens/s \(12 tokens\)", done.stderr)


def test_sampling_flags_do_what_they_do_in_the_package(llm: nb.LLM, model_path: Path) -> None:
    params = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 7}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in params.items()]
    everything = text_of(run("generate", "--model", model_path, "--max-tokens=24", *flags, PROMPT))
    sampling = nb.SamplingParams(max_tokens=24, **params)  # type: ignore[arg-type]
    assert everything == PROMPT + llm.generate(PROMPT, sampling)[0].text + "\n"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--top-k", "1"), ("--top-p", "0.001"), ("--min-p", "1"), ("--temperature", "0"), ("--seed", "99")],
)
def test_each_sampling_flag_changes_the_text(model_path: Path, flag: str, value: str) -> None:
    base = ["generate", "--model", model_path, "--max-tokens", "16", "--temperature", "1.5", "--seed", "3", PROMPT]
    assert text_of(run(*map(str, base))) != text_of(run(*map(str, base), flag, value))


def test_device_threads_and_context_are_honoured(model_path: Path) -> None:
    done = run("generate", "--model", model_path, "--device", "scalar", "--threads", "1", "--max-tokens", "4", PROMPT)
    assert text_of(done).startswith(PROMPT)
    assert b"backend scalar, 1 threads" in done.stderr
    short = text_of(run("generate", "--model", model_path, "--max-model-len", "8", "--max-tokens", "64", PROMPT))
    assert text_of(run("generate", "--model", model_path, "--max-tokens", "3", PROMPT)) == short


# --- chat_demo ---------------------------------------------------------------------------------------------------


def test_chat_gives_the_answers_of_the_package(llm: nb.LLM, model_path: Path) -> None:
    questions = ["What is 2 + 2? <|im_end|>", "Greet me in Japanese 😀."]
    messages: list[dict[str, str]] = []
    wanted = ""
    params = nb.SamplingParams(temperature=0, max_tokens=24)
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": llm.chat(messages, params).text})
        wanted += messages[-1]["content"] + "\n"
    again = llm.chat([{"role": "user", "content": questions[1]}], params).text + "\n"
    lines = "\n".join([*questions, "", "/clear", questions[1], "/exit", "not reached"])
    done = run("chat_demo", "--model", model_path, "--temperature", "0", "--max-tokens", "24", stdin=lines)
    assert text_of(done) == wanted + again
    assert len(re.findall(rb"\[first token \d+ ms, [\d.]+ tokens/s, \d+ tokens", done.stderr)) == 3


def test_chat_takes_a_system_message_and_keeps_it(llm: nb.LLM, model_path: Path) -> None:
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]
    wanted = llm.chat(messages, GREEDY).text + "\n"
    common = ["--model", str(model_path), "--temperature", "0", "--max-tokens", "12"]
    done = run("chat_demo", *common, "--system", "You are a pirate.", stdin="Who are you?\n/clear\nWho are you?")
    assert text_of(done) == wanted * 2
    assert text_of(run("chat_demo", *common, stdin="Who are you?")) != wanted


def test_a_full_context_is_said_and_survived(model_path: Path) -> None:
    lines = "word " * 80 + "\nHi\n/clear\nHi\n"
    done = run("chat_demo", "--model", model_path, "--max-model-len", "64", "--temperature=0", stdin=lines)
    assert len(text_of(done).splitlines()) >= 2
    assert re.search(rb"context is full: the conversation has \d+ tokens, the context 64; .*/clear", done.stderr)


def test_input_that_is_no_utf8_is_answered_in_utf8(model_path: Path) -> None:
    common = ["--model", str(model_path), "--max-tokens", "24", "--temperature", "3", "--top-p", "1", "--top-k", "0"]
    for seed in range(3):  # draws nearly at random, so that characters are cut
        assert text_of(run("chat_demo", *common, "--seed", str(seed), stdin=b"\xff\xfe\x80 ?\n"))


# --- the others --------------------------------------------------------------------------------------------------


def test_a_batch_gives_each_prompt_what_it_gets_alone(llm: nb.LLM, model_path: Path, tmp_path: Path) -> None:
    prompts = ["One, two, three,", "Hi", "é 😀 " * 40, *(f"Number {i} is" for i in range(20))]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts[1:]))
    common = ["--model", str(model_path), "--max-tokens", "12", "--max-model-len", "1024"]
    done = run("batched_infer_multi_prompts", *common, "--prompts-file", file, prompts[0])
    outputs = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert text_of(done) == "".join(f"[{i}] {prompts[i]}{out.text}\n" for i, out in enumerate(outputs))
    rows, total = table_of(done)
    for row, out in zip(rows, outputs, strict=True):
        assert row[:2] == [len(out.prompt_token_ids), 0]
        assert row[2] == len(out.token_ids)
        assert 0 <= row[3] < row[4]
    num_tokens = sum(len(out.token_ids) for out in outputs)
    assert total["requests"] == 23 and total["tokens"] == num_tokens
    assert total["steps"] < num_tokens / 4  # computed together
    assert total["preemptions"] == total["hits"] == 0


def table_of(done: subprocess.CompletedProcess[bytes]) -> tuple[list[list[float]], dict[str, float]]:
    """Rows of the table (prompt, cached, new, queue ms, TTFT ms, tokens/s), and the totals."""
    lines = done.stderr.decode().splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:2] == ["request", "prompt"])
    last = next(i for i, line in enumerate(lines) if line.startswith("total: "))
    rows = []
    for i, line in enumerate(lines[first + 1 : last]):
        words = line.split()
        assert int(words[0]) == i and words[-1] in ("stop", "length"), line
        rows.append([float(word) for word in words[1:-1]])
    found = re.fullmatch(
        r"total: (\d+) requests, (\d+) new tokens in [\d.]+ s, [\d.]+ tokens/s, (\d+) steps, "
        r"([\d.]+) answers in a step, (\d+) preemptions, (\d+) tokens from the prefix cache",
        lines[last],
    )
    assert found, lines[last]
    names = ("requests", "tokens", "steps", "occupancy", "preemptions", "hits")
    return rows, dict(zip(names, map(float, found.groups()), strict=True))


def test_a_batch_repeats_prompts_with_lengths_in_turn(llm: nb.LLM, model_path: Path) -> None:
    prompts = ["The capital of France is", "One, two, three, four, five, six, seven, eight, nine, ten,"]
    lengths = [3, 20, 9]
    common = ["--model", str(model_path), "--max-model-len", "256", "--max-num-seqs", "2"]
    done = run("batched_infer_multi_prompts", *common, "--repeat=3", "--output-lens", "3,20,9", "--verify", *prompts)
    outputs = [
        llm.generate(prompts[i % 2], nb.SamplingParams(temperature=0, max_tokens=lengths[i % 3]))[0] for i in range(6)
    ]
    assert text_of(done) == "".join(f"[{i}] {prompts[i % 2]}{out.text}\n" for i, out in enumerate(outputs))
    rows, total = table_of(done)
    assert [row[2] for row in rows] == [len(out.token_ids) for out in outputs]
    long = len(outputs[1].prompt_token_ids)
    assert [row[1] for row in rows[2:]] == [0, (long - 1) // 16 * 16] * 2  # full blocks, asked before
    assert total["hits"] == sum(row[1] for row in rows) > 0
    assert 1 < total["occupancy"] <= 2
    assert total["occupancy"] * total["steps"] >= total["tokens"] - 0.01 * total["steps"]
    assert b"verify: 6 of 6 answers are those of the prompts alone" in done.stderr


def test_a_batch_survives_preemption(model_path: Path) -> None:
    prompts = [f"Chapter {i}. Once upon a time, there was" for i in range(6)]
    block_bytes = 16 * 30 * 2 * 3 * 64 * 2  # tokens, layers, K and V, heads, dimensions, bf16
    common = ["--model", str(model_path), "--max-model-len", "64", "--max-tokens", "48", "--verify"]
    done = run("batched_infer_multi_prompts", *common, "--kv-cache-bytes", 10 * block_bytes, *prompts)
    text_of(done)
    rows, total = table_of(done)
    assert len(rows) == 6 and total["preemptions"] > 0
    assert b"verify: 6 of 6" in done.stderr


def test_verify_wants_answers_that_can_be_repeated(model_path: Path) -> None:
    common = ["batched_infer_multi_prompts", "--model", str(model_path), "--max-tokens", "8", "--verify", PROMPT]
    assert_one_line_error(common[0], run(*common, "--temperature", "1"), "--verify needs --seed")
    assert b"verify: 1 of 1" in run(*common, "--temperature", "1", "--seed", "4").stderr


def test_strategies_stand_side_by_side(llm: nb.LLM, model_path: Path) -> None:
    done = run(
        "sampling_strategies_demo", "--model", model_path, "--seed", "5", "--max-tokens", "16",
        "--temperature", "1.2", "--top-k", "20", "--top-p", "0.8", "--min-p", "0.1", PROMPT,
    )  # fmt: skip
    head, *rows = text_of(done).splitlines()
    assert head == "temperature 1.2, top-k 20, top-p 0.8, min-p 0.1, repetition penalty 1, seed 5"
    hot = {"temperature": 1.2}
    strategies = {
        "greedy": {"temperature": 0.0},
        "temperature": hot,
        "top-k": {**hot, "top_k": 20},
        "top-p": {**hot, "top_p": 0.8},
        "min-p": {**hot, "min_p": 0.1},
        "combined": {**hot, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    }
    assert len(rows) == len(strategies)
    for row, (name, params) in zip(rows, strategies.items(), strict=True):
        sampling = nb.SamplingParams(max_tokens=16, seed=5, **params)  # type: ignore[arg-type]
        assert row == f"{name:<12} " + llm.generate(PROMPT, sampling)[0].text.replace("\n", " ")
    assert len({row[12:] for row in rows}) >= 3


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--model is missing"),
        (["--model"], '"--model" needs a value'),
        (["--model", "M", "--bogus", "1"], 'unknown option "--bogus"'),
        (["--model", "M", "-t", "1"], 'unknown option "-t"'),
        (["--model", "M", "--top-k", "many"], '--top-k must be a number .*"many"'),
        (["--model", "M", "--top-k=1.5"], '--top-k must be .*"1.5"'),
        (["--model", "M", "--top-p", "0"], "--top-p must be"),
        (["--model", "M", "--min-p", "1.1"], "--min-p must be"),
        (["--model", "M", "--temperature", "nan"], '--temperature must be .*"nan"'),
        (["--model", "M", "--temperature", "inf"], '--temperature must be .*"inf"'),
        (["--model", "M", "--repetition-penalty", "-1"], "--repetition-penalty must be"),
        (["--model", "M", "--seed", "-1"], "--seed must be"),
        (["--model", "M", "--threads", "-1"], "--threads must be"),
        (["--model", "M", "--max-tokens", "0"], "--max-tokens must be"),
        (["--model", "M", "--max-tokens", "99999999999"], "--max-tokens must be"),
        (["--model", "M", "--max-tokens", ""], '--max-tokens must be .*""'),
    ],
)
def test_wrong_options_are_one_line(name: str, arguments: list[str], says: str) -> None:
    assert_one_line_error(name, run(name, *arguments), says)


def assert_one_line_error(name: str, done: subprocess.CompletedProcess[bytes], says: str) -> None:
    assert done.returncode == 2, done
    lines = done.stderr.decode().removeprefix("> ").splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: error: ")
    assert re.search(says, lines[0]), lines[0]
    assert done.stdout == b""


def test_the_prefix_cache_saves_what_it_says(tmp_path: Path) -> None:
    config = config_of("llama", max_position_embeddings=2048)  # its prompts are long, and what weights say is no matter
    folder = write_folder(tmp_path / "small", config, tensors_of(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    model = tmp_path / "small.braid"
    export_model(folder, model, "keep")
    text = text_of(run("prefix_caching_benchmark", "--model", model, "--max-tokens", 4, "--max-model-len", 1200))
    rows = [line for line in text.splitlines()[1:] if line]
    reused = {}
    for line in rows:
        name, turn, prompt, _, _, _, share = re.match(
            r"(.+?) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)%$", line
        ).groups()  # type: ignore[union-attr]
        reused[name, int(turn)] = float(share) * int(prompt) / 100
    assert reused["same prompt", 2] == pytest.approx(992, abs=1)  # all full blocks but the last token's
    assert reused["shared system prompt", 4] == pytest.approx(992, abs=1)
    assert reused["disjoint", 3] == 0
    for turn in range(2, 9):
        assert reused["conversation", turn] == pytest.approx((72 * (turn - 1) - 1) // 16 * 16, abs=1)


def test_composed_prompts_say_where_their_tokens_came_from(model_path: Path) -> None:
    texts = ["The red room is locked.", "The blue room is open on Mondays.", "The red room is"]
    done = run("compose_chunks", "--model", model_path, "--max-tokens", 4, *texts)
    assert len(text_of(done).splitlines()) >= 6
    rows = [
        line.split() for line in done.stderr.decode().splitlines() if re.search("(isolated|blend|exact) +[0-9]", line)
    ]
    lengths = {sum(map(int, row[-4:])) for row in rows}
    assert len(rows) == 6
    assert len(lengths) == 1  # every token of every prompt is accounted for
    assert [row[-6] for row in rows] == ["isolated", "blend", "exact"] * 2
    assert all((int(row[-3]) > 0) == (row[-6] != "exact") for row in rows)
    assert all((int(row[-2]) > 0) == (row[-6] == "blend") for row in rows)


@pytest.mark.parametrize("name", DEMOS)
def test_wrong_files_devices_and_arguments(name: str, model_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    model = ["--model", str(model_path)]
    no_prompt = ("chat_demo", "prefix_caching_benchmark")
    prompt = [] if name in no_prompt else ["x", "y"] if name == "compose_chunks" else ["x"]
    assert_one_line_error(name, run(name, "--model", broken, *prompt), "broken.gguf")
    assert_one_line_error(name, run(name, "--model", tmp_path / "nowhere.gguf", *prompt), "nowhere.gguf")
    assert_one_line_error(name, run(name, *model, "--device", "abacus", *prompt), "abacus")
    if name in no_prompt:
        assert_one_line_error(name, run(name, *model, "x"), 'unexpected argument "x"')
    elif name == "batched_infer_multi_prompts":
        assert_one_line_error(name, run(name, *model), "no prompts")
    elif name == "compose_chunks":
        assert_one_line_error(name, run(name, *model, "x"), "at least one document and a question are wanted, got 1")
    else:
        assert_one_line_error(name, run(name, *model), "one prompt is wanted, got 0")
        assert_one_line_error(name, run(name, *model, "a", "b"), "one prompt is wanted, got 2")
    if name == "batched_infer_multi_prompts":
        assert_one_line_error(name, run(name, *model, "--prompts-file", tmp_path / "none"), "cannot open .*none")
        assert_one_line_error(name, run(name, *model, "--prompts-file", tmp_path), "prompts|read")
        assert_one_line_error(name, run(name, *model, "ok", ""), "prompt is empty")
        assert_one_line_error(name, run(name, *model, "--repeat", "0", "ok"), "--repeat must be")
        assert_one_line_error(name, run(name, *model, "--output-lens", "4,,5", "ok"), '--output-lens must be .*""')
        assert_one_line_error(name, run(name, *model, "--output-lens", "4,0", "ok"), '--output-lens must be .*"0"')
        assert_one_line_error(name, run(name, *model, "--max-num-seqs", "0", "ok"), "--max-num-seqs must be")
        assert_one_line_error(name, run(name, *model, "--kv-cache-bytes", "x", "ok"), "--kv-cache-bytes must be")
        assert_one_line_error(name, run(name, *model, "--verify=1", "ok"), '"--verify" takes no value')
    else:
        for flag in ("--prompts-file", "--repeat", "--verify"):
            assert_one_line_error(name, run(name, *model, flag, "1"), "unknown option")


@pytest.mark.parametrize("name", DEMOS)
def test_help_lists_the_options(name: str) -> None:
    text = text_of(run(name, "--help"))
    assert text.startswith(f"usage: {name} --model FILE")
    for flag in ("device", "threads", "max-tokens", "temperature", "top-k", "top-p", "min-p", "repetition-penalty"):
        assert f"  --{flag} " in text


# --- chat formats against jinja2 ---------------------------------------------------------------------------------

Conversation = list[dict[str, str]]

# Written after the formats that Meta documents for these models.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = none %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not in turn') }}{% endif %}"
    "{% if loop.first and system is not none %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou\\'re \"helpful\".<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BARE = QWEN2.replace("loop.first", "false and loop.first").replace("<|im_start|>system\\n", "<|im_start|>' + 'x")
TOKENS = {
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
SPACES = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())
PARTS = [
    "Hello", " ", "\n", "\t", "  \n", "é", "日本語", "😀", "\u200b", "\x1c", "\x85", "\xa0", "\u3000", "\x00", "'", '"',
    "{{ x }}", "<|im_end|>", "<|im_start|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<|eot_id|>", "\\n",
    "<|start_header_id|>",
]  # fmt: skip


def conversations(alternate: bool) -> list[tuple[Conversation, bool]]:
    """Many, the same each time; every white space character of Python and its neighbours at both ends of a content."""
    draw = random.Random(1)
    many: list[tuple[Conversation, bool]] = []
    for _ in range(600):
        messages = [{"role": "system", "content": "".join(draw.choices(PARTS, k=3))}] if draw.random() < 0.4 else []
        for turn in range(draw.randint(1, 6)):
            role = ("user", "assistant")[turn % 2] if alternate else draw.choice(["system", "user", "assistant"])
            messages.append({"role": role, "content": "".join(draw.choices(PARTS, k=draw.randint(0, 6)))})
        many.append((messages, draw.random() < 0.5))
    near = {c for space in SPACES for c in (chr(ord(space) - 1), space, chr(ord(space) + 1))}
    many += [([{"role": "user", "content": f"{c}a{c}b{c}"}], True) for c in sorted(near)]
    return many


def pipe(
    template: str, cases: list[tuple[Conversation, bool]], model: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    fields = [template]
    for messages, generate in cases:
        fields += [str(int(generate)), str(len(messages))]
        fields += [text for message in messages for text in (message["role"], message["content"])]
    coded = b"".join(b"%d:%b" % (len(field.encode()), field.encode()) for field in fields)
    assert BUILD
    program = Path(BUILD) / "chat_render_pipe"
    command = [program] if model is None else [program, model]
    return subprocess.run(command, input=coded, capture_output=True, timeout=120, check=False)


def rendered(template: str, cases: list[tuple[Conversation, bool]], model: Path | None = None) -> list[str]:
    done = pipe(template, cases, model)
    assert done.returncode == 0, done.stderr.decode()
    texts, rest = [], done.stdout
    while rest:
        length, _, rest = rest.partition(b":")
        texts.append(rest[: int(length)].decode())
        rest = rest[int(length) :]
    return texts


def compare(template: str, tokens: dict[str, str], cases: list[tuple[Conversation, bool]]) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    texts = rendered(template, cases)
    assert len(texts) == len(cases)
    for text, (messages, generate) in zip(texts, cases, strict=True):
        wanted = compiled.render(messages=messages, add_generation_prompt=generate, **tokens)
        assert text[0] == "+", (text, messages)
        assert text[1:].replace("\1", "").replace("\2", "") == wanted, messages
        contents = "".join(message["content"] for message in messages)
        for mark in ("<|im_end|>", "<|eot_id|>", "</s>"):  # what users spell is text, what the format spells is control
            assert text.count(f"\1{mark}\2") == wanted.count(mark) - contents.count(mark)


@pytest.mark.parametrize("scheme", ["prepend", "none", "first", "always"])
def test_chats_of_sentencepiece_models_have_the_tokens_of_tokenizers(scheme: str, tmp_path: Path) -> None:
    """Natively and by the template engine: where SentencePiece's space goes depends on what is in front of a text."""
    pytest.importorskip("tokenizers", reason="the `tokenizers` package, the oracle, is not installed")
    from test_tokenizer_hf import save, sentencepiece_like

    from nanobraid._gguf_bytes import gguf_bytes
    from nanobraid.export.hf_tokenizer import read_hf_tokenizer

    oracle = sentencepiece_like(scheme)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}
    folder = save(tmp_path / "model", oracle, tokenizer_config=config)
    model = tmp_path / "vocabulary.gguf"
    model.write_bytes(gguf_bytes(read_hf_tokenizer(folder)))
    tokenizer = nb.Tokenizer(model)
    template = nb.ChatTemplate.of(tokenizer)
    cases = conversations(alternate=True)
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(LLAMA2)
    compared = 0
    for text, (messages, generate) in zip(rendered(LLAMA2, cases, model), cases, strict=True):
        assert text[0] == "+", text
        ids = [int(i) for i in text[1:].split()]
        assert template.encode(messages, tokenizer, add_generation_prompt=generate) == ids
        contents = "".join(message["content"] for message in messages)
        if not any(mark in contents for mark in ("<s>", "</s>", "<|im_end|>")):  # these the oracle takes for control
            wanted = compiled.render(messages=messages, add_generation_prompt=generate, **TOKENS["llama2"])
            assert ids == oracle.encode(wanted, add_special_tokens=False).ids, messages
            compared += 1
    assert compared > 150


def test_chatml_of_the_default_model_renders_alike(model_path: Path) -> None:
    template = nb.Tokenizer(model_path).chat_template
    assert template and "SmolLM" in template
    cases = conversations(alternate=False)
    compare(template, {}, cases)
    assert "SmolLM" in rendered(template, [([{"role": "user", "content": "x"}], True)])[0]


@pytest.mark.parametrize("template", [QWEN2, BARE], ids=["default system", "no default"])
def test_chatml_renders_alike(template: str) -> None:
    compare(template, {}, conversations(alternate=False))


def test_llama2_renders_alike() -> None:
    compare(LLAMA2, TOKENS["llama2"], conversations(alternate=True))


def test_llama3_renders_alike() -> None:
    compare(LLAMA3, TOKENS["llama3"], conversations(alternate=False))


def test_llama2_refuses_what_its_template_refuses() -> None:
    cases = conversations(alternate=False)[:200]
    raised = 0

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    compiled = ImmutableSandboxedEnvironment().from_string(LLAMA2, {"raise_exception": raise_exception})
    for text, (messages, _) in zip(rendered(LLAMA2, cases), cases, strict=True):
        try:
            compiled.render(messages=messages, **TOKENS["llama2"])
            # The template drops a system message that stands alone and knows any second role as an assistant.
            refused = messages == messages[:1] and messages[0]["role"] == "system"
            refused = refused or any(m["role"] == "system" for m in messages[1:])
        except jinja2.TemplateError:
            refused = True
        assert (text[0] == "-") == refused, (text, messages)
        raised += refused
    assert 0 < raised < len(cases)


def test_other_templates_are_refused_by_name() -> None:
    mistral = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"
    for template, says in (
        ("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "<|user|>"),
        (mistral, "<<SYS>>"),
        (LLAMA3 + "Cutting Knowledge Date", "Llama 3.1"),
        (QWEN2 + "{{ '</think>' }}", "thinking"),
    ):
        done = pipe(template, [])
        assert done.returncode == 2
        assert says in done.stderr.decode()
