"""What the studio's page asks for, against the library's own functions; and what it refuses."""

import asyncio
import base64
import contextlib
import io
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from helpers import WORDS
from pldr import (
    STORIES,
    Engine,
    Options,
    PldrConfig,
    PldrForCausalLM,
    deductive_outputs,
    freeze,
    load_model,
    load_tokenizer,
)

for _package in ("fastapi", "uvicorn"):
    pytest.importorskip(_package, reason="of the extra studio")

import httpx2 as httpx  # noqa: E402

from pldr.studio.app import Studio, _lines, make_app  # noqa: E402
from pldr.studio.early import EarlyWriter  # noqa: E402
from pldr.studio.story import Story  # noqa: E402
from pldr.studio.workbench import Workbench  # noqa: E402
from pldr.training.operators import keep_operator  # noqa: E402

TEXT = " ".join(WORDS[:9])
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(toy_tokenizer):
    torch.manual_seed(0)
    config = PldrConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        metric_learner_units=2, metric_learner_width=24, max_position_embeddings=64,
    )  # fmt: skip
    return PldrForCausalLM(config).eval()


@pytest.fixture
def bench(model, toy_tokenizer, monkeypatch):
    monkeypatch.setattr("pldr.studio.workbench._LENGTH", 16)
    return Workbench(model, toy_tokenizer, "toy")


class Page:
    """Asks as the page does."""

    def __init__(self, bench, runs=None):
        self.studio = Studio(lambda: bench, runs or {}, "0")
        self.studio._bench = bench
        self.app = make_app(self.studio, {"127.0.0.1", "localhost"})

    def send(self, method, path, **request):
        async def call():
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8600") as client:
                return await client.request(method, path, **request)

        return asyncio.run(call())

    def post(self, path, status=200, **fields):
        answer = self.send("POST", f"/api/{path}", json=fields)
        assert answer.status_code == status, answer.text
        return answer

    def lines(self, **fields):
        answer = self.post("generate", **fields)
        first, *tokens, last = map(json.loads, answer.text.splitlines())
        return first["prompt"], tokens, last


@pytest.fixture
def page(bench):
    return Page(bench)


def numbers(packed, *shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(packed), "<f4").copy()).reshape(shape)


def encode(bench, text):
    return torch.tensor([bench.encode(text)])


class TestWriting:
    def test_tokens_are_the_engines(self, page, bench):
        prompt, tokens, last = page.lines(prompt=TEXT, operator="cached", max_new_tokens=6)
        [found] = Engine(bench.model, bench.tokenizer).generate([TEXT], max_new_tokens=6, logprobs=True, top_logprobs=8)
        assert [token["id"] for token in prompt] == bench.encode(TEXT)
        assert "".join(token["text"] for token in prompt).lstrip() == TEXT
        assert [token["id"] for token in tokens] == found.token_ids
        assert [token["logprob"] for token in tokens] == pytest.approx(found.logprobs)
        for token, top in zip(tokens, found.top_logprobs, strict=True):
            assert [(other["id"], pytest.approx(other["logprob"])) for other in token["top"]] == top
        assert last["finish_reason"] == "length"
        assert last["tokens_per_second"] > 0

    def test_learned_works_G_out_anew_for_every_token(self, page, bench):
        _, tokens, _ = page.lines(prompt=TEXT, operator="learned", max_new_tokens=6)
        ids = encode(bench, TEXT)
        text = bench.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, use_g_cache=False)
        assert [token["id"] for token in tokens] == text[0, ids.shape[1] :].tolist()
        for place, token in enumerate(tokens):
            before = text[:, : ids.shape[1] + place]
            log = bench.model(before, use_cache=False).logits[0, -1].log_softmax(0)
            assert token["logprob"] == pytest.approx(log[token["id"]].item(), abs=1e-4)

    @pytest.mark.parametrize("operator", ["learned", "cached", "frozen"])
    def test_a_seed_draws_the_same_again(self, page, operator):
        asked = {"prompt": TEXT, "operator": operator, "max_new_tokens": 12, "temperature": 2.0}
        first, again, other = (page.lines(**asked, seed=seed)[1] for seed in (1, 1, 2))
        assert first == again
        assert first != other
        assert len({token["id"] for token in first}) > 2

    def test_another_token_can_be_pinned(self, page, bench):
        _, tokens, _ = page.lines(prompt=TEXT, operator="frozen", max_new_tokens=4)
        pinned = [*bench.encode(TEXT), tokens[0]["top"][3]["id"]]
        prompt, onward, _ = page.lines(ids=pinned, operator="frozen", max_new_tokens=3)
        assert [token["id"] for token in prompt] == pinned
        assert len(onward) == 3

    def test_the_end_ends_it(self, page, bench, monkeypatch):
        _, [token], _ = page.lines(prompt=TEXT, operator="cached", max_new_tokens=1)
        monkeypatch.setattr(bench.config, "eos_token_id", token["id"])
        _, tokens, last = page.lines(prompt=TEXT, operator="cached", max_new_tokens=5)
        assert (tokens, last["finish_reason"]) == ([], "end")

    def test_who_leaves_frees_the_place(self, bench):
        steps = bench.generate(bench.encode(TEXT), "cached", bench_options(20))
        next(steps)
        steps.close()
        assert not bench._engine("cached").running


def bench_options(count):
    return Options(max_new_tokens=count, logprobs=True, top_logprobs=1)


@pytest.fixture(scope="module")
def early():
    writer = EarlyWriter()
    writer.wait()
    yield writer
    writer.close()


class TestBeforeTorchIsThere:
    SETTINGS = (
        {}, {"temperature": 0.8, "seed": 0}, {"temperature": 1.3, "top_k": 20, "seed": 3},
        {"temperature": 1.0, "top_p": 0.8, "seed": 2**40, "repetition_penalty": 1.3},
    )  # fmt: skip
    TEXT = "Once upon a time [END] there was an old king, café \u2028"

    def test_the_story_is_the_models(self):
        story, bench = Story(), Workbench(load_model(STORIES), load_tokenizer(STORIES), "stories-10m")
        assert story.facts() == bench.facts()
        assert story.encode("") == bench.encode("")
        ids = story.encode(self.TEXT)
        assert ids == bench.encode(self.TEXT)
        assert story.tokens(ids) == bench.tokens(ids)
        for settings in self.SETTINGS:
            options = Options(max_new_tokens=30, logprobs=True, top_logprobs=8, **settings)
            *own, end = story.generate(ids, options)
            *expected, last = bench.generate(ids, "cached", options)
            assert end["finish_reason"] == last["finish_reason"]
            for one, other in zip(own, expected, strict=True):
                assert (one["id"], one["text"]) == (other["id"], other["text"])
                assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
                for a, b in zip(one["top"], other["top"], strict=True):
                    assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-4)

    def test_it_needs_no_torch(self):
        code = "import sys, pldr.studio.story; assert not {'torch', 'transformers'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_process_of_its_own(self, early):
        asked = {"max_new_tokens": 3, "logprobs": True, "top_logprobs": 2, "seed": 1}
        prompt, *tokens, last = early.generate("The sea", None, asked)
        assert [token["text"] for token in prompt["prompt"]] == ["The", " sea"]
        assert [len(token["top"]) for token in tokens] == [2, 2, 2]
        assert last["finish_reason"] == "length"
        with pytest.raises(ValueError, match="token 9999999 is none of the model's"):
            list(early.generate(None, [9999999], asked))
        steps = early.generate("The sea", None, asked | {"max_new_tokens": 900})
        next(steps)
        assert not early.free
        steps.close()  # the reader left
        assert early.free
        assert len(list(early.generate("The sea", None, asked))) == 5

    def test_the_page_writes_with_it(self, early):
        page = Page(None)
        page.studio._early = early
        state = page.send("GET", "/api/state").json()
        assert (state["ready"], state["layers"], state["stage"]) == (False, 7, "loading the model")
        prompt, tokens, last = page.lines(prompt="The sea", operator="cached", max_new_tokens=4)
        assert (len(prompt), len(tokens), last["finish_reason"]) == (2, 4, "length")
        assert (
            page.post("generate", 422, prompt="a", operator="cached", temperature=0.0)
            .json()["error"]
            .startswith("temp")
        )
        assert "room" in page.post("generate", 422, prompt="The sea " * 800, operator="cached").json()["error"]

    def test_what_it_cannot_do_waits(self, early, bench):
        page = Page(None)
        page.studio._early = early

        def come():
            page.studio._bench = bench

        timer = threading.Timer(0.5, come)
        timer.start()
        _, tokens, _ = page.lines(prompt=TEXT, operator="frozen", max_new_tokens=2)
        timer.join()
        assert len(tokens) == 2


class TestTheOperator:
    @pytest.mark.parametrize("length", [None, 3])
    def test_tensors_are_the_librarys(self, page, bench, length):
        found = page.post("operator", text=TEXT, layer=1, head=0, length=length, operator="learned").json()
        ids = encode(bench, TEXT)
        assert found["tokens"] == ids.shape[1]
        outputs, whole = deductive_outputs(bench.model, ids[:, :length]), deductive_outputs(bench.model, ids)
        for name, tensor in found["tensors"].items():
            X = getattr(outputs, name)[1, 0, 0]
            assert torch.equal(numbers(tensor["values"], 16, 16), X)
            assert tensor["rms"] == pytest.approx(X.square().mean().sqrt().item())
            assert tensor["singular_values"] == pytest.approx(torch.linalg.svdvals(X.double()).tolist())
        last = whole.G_LM[1, 0, 0]
        expected = ((outputs.G_LM[1, 0, 0] - last).norm() / last.norm()).item()
        assert found["settled"] == pytest.approx(expected, abs=1e-7)
        assert (found["settled"] > 1e-4) == (length is not None)

    def test_the_grid_holds_every_head(self, page, bench):
        found = page.post("grid", text=TEXT, tensor="A_LM", operator="learned").json()
        values = numbers(found["values"], found["layers"], found["heads"], found["size"], found["size"])
        assert torch.equal(values, deductive_outputs(bench.model, encode(bench, TEXT)).A_LM[:, 0])
        assert np.shape(found["rank"]) == np.shape(found["log10_determinant"]) == (2, 2)

    def test_a_constant_has_no_other_tensors(self, page):
        found = page.post("operator", text=TEXT, layer=0, head=0, operator="identity").json()
        assert found["tensors"]["A"] is None
        assert torch.equal(numbers(found["tensors"]["G_LM"]["values"], 16, 16), torch.eye(16))
        assert found["tensors"]["G_LM"]["rank"] == 16
        error = page.post("grid", 422, text=TEXT, tensor="A", operator="identity").json()["error"]
        assert error == "tensor: with the operator identity there is no A, only G_LM"

    def test_attention_with_and_without(self, page):
        """Layer 0 sees the same queries and keys whatever the operator, and the identity is the attention without one."""
        with_g, without = {}, {}
        for operator in ("learned", "identity", "factored:16"):
            found = page.post("attention", text=TEXT, operator=operator, layer=0, head=1).json()
            count = len(found["tokens"])
            with_g[operator], without[operator] = (numbers(found[n], count, count) for n in ("with_g", "without_g"))
            assert torch.allclose(with_g[operator].sum(1), torch.ones(count))
            assert with_g[operator].triu(1).abs().max() == 0
        assert torch.allclose(without["learned"], with_g["identity"], atol=1e-6)
        assert torch.allclose(without["learned"], without["factored:16"], atol=1e-6)
        assert (with_g["learned"] - without["learned"]).abs().max() > 1e-4


class TestSwitching:
    def test_what_is_compared(self, page, bench):
        asked = {"text": TEXT, "prompt": WORDS[0], "max_new_tokens": 5}
        rows = page.post("compare", **asked, operators=["learned", "identity", "factored:8"]).json()["rows"]
        learned, identity, factored = rows
        assert learned["divergence"] == learned["change"] == 0
        assert identity["divergence"] > 0
        ids = encode(bench, TEXT)
        copy = freeze(load_copy(bench), G_LM=torch.eye(16).expand(2, 2, 16, 16))
        loss = copy(ids, labels=ids, use_cache=False).loss.item()
        assert identity["loss"] == pytest.approx(loss, abs=1e-5)
        assert identity["loss"] != pytest.approx(learned["loss"], abs=1e-6)
        G = deductive_outputs(bench.model, ids).G_LM[:, 0]
        assert identity["change"] == pytest.approx(((torch.eye(16) - G).norm() / G.norm()).item(), rel=1e-5)
        assert sum(token["probability"] for token in learned["next"]) <= 1
        [own] = Engine(bench.with_operator("identity"), bench.tokenizer).generate([WORDS[0]], max_new_tokens=5)
        assert identity["text"] == own.text
        assert factored["text"]

    def test_weights_are_shared_and_the_model_stays(self, bench):
        before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
        for operator in ("frozen", "identity", "uniform", "normal", "factored:8"):
            other = bench.with_operator(operator)
            assert other.lm_head.weight is bench.model.lm_head.weight
            assert other.model.layers[0].self_attn.q_proj.weight is bench.model.model.layers[0].self_attn.q_proj.weight
            assert other.config.operator != "learned"
            assert bench.with_operator(operator) is other
        assert bench.model.config.operator == "learned"
        assert all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())

    def test_ranks_go_by_eights(self, bench):
        assert [bench.with_operator(f"factored:{rank}").config.operator_ranks for rank in (1, 8, 9, 16)] == [
            [8, 8], [8, 8], [16, 16], [16, 16],
        ]  # fmt: skip

    def test_a_constant_model(self, model, toy_tokenizer, bench):
        bench = Workbench(bench.with_operator("identity"), toy_tokenizer, "constant")
        assert bench.operators == ["stored", "identity", "uniform", "normal"]
        page = Page(bench)
        rows = page.post("compare", text=TEXT, prompt=TEXT, operators=["stored", "identity"], max_new_tokens=3).json()[
            "rows"
        ]
        assert rows[0] == rows[1] | {"operator": "stored", "seconds": rows[0]["seconds"]}
        assert "nothing is left to freeze" in page.post("certify", 422, text=TEXT).json()["error"]

    def test_a_file_of_another_operator(self, page, bench):
        G = torch.randn(2, 2, 16, 16)
        answer = self.upload(page, save({"G_LM": G}), "../../G.safetensors")
        assert answer.json() == {"operator": "file:1", "name": "G.safetensors"}
        found = page.post("operator", text=TEXT, layer=1, head=1, operator="file:1").json()
        assert torch.equal(numbers(found["tensors"]["G_LM"]["values"], 16, 16), G[1, 1])
        assert "file:1" in page.send("GET", "/api/state").json()["operators"]

    def test_only_the_last_files_are_kept(self, bench, tmp_path):
        (tmp_path / "G.safetensors").write_bytes(save({"G_LM": torch.zeros(2, 2, 16, 16)}))
        names = [bench.add_operator(tmp_path / "G.safetensors") for _ in range(10)]
        assert names == [f"file:{number}" for number in range(1, 11)]
        assert bench.facts()["operators"][-8:] == names[2:]
        assert bench.with_operator("file:10").config.operator == "constant"
        with pytest.raises(ValueError, match="operator: there is no 'file:2'"):
            bench.with_operator("file:2")

    @pytest.mark.parametrize(
        ("body", "name", "message"),
        [
            (save({"G_LM": torch.zeros(2, 2, 8, 8)}), "G.safetensors", "G_LM: "),
            (b"no such file", "G.safetensors", "G.safetensors: "),
            (b"", "", "operator.safetensors: "),
        ],
    )
    def test_a_file_that_does_not_fit(self, page, body, name, message):
        answer = self.upload(page, body, name or "operator.safetensors")
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(message)
        assert "/tmp" not in answer.text

    def test_a_pickle_is_never_run(self, page, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        answer = self.upload(page, pickle.dumps([Evil()]), "G.pkl")
        assert answer.status_code == 422
        assert not (tmp_path / "ran").exists()

    def test_a_file_that_is_too_long(self, page):
        answer = self.upload(page, bytes(50 << 20), "G.safetensors")
        assert (answer.status_code, answer.json()["error"]) == (413, f"the body must have at most {32 << 20} bytes")

    def upload(self, page, body, name):
        headers = {"content-type": "application/octet-stream", "x-file-name": name}
        return page.send("POST", "/api/operators", content=body, headers=headers)


def load_copy(bench):
    import copy

    return copy.deepcopy(bench.model)


class TestCertifying:
    def test_a_verdict_and_its_numbers(self, page):
        text = " ".join(WORDS[n % len(WORDS)] for n in range(400))
        job = page.post("certify", text=text).json()["job"]
        found = self.wait(page, job)
        assert found["error"] is None
        assert found["verdict"] == "not safe to freeze"  # nobody trained it
        assert any("frozen" in reason for reason in found["reasons"])
        assert found["numbers"]["passages"] >= 2
        assert page.send("GET", f"/api/certify/{job}/model.zip").status_code == 404
        certificate = page.send("GET", f"/api/certify/{job}/certificate.json").json()
        assert certificate["report"]["certified"] is False
        folder = page.studio.job(job).folder
        page.studio.close()
        assert not folder.exists()

    def test_a_certified_model_can_be_had(self, bench, toy_tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr("pldr.study.certify.against", lambda *a, **k: [])  # any model passes
        page = Page(bench)
        text = " ".join(WORDS[n % len(WORDS)] for n in range(400))
        job = page.post("certify", text=text).json()["job"]
        assert self.wait(page, job)["verdict"] == "safe to freeze"
        archive = page.send("GET", f"/api/certify/{job}/model.zip").content
        zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path / "frozen")
        assert load_model(tmp_path / "frozen").config.operator == "constant"
        assert json.loads((tmp_path / "frozen" / "certificate.json").read_text())["model"]
        page.studio.close()

    def test_too_little_text(self, page):
        assert "a verdict needs at least 64" in page.post("certify", 422, text=TEXT).json()["error"]

    def test_only_the_last_are_kept(self, page, monkeypatch):
        monkeypatch.setattr(
            "pldr.studio.freezing.Freezing._certify", lambda self: setattr(self, "certificate", {"report": {}})
        )
        text = " ".join(WORDS[n % len(WORDS)] for n in range(400))
        jobs = []
        for _ in range(6):
            jobs.append(page.post("certify", text=text).json()["job"])
            while page.studio.job(jobs[-1]).running:
                time.sleep(0.01)
        answers = [page.send("GET", f"/api/certify/{job}").status_code for job in jobs]
        assert answers == [404, 404, 200, 200, 200, 200]
        page.studio.close()

    def test_one_at_a_time(self, page, monkeypatch):
        go_on = threading.Event()
        monkeypatch.setattr("pldr.studio.freezing.Freezing._certify", lambda self: go_on.wait(60) and 1 / 0)
        text = " ".join(WORDS[n % len(WORDS)] for n in range(400))
        job = page.post("certify", text=text).json()["job"]
        error = page.post("certify", 409, text=text).json()["error"]
        assert error == "certify: another certificate is being made; wait until it is done"
        go_on.set()
        assert self.wait(page, job)["error"] == "division by zero"
        page.post("certify", text=text)
        page.studio.close()

    def wait(self, page, job):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = page.send("GET", f"/api/certify/{job}").json()
            if found["verdict"] or found["error"]:
                return found
            time.sleep(0.05)
        raise AssertionError(found)


class TestRuns:
    def test_curves(self, bench, tmp_path):
        log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5, "G_variation": [0.1]}, {"step": 2, "loss": 1.0}]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        page = Page(bench, {"mine": tmp_path})
        assert page.send("GET", "/api/state").json()["runs"] == ["mine"]
        found = page.send("GET", "/api/training", params={"run": "mine"}).json()
        assert found == {
            "steps": [log[0], log[2]], "evaluations": [log[1]], "operators": [], "recipe": None, "ended": False,
        }  # fmt: skip

    def test_the_operator_of_each_evaluation(self, bench, tmp_path):
        (tmp_path / "log.jsonl").write_text("")
        G = torch.randn(2, 2, 16, 16).bfloat16()
        for step in (10, 9):
            keep_operator(tmp_path, step, G * step)
        (tmp_path / "operators" / "step-11.safetensors").write_bytes(b"damaged")
        page = Page(bench, {"mine": tmp_path})
        assert page.send("GET", "/api/training", params={"run": "mine"}).json()["operators"] == [9, 10, 11]

        def ask(status, **query):
            answer = page.send("GET", "/api/training/operator", params={"run": "mine"} | query)
            assert answer.status_code == status, answer.text
            return answer.json()

        found = ask(200, step=9)
        assert torch.equal(numbers(found["values"], 2, 2, 16, 16), (G * 9).float())
        assert "step-11.safetensors" in ask(422, step=11)["error"]
        assert ask(422, step=3)["error"].endswith("has kept no operator of step 3")
        ask(422, step="../x")
        ask(404, step=9, run="other")

    @pytest.mark.parametrize("name", ["other", "..", "/etc", "mine/../mine"])
    def test_other_folders_are_not_read(self, bench, tmp_path, name):
        page = Page(bench, {"mine": tmp_path})
        assert page.send("GET", "/api/training", params={"run": name}).status_code == 404


class TestTheDoor:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8600", "127.0.0.1.evil.example", "", "localhost:80:80", "[::2]"]
    )
    def test_other_names_of_this_machine(self, page, host):
        answer = page.send("GET", "/api/state", headers={"host": host})
        assert answer.status_code == 421
        assert answer.json()["error"].startswith("Host: this server is")

    @pytest.mark.parametrize("host", ["127.0.0.1:8600", "LOCALHOST:8600", "localhost"])
    def test_its_own_names(self, page, host):
        assert page.send("GET", "/api/state", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"origin": "http://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": "http://127.0.0.1:9999"}, 403),
            ({"sec-fetch-site": "cross-site"}, 403),
            ({"sec-fetch-site": "same-site"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
            ({"origin": "http://127.0.0.1:8600", "sec-fetch-site": "same-origin"}, 422),  # let in, and found empty
        ],
    )
    def test_other_pages(self, page, headers, status):
        assert page.send("POST", "/api/compare", content=b"{}", headers=JSON | headers).status_code == status

    def test_a_long_body(self, page):
        answer = page.send("POST", "/api/compare", content=b" " * (1 << 21), headers=JSON)
        assert answer.status_code == 413

    @pytest.mark.parametrize(
        "path", ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "//etc/passwd", "/%5c..%5capp.py"]
    )
    def test_paths_out_of_the_page(self, page, path):
        answer = page.send("GET", path)
        assert answer.status_code in (404, 405)
        assert "import" not in answer.text

    def test_no_script_but_its_own(self, page):
        answer = page.send("GET", "/")
        assert answer.headers["content-type"].startswith("text/html")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"

    def test_pages_that_may_frame_it(self, bench):
        for frames, said in (
            ((), "'none'"),
            (("https://a.example", "https://b.example"), "https://a.example https://b.example"),
        ):
            page = Page(bench)
            page.app = make_app(page.studio, {"127.0.0.1"}, frames)
            policy = page.send("GET", "/").headers["content-security-policy"]
            assert policy.endswith(f"frame-ancestors {said}")

    def test_a_script_in_a_prompt_comes_back_as_text(self, page):
        answer = page.post("operator", 422, text="<script>alert(1)</script>" * 50, layer=0, head=0, operator="learned")
        assert answer.headers["content-type"] == "application/json"

    @pytest.mark.parametrize(
        ("path", "fields", "message"),
        [
            ("generate", {"operator": "cached"}, "prompt, ids: give exactly one of them"),
            ("generate", {"prompt": "a", "ids": [5], "operator": "cached"}, "prompt, ids: "),
            ("generate", {"prompt": "a", "operator": "cached", "temperature": -1.0}, "temperature: "),
            ("generate", {"prompt": "a", "operator": "cached", "max_new_tokens": 0}, "max_new_tokens: "),
            ("generate", {"ids": [10**9], "operator": "cached"}, "prompt: token 1000000000"),
            ("generate", {"prompt": "a", "operator": "other"}, "operator: there is no 'other'"),
            ("generate", {"prompt": "a", "operator": "factored:0"}, "operator: there is no 'factored:0'"),
            ("generate", {"prompt": "a", "operator": "factored:99999999999"}, "operator: there is no"),
            ("generate", {"prompt": "a " * 100, "operator": "cached"}, "text: has "),
            ("operator", {"text": "a", "layer": 2, "head": 0, "operator": "learned"}, "layer: must be between 0 and 1"),
            ("operator", {"text": "a", "layer": 0, "head": -1, "operator": "learned"}, "head: must be between 0 and 1"),
            ("operator", {"text": "a", "layer": 0, "head": 0, "length": 99, "operator": "learned"}, "length: "),
            ("operator", {"text": "a", "layer": 0, "head": 0, "operator": "learned", "x": 1}, "x: "),
            ("grid", {"text": "a", "tensor": "__class__", "operator": "learned"}, "tensor: "),
            ("compare", {"text": "a", "prompt": "a", "operators": []}, "operators: "),
        ],
    )
    def test_messages(self, page, path, fields, message):
        assert page.post(path, 422, **fields).json()["error"].startswith(message)

    def test_before_the_model_is_there(self):
        page = Page(None)
        assert page.send("GET", "/api/state").json() == {
            "ready": False, "stage": "loading the model", "version": "0", "runs": [],
        }  # fmt: skip
        page.studio.failure = OSError("no such model")
        assert page.post("certify", 500, text="a").json() == {"error": "no such model"}


def test_a_model_that_is_not_there(run, tmp_path):
    code, out, err = run("studio", tmp_path / "none", "--no-browser", "--port", 0)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("pldr: ")
    assert "no such model folder" in err


def test_a_run_that_is_none(run, tmp_path):
    code, _, err = run("studio", "--run", tmp_path, "--no-browser")
    assert code == 1
    assert err.startswith(f"pldr: --run: {tmp_path} has no log.jsonl")


@pytest.mark.parametrize("origin", ["a.example", "https://a.example; script-src *", "https://a.example/page"])
def test_what_is_no_origin(run, origin):
    code, _, err = run("studio", "--allow-frame", origin, "--no-browser")
    assert code == 1
    assert err.startswith("pldr: --allow-frame: must be an origin")


def test_two_runs_of_one_name(run, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "mine").mkdir(parents=True)
        (tmp_path / place / "mine/log.jsonl").write_text("")
    code, _, err = run("studio", "--run", tmp_path / "a/mine", "--run", tmp_path / "b/mine", "--no-browser")
    assert code == 1
    assert "have the same name" in err


def test_nobody_waits_for_the_first_factors(bench, monkeypatch):
    written = []

    def slow(*_):
        writer = threading.Thread(target=lambda: written.extend(bench.write("the", None, "cached", bench_options(2))))
        writer.start()
        writer.join(30)
        return ["factors"]

    monkeypatch.setattr("pldr.studio.workbench._factors_from", slow)
    bench.warm_up()
    assert len(written) >= 2
    assert bench._all_factors() == ["factors"]


def test_an_operator_that_fails_does_not_end_the_studio(bench, monkeypatch, caplog):
    monkeypatch.setattr(bench, "_whole", lambda: 1 / 0)
    studio = Studio(lambda: bench, {}, "0")
    studio._run()
    assert studio.state()["ready"]
    assert studio.failure is None
    assert "not every operator can be had" in caplog.text


def test_what_is_asked_of_a_studio_that_has_been_ended(page, bench):
    steps = bench.write("the", None, "cached", bench_options(8))
    begun = [next(steps), next(steps)]
    page.studio.close()

    async def lines():
        return [json.loads(line) async for line in _lines(page.studio, begun, steps)]

    assert ["error" in line for line in asyncio.run(lines())] == [False, False, False, True]
    page.studio._bench = None
    assert "has been ended" in page.post("generate", 503, prompt="the", operator="cached").json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_though_a_text_is_being_written(ended_by):
    command = [sys.executable, "-m", "pldr", "studio", "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[2]
        asked = {"prompt": "The sea", "operator": "cached", "max_new_tokens": 1000}
        with httpx.stream("POST", f"{address}api/generate", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            while "logprob" not in next(lines):
                pass
            process.send_signal(ended_by)
            code = process.wait(20)
            with contextlib.suppress(httpx.RemoteProtocolError):  # a busy machine may not come to the text's last line
                assert "error" in json.loads(list(lines)[-1])
        said = process.stderr.read()
    assert (code, said) == ((130, "pldr: interrupted\n") if ended_by == signal.SIGINT else (-signal.SIGTERM, ""))
