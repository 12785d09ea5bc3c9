"""vllm-router in front of two workers of one thread each: prompts that begin alike go to one worker; one is killed."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import openai
from checks import MODEL, main, with_nanobraid

TOPICS = ("the sea and its tides", "the bridges of an old town", "how bread is baked", "the flight of wild geese")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def healthy(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def process(
    log: IO[bytes], command: list[str], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_for(base: str, log: IO[bytes]) -> None:
    end = time.monotonic() + 90
    while not healthy(base):
        if time.monotonic() > end:
            log.seek(0)
            raise AssertionError(f"{base} is not ready:\n{log.read()[-2000:].decode(errors='replace')}")
        time.sleep(0.1)


@contextlib.contextmanager
def pool() -> Iterator[tuple[openai.OpenAI, list[str], list[subprocess.Popen[bytes]]]]:
    """A client of the router that never tries twice, the workers' addresses and their processes."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        ports = [free_port() for _ in range(3)]
        workers = [f"http://127.0.0.1:{port}" for port in ports[:2]]
        serve, environment = with_nanobraid("-m", "nanobraid", "serve", MODEL, "--num-threads", "1", "--no-access-log")
        processes = [
            stack.enter_context(process(log, [*serve, "--port", str(port)], environment)) for port in ports[:2]
        ]
        for worker in workers:
            wait_for(worker, log)
        command = [str(Path(sys.executable).with_name("vllm-router")), "--host", "127.0.0.1", "--port", str(ports[2])]
        command += ["--worker-urls", *workers, "--policy", "cache_aware"]
        command += ["--health-check-interval-secs", "1", "--prometheus-port", str(free_port())]
        command += ["--balance-abs-threshold", "2", "--balance-rel-threshold", "1.1"]
        stack.enter_context(process(log, command))
        base = f"http://127.0.0.1:{ports[2]}"
        wait_for(base, log)
        yield openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0, timeout=60), workers, processes


def prompt_tokens(worker: str) -> int:
    """Tokens of all prompts that a worker has had, by its metrics."""
    with urllib.request.urlopen(f"{worker}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(r"^vllm:prompt_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.MULTILINE)
    assert found, text[:2000]
    return int(float(found[1]))


def ask(client: openai.OpenAI, topic: str, number: int) -> Any:
    system = f"You answer questions on {topic}. " * 30
    messages: Any = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question {number}: what is this about?"},
    ]
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)


def check_prefixes_and_failure() -> None:
    with pool() as (client, workers, processes):
        # Each topic twice at a time, so that the router has a load to balance.
        cached: list[int] = []
        sent: list[int] = []

        def talk(topic: str) -> None:
            for number in range(5):
                usage = ask(client, topic, number).usage
                sent.append(usage.prompt_tokens)
                cached.append(usage.prompt_tokens_details.cached_tokens if number else -1)

        threads = [threading.Thread(target=talk, args=(topic,)) for topic in TOPICS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(sent) == 20
        later = [count for count in cached if count >= 0]
        hits = [count for count in later if count >= 0.7 * min(sent)]
        assert len(hits) >= 0.8 * len(later), (cached, sent)  # by chance alone it is about half
        both = [prompt_tokens(worker) for worker in workers]
        assert sum(both) >= sum(sent)

        # The worker that does most is killed while requests run.
        answers: list[float] = []
        errors: list[float] = []
        killed = [0.0]
        in_flight = [0]
        lock = threading.Lock()

        def go_on(topic: str) -> None:
            for number in range(5, 15):
                begin = time.monotonic()
                with lock:
                    in_flight[0] += 1
                try:
                    ask(client, topic, number)
                    answers.append(begin)
                except openai.APIError:
                    errors.append(begin)
                finally:
                    with lock:
                        in_flight[0] -= 1

        threads = [threading.Thread(target=go_on, args=(topic,)) for topic in TOPICS]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        with lock:
            lost_at_most = in_flight[0]
        killed[0] = time.monotonic()
        processes[both.index(max(both))].send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert len(answers) + len(errors) == 40
        assert len(errors) <= lost_at_most, (len(errors), lost_at_most)
        assert answers
        assert max(answers) > killed[0]
        late = [begin for begin in errors if begin > killed[0] + 3.0]
        assert not late, [begin - killed[0] for begin in late]
        print(
            f"prefix hits {len(hits)} of {len(later)}; prompt tokens by worker {both}; "
            f"worker killed with {lost_at_most} in flight: {len(answers)} answers, {len(errors)} errors",
        )


if __name__ == "__main__":
    sys.exit(main("vllm-router", globals()))
