"""`transformers serve` and `transformers chat`, as a user starts them, with models in the hub's cache and in folders."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

for client in ("fastapi", "openai"):
    pytest.importorskip(client)
import httpx2 as httpx
import openai

from pldr import convert_checkpoint, load_model, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTION = [{"role": "user", "content": "Tell me of the king."}]
TOO_LONG = [{"role": "user", "content": "the king and the queen " * 600}]
ALONE = ["-m", "transformers.cli.transformers"]
WITH_PLDR = ["-c", "import pldr, transformers.cli.transformers as cli; cli.main()"]


@pytest.fixture
def chatty(model_folder, tmp_path):
    """`chatty(operator)`: a folder with a chat template, and the greedy answer to the question."""

    def folder(operator):
        place = shutil.copytree(model_folder(operator), tmp_path / "stories")
        (place / "chat_template.jinja").write_text(TEMPLATE)
        tokenizer = load_tokenizer(place)
        asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
        tokens = load_model(place).generate(**asked, max_new_tokens=16, do_sample=False)[0]
        return place, tokenizer.decode(tokens[asked["input_ids"].shape[1] :], skip_special_tokens=True)

    return folder


@pytest.fixture
def environment(tmp_path):
    """Of a process whose hub is an empty folder, and out of reach."""
    (tmp_path / "hub").mkdir()
    return os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def in_cache(folder, environment):
    """The folder as the hub's cache holds a model of its name."""
    place = f"{environment['HF_HUB_CACHE']}/models--someone--{folder.name}"
    shutil.copytree(folder, f"{place}/snapshots/{40 * 'a'}")
    os.mkdir(f"{place}/refs")
    with open(f"{place}/refs/main", "w") as file:
        file.write(40 * "a")
    return f"someone/{folder.name}"


@contextmanager
def answering(start, model, environment, *options):
    """The address of `transformers serve MODEL`, once it answers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *start, "serve", str(model), "--device", "cpu", "--port", str(port), *options]
    with subprocess.Popen(command, env=environment) as server:
        try:
            url, end = f"http://localhost:{port}", time.monotonic() + 120
            while True:
                assert server.poll() is None
                assert time.monotonic() < end
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.ConnectError:
                    time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@contextmanager
def asking(url, model):
    """`ask(messages)`: the greedy answer of a chat; and the client itself."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:

        def ask(messages):
            settings = {"model": str(model), "messages": messages, "max_tokens": 16, "temperature": 0}
            whole = client.chat.completions.create(**settings).choices[0].message.content
            pieces = client.chat.completions.create(**settings, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
            return whole

        yield ask, client


def test_serve_and_chat(row, operator, chatty, environment):
    """Where pldr is imported, it lists the model, answers whole and in pieces, and refuses what is too long."""
    for use in ("serve", "chat"):
        row("transformers", f"`transformers {use}`, after `import pldr`", operator)
    folder, expected = chatty(operator)
    name = in_cache(folder, environment)
    with answering(WITH_PLDR, name, environment) as url, asking(url, name) as (ask, client):
        assert [model.id for model in client.models.list().data] == [name]
        assert ask(QUESTION) == expected
        with pytest.raises(openai.BadRequestError, match=r"longer than the context length .*=1024"):
            ask(TOO_LONG)
        assert ask(QUESTION) == expected
        command = [sys.executable, *ALONE, "chat", name, url, "max_new_tokens=16", "do_sample=False"]
        said = f"{QUESTION[0]['content']}\nn\n!exit\n"  # no, it need not go on after 16 tokens
        online = {key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"}  # or it asks no server
        done = subprocess.run(command, input=said, env=online, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert " ".join(expected.split()) in " ".join(done.stdout.split())


def test_serve_with_continuous_batching(row, chatty, environment):
    row("transformers", "`transformers serve --continuous-batching`, after `import pldr`", "frozen")
    folder, expected = chatty("frozen")
    with (
        answering(WITH_PLDR, folder, environment, "--continuous-batching") as url,
        asking(url, folder) as (ask, client),
    ):
        assert ask(QUESTION) == expected
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=r"leaves no room in the context length .*=1024"):
                client.chat.completions.create(model=str(folder), messages=TOO_LONG, max_tokens=16, stream=stream)
        assert ask(QUESTION) == expected


def test_serve_without_pldr(row, chatty, environment, tmp_path):
    """By the code that a hub folder brings, which says itself that a prompt is too long."""
    row("transformers", "`transformers serve --trust-remote-code` of `pldr convert --with-code`", "frozen")
    folder, expected = chatty("frozen")
    convert_checkpoint(folder, tmp_path / "coded", to="hub", with_code=True, tokenizer=folder)
    with (
        answering(ALONE, tmp_path / "coded", environment, "--trust-remote-code") as url,
        asking(url, tmp_path / "coded") as (ask, _),
    ):
        assert ask(QUESTION) == expected
        with pytest.raises(openai.BadRequestError) as refused:
            ask(TOO_LONG)
        assert "longer than the context length max_position_embeddings=1024" in refused.value.body["detail"]
        assert ask(QUESTION) == expected
