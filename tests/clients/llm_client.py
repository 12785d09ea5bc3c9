"""The command `llm`, with the server in its extra-openai-models.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, main, url


def run(folder: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": folder}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    ).stdout


def check_prompt_and_schema() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "extra-openai-models.yaml").write_text(
            f"- model_id: nb\n  model_name: {MODEL}\n  api_base: {url()}/v1\n  supports_schema: true\n"
        )
        assert "nb" in run(folder, "models")
        options = ("-o", "temperature", "0", "-o", "max_tokens", "20")
        streamed = run(folder, "-m", "nb", *options, "Name the capital of France.")
        assert "Paris" in streamed
        assert run(folder, "-m", "nb", "--no-stream", *options, "Name the capital of France.") == streamed
        shaped = run(folder, "-m", "nb", "--no-stream", "--schema", "is_capital bool", "Is Paris a capital?")
        assert '"is_capital"' in shaped


if __name__ == "__main__":
    sys.exit(main("llm", globals()))
