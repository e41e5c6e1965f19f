"""PLDR-LLMs in vLLM: what the plugin refuses, and servers as a user starts them, asked through OpenAI's own client.

The second part needs vLLM: `make test-vllm` makes an environment that has it. vLLM would take most of the machine's memory
for its cache unless it is told otherwise, which is all that the settings below do that no user needs.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import torch

from helpers import certify
from pldr import (
    HELD_OUT,
    STORIES,
    Engine,
    PldrConfig,
    PldrForCausalLM,
    convert_checkpoint,
    freeze_checkpoint,
    load_model,
    load_tokenizer,
)
from pldr.integrations import vllm as plugin
from pldr.operator import factor, stored_operator

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run: make test-vllm"),
]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # or vLLM asks for a NUMA node each
FLAGS = ("--gpu-memory-utilization", "0.05", "--dtype", "float32")
NEW = 64


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "frozen"
    freeze_checkpoint(STORIES, folder, prompts="Once upon a time there was a little dog.")
    return folder


@pytest.fixture(scope="module")
def hub(frozen):
    folder = frozen.with_name("hub")
    convert_checkpoint(frozen, folder, to="hub")
    return folder


@pytest.fixture(scope="module")
def factored(frozen):
    """Factored operators of several ranks, and a feed-forward block of an odd width, which two processes can not halve."""
    folder, model = frozen.with_name("factored"), load_model(frozen)
    ranks = [8, 16, 24, 32, 24, 16, 32]
    pairs = [torch.linalg.svd(layer) for layer in stored_operator(model)]
    factor(model, [(U[..., :r] * S[..., None, :r], V.mT[..., :r]) for (U, S, V), r in zip(pairs, ranks, strict=True)])
    fields = model.config.to_dict() | {"intermediate_size": 701, "operator_init": "identity"}
    odd, wide = PldrForCausalLM(PldrConfig.from_dict(fields)), model.state_dict()
    for name, tensor in odd.state_dict().items():
        tensor.copy_(wide[name][tuple(map(slice, tensor.shape))])
    odd.save_pretrained(folder)
    load_tokenizer(frozen).save_pretrained(folder)
    return folder


# --- what is refused ------------------------------------------------------------------------------------------------


def model_config(folder):
    return SimpleNamespace(model=str(folder), hf_config=PldrConfig.from_pretrained(folder))


class TestChecks:
    def test_a_learned_operator_is_refused_with_what_to_do(self):
        with pytest.raises(
            ValueError, match=f"pldr certify {STORIES} .* pldr freeze; .* pldr serve {STORIES} --backend engine"
        ):
            plugin.check_model(model_config(STORIES))

    def test_without_a_certificate_a_model_is_served_with_a_warning(self, hub):
        with pytest.warns(UserWarning, match=f"{hub}: has no certificate .*; pldr certify"):
            plugin.check_model(model_config(hub))

    def test_or_not_at_all(self, hub, monkeypatch):
        monkeypatch.setenv(plugin.REQUIRE_CERTIFICATE, "1")
        with pytest.raises(ValueError, match=f"{hub}: has no certificate"):
            plugin.check_model(model_config(hub))

    def test_a_certificate_must_be_about_the_weights(self, frozen, tmp_path, monkeypatch):
        monkeypatch.setenv(plugin.REQUIRE_CERTIFICATE, "1")
        model = load_model(frozen)
        model.save_pretrained(tmp_path)
        certify(tmp_path)
        plugin.check_model(model_config(tmp_path))
        with torch.no_grad():
            model.lm_head.bias[0] += 1
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path}: its certificate is about other weights"):
            plugin.check_model(model_config(tmp_path))

    def test_a_damaged_folder_is_refused(self, frozen, tmp_path):
        load_model(frozen).save_pretrained(tmp_path)
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
        with pytest.raises(ValueError, match="does not match SHA256SUMS"):
            plugin.check_model(model_config(tmp_path))

    def test_code_that_comes_with_a_model_is_not_run(self, frozen):
        with pytest.raises(ValueError, match="leave out --trust-remote-code"):
            plugin.check_model(SimpleNamespace(model=str(frozen), hf_config=object()))


# --- servers --------------------------------------------------------------------------------------------------------


def free_port():
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def command(folder, *flags):
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *FLAGS, *flags]


@contextmanager
def served(folder, log, *flags, environment=None):
    """OpenAI's client of a `vllm serve`, and the server's address."""
    import httpx
    import openai

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as stream, subprocess.Popen(
        command(folder, "--port", str(port), "--served-model-name", "model", *flags),
        stdout=stream, stderr=stream, env=os.environ | SMALL | (environment or {}),
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 900  # of a server on a machine that others use, too
            while True:
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none"), url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def prompts():
    """50 beginnings of stories that the model has not seen, of 3 to 42 words."""
    with open(HELD_OUT, encoding="utf-8") as lines:
        stories = [json.loads(line)["text"].split() for line in lines]
    return [" ".join(stories[i % len(stories)][: 3 + 7 * i % 40]) for i in range(50)]


def continuations(client, prompts, **settings):
    answer = client.completions.create(
        model="model", prompt=prompts, max_tokens=NEW, temperature=0, extra_body={"return_token_ids": True}, **settings
    )
    return sorted(answer.choices, key=lambda choice: choice.index)


def check_continuations(folder, choices, prompts):
    """Token by token those of the engine, but for ties: a token that the model finds as probable, to 1e-5."""
    model = load_model(folder)
    expected = Engine(model, load_tokenizer(folder)).generate(prompts, max_new_tokens=NEW)
    assert len(choices) == len(prompts)
    for choice, ours in zip(choices, expected, strict=True):
        theirs, wanted = choice.token_ids, ours.token_ids
        if theirs == wanted:
            assert choice.text == ours.text
            continue
        first = next(i for i, (a, b) in enumerate(zip(theirs, wanted, strict=False)) if a != b)
        with torch.no_grad():
            ids = torch.tensor([choice.prompt_token_ids + wanted[:first]])
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        assert abs(logprobs[theirs[first]] - logprobs[wanted[first]]) < 1e-5, (choice.prompt_token_ids, first)


class TestServer:
    pytestmark = needs_vllm

    def test_of_a_constant_operator(self, frozen, prompts, tmp_path):
        """One server for what is asked of one: prompts read in pieces, and from the cache of prefixes, too."""
        pieces = ("--enforce-eager", "--max-num-batched-tokens", "96")
        with served(frozen, tmp_path / "log", *pieces) as (client, url):
            check_continuations(frozen, continuations(client, prompts), prompts)
            self.check_logprobs(frozen, client, prompts[:8])
            self.check_pieces(client, prompts[:3])
            self.check_prefixes(frozen, client, url, prompts)
        assert "has no certificate" in (tmp_path / "log").read_text()

    def check_logprobs(self, folder, client, prompts):
        model = load_model(folder)
        for choice in continuations(client, prompts, logprobs=1):
            ids = choice.prompt_token_ids + choice.token_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(choice.prompt_token_ids)
            of_tokens = logprobs[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
            # The bound. Both compute in float32, in other orders.
            assert (of_tokens - torch.tensor(choice.logprobs.token_logprobs)).abs().max() < 1e-5

    def check_pieces(self, client, prompts):
        """Choices that are drawn, with stops: what comes in pieces is what comes whole."""
        asked = {"model": "model", "prompt": prompts, "max_tokens": 24, "n": 2, "seed": 3, "temperature": 0.8, "top_p": 0.9,
                 "stop": [".", "zzz"], "logprobs": 2}  # fmt: skip
        whole = client.completions.create(**asked)
        texts, usage = [""] * 6, None
        for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = piece.usage or usage
            for choice in piece.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in sorted(whole.choices, key=lambda choice: choice.index)]
        assert usage.completion_tokens == whole.usage.completion_tokens

    def check_prefixes(self, folder, client, url, prompts):
        """Prompts of some 400 tokens, more than four steps read, with beginnings in common."""
        import httpx

        common = " ".join(prompts[:20])
        long = [f"{common} {prompt}" for prompt in prompts[20:30]]
        for _ in range(2):
            check_continuations(folder, continuations(client, long), long)
        metrics = httpx.get(f"{url}/metrics").text.splitlines()
        (hits,) = (float(line.split()[-1]) for line in metrics if line.startswith("vllm:prefix_cache_hits_total"))
        assert hits > 2000

    def test_of_the_hub_layout_in_two_tensor_parallel_processes(self, hub, prompts, tmp_path):
        flags = ("--enforce-eager", "--tensor-parallel-size", "2")
        with served(hub, tmp_path / "log", *flags, environment=TWO_PROCESSES) as (client, _):
            check_continuations(hub, continuations(client, prompts), prompts)

    def test_of_a_factored_operator_and_an_odd_width_in_two_tensor_parallel_processes(
        self, factored, prompts, tmp_path
    ):
        flags = ("--enforce-eager", "--tensor-parallel-size", "2")
        with served(factored, tmp_path / "log", *flags, environment=TWO_PROCESSES) as (client, _):
            check_continuations(factored, continuations(client, prompts), prompts)

    def test_of_half_the_layers_in_each_of_two_processes(self, factored, prompts, tmp_path):
        """Compiled, because vLLM's pipelines on a CPU begin no other way."""
        flags = ("--pipeline-parallel-size", "2")
        with served(factored, tmp_path / "log", *flags, environment=TWO_PROCESSES) as (client, _):
            check_continuations(factored, continuations(client, prompts), prompts)

    @pytest.mark.parametrize(
        ("folder", "environment", "said"),
        [(STORIES, {}, "pldr certify"), ("frozen", {plugin.REQUIRE_CERTIFICATE: "1"}, "has no certificate")],
        ids=["learned", "not certified"],
    )
    def test_that_does_not_start(self, request, folder, environment, said):
        folder = request.getfixturevalue(folder) if folder == "frozen" else folder
        result = subprocess.run(
            command(folder, "--port", str(free_port())),
            capture_output=True,
            text=True,
            env=os.environ | SMALL | environment,
        )
        assert result.returncode != 0
        assert said in result.stderr.splitlines()[-2] + result.stderr.splitlines()[-1]
