"""Quantized checkpoints: size, time to take one over, and quality, of one model in the formats of AWQ, GPTQ and FP8.

    python eval/checkpoint_quality.py                               # the default model
    python eval/checkpoint_quality.py --source other.gguf --schemes awq-g64 fp8-channel --json report.json

The float32 weights of SRC are rounded to nearest and written as a Hugging Face folder of each scheme, by the writers of
the tests (`tests/python/quantized_hf.py`): no scheme's own search for better codes is run, so the figures say what
the formats hold and cost here, not how good a quantizer is. Each folder is exported with `keep`. Two divergences:
KL(float32 of the same codes || file), which is what the engine loses, must stay below 1e-3 with float activations, of
32 bits and of 16; and KL(float32 model || file), which is the price of rounding. The values of all matrices of the file
are compared with numpy's, bit for bit. Columns of 4-bit schemes must fill groups: a model whose rows are no multiple of
a group's size is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export_quality import add_text_options, export, logits_of, quality, windows_of
from nanobraid import models
from nanobraid._core import ModelFile

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "python"))

from quantized_hf import Scheme, quantized
from tiny_hf import ARCHITECTURES, write_folder

SCHEMES = {
    "awq-g32": Scheme("awq", 32),
    "awq-g64": Scheme("awq", 64),
    "awq-g128": Scheme("awq", 128),
    "gptq-g64": Scheme("gptq", 64),
    "gptq-g64-sym": Scheme("gptq", 64, sym=True),
    "gptq-g64-act-order": Scheme("gptq", 64, act_order="shared"),
    "gptq-g128": Scheme("gptq", 128),
    "fp8-tensor": Scheme("compressed-tensors"),
    "fp8-channel": Scheme("compressed-tensors", per_channel=True),
}
# The folders have no files of a tokenizer: the process that exports them takes the source's.
TOKENIZER = """
from nanobraid._core import ModelFile
from nanobraid.export import hf_folder
facts = {{key: value for key, value in ModelFile({source!r}).metadata().items() if key.startswith("tokenizer.")}}
hf_folder._tokenizer = lambda _: facts
"""
MOST_KL = 1e-3  # with float activations, to the same codes in float32

_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
          "output.weight": "lm_head.weight"}  # fmt: skip


def stored_name(name: str) -> str:
    """The name in a Hugging Face folder."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, what, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER[what]}.{kind}"


def hf_model(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of a `.braid` file of plain facts (rotation without scaling, no window)."""
    file = ModelFile(str(path))
    facts = file.metadata()
    family = facts["general.architecture"]
    if unknown := [key for key in facts if key.startswith(f"{family}.rope.scaling") or "sliding_window" in key]:
        sys.exit(f"{path}: {unknown[0]} is not written into a configuration here")

    def fact(key: str, missing: Any = None) -> Any:
        return facts.get(f"{family}.{key}", missing)

    tensors: dict[str, Any] = {}
    for name, _, shape, _ in file.tensors():
        tensors[stored_name(name)] = file.read_rows(name).reshape(shape)
    hidden, heads = fact("embedding_length"), fact("attention.head_count")
    return {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_size": hidden,
        "intermediate_size": fact("feed_forward_length"), "num_hidden_layers": fact("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": fact("attention.head_count_kv", heads),
        "head_dim": fact("attention.key_length", hidden // heads), "hidden_act": "silu",
        "max_position_embeddings": fact("context_length"), "rope_theta": fact("rope.freq_base"),
        "rms_norm_eps": fact("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
    }, tensors  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser, tokens=1536)
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=["awq-g64", "gptq-g64-act-order", "fp8-channel"]
    )
    args = parser.parse_args()
    source = args.source or models.pull(models.DEFAULT_MODEL)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.braid"
        export(source, path, "f32")
        windows = windows_of(path, args.text, args.context, args.tokens)
        reference = logits_of(path, windows)
        config, tensors = hf_model(path)
        path.unlink()
        for name in args.schemes:
            rows.append(measure(Path(folder), name, source, (config, tensors), windows, reference))
            print_row(rows[-1])
    report = {"source": source.name, "text": args.text.name, "windows": len(windows), "context": args.context}
    if args.json:
        args.json.write_text(json.dumps({**report, "checkpoints": rows}, indent=1) + "\n")
    failed = [row["name"] for row in rows if max(row["kl_to_same_codes"], row["kl_to_same_codes_bf16"]) > MOST_KL]
    if failed:
        print(f"more than {MOST_KL} from the same codes in float32: {', '.join(failed)}", file=sys.stderr)
    changed = [row["name"] for row in rows if row["bit_equal_matrices"] != row["matrices"]]
    if changed:
        print(f"not the values that numpy makes of the codes: {', '.join(changed)}", file=sys.stderr)
    return 1 if failed or changed else 0


def measure(  # noqa: PLR0917 - the parts of one call
    folder: Path,
    name: str,
    source: Path,
    model: tuple[dict[str, Any], dict[str, Any]],
    windows: list[list[int]],
    reference: list[Any],
) -> dict[str, Any]:
    before = TOKENIZER.format(source=str(source))
    config, stored, plain = quantized(*model, SCHEMES[name])
    write_folder(folder / "checkpoint", config, stored)
    del stored
    report = export(folder / "checkpoint", folder / "kept.braid", "keep", before)
    equal = bit_equal(ModelFile(str(folder / "kept.braid")), plain)
    write_folder(folder / "plain", {**config, "quantization_config": None}, plain)
    del plain
    export(folder / "plain", folder / "plain.braid", "f32", before)
    same_codes = logits_of(folder / "plain.braid", windows)
    checkpoint_bytes = sum(file.stat().st_size for file in (folder / "checkpoint").iterdir())
    row = {
        "name": name,
        "checkpoint_bytes": checkpoint_bytes,
        **report,
        "matrices": len(equal),
        "bit_equal_matrices": sum(equal),
        "kl_to_same_codes": quality(folder / "kept.braid", windows, same_codes)["kl"],
        "kl_to_same_codes_bf16": quality(folder / "kept.braid", windows, same_codes, "bf16")["kl"],
        **quality(folder / "kept.braid", windows, reference),
    }
    for file in folder.glob("*.braid"):
        file.unlink()
    return row


def bit_equal(file: ModelFile, plain: dict[str, Any]) -> list[bool]:
    """Of each matrix of a file, whether its values are those that numpy made of the codes."""
    return [
        bool(np.array_equal(file.read_rows(name).view(np.uint32), plain[stored_name(name)].view(np.uint32)))
        for name, _, shape, _ in file.tensors()
        if len(shape) == 2
    ]


def print_row(row: dict[str, Any]) -> None:
    print(
        f"| {row['name']} | {row['checkpoint_bytes'] / 1e6:.0f} MB | {row['file_bytes'] / 1e6:.0f} MB | "
        f"{row['bits_per_weight']:.2f} | {row['seconds']:.1f} s | {row['peak_rss_bytes'] / 2**20:.0f} MiB | "
        f"{row['bit_equal_matrices']} of {row['matrices']} | {row['kl_to_same_codes']:.1e} | "
        f"{row['kl_to_same_codes_bf16']:.1e} | {row['kl']:.4f} | {row['perplexity']:.2f} | "
        f"{100 * np.float64(row['same_greedy']):.1f} % |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
