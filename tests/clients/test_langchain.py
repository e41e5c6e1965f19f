"""LangChain's class for OpenAI's completions, asking `pldr serve` as a user starts it."""

import pytest

pytest.importorskip("langchain_openai")
from langchain_openai import OpenAI

from helpers import serving
from pldr import Engine, load_model, load_tokenizer

PROMPTS = ["Once upon a time", "The sea"]


def test_openai_class(row, operator, model_folder):
    row("langchain-openai", "`OpenAI` asks `pldr serve`: several prompts, and in pieces", operator)
    folder = model_folder(operator)
    engine = Engine(load_model(folder), load_tokenizer(folder), max_batch=1)
    expected = [completion.text for completion in engine.generate(PROMPTS, max_new_tokens=16)]
    with serving(folder, "a-key") as (_, url, _):
        llm = OpenAI(model=folder.name, base_url=f"{url}/v1", api_key="a-key", temperature=0, max_tokens=16)
        assert llm.batch(PROMPTS) == expected
        assert "".join(llm.stream(PROMPTS[0])) == expected[0]
