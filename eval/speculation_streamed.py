"""A large target that is read from disk in every step, with a small draft model and without: what guesses gain there.

    python eval/speculation_streamed.py [--layers 150] [--share 0.5] [--rounds 3] [--folder DIR] [--json]

Synthetic: the target is the default model in bf16, deepened to at least 1 GB by layers that do almost nothing (copies
whose outputs are scaled by --epsilon), so that the default model as it is guesses it well; a real pair of models
agrees less. The second draft model is the default model with noise in its weights, as much as leaves about 40 % of its
guesses right. All sides answer the same prompts greedily, one at a time, in turn; the texts must be equal, or the
script exits with 1. `bound` is the gain if guessing took no time and verifying no more than a step of one token: the
tokens of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

import nanobraid as nb
from machine import load_average
from nanobraid import models
from nanobraid.bench_kv.machine import cpu_name

PROMPTS = (
    "The history of the town begins with",
    "Photosynthesis is the process by which",
    "Once upon a time there was a miller who",
    "To bake a simple loaf of bread you need",
)
PREFIX = "blk."


def metadata(reader: GGUFReader, writer: GGUFWriter, num_layers: int) -> None:
    """Copies what the file says of itself, with another number of layers."""
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        value = num_layers if field.name.endswith(".block_count") else field.contents()
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=inner)


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    stored: NDArray[np.uint8] = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
    return stored


def write(source: Path, path: Path, num_layers: int, epsilon: float, noise: float) -> None:
    """Writes the model in bf16: deepened by layers of little effect, its matrices with relative noise."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    own = int(reader.fields[f"{architecture}.block_count"].contents())
    writer = GGUFWriter(path, architecture)
    metadata(reader, writer, num_layers)
    random = np.random.default_rng(1)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}

    def add(name: str, values: NDArray[np.float32]) -> None:
        if values.ndim == 1:
            writer.add_tensor(name, values)
            return
        if noise > 0:
            values = values + noise * values.std() * random.standard_normal(values.shape, np.float32)
        writer.add_tensor(name, bf16(values), raw_dtype=gguf.GGMLQuantizationType.BF16)

    for name, values in tensors.items():
        add(name, values)
    for layer in range(own, num_layers):
        of = f"{PREFIX}{layer % own}."
        for name, values in tensors.items():
            if not name.startswith(of):
                continue
            part = name[len(of) :]
            scale = epsilon if part in ("attn_output.weight", "ffn_down.weight") else 1.0
            add(f"{PREFIX}{layer}.{part}", np.float32(scale) * values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def params(tokens: int) -> nb.SamplingParams:
    return nb.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def acceptance(source: Path, draft: Path, tokens: int) -> float:
    """Share of the guesses of one draft model for the default model that are right."""
    config = nb.SpeculativeConfig(method="draft", draft_model=draft, adaptive=False)
    with nb.LLM(source, max_model_len=256, speculative_config=config) as llm:
        llm.generate(list(PROMPTS), params(tokens))
        share: float = llm.stats()["draft_acceptance"]
    return share


def damaged(source: Path, path: Path, wanted: float, tokens: int) -> tuple[float, float]:
    """Writes the draft model whose share of right guesses is about `wanted`; returns its noise and share."""
    reader = GGUFReader(source)
    layers = int(reader.fields[f"{reader.fields['general.architecture'].contents()}.block_count"].contents())
    low, high = 0.0, 0.6
    noise, share = 0.0, 1.0
    for _ in range(7):
        noise = (low + high) / 2
        write(source, path, layers, 1.0, noise)
        share = acceptance(source, path, tokens)
        if abs(share - wanted) < 0.02:
            break
        low, high = (noise, high) if share > wanted else (low, noise)
    return noise, share


def timed(llm: nb.LLM, tokens: int) -> tuple[float, list[list[int]], dict[str, float]]:
    """Tokens per second after the first of each answer, the answers, and what of stats() they changed."""
    before = llm.stats()
    outputs = [llm.generate(prompt, params(tokens))[0] for prompt in PROMPTS]
    after = llm.stats()
    seconds = sum((output.metrics.total_ms - output.metrics.ttft_ms) / 1e3 for output in outputs if output.metrics)
    keys = (
        "draft_tokens",
        "accepted_draft_tokens",
        "steps",
        "draft_model_seconds",
        "streamed_bytes",
        "forward_seconds",
    )
    return (
        len(PROMPTS) * (tokens - 1) / seconds,
        [list(output.token_ids) for output in outputs],
        {key: after[key] - before[key] for key in keys},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=150)
    parser.add_argument("--epsilon", type=float, default=0.001)
    parser.add_argument("--share", type=float, default=0.5, help="budget, of the bytes of all weights of the target")
    parser.add_argument("--num-draft-tokens", type=int, default=8)
    parser.add_argument("--acceptance", type=float, default=0.4, help="of the damaged draft model")
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models and layers are written (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source = models.ensure("smollm2-135m")
    load = load_average()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        target, bad = Path(scratch) / "deep.gguf", Path(scratch) / "noisy.gguf"
        noise, share = damaged(source, bad, args.acceptance, 2 * args.tokens)
        write(source, target, args.layers, args.epsilon, 0.0)
        budget = int(args.share * target.stat().st_size)
        streaming = nb.StreamingConfig(budget_bytes=budget, cache_dir=str(Path(scratch) / "layers"))

        def load_target(draft: Path | None) -> nb.LLM:
            config = None
            if draft is not None:
                config = nb.SpeculativeConfig(method="draft", draft_model=draft, num_draft_tokens=args.num_draft_tokens)
            return nb.LLM(
                target,
                max_model_len=256,
                kv_cache_bytes=256 << 20,
                streaming_config=streaming,
                speculative_config=config,
            )

        sides = {"plain": None, "draft": source, "noisy draft": bad}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        ratios: dict[str, list[float]] = {name: [] for name in sides}
        counts: dict[str, dict[str, float]] = {name: {} for name in sides}
        texts: list[list[list[int]]] = []
        for _ in range(args.rounds):
            for name, draft in sides.items():  # one at a time, so that the budget is that of one
                with load_target(draft) as llm:
                    timed(llm, 9)
                    rate, answers, counted = timed(llm, args.tokens)
                rates[name].append(rate)
                ratios[name].append(rate / rates["plain"][-1])
                texts.append(answers)
                counts[name] = {key: counts[name].get(key, 0) + value for key, value in counted.items()}
        same = all(text == texts[0] for text in texts)
        num_answers = args.rounds * len(PROMPTS)  # each with a step for its prompt
        rows: list[dict[str, Any]] = []
        for name in sides:
            count = counts[name]
            rows.append(
                {
                    "side": name,
                    "tokens_per_s": statistics.median(rates[name]),
                    "ratio": statistics.median(ratios[name]),
                    "acceptance": count["accepted_draft_tokens"] / max(count["draft_tokens"], 1),
                    "bound": num_answers * (args.tokens - 1) / (count["steps"] - num_answers),
                    "draft_model_share": count["draft_model_seconds"]
                    / (count["draft_model_seconds"] + count["forward_seconds"]),
                    "streamed_gb_per_step": count["streamed_bytes"] / count["steps"] / 1e9,
                }
            )
        report = {
            "synthetic": "default model, deepened by layers that do almost nothing",
            "cpu": cpu_name(),
            "layers": args.layers,
            "target_bytes": target.stat().st_size,
            "budget_bytes": budget,
            "num_draft_tokens": args.num_draft_tokens,
            "noise": noise,
            "acceptance_of_noisy_draft_by_default_model": share,
            "same_texts": same,
            "load_average": [load, load_average()],
            "rows": rows,
        }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"target {report['target_bytes'] / 1e9:.2f} GB (synthetic), {budget / 1e9:.2f} GB in memory")
        for row in rows:
            print(
                f"{row['side']:12} {row['tokens_per_s']:6.2f} tokens/s  {row['ratio']:.2f} x  "
                f"acceptance {row['acceptance']:.2f}  bound {row['bound']:.2f} x  "
                f"draft model {100 * row['draft_model_share']:.0f} % of the time"
            )
        if not same:
            print("the texts differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
