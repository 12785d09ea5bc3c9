"""The methods of an `LLM` that score a text instead of continuing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanobraid import _core
from nanobraid._driver import Call, Driver
from nanobraid._requests import encode_prompts
from nanobraid.outputs import ScoreOutput
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Scoring:
    """Part of `LLM`."""

    _driver: Driver
    _tokenizer: Tokenizer

    if TYPE_CHECKING:  # what an `LLM` has

        def _request(
            self, ids: list[int], params: SamplingParams, index: int | None = None, room: int = 1
        ) -> dict[str, Any]: ...

    def score(self, text_or_ids: str | Sequence[int]) -> ScoreOutput:
        """Returns how likely each token of a text is, given those before it.

        Args:
            text_or_ids: A text or a list of token ids, at most `max_model_len` tokens.

        Raises:
            InvalidArgumentError: It is empty, too long or has ids outside the vocabulary.
        """
        ids, output = self._evaluate(text_or_ids, prompt_logprobs=0)
        return ScoreOutput(ids, [None, *(row[0][1] for row in output.prompt_logprobs or ())])

    def logits(self, text_or_ids: str | Sequence[int]) -> NDArray[np.float32]:
        """Returns the logits after every token, for evaluation.

        Args:
            text_or_ids: A text or a list of T token ids, at most `max_model_len`.

        Returns:
            float32[T, V]; row i are the logits for the token after token i. 4 * T * V bytes.

        Raises:
            InvalidArgumentError: As `score`.
        """
        _, output = self._evaluate(text_or_ids, prompt_logits=True)
        logits = output.prompt_logits
        assert logits is not None
        return logits

    def _evaluate(self, text_or_ids: str | Sequence[int], **what: Any) -> tuple[list[int], _core.StepOutput]:
        prompt: Any = text_or_ids if isinstance(text_or_ids, str) else [text_or_ids]
        _, (ids,) = encode_prompts(self._tokenizer, prompt)
        options = self._request(ids, SamplingParams(temperature=0.0), room=0)
        options.update(what, max_tokens=0)
        call = Call(streams=False)
        try:
            self._driver.submit(call, 0, ids, **options)
            while True:
                for _, output in self._driver.wait(call):
                    if output.finish_reason is not None:
                        return ids, output
        except BaseException:
            self._driver.cancel(call)
            raise
