"""Exported models, run by ONNX Runtime, by torch without our code, and by onnxruntime-web in Node."""

import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from helpers import assert_close
from pldr import PldrConfig, PldrForCausalLM, deductive_outputs, export, load_model, load_tokenizer
from pldr.files import read_json
from pldr.integrations.export import cache_names

PROMPT = "Once upon a time there was a little dog"
NEW = 24
# Logits here are up to 13; float32 and other orders of summation make 1.5e-5 of it.
LOGITS = 5e-5
BROWSER = Path(__file__).parents[2] / "examples" / "browser"


@pytest.fixture(scope="session")
def exported(model_folder, tmp_path_factory):
    """`exported(operator, to)`: the folder of `model_folder(operator)`, exported once."""
    made = {}

    def folder(operator, to):
        if (operator, to) not in made:
            made[operator, to] = tmp_path_factory.mktemp("exported") / f"{operator}-{to}"
            export(model_folder(operator), made[operator, to], to=to)
        return made[operator, to]

    return folder


class OnnxModel:
    """A folder with model.onnx and config.json, and nothing else of ours."""

    def __init__(self, folder):
        onnxruntime = pytest.importorskip("onnxruntime")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.config = read_json(folder / "config.json")
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past")]

    def empty(self, batch):
        return [np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=np.float32) for value in self.past]

    def __call__(self, ids, mask, cache):
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed |= {value.name: tensor for value, tensor in zip(self.past, cache, strict=True)}
        logits, *cache = self.session.run(None, feed)
        return logits, cache

    def greedy(self, ids, mask, count):
        cache, written = self.empty(len(ids)), []
        for _ in range(count):
            logits, cache = self(ids, mask, cache)
            ids = logits[:, -1].argmax(-1)[:, None]
            written.append(ids)
            mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
        return np.concatenate(written, axis=1)


@pytest.mark.parametrize("kind", ["frozen", "factored"])
def test_onnx_runtime(row, kind, model_folder, exported):
    """The same logits, whole and step by step, and the same greedy texts of a batch that is padded on the left."""
    row("onnxruntime", "`pldr export --to onnx`: logits and greedy text, with KV-cache", kind)
    theirs, folder = OnnxModel(exported(kind, "onnx")), model_folder(kind)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    config = model.config
    assert [value.name for value in theirs.past] == cache_names(config, "past_key_values")
    assert [value.name for value in theirs.session.get_outputs()] == ["logits", *cache_names(config, "present")]
    widths = [value.shape[3] for value in theirs.past[::2]]
    assert widths == (config.operator_ranks or [config.head_dim] * config.num_hidden_layers)

    batch = tokenizer([PROMPT, "The king"], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch.input_ids, batch.attention_mask
    assert int(mask.sum()) < mask.numel()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    whole, _ = theirs(ids.numpy(), mask.numpy(), theirs.empty(2))
    assert_close(torch.from_numpy(whole)[mask.bool()], expected[mask.bool()], max_error=LOGITS)
    cache, steps = theirs.empty(2), []
    for end in range(1, ids.shape[1] + 1):
        logits, cache = theirs(ids[:, end - 1 : end].numpy(), mask[:, :end].numpy(), cache)
        steps.append(torch.from_numpy(logits))
    assert_close(torch.cat(steps, dim=1)[mask.bool()], expected[mask.bool()], max_error=LOGITS)

    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert theirs.greedy(ids.numpy(), mask.numpy(), NEW).tolist() == tokens[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["frozen", "factored"])
def test_torch_without_our_code(row, kind, model_folder, exported):
    """The program runs where neither pldr nor transformers is imported, at sizes that it was not traced with."""
    row("torch", "`pldr export --to torch`: `torch.export.load`, batch and length free", kind)
    folder, model = exported(kind, "torch"), load_model(model_folder(kind))
    code = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
assert not {"pldr", "transformers"} & set(sys.modules)
for case in torch.load(sys.argv[2], weights_only=True):
    case.append(program(*case))
    torch.save(case[4], f"{sys.argv[2]}.{case[0].shape[1]}")
"""
    config, heads = model.config, model.config.num_attention_heads
    ids = torch.randint(4, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    widths = [width for rank in config.operator_ranks or [config.head_dim] * config.num_hidden_layers
              for width in (rank, config.head_dim)]  # fmt: skip
    with torch.no_grad():
        expected = model(ids).logits
        before = model(ids[:, :8], use_cache=True).past_key_values
    cases = [
        [ids, torch.ones_like(ids), torch.arange(9)[None], [torch.zeros(1, heads, 0, width) for width in widths]],
        [ids[:, 8:], torch.ones_like(ids), torch.tensor([[8]]),
         [tensor for layer in before.layers for tensor in (layer.keys, layer.values)]],
    ]  # fmt: skip
    file = folder / "cases.pt"
    torch.save(cases, file)
    subprocess.run([sys.executable, "-c", code, str(folder / "model.pt2"), str(file)], check=True, timeout=300)
    for tokens in (9, 1):
        logits = torch.load(f"{file}.{tokens}", weights_only=True)[0]
        assert_close(logits, expected[:, -tokens:], max_error=LOGITS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_ahead_of_time(row, toy_tokenizer, tmp_path):
    """The program of `--to torch`, compiled by AOTInductor; a small model, for the story model takes a minute or two."""
    row("torch", "AOTInductor: `torch._inductor.aoti_compile_and_package` of `pldr export --to torch`", "frozen")
    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig(vocab_size=290, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
                                       operator="constant", operator_init="normal")).eval()  # fmt: skip
    export(model, tmp_path / "program", to="torch", tokenizer=toy_tokenizer)
    program = torch.export.load(tmp_path / "program/model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch, tokens in ((1, 9), (3, 20), (2, 1)):
        ids = torch.randint(4, 290, (batch, tokens + 1), generator=torch.Generator().manual_seed(0))
        mask, positions = torch.ones_like(ids), torch.arange(tokens + 1).repeat(batch, 1)
        with torch.no_grad():
            expected = model(ids).logits
        empty = [torch.zeros(batch, 2, 0, 16) for _ in range(4)]
        logits, *cache = compiled(
            ids[:, :-1].contiguous(), mask[:, 1:].contiguous(), positions[:, :-1].contiguous(), empty
        )
        assert_close(logits, expected[:, :-1], max_error=LOGITS)
        last, *_ = compiled(ids[:, -1:].contiguous(), mask, positions[:, -1:].contiguous(), cache)
        assert_close(last, expected[:, -1:], max_error=LOGITS)


def test_node(row, model_folder, exported):
    """examples/browser, all but its page."""
    if shutil.which("node") is None or not (BROWSER / "node_modules").is_dir():
        pytest.skip("needs node, and `npm install` in examples/browser")
    row("onnxruntime", "onnxruntime-web in Node: `examples/browser`", "frozen")
    folder = exported("frozen", "onnx")
    command = ["node", str(BROWSER / "node.js"), str(folder), PROMPT, str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    model, tokenizer = load_model(model_folder("frozen")), load_tokenizer(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0]
    assert PROMPT + done.stdout.rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True)


class Served(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def page_address(exported, tmp_path):
    """Where `python -m http.server` shows examples/browser, with the model exported into it."""
    if not (BROWSER / "node_modules").is_dir():
        pytest.skip("needs `npm install` in examples/browser")
    for file in (*BROWSER.glob("*.html"), *BROWSER.glob("*.js"), BROWSER / "node_modules"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model").symlink_to(exported("frozen", "onnx"))
    with ThreadingHTTPServer(("localhost", 0), partial(Served, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def test_page(row, model_folder, page_address):
    """examples/browser as its visitor sees it; nothing is asked of any other address."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    row("onnxruntime", "onnxruntime-web in Chromium: the page of `examples/browser`", "frozen")
    model, tokenizer = load_model(model_folder("frozen")), load_tokenizer(model_folder("frozen"))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=200, do_sample=False)[0]
    asked, wrong = set(), []
    with playwright.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.on("request", lambda request: asked.add(urlsplit(request.url)._replace(path="/", query="").geturl()))
        page.on("pageerror", lambda error: wrong.append(error))
        page.goto(page_address)
        go_on = page.get_by_role("button", name="Go on")
        playwright.expect(go_on).to_be_enabled(timeout=120_000)
        page.get_by_label("How it begins").fill(PROMPT)
        page.get_by_label("temperature").fill("0")
        go_on.click()
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        playwright.expect(page.locator("#story")).to_have_text(expected, timeout=240_000)
        playwright.expect(go_on).to_be_enabled()
        chromium.close()
    assert not wrong
    assert {address for address in asked if address.startswith("http")} == {page_address}


def test_what_the_exporter_does_to_a_learned_operator(row, toy_tokenizer, tmp_path):
    """Why they are refused; and that what makes them wrong is the optimizer, which drops the 1e-9 of the metric tensor."""
    refused = "refused: freeze it first (`pldr freeze`)"
    row("onnxruntime", "`pldr export --to onnx`: logits and greedy text, with KV-cache", "learned", refused=refused)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig(vocab_size=290, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
                                       metric_learner_units=1, metric_learner_width=8)).eval()  # fmt: skip
    operator = model.model.layers[0].self_attn.operator
    with torch.no_grad():
        operator.metric_weight.mul_(1e-5)  # A_LM hardly above its 1e-9
        operator.exponent.fill_(0.1)
    with pytest.raises(ValueError, match=r'pldr freeze MODEL FROZEN --prompt "Any text will do\."'):
        export(model, tmp_path / "refused", tokenizer=toy_tokenizer)

    class Operator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False, output_deductive_outputs=True).deductive_outputs[0].A_P

    ids = torch.arange(12)[None]
    expected = deductive_outputs(model, ids)[2][0]
    errors = {}
    for optimize in (False, True):
        file = tmp_path / f"{optimize}.onnx"
        torch.onnx.export(Operator(), (ids,), dynamo=True, optimize=optimize, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0])
        errors[optimize] = float((found - expected).abs().max() / expected.abs().max())
    assert errors[False] < 1e-5
    assert errors[True] > 0.1
