"""instructor: pydantic models by JSON schema and by tools, and its retries when a validator refuses."""

from __future__ import annotations

import sys
from typing import Any, Literal

import instructor
import openai
from checks import ASK, MODEL, main, url
from pydantic import BaseModel, Field, field_validator


def client(mode: instructor.Mode) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url()}/v1", api_key="unused", max_retries=0), mode=mode)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    country: Literal["France", "Italy"]


def check_modes() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        city = client(mode).chat.completions.create(
            model=MODEL, messages=ASK, response_model=City, max_tokens=200, temperature=0, max_retries=0
        )
        assert isinstance(city, City), mode


def check_retry_after_validation() -> None:
    seen: list[str] = []

    class Picky(City):
        @field_validator("name")
        @classmethod
        def second_time(cls, value: str) -> str:
            seen.append(value)
            if len(seen) == 1:
                raise ValueError("give another name")
            return value

    city = client(instructor.Mode.TOOLS).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Picky, max_tokens=200, temperature=0, max_retries=2
    )
    assert isinstance(city, Picky)
    assert len(seen) == 2


if __name__ == "__main__":
    sys.exit(main("instructor", globals()))
