"""lm-evaluation-harness over /v1/completions with a remote tokenizer; log-likelihoods are those of `LLM.score`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "unused"}

import lm_eval
from checks import MODEL, main, url, with_nanobraid
from lm_eval.tasks import TaskManager

HERE = Path(__file__).parent / "capitals"


def evaluate(**options: object) -> tuple[float, list[tuple[str, str, float]]]:
    """The accuracy, and context, continuation and log-likelihood of every choice."""
    with tempfile.TemporaryDirectory() as folder:
        task = (HERE / "capitals.yaml").read_text().replace("FOLDER", str(HERE))
        (Path(folder) / "capitals.yaml").write_text(task)
        os.environ["HF_DATASETS_CACHE"] = folder
        result = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{url()}/v1/completions",
                "tokenizer_backend": "remote",
                "max_retries": 1,
                **options,
            },
            tasks=["capitals"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    rows = []
    for sample in result["samples"]["capitals"]:
        arguments = sample["arguments"]
        pairs = arguments.values() if isinstance(arguments, dict) else arguments
        for pair, answer in zip(pairs, sample["resps"], strict=True):
            context, continuation = pair.values() if isinstance(pair, dict) else pair
            rows.append((context, continuation, float(answer[0][0])))
    return result["results"]["capitals"]["acc,none"], rows


def check_loglikelihoods() -> None:
    seen = []
    for options in ({"tokenized_requests": True, "batch_size": 4}, {"tokenized_requests": False, "batch_size": 1}):
        accuracy, rows = evaluate(**options)
        assert len(rows) == 40, len(rows)
        assert accuracy > 0.6, accuracy
        pairs = [[context, continuation] for context, continuation, _ in rows]
        command, environment = with_nanobraid(str(HERE / "score.py"), MODEL)
        process = subprocess.run(
            command,
            env=environment,
            input=json.dumps(pairs),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        expected = json.loads(process.stdout)
        furthest = max(abs(row[2] - score) for row, score in zip(rows, expected, strict=True))
        assert furthest <= 1e-3, furthest
        seen.append([row[2] for row in rows])
    assert max(abs(a - b) for a, b in zip(*seen, strict=True)) <= 1e-3


if __name__ == "__main__":
    sys.exit(main("lm_eval", globals()))
