"""The embedded server, started as a user starts it and asked through OpenAI's own client; and its parts where a server can not show them."""

import asyncio
import copy
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
import yaml

from helpers import certify, fails, quantised_by_hand, serving
from pldr import HELD_OUT, STORIES, Engine, Options, freeze, load_model
from pldr.checkpoints.certificate import certificate_to_serve, refuse_learned
from pldr.cli import app
from pldr.serving import server

for _package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(_package, reason="of the extras serve-light and dev")

import httpx2 as httpx  # noqa: E402
import openai  # noqa: E402

from pldr.serving.app import Limits, Service, make_app  # noqa: E402
from pldr.serving.metrics import Metrics  # noqa: E402
from pldr.serving.worker import Full, Job, Stopped, Worker  # noqa: E402

KEY = "a key of tests"
TEMPLATE = """{% for message in messages %}{% if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}\
{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""
PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """The model that ships with pldr, with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "stories"
    folder.mkdir()
    for file in STORIES.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def running(chatty):
    """One server for this file: its address, its log and its process."""
    with serving(chatty, KEY) as (process, url, lines):
        yield url, lines, process
    assert [line["event"] for line in lines if line["event"] != "request"][-2:] == ["shutting down", "stopped"]
    assert not any("traceback" in line for line in lines), "something failed that no test meant to"


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client):
    return partial(client.completions.create, model="stories")


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running[0], headers={"authorization": f"Bearer {KEY}"}, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def engine(stories):
    """What answers are compared with: one prompt at a time."""
    return Engine(*stories, max_batch=1)


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    """Where a test runs the command in this process, the log stays pytest's."""
    monkeypatch.setattr(server, "log_to_standard_error", lambda: None)


def metric(http, name):
    return float(re.search(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)[1])


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- completions ----------------------------------------------------------------------------------------------------

# What is asked, and the same of the engine.
ASKED = {
    "greedy": ({"temperature": 0}, {}),
    "drawn": ({"temperature": 0.8, "top_p": 0.9, "seed": 7}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}),
    "by default drawn at temperature 1": ({"seed": 1}, {"temperature": 1.0, "seed": 1}),
    "stop": ({"temperature": 0, "stop": ["and", "zzz"]}, {"stop": ["and", "zzz"]}),
    "one stop": ({"temperature": 0, "stop": ","}, {"stop": ","}),
    "ours": (
        {"temperature": 1, "seed": 2, "extra_body": {"top_k": 5, "repetition_penalty": 1.3, "ignore_eos": True}},
        {"temperature": 1.0, "seed": 2, "top_k": 5, "repetition_penalty": 1.3, "ignore_end": True},
    ),
    "stop ids": ({"temperature": 0, "extra_body": {"stop_token_ids": [264]}}, {"stop_ids": [264]}),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_completion_is_the_engines_whole_and_in_pieces(complete, engine, name):
    asked, settings = ASKED[name]
    (expected,) = engine.generate(PROMPT, max_new_tokens=24, **settings)
    whole = complete(prompt=PROMPT, max_tokens=24, **asked)
    (choice,) = whole.choices
    assert choice.text == expected.text
    assert choice.finish_reason == {"end": "stop"}.get(expected.finish_reason, expected.finish_reason)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, len(expected.token_ids))
    pieces = list(complete(prompt=PROMPT, max_tokens=24, stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == expected.text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 2) + [
        choice.finish_reason
    ]
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1


def test_several_prompts_and_choices(complete, engine, stories):
    """In order, with seeds that go on; prompts as texts or as token ids."""
    ids = stories[1]([PROMPT, "The sea"], add_special_tokens=False)["input_ids"]
    texts = [
        engine.generate(prompt, max_new_tokens=8, temperature=1.0, seed=5 + i)[0].text
        for prompt in ids
        for i in range(3)
    ]
    for prompt in ([PROMPT, "The sea"], ids):
        answer = complete(prompt=prompt, n=3, seed=5, max_tokens=8)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        joined = [""] * 6
        for piece in complete(prompt=prompt, n=3, seed=5, max_tokens=8, stream=True):
            joined[piece.choices[0].index] += piece.choices[0].text
        assert joined == texts
    assert complete(prompt=ids[0], seed=5, max_tokens=8).choices[0].text == texts[0]


def test_an_empty_prompt_is_the_token_between_texts(complete, engine, stories):
    (expected,) = engine.generate([[stories[1].eos_token_id]], max_new_tokens=8)
    answer = complete(prompt="", max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.usage.prompt_tokens == 1


def test_without_max_tokens_a_completion_has_16(complete):
    assert complete(prompt=PROMPT, temperature=0).usage.completion_tokens == 16


def plain_logprobs(model, ids, prompt):
    """Of one forward over all of it, with G_LM of the prompt, as the engine has it: [T - 1, V]."""
    frozen = freeze(copy.deepcopy(model), torch.tensor([ids[:prompt]]))
    with torch.no_grad():
        return frozen(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "seed": 3}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
def test_log_probabilities_are_those_of_a_plain_forward(complete, stories, engine, settings, echo):
    model, tokenizer = stories
    generated = engine.generate(
        PROMPT, max_new_tokens=12, **({"seed": 3, "temperature": 1.0} if "seed" in settings else {})
    )[0]
    asked = {"prompt": PROMPT, "max_tokens": 12, "logprobs": 3, "echo": echo} | settings
    (choice,) = complete(**asked).choices
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert choice.text == (PROMPT if echo else "") + generated.text
    found, drawn = choice.logprobs, prompt + generated.token_ids
    expected = plain_logprobs(model, drawn, len(prompt))
    start = 0 if echo else len(prompt) - 1
    if echo:
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for place, token in enumerate(drawn[start + 1 :], start):
        index = place - start + echo
        assert abs(found.token_logprobs[index] - expected[place, token]) < 1e-5
        best = expected[place].topk(3)
        named = dict(
            zip(
                [one.replace("▁", " ") for one in tokenizer.convert_ids_to_tokens(best.indices)],
                best.values,
                strict=True,
            )
        )
        assert found.top_logprobs[index].keys() == named.keys()
        assert all(abs(found.top_logprobs[index][name] - value) < 1e-5 for name, value in named.items())
    assert "".join(found.tokens) == choice.text
    assert [choice.text[i : i + len(t)] for i, t in zip(found.text_offset, found.tokens, strict=True)] == found.tokens
    pieces = [piece.choices[0].logprobs for piece in complete(stream=True, **asked)]
    assert [t for piece in pieces for t in piece.tokens] == found.tokens
    assert [v for piece in pieces for v in piece.token_logprobs] == found.token_logprobs
    assert [o for piece in pieces for o in piece.text_offset] == found.text_offset


def test_an_echo_alone(complete):
    """As evaluations ask for the log-probabilities of a text."""
    answer = complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(choice.logprobs.token_logprobs) == 6
    assert choice.logprobs.top_logprobs is None


# --- chats ----------------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "You tell stories."},
    {"role": "user", "content": [{"type": "text", "text": "Tell "}, {"type": "text", "text": "one."}]},
]


def test_a_chat(client, engine):
    text = "system: You tell stories.\nuser: Tell one.\nassistant:"
    (expected,) = engine.generate(text, max_new_tokens=10, logprobs=True, top_logprobs=2)
    asked = {"model": "stories", "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0,
             "logprobs": True, "top_logprobs": 2}  # fmt: skip
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    found = choice.logprobs.content
    assert [entry.logprob for entry in found] == pytest.approx(expected.logprobs, abs=1e-5)
    assert bytes(byte for entry in found for byte in entry.bytes).decode() == expected.text
    for entry, alternatives in zip(found, expected.top_logprobs, strict=True):
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(
            [value for _, value in alternatives], abs=1e-5
        )
    pieces = list(client.chat.completions.create(stream=True, **asked))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    logged = [entry for piece in pieces if piece.choices[0].logprobs for entry in piece.choices[0].logprobs.content]
    assert logged == found


# --- facts ----------------------------------------------------------------------------------------------------------


def test_models_operator_and_health(client, http):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("stories", "pldr")
    assert client.models.retrieve("stories") == model
    facts = http.get("/v1/pldr/operator").json()
    assert {name: facts[name] for name in ("model", "operator", "ranks", "certificate")} == {
        "model": "stories", "operator": "learned", "ranks": None, "certificate": None,
    }  # fmt: skip
    assert (facts["kv_cache_bytes_per_token"], facts["g_cache_bytes_per_sequence"]) == (14336, 229376)
    assert http.get("/health").json() == {"status": "ok"}


def test_metrics_and_log(running, http, complete):
    names = ("pldr_prompt_tokens_total", "pldr_generated_tokens_total", "pldr_time_to_first_token_seconds_count",
             'pldr_finished_total{reason="length"}')  # fmt: skip
    before = [metric(http, name) if name in http.get("/metrics").text else 0 for name in names]
    complete(prompt="A secret", max_tokens=5, temperature=0)
    assert [metric(http, name) for name in names] == [was + new for was, new in zip(before, (2, 5, 1, 1), strict=True)]
    answer = http.post("/v1/completions", json={"prompt": "A secret", "max_tokens": 3, "temperature": 0})
    (line,) = [line for line in running[1] if line.get("id") == answer.headers["x-request-id"]]
    assert {name: line[name] for name in ("path", "status", "prompt_tokens", "completion_tokens")} == {
        "path": "/v1/completions", "status": 200, "prompt_tokens": 2, "completion_tokens": 3,
    }  # fmt: skip
    assert "secret" not in json.dumps(running[1])
    assert running[1][0]["level"] == "warning"
    assert "has a learned operator, which no certificate is about" in running[1][0]["event"]


# --- mistakes -------------------------------------------------------------------------------------------------------

WRONG = [
    ({}, "prompt", "prompt: is missing"),
    ({"prompt": 3}, "prompt", "prompt: must be a text, a list of token ids, or a list of several of either, got 3"),
    (
        {"prompt": [1, "a"]},
        "prompt",
        "prompt: must be a text, a list of token ids, or a list of several of either, got a list",
    ),
    ({"prompt": []}, "prompt", "prompt: must be a text"),
    ({"prompt": "\ud800"}, "prompt", "prompt: not valid UTF-8"),
    ({"prompt": [7000]}, "prompt", "prompt: token 7000 is none of the model's 6144"),
    ({"prompt": [-1]}, "prompt", "prompt: token -1 is none"),
    ({"prompt": [10**30]}, "prompt", "prompt: "),
    ({"prompt": [5] * 1024}, "prompt", "prompt: 1024 tokens leave no room in the context of 1024"),
    ({"prompt": "a", "max_tokens": 2000}, "max_tokens", "max_tokens: must be between 1 and 1023"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens: must be at least 1"),
    ({"prompt": "a", "max_tokens": "3"}, "max_tokens", 'max_tokens: must be a valid integer, got "3"'),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "max_tokens: must be a valid integer, got true"),
    ({"prompt": "a", "max_tokens": 10**400}, "max_tokens", "max_tokens: "),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature: must be greater than or equal to 0, got -1"),
    ({"prompt": "a", "temperature": 1e-9}, "temperature", "temperature: must be positive"),
    ({"prompt": "a", "temperature": float("nan")}, "temperature", "temperature: must be a finite number, got NaN"),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p: must be greater than 0, got 0"),
    ({"prompt": "a", "n": 0}, "n", "n: must be greater than or equal to 1, got 0"),
    ({"prompt": ["a"] * 3, "n": 128}, "n", "prompt, n: at most 288 texts in one request, got 384"),
    ({"prompt": ["a"] * 100_000}, "prompt", "at most 288 texts in one request, got 100000"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs: must be less than or equal to 20, got 21"),
    ({"prompt": "a", "best_of": 2}, "best_of", "best_of: is not supported"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "suffix: is not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "presence_penalty: is not supported"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "logit_bias: is not supported"),
    ({"prompt": "a", "stop": [""]}, "stop", "stop: must be a text"),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop", "stop: must be a text, or a list of at most 16"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream_options: is for streams"),
    ({"prompt": "a", "seed": 2**63}, "seed", "seed: must be less than"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty: must be between"),
    ({"prompt": "a", "colour": 1}, None, "Unrecognized request argument supplied: colour"),
    ({"prompt": "a", "stop": "x" * 90_000, "user": 3}, "user", "user: must be a valid string, got 3"),
    ({"prompt": "a", "n": "x" * 90_000}, "n", f'n: must be a valid integer, got "{"x" * 58}…'),
    ({"messages": []}, "messages", "messages: must have at least 1 item"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "messages", "messages.0.role: must be 'system'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "the chat template refuses them (no tools here)"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages.0."),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "top_logprobs: needs logprobs"),
    ({"messages": MESSAGES, "tools": [{}]}, "tools", "tools: is not supported"),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "response_format: is not"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_mistake_is_400_and_says_what_and_where(http, fields, param, message):
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    answer = http.post(path, content=json.dumps(fields), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "method", "path", "content", "headers"),
    [
        (400, "POST", "/v1/completions", b"{", {}),
        (400, "POST", "/v1/completions", b"", {}),
        (400, "POST", "/v1/completions", b"\xff\xfe{}", {}),
        (400, "POST", "/v1/completions", b"[" * 100_000, {}),
        (400, "POST", "/v1/completions", b'{"prompt": ' + b"9" * 5000 + b"}", {}),
        (400, "POST", "/v1/completions", b'{"prompt": "a"}', {"content-type": "text/plain"}),
        (400, "POST", "/v1/completions", json.dumps(dict.fromkeys(map(str, range(50_000)))).encode(), {}),
        (400, "POST", "/v1/completions", json.dumps({"prompt": [None] * 150_000}).encode(), {}),
        (413, "POST", "/v1/completions", b" " * 3_000_000, {}),
        (413, "POST", "/v1/completions", (b" " * 100_000 for _ in range(30)), {}),
        (401, "POST", "/v1/completions", b"{}", {"authorization": "Bearer another"}),
        (401, "POST", "/v1/completions", b"{}", {"authorization": "Bearer \u00e9"}),
        (401, "GET", "/v1/models", b"", {"authorization": ""}),
        (404, "GET", "/v2", b"", {}),
        (404, "GET", "/openapi.json", b"", {}),
        (404, "GET", "/docs", b"", {}),
        (404, "GET", "/v1/models/another", b"", {}),
        (404, "POST", "/v1/completions", b'{"prompt": "a", "model": "another"}', {}),
        (405, "GET", "/v1/completions", b"", {}),
    ],
)  # fmt: skip
def test_a_request_that_is_none(http, status, method, path, content, headers):
    headers = {"content-type": "application/json"} | {name: value.encode() for name, value in headers.items()}
    answer = http.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert len(answer.text) < 1000


def test_a_body_without_its_header_says_which(http):
    """As curl sends it without -H."""
    answer = http.post(
        "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert answer.status_code == 400
    assert "come with the header Content-Type: application/json" in answer.json()["error"]["message"]


def test_the_scheme_of_a_key_may_be_written_in_small_letters(http):
    assert http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert http.get("/v1/models", headers={"authorization": f"Basic {KEY}"}).status_code == 401
    assert http.get("/v1/models", headers={"authorization": KEY}).status_code == 401


def test_openais_client_knows_the_errors(client, complete):
    with pytest.raises(openai.BadRequestError, match="best_of"):
        complete(prompt="a", best_of=3)
    with pytest.raises(openai.NotFoundError, match="The model '' does not exist; this server has 'stories'"):
        client.completions.create(model="", prompt="a")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_what_is_no_http_is_refused_and_a_client_that_leaves_is_forgotten(running, http):
    host, port = running[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    for stream in (False, True):
        asked = json.dumps(
            {"prompt": "The sea", "max_tokens": 1000, "n": 4, "ignore_eos": True, "stream": stream}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        connection = socket.create_connection((host, int(port)))
        connection.sendall(f"{head}content-length: {len(asked)}\r\n\r\n".encode() + asked)
        until(lambda: metric(http, "pldr_requests_running") == 4)
        connection.close()
        until(lambda: metric(http, "pldr_requests_running") == 0)
    assert metric(http, 'pldr_finished_total{reason="cancelled"}') == 8


@pytest.mark.slow
def test_malformed_requests_by_the_hundred():
    """A short run of the campaign, which has its own server: every answer is the right one, and the server as well as before."""
    pytest.importorskip("aiohttp", reason="of the benchmarks")
    script = Path(__file__).parents[1] / "benchmarks" / "faults_serve.py"
    command = [sys.executable, str(script), "--requests", "400", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["wrong"] == []


# --- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_50_prompts_in_random_order_and_arrival_are_answered_as_alone(complete, stories):
    """G_LM of each is of its own prompt, whoever else is in the batch."""
    dice = random.Random(0)
    words = " ".join(json.loads(line)["text"] for line in HELD_OUT.read_text().splitlines()).split()
    prompts = []
    for _ in range(50):
        start = dice.randrange(len(words) - 40)
        prompts.append(" ".join(words[start : start + dice.randint(1, 40)]))
    expected = [one.text for one in Engine(*stories, max_batch=50).generate(prompts, max_new_tokens=8)]
    alone = Engine(*stories, max_batch=1).generate(prompts[:10], max_new_tokens=8)
    assert [one.text for one in alone] == expected[:10]
    found = {}

    async def ask(client, index):
        await asyncio.sleep(dice.random())
        answer = await client.completions.create(model="stories", prompt=prompts[index], max_tokens=8, temperature=0)
        found[index] = answer.choices[0].text

    async def ask_all(url):
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            await asyncio.gather(*(ask(client, index) for index in dice.sample(range(50), 50)))

    asyncio.run(ask_all(str(complete.func.__self__._client.base_url)))
    assert [found[index] for index in range(50)] == expected


@pytest.fixture
def worker(small_model):
    """Over an engine with one row, and one job that may wait; and a way to make jobs."""
    engine = Engine(small_model(), max_batch=1)
    told = []
    worker = Worker(engine, Metrics(), 1, told.extend)
    worker.start()

    def job(tokens, seconds=60.0):
        request = engine.request([5, 6], Options(max_new_tokens=tokens, ignore_end=True))
        return Job(request, None, time.monotonic() + seconds, False)

    yield worker, job, told
    worker.close(True)
    worker.join()


class TestWorker:
    def test_more_than_may_wait_are_refused_all_or_none(self, worker):
        worker, job, told = worker
        first = job(60)
        worker.submit([first])
        with pytest.raises(Full):
            worker.submit([job(1), job(1)])
        second = job(1)
        worker.submit([second])
        until(lambda: len(told) == 2)
        assert [len(one.completion.token_ids) for one in (first, second)] == [60, 1]

    def test_what_takes_too_long_is_ended(self, worker):
        worker, job, told = worker
        late, other = job(60, seconds=-1.0), job(3)
        worker.submit([late, other])
        until(lambda: len(told) == 2)
        assert isinstance(late.error, TimeoutError)
        assert len(other.completion.token_ids) == 3

    def test_a_step_that_fails_ends_its_requests_and_no_others(self, worker, monkeypatch):
        worker, job, told = worker
        run = worker.engine.decoder.run
        monkeypatch.setattr(worker.engine.decoder, "run", lambda *args, **kwargs: 1 / 0)
        failed = job(5)
        worker.submit([failed])
        until(lambda: told)
        assert isinstance(failed.error, ZeroDivisionError)
        monkeypatch.setattr(worker.engine.decoder, "run", run)
        well = job(5)
        worker.submit([well])
        until(lambda: len(told) == 2)
        assert worker.healthy
        assert well.completion.token_ids

    @pytest.mark.parametrize("now", [False, True])
    def test_the_end(self, worker, now):
        worker, job, told = worker
        jobs = [job(60), job(60)]
        worker.submit(jobs)
        worker.close(now)
        with pytest.raises(Stopped):
            worker.submit([job(1)])
        worker.join()
        assert len(told) == 2
        assert all(isinstance(one.error, Stopped) if now else one.completion for one in jobs)
        assert not worker.healthy


# --- what a server started as users start it does not come to -----------------------------------------------------


@pytest.fixture
def asked(small_model, toy_tokenizer):
    """Ask a server in this process: with limits and more, some (path, fields) at once; its answers, and the service."""

    def ask(*requests, limits=None, before=lambda service: None, origins=(), method="POST", **settings):
        engine = Engine(small_model(vocab_size=len(toy_tokenizer)), toy_tokenizer, max_batch=1)
        service = Service("toy", engine, {}, limits or Limits(), **settings)

        async def run():
            application = make_app(service, origins=origins)
            service.start()
            before(service)
            transport = httpx.ASGITransport(application)
            try:
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://a", headers={"origin": "http://b"}
                ) as client:
                    return await asyncio.gather(
                        *(client.request(method, path, json=fields) for path, fields in requests)
                    )
            finally:
                service.worker.close(True)
                await asyncio.to_thread(service.worker.join)

        return asyncio.run(run()), service

    return ask


LONG = ("/v1/completions", {"prompt": "the cat", "max_tokens": 50, "ignore_eos": True, "temperature": 0})


class TestApp:
    def test_a_full_queue_is_503_and_says_when_to_come_again(self, asked):
        answers, _ = asked(LONG, LONG, LONG, limits=Limits(queue=1))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503]
        (sent_away,) = (answer for answer in answers if answer.status_code == 503)
        assert sent_away.headers["retry-after"] == "1"
        assert sent_away.json()["error"]["type"] == "overloaded_error"

    def test_too_many_connections_are_503_but_for_who_asks_how_the_server_is(self, asked):
        def crowd(service):
            service.connections = range(1025)

        (answer,), _ = asked(LONG, before=crowd)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["message"] == "more than 1024 connections are open; try again"
        (health,), _ = asked(("/health", None), before=crowd, method="GET")
        assert health.status_code == 200

    def test_a_request_that_takes_too_long(self, asked):
        stream = (LONG[0], LONG[1] | {"stream": True})
        (whole, pieces), _ = asked(LONG, stream, limits=Limits(seconds=0.0))
        assert (whole.status_code, whole.headers["x-should-retry"]) == (504, "false")
        events = [line for line in pieces.text.split("\n\n") if line]
        assert (pieces.status_code, events[-1]) == (200, "data: [DONE]")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["message"].startswith("the request took longer")

    def test_a_server_that_shuts_down(self, asked):
        def drain(service):
            service.draining = True
            service.worker.close(False)

        (answer,), _ = asked(LONG, before=drain)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        (health,), _ = asked(("/health", None), before=drain, method="GET")
        assert (health.status_code, health.json()) == (503, {"status": "shutting down"})

    def test_more_tokens_than_the_server_gives(self, asked):
        (refused, given), _ = asked(LONG, (LONG[0], {"prompt": "the cat"}), limits=Limits(tokens=3))
        assert "max_tokens: must be at most 3, got 50" in refused.text
        assert given.json()["usage"]["completion_tokens"] <= 3

    @pytest.mark.parametrize("where", ["the engine", "the server"])
    def test_what_fails_inside_is_500_without_a_traceback(self, asked, monkeypatch, where, caplog):
        def fail(service):
            if where == "the engine":
                service.engine.decoder.run = lambda *args, **kwargs: 1 / 0
            else:
                service.check_model = lambda name: 1 / 0

        (answer,), _ = asked(LONG, before=fail)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "ZeroDivision" not in answer.text
        assert "ZeroDivisionError" in caplog.text

    def test_prompts_are_logged_where_asked_for(self, asked, caplog):
        caplog.set_level("INFO", "pldr.serving")
        for log_prompts in (False, True):
            caplog.clear()
            asked(LONG, log_prompts=log_prompts)
            (line,) = (record.fields for record in caplog.records if record.message == "request")
            assert ("prompts" in line) == log_prompts
        assert line["prompts"] == ["the cat"]

    def test_pages_of_other_origins(self, asked):
        (answer,), _ = asked(LONG)
        assert "access-control-allow-origin" not in answer.headers
        (answer,), _ = asked(LONG, origins=["http://b"])
        assert answer.headers["access-control-allow-origin"] == "http://b"

    def test_without_a_chat_template(self, asked):
        (answer,), _ = asked(("/v1/chat/completions", {"messages": MESSAGES}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")

    def test_logits_that_are_not_finite(self, asked):
        def spoil(service):
            service.engine.decoder.head.bias.fill_(float("nan"))

        (answer,), _ = asked(LONG, before=spoil)
        assert answer.status_code == 500
        assert "logits are NaN or infinite" in answer.json()["error"]["message"]


# --- the command ----------------------------------------------------------------------------------------------------


def test_mistakes_at_the_command_line_are_one_line(run, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fails(run("serve", "--port", port), f"127.0.0.1:{port} can not be listened on (Address already in use)")
    fails(run("serve", "--host", "nowhere.invalid"), "nowhere.invalid:8000 can not be listened on")
    fails(run("serve", tmp_path / "none", "--port", 0), "no such model folder")
    fails(run("serve", "--port", 70000), "--port: must be between 0 and 65535")
    fails(run("serve", "--api-key", " "), "--api-key: must be printable ASCII")
    fails(
        run("serve", "--api-key", "a "), "--api-key: must be printable ASCII, not empty, and without spaces at its ends"
    )
    fails(run("serve", "--max-queue", "-1"), "--max-queue: must be at least 0")
    fails(run("serve", "--request-timeout", "nan"), "--request-timeout: must be at least 0.1")
    fails(run("serve", "--max-batch", 0, "--port", 0), "--max-batch: must be at least 1")
    fails(run("serve", "--port", 0, "--backend", "engine", STORIES, "--", "--x"), "only with --backend vllm")
    monkeypatch.setattr(server, "require", partial(_without, "fastapi"))
    fails(run("serve", "--backend", "engine"), "needs fastapi: pip install 'pldr[serve-light]'")


def _without(package, extra, *packages):
    assert package in packages
    raise ModuleNotFoundError(f"needs {package}: pip install 'pldr[{extra}]'")


@pytest.fixture
def made(small_model, toy_tokenizer, tmp_path):
    """A folder with a model that has a constant operator, and its tokenizer."""
    small_model(vocab_size=len(toy_tokenizer), operator="constant").save_pretrained(tmp_path / "made")
    toy_tokenizer.save_pretrained(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def served(monkeypatch):
    """What the embedded server would serve, rather than served."""
    services = []
    monkeypatch.setattr("pldr.serving.run.run", lambda service, *_: services.append(service))
    return services


class TestCertificate:
    def test_a_model_without_one_is_served_with_a_warning_or_not_at_all(self, tmp_path):
        with pytest.warns(UserWarning, match="has no certificate"):
            assert certificate_to_serve(tmp_path, "constant") is None
        with pytest.warns(UserWarning, match="a learned operator, which no certificate is about"):
            certificate_to_serve(tmp_path, "learned")
        with pytest.raises(ValueError, match=r"pldr certify .* --output CERTIFIED"):
            certificate_to_serve(tmp_path, "learned", required=True)
        (tmp_path / "certificate.json").write_text("{}")
        with pytest.raises(ValueError, match="not a valid certificate"):
            certificate_to_serve(tmp_path, "constant", required=True)

    def test_the_command_requires_it(self, run):
        fails(
            run("serve", "--port", 0, "--require-certificate"), "has a learned operator, which no certificate is about"
        )

    def test_it_is_about_the_weights_as_they_are_stored_whatever_they_are_served_in(self, run, made, served):
        certify(made)
        flags = ("serve", made, "--port", 0, "--backend", "engine", "--require-certificate", "--dtype", "bfloat16")
        assert run(*flags)[0] == 0
        (service,) = served
        assert service.operator["certificate"]["weights"] == "x"
        assert service.operator["dtype"] == "bfloat16"
        model = load_model(made)
        with torch.no_grad():
            model.lm_head.bias[0] += 1
        model.save_pretrained(made)
        fails(run(*flags), "its certificate is about other weights")

    def test_of_a_model_on_the_hub_it_is_where_its_files_are(self, run, made, served, monkeypatch):
        certify(made)
        monkeypatch.setattr(server, "local_path", lambda path: made if str(path) == "owner/name" else path)
        assert run("serve", "owner/name", "--port", 0, "--backend", "engine", "--require-certificate")[0] == 0
        assert served[0].name == "name"

    def test_vllm_is_not_given_a_learned_operator(self, run, monkeypatch):
        with pytest.raises(ValueError, match=r"pldr certify X .*pldr freeze; or .*pldr serve X --backend engine"):
            refuse_learned("X", "learned")
        refuse_learned("X", "constant")
        monkeypatch.setattr(server, "require", lambda *args: None)
        fails(run("serve", "--port", 0, "--backend", "vllm"), "has a learned operator, whose G_LM would come from")


class TestWithVllm:
    """Where it is installed, the command becomes vLLM's; its own tests are in test_vllm.py."""

    @pytest.fixture
    def became(self, monkeypatch):
        commands = []

        def execv(program, command):
            commands.append((command, os.environ.get("VLLM_API_KEY")))
            raise SystemExit(0)

        monkeypatch.setattr(server, "require", lambda *args: None)
        monkeypatch.setattr(server, "find_spec", lambda name: name)
        monkeypatch.setattr(os, "execv", execv)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        return commands

    def test_arguments_are_handed_on(self, run, became, made, monkeypatch):
        monkeypatch.setenv("PLDR_API_KEY", "k")
        monkeypatch.setenv("VLLM_API_KEY", "overwritten")
        arguments = [made, "--port", 0, "--max-length", 32, "--", "--tensor-parallel-size", 2]
        assert run("serve", *arguments)[0] == 0
        fails(run("serve", "--require-certificate", *arguments), "has no certificate")
        ((command, key),) = became
        assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
        assert command[4:] == [
            str(made), "--host", "127.0.0.1", "--port", "0", "--served-model-name", "made", "--dtype", "float32",
            "--max-model-len", "32", "--tensor-parallel-size", "2",
        ]  # fmt: skip
        assert key == "k"

    @pytest.mark.parametrize("option", [("--quantize", "int8"), ("--max-queue", 0), ("--request-timeout", 9)])
    def test_an_option_that_vllm_has_not_is_refused(self, run, became, made, option):
        fails(run("serve", made, "--port", 0, *option), f"{option[0]}: only with --backend engine")

    def test_what_vllm_does_not_read_is_served_by_the_engine(self, run, became, made, served, toy_tokenizer):
        quantised = made.with_name("quantised")
        quantised_by_hand(made, quantised)
        assert run("serve", quantised, "--port", 0)[0] == 0
        assert len(served) == 1
        assert not became
        fails(run("serve", quantised, "--port", 0, "--backend", "vllm"), "vLLM reads no quantised weights of ours")


# --- what is deployed -----------------------------------------------------------------------------------------------

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_dashboard_asks_for_metrics_that_exist(http):
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"\b(?:pldr|process)_\w+", target["expr"])}  # fmt: skip
    page = http.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    there = {name + suffix for name, kind in kinds.items()
             for suffix in (("_bucket", "_count", "_sum") if kind == "histogram" else ("",))}  # fmt: skip
    assert asked <= there
    assert {name for name, kind in kinds.items() if name.startswith("pldr_") and kind != "histogram"} <= asked
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 10


def test_the_image_and_its_services():
    """What can be seen without building: what is copied is there, nobody is root, options and health check exist."""
    image = (DEPLOY / "Dockerfile").read_text()
    sent = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", image, re.MULTILINE) for word in line.split()}
    assert copied == sent
    assert all((DEPLOY.parent / source).exists() for source in copied)
    assert "PIP_CONSTRAINT=constraints-dev.txt" in image
    last = image.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == ["10001"]
    assert "/health" in re.search(r"^HEALTHCHECK .*\n.*$", last, re.MULTILINE)[0]
    options = {
        option for parameter in typer.main.get_command(app).commands["serve"].params for option in parameter.opts
    }
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)[1])
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        words = [*entry, *service["command"]]
        assert {word for word in words if word.startswith("--")} <= options
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    # Docker mounts these without leave to run what is in them, and Triton loads there what it has compiled.
    assert services["pldr-gpu"]["tmpfs"] == [f"{place}:exec" for place in services["pldr"]["tmpfs"]]


# --- the end --------------------------------------------------------------------------------------------------------


def test_sigterm_lets_accepted_requests_end(running, http, complete):
    """Whole and in pieces; new ones are sent away; the code is 0. It ends the server of this file, and so is its last test."""
    asked = {"prompt": PROMPT, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    stream, answers = complete(stream=True, **asked), []
    thread = threading.Thread(target=lambda: answers.append(complete(**asked)))
    thread.start()
    pieces = [next(stream)]
    until(lambda: metric(http, "pldr_requests_running") == 2)
    running[2].send_signal(signal.SIGTERM)
    pieces += stream
    thread.join(20)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert answers[0].usage.completion_tokens == 150
    assert running[2].wait(10) == 0
    with pytest.raises(openai.APIConnectionError):
        complete(prompt="a")
