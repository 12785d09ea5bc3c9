"""OpenVINO GenAI as a side of bench_cpu_peers.py: a program that its own Python runs, one JSON object a line.

    OPENVINO_PYTHON eval/openvino_side.py MODEL.gguf THREADS

Prints {"version", "open_s"} once the model is open, then answers each request {"pp", "tg", "seed"} on its input with
{"prefill", "decode"} in tokens/s: its own time to the first token of a random prompt, and its own mean time of a
token behind a prompt of one. Imports nothing of nanobraid: the two live in separate environments.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

VOCABULARY = 32000  # ids are drawn below it: every model measured has as many


def answer(pipeline: Any, prompt: list[int], new_tokens: int) -> Any:
    ids = np.array([prompt], dtype=np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    metrics = pipeline.generate(inputs, config).perf_metrics
    if metrics.get_num_generated_tokens() != new_tokens:
        raise SystemExit(f"asked for {new_tokens} tokens, got {metrics.get_num_generated_tokens()}")
    return metrics


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    begin = time.perf_counter()
    pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    opened = {"version": genai.__version__, "open_s": time.perf_counter() - begin}
    answer(pipeline, [1, 2, 3], 2)
    print(json.dumps(opened), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        draw = random.Random(request["seed"])
        result: dict[str, float] = {}
        if request["pp"]:
            prompt = [draw.randrange(VOCABULARY) for _ in range(request["pp"])]
            result["prefill"] = 1e3 * request["pp"] / answer(pipeline, prompt, 1).get_ttft().mean
        if request["tg"]:
            metrics = answer(pipeline, [draw.randrange(VOCABULARY)], request["tg"])
            result["decode"] = 1e3 / metrics.get_tpot().mean
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
