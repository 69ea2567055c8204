"""instructor in every mode that works with OpenAI's API, with an Enum (a ``$ref`` in the schema)."""

import enum
from typing import Literal

import instructor
import openai
from cases import QUESTION, URL, case, run
from pydantic import BaseModel


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Wall(BaseModel):
    colour: Colour


class Door(BaseModel):
    """Partial results of instructor 1.17 do not accept an ``Enum``."""

    colour: Literal["red", "blue"]


def ask(mode):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
    found = client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": QUESTION}],
        response_model=Wall,
        max_tokens=100,
        max_retries=1,
    )
    assert isinstance(found, Wall)


for name in ("TOOLS", "TOOLS_STRICT", "FUNCTIONS", "JSON_SCHEMA"):
    mode = getattr(instructor.Mode, name, None)
    if mode is not None:
        check = lambda mode=mode: ask(mode)  # noqa: E731
        check.__name__ = name.lower()
        case(check)


@case
def streaming():
    client = instructor.from_openai(
        openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=instructor.Mode.JSON_SCHEMA
    )
    pieces = list(
        client.chat.completions.create_partial(
            model="nano",
            messages=[{"role": "user", "content": QUESTION}],
            response_model=Door,
            max_tokens=100,
        )
    )
    assert pieces[-1].colour in ("red", "blue")


run()
