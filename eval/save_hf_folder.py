"""Saves a GGUF model as a Hugging Face folder in float32, for exports from the form that most models come in.

    python eval/save_hf_folder.py FOLDER                  # the default model
    python eval/save_hf_folder.py FOLDER --model other.gguf

transformers dequantizes the file; its weights go into a fresh model without the mark of a quantized one, since it
refuses to save the other. Needs torch, transformers, accelerate and gguf (the extra `eval`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from oracle import Oracle, source_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file or a known name")
    parser.add_argument("--shard-size", default="5GB", help="largest file, as save_pretrained takes it")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = source_of(args.model)
    loaded = Oracle(path).model
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(args.folder, max_shard_size=args.shard_size)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(args.folder)
    print(f"{args.folder}: {sum(file.stat().st_size for file in args.folder.iterdir()) / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
