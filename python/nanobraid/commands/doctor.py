"""Show what this installation and this machine can do."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

from nanobraid import __version__, _core, models
from nanobraid._kv_selftest import known_results, result_line
from nanobraid._options import fusion_lines
from nanobraid.commands._terminal import printable, table
from nanobraid.errors import NanobraidError, core_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print(table([(key.replace("_", " "), _text(value)) for key, value in facts.items()]))
    return 0


def _facts() -> dict[str, Any]:
    with core_errors():
        memory = _core.memory_status()
        backends = _core.available_backends()
        build = _core.build_info()
        cuda = _core.cuda_status()
    found = models.list_models()
    names = {model.name for model in found}
    return {
        "nanobraid": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{key if key.startswith("build") else f"build_{key}": value or "none" for key, value in build.items()},
        "cpu_features": _core.cpu_features(),
        "backends": backends,
        "cuda": cuda,
        "threads": f"{_core.default_num_threads()} by default",
        "memory": f"{memory['available_bytes'] / 2**30:.1f} GiB available",
        "cache": str(models.cache_dir()),
        "hugging_face_cache": str(models.hugging_face_dir()),
        "models_found": [f"{model.name}: {model.path}" for model in found],
        "models_to_pull": [name for name in models.KNOWN_MODELS if name not in names],
        "fusion": _fusion(found),
        "kv_selftests": [f"{row['model']}: {result_line(row)}" for row in known_results()],
        "offline": models.is_offline(),
        "hub": models.hub_state(),
    }


def _fusion(found: list[models.FoundModel]) -> list[str]:
    """How accurate fused operators are for the default model on the default device, and which are taken."""
    model = next((model for model in found if model.name == models.DEFAULT_MODEL), None)
    if model is None:
        return [f"not measured: {models.DEFAULT_MODEL} is not on this machine"]
    try:
        with core_errors():
            loaded = _core.Model(str(model.path), measure_fusion=True)
            return [f"{model.name} on {loaded.backend}", *fusion_lines(loaded.fusion)]
    except NanobraidError as error:
        return [f"not measured: {error}"]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return printable(str(value))
