"""The studio's page in a browser: what a reader does on each screen. Any error of the console or of a request fails a test.

PLDR_SCREENSHOTS=folder keeps a picture of every screen, to be looked at.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pldr
from helpers import toy_recipe
from pldr.studio.workbench import Workbench
from pldr.training.operators import keep_operator

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which make test-clients has")
expect = playwright.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.clients, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

AXE = "axe-core@4.14.1"
PATIENCE = 60_000  # milliseconds: other tests may run beside
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training that ended, as far as the studio reads it."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    folder.mkdir()
    lines = [{"step": step, "loss": 9.0 / step} for step in range(1, 9)]
    lines += [{"step": step, "eval_loss": 8.0 / step, "G_variation": [10.0**-step, 2.0**-step]} for step in (2, 4, 8)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for step in (2, 4, 8):
        keep_operator(folder, step, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@contextmanager
def studio(*options):
    """`pldr studio` in a process: its address."""
    command = [sys.executable, "-m", "pldr", "studio", "--port", "0", "--no-browser", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        try:
            answers(found[0])
            yield found[0]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def address(run):
    with studio("--run", run) as found:
        yield found


def answers(address, seconds=60):
    """Wait until somebody listens there."""
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"{address}api/state").close()
        except urllib.error.URLError:
            assert time.monotonic() < end, f"nothing listens at {address}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page with a fragment; in the end, nothing must have gone wrong but what a test says."""
    contexts, wrong, expected = [], [], []

    def open_page(fragment="", *, at=address, allow=None, ready=True, **look):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | look))
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        expected.extend([allow] if allow else [])
        page = context.new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
        expected.append("ERR_ABORTED")  # what the page itself gives up for what was asked later
        page.goto(f"{at}#{fragment}")
        if ready:
            expect(page.locator("#stage")).to_be_hidden(timeout=PATIENCE)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in wrong if not any(allowed in line for allowed in expected)] == []


def picture(page, name):
    if folder := os.environ.get("PLDR_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def written(page):
    """Wait for the end of a text, and return its tokens."""
    expect(page.locator("#write-status")).to_contain_text("tokens/s", timeout=PATIENCE)
    return page.locator("#written .token").all_text_contents()


def figure(page, name):
    return page.locator("figure", has=page.get_by_role("heading", name=name, exact=True))


class TestWrite:
    def test_a_prompt_is_continued_and_goes_on_from_another_token(self, visit):
        page = visit()
        page.locator("#prompt").fill("The old house")
        page.locator("#operator-name").select_option("frozen")
        page.get_by_text("Sampling", exact=True).click()
        page.get_by_label("New tokens").fill("12")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Write", exact=True).click()
        first = written(page)
        assert "".join(first).startswith("The old house")

        place = len(first) - 10
        page.locator("#written .token").nth(place).click()
        alternatives = page.locator("#alternatives li button")
        assert alternatives.count() == 8  # greedy: the token is one of the likeliest
        picture(page, "write")
        other = page.locator("#alternatives li:not(.chosen) button").first
        taken = other.locator(".word").text_content().strip("“”").replace("␣", " ").replace("↵", "\n")
        other.click()
        expect(page.locator("#written .pinned")).to_have_count(1)
        second = written(page)
        assert second[:place] == first[:place]
        assert second[place] == taken != first[place]
        assert len(second) == place + 1 + 12
        expect(page).to_have_url(re.compile("ids=[0-9%C]+"))

    def test_greedy_text_is_that_of_the_library(self, visit):
        model, tokenizer = pldr.load_model(pldr.STORIES), pldr.load_tokenizer(pldr.STORIES)
        (expected,) = pldr.Engine(model, tokenizer).generate(["The sea"], max_new_tokens=8)
        page = visit("prompt=The+sea&operator=cached&max_new_tokens=8&temperature=0")  # a link is followed at once
        assert "".join(written(page)[-8:]) == expected.text

    def test_it_writes_before_torch_is_there(self, visit):
        with studio() as place:
            page = visit("prompt=The+sea&max_new_tokens=8&temperature=0&operator=cached", at=place, ready=False)
            early = written(page)
            assert not json.load(urllib.request.urlopen(f"{place}api/state"))["ready"]
            expect(page.locator("#stage")).to_contain_text("Torch is being imported")
            expect(page.locator("#stage")).to_be_hidden(timeout=2 * PATIENCE)
            page.locator("#operator-name").select_option("learned")
            page.get_by_role("button", name="Write", exact=True).click()
            expect(page.locator("#written")).to_have_attribute("aria-busy", "false", timeout=PATIENCE)
            assert written(page) == early

    def test_a_long_text_is_stopped(self, visit):
        page = visit("max_new_tokens=900&operator=learned")
        expect(page.locator("#written .token:not(.given)").first).to_be_visible(timeout=PATIENCE)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#write-status")).to_have_text("stopped")
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()

    def test_keys_alone_are_enough(self, visit):
        page = visit("max_new_tokens=4&operator=frozen&screen=share")
        page.locator("#tab-share").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tab-write")).to_be_focused()
        expect(page.get_by_role("tabpanel")).to_have_id("write")
        page.locator("#prompt").focus()
        page.keyboard.press("Control+Enter")
        written(page)
        page.locator("#written .token").first.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#written .token").nth(1)).to_be_focused()

    def test_what_looks_like_html_stays_text(self, visit):
        page = visit("operator=frozen&max_new_tokens=3")
        page.locator("#prompt").fill(HOSTILE)
        page.get_by_role("button", name="Write", exact=True).click()
        assert "".join(written(page)).lstrip().startswith(HOSTILE)
        page.get_by_role("tab", name="Share").click()
        assert page.title() == "pldr studio"
        assert page.locator("main img, main script").count() == 0


class TestOperator:
    def test_the_slider_walks_and_a_cell_explains_itself(self, visit):
        page = visit("screen=operator&layer=2&head=3")
        expect(page.locator("#heads-tensors svg")).to_have_count(4, timeout=PATIENCE)
        expect(page.locator("#grid svg")).to_be_visible(timeout=PATIENCE)
        slider = page.locator("#length")
        tokens = int(slider.get_attribute("max"))
        assert slider.input_value() == str(tokens)
        before = figure(page, "G_LM").locator("image").first.get_attribute("href")
        slider.fill("1")
        expect(page.locator("#length-output")).to_contain_text(f"1 of {tokens}: G differs by", timeout=PATIENCE)
        expect(page).to_have_url(re.compile("length=1"))
        assert figure(page, "A").locator("image").first.get_attribute("href") != before
        figure(page, "G_LM").locator("svg").hover()
        expect(page.locator("#cell")).to_contain_text("multiplies query component")
        page.locator("#grid rect").nth(5).click()
        expect(page).to_have_url(re.compile("layer=0|head=5"))
        picture(page, "operator")

    def test_a_walk_draws_how_G_settles(self, visit):
        page = visit("screen=operator&prompt=Once+upon+a+time")
        expect(page.locator("#heads-tensors svg")).to_have_count(4, timeout=PATIENCE)
        tokens = int(page.locator("#length").get_attribute("max"))
        page.locator("#walk").click()
        expect(page.locator("#walk")).to_have_text("Stop")
        expect(page.locator("#walk")).to_have_text("Walk from 1 to all", timeout=PATIENCE)
        assert (
            figure(page, "How G settles").locator("circle").count() == tokens - 1
        )  # at all tokens the difference is 0

    def test_what_a_shared_scale_hides_is_said(self, visit):
        page = visit("screen=operator")
        small = page.locator("#heads-tensors figcaption", has_text="Too small to be seen")
        expect(small).to_have_count(1, timeout=PATIENCE)  # A_LM
        page.locator("#operator [data-state=scale]").select_option("own")
        expect(small).to_have_count(0)

    def test_a_constant_operator_has_G_alone(self, visit):
        page = visit("screen=operator&operator=identity")
        expect(page.locator("#heads-tensors svg:visible")).to_have_count(1, timeout=PATIENCE)
        row = page.locator("#tensor-numbers tbody tr")
        expect(row).to_have_count(1)
        assert row.locator("td").all_text_contents()[:2] == ["32", "0"]  # full rank, determinant 1

    @pytest.mark.parametrize("kind", ["SVG", "PNG"])
    def test_a_figure_is_saved(self, visit, kind):
        page = visit("screen=operator")
        save = page.get_by_role("button", name=f"Save G_LM as {kind}")
        expect(figure(page, "G_LM").locator("svg")).to_be_visible(timeout=PATIENCE)
        with page.expect_download() as download:
            save.click()
        content = Path(download.value.path()).read_bytes()
        assert download.value.suggested_filename == f"G_LM.{kind.lower()}"
        assert content.startswith(b"<svg" if kind == "SVG" else b"\x89PNG")
        assert len(content) > 500


class TestSwitch:
    def test_operators_side_by_side(self, visit, tmp_path):
        page = visit("screen=switch&compared=cached,frozen,identity")
        page.locator("#score").fill("It was a dark night, and the wind blew from the sea.")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#cards article")).to_have_count(3, timeout=PATIENCE)
        rows = [row.locator("th, td").all_text_contents() for row in page.locator("#compared tbody tr").all()]
        assert [row[0] for row in rows] == ["cached", "frozen", "identity"]
        loss = {row[0]: float(row[1]) for row in rows}
        assert abs(loss["cached"] - loss["frozen"]) < 1e-3 < loss["identity"] - loss["frozen"]
        expect(page.locator("#with-g svg")).to_be_visible(timeout=PATIENCE)
        page.locator("#token").fill("0")
        expect(page.locator("#attended svg rect")).to_have_count(2)  # itself, with G and without
        picture(page, "switch")

        save_file({"G_LM": torch.eye(32).expand(7, 8, 32, 32).contiguous()}, tmp_path / "own <b>.safetensors")
        page.locator("#operator-file").set_input_files(tmp_path / "own <b>.safetensors")
        expect(page.locator("#cards article")).to_have_count(4, timeout=PATIENCE)
        own = page.locator("#compared tbody tr").nth(3).locator("th, td").all_text_contents()
        assert own[0] == "own <b>.safetensors"
        assert own[1:5] == rows[2][1:5]  # the file holds the identity

    def test_a_rank_is_chosen(self, visit):
        page = visit("screen=switch&compared=frozen")
        page.locator("#rank").fill("16")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#cards article")).to_have_count(2, timeout=PATIENCE)
        expect(page.locator("#compared")).to_contain_text("factored:16")

    @pytest.mark.parametrize("kind", ["constant", "factored"])
    def test_a_model_without_a_network(self, visit, tmp_path, kind):
        tokenizer = pldr.load_tokenizer(pldr.STORIES)
        bench = Workbench(pldr.load_model(pldr.STORIES), tokenizer, "")
        bench.with_operator({"constant": "frozen", "factored": "factored:16"}[kind]).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        with studio(tmp_path / kind) as place:
            page = visit("screen=switch&compared=stored,identity", at=place)
            expect(page.locator("#model")).to_contain_text(f"{kind}: ")
            page.locator("#rank").fill("16")
            page.get_by_role("button", name="Compare").click()
            expect(page.locator("#cards article")).to_have_count(3, timeout=PATIENCE)
            rows = [row.locator("th, td").all_text_contents() for row in page.locator("#compared tbody tr").all()]
            assert [row[0] for row in rows] == ["stored", "identity", "factored:16"]
            stored, identity, factored = (float(row[1]) for row in rows)
            assert identity - stored > 0.1 > abs(factored - stored)
            expect(page.locator("#with-g svg")).to_be_visible(timeout=PATIENCE)
            page.get_by_role("tab", name="Operator").click()
            expect(page.locator("#heads-tensors svg:visible")).to_have_count(1, timeout=PATIENCE)
            expect(page.locator("#grid svg")).to_be_visible(timeout=PATIENCE)
            page.get_by_role("tab", name="Write").click()
            page.get_by_role("button", name="Write", exact=True).click()
            assert len(written(page)) > 20

    def test_a_file_that_is_no_operator_is_refused_in_one_line(self, visit, tmp_path):
        page = visit("screen=switch", allow="422")
        (tmp_path / "G.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        page.locator("#operator-file").set_input_files(tmp_path / "G.pkl")
        expect(page.get_by_role("alert")).to_contain_text("G.pkl")

    def test_a_file_that_is_too_large_is_not_sent(self, visit, tmp_path):
        page = visit("screen=switch")
        with (tmp_path / "large.safetensors").open("wb") as file:
            file.truncate(50 << 20)
        page.locator("#operator-file").set_input_files(tmp_path / "large.safetensors")
        expect(page.get_by_role("alert")).to_have_text(
            "large.safetensors: an operator's file has at most 32 MiB, this one 50."
        )


def test_a_link_to_what_is_not_there_shows_what_is(visit):
    page = visit("screen=operator&operator=none&layer=99&head=-1&length=999&prompt=The+sea&tensor=A")
    expect(page.locator("#grid svg")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#length-output")).to_contain_text("2 of 2", timeout=PATIENCE)
    expect(page.locator("#operator-name")).to_have_value("learned")
    expect(page.locator("#operator [data-state=layer]")).to_have_value("6")
    expect(page.get_by_role("alert")).to_be_empty()


class TestCertify:
    def test_a_verdict_and_its_files(self, visit, tmp_path):
        texts = [json.loads(line)["text"] for line in pldr.HELD_OUT.read_text(encoding="utf-8").splitlines()]
        (tmp_path / "text.txt").write_text(texts[0][:4000], encoding="utf-8")
        page = visit("screen=certify")
        page.locator("#text-file").set_input_files(tmp_path / "text.txt")
        expect(page.locator("#held-out")).to_have_value(re.compile(".{100}"))
        page.get_by_role("button", name="Certify", exact=True).click()
        expect(page.get_by_role("heading", name="Safe to freeze")).to_be_visible(timeout=4 * PATIENCE)
        picture(page, "certify")
        for name, begins in (("Frozen model", b"PK"), ("Certificate", b"{")):
            with page.expect_download() as download:
                page.get_by_role("link", name=name, exact=True).click()
            assert Path(download.value.path()).read_bytes().startswith(begins)

    def test_too_little_text_is_said(self, visit):
        page = visit("screen=certify", allow="422")
        page.locator("#held-out").fill("Too short.")
        page.get_by_role("button", name="Certify", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("a verdict needs at least")


def test_a_run_is_drawn(visit, run):
    page = visit("screen=training")
    expect(page.locator("#training-status")).to_contain_text("Step 8, loss 1.125; ended.")
    expect(page.locator("#curves svg")).to_have_count(3)
    assert figure(page, "Variation of G over texts").locator("path[stroke-width='2']").count() == 2  # a line each layer
    sentences = page.locator("#curves figcaption").all_inner_texts()
    assert len(sentences) == 3
    assert all(sentence.strip().endswith(".") for sentence in sentences)
    slider = page.locator("#evaluation")
    expect(page.locator("#evaluated svg")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#evaluation-output")).to_have_text("step 8, 3 of 3")
    last = page.locator("#evaluated image").first.get_attribute("href")
    slider.fill("0")
    expect(page.locator("#evaluation-output")).to_have_text("step 2, 1 of 3")
    expect(page.locator("#evaluated image").first).not_to_have_attribute("href", last)
    expect(page).to_have_url(re.compile("step=2"))
    shared = page.locator("#evaluated image").first.get_attribute("href")
    page.locator("#training [data-state=scale]").select_option("own")
    expect(page.locator("#evaluated image").first).not_to_have_attribute("href", shared)
    picture(page, "training")


def test_a_run_is_followed_while_it_trains(visit, texts, toy_model_file, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        toy_recipe(texts, toy_model_file, output=out, optimization__steps=3000, eval_steps=20, log_steps=5)
    )
    with subprocess.Popen([sys.executable, "-m", "pldr", "train", str(recipe)], stderr=subprocess.DEVNULL) as training:
        try:
            while not (out / "log.jsonl").is_file():
                assert training.poll() is None
                time.sleep(0.1)
            with studio("--run", out) as place:
                page = visit("screen=training", at=place)
                status, slider = page.locator("#training-status"), page.locator("#evaluation")
                expect(status).to_have_text(re.compile(r"Step \d+, loss [\d.]+; running\."), timeout=PATIENCE)
                step = int(re.search(r"\d+", status.text_content())[0])
                expect(page.locator("#evaluated svg")).to_be_visible(timeout=PATIENCE)
                evaluations = int(slider.get_attribute("max"))
                expect(slider).not_to_have_attribute("max", str(evaluations), timeout=PATIENCE)
                assert int(slider.get_attribute("max")) > evaluations
                assert int(re.search(r"\d+", status.text_content())[0]) > step
                training.terminate()
                page.close()  # or it would go on asking
        finally:
            training.kill()


def test_a_link_restores_everything_and_python_runs(visit, tmp_path):
    page = visit("prompt=The+sea&operator=frozen&max_new_tokens=5&temperature=0&layer=4&head=2&tensor=A_P&seed=7")
    written(page)
    page.get_by_role("tab", name="Operator").click()
    page.get_by_role("tab", name="Share").click()
    link, code = page.locator("#link").text_content(), page.locator("#python").text_content()
    other = visit(link.partition("#")[2])  # to the screen that one came from
    expect(other.locator("#operator")).to_be_visible()
    for name, value in {"prompt": "The sea", "operator": "frozen", "tensor": "A_P"}.items():
        expect(other.locator(f"[data-state={name}]")).to_have_value(value)
    expect(other.locator("#operator [data-state=layer]")).to_have_value("4")
    picture(page, "share")
    (tmp_path / "same.py").write_text(code, encoding="utf-8")
    ran = subprocess.run([sys.executable, tmp_path / "same.py"], capture_output=True, text=True, check=True)
    page.get_by_role("tab", name="Write").click()
    text = "".join(page.locator("#written .token:not(.given)").all_text_contents())
    assert ran.stdout.rstrip("\n").endswith(text)


def test_link_and_code_are_copied(visit):
    page = visit("screen=share&prompt=The+sea")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#copied")).to_have_text("Python copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("import pldr\n")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#copied")).to_have_text("Link copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.locator("#link").text_content() == page.url.replace("screen=share&", "")


# Something else than the default for everything that a reader can set.
EVERYTHING = {
    "screen": "operator", "prompt": "The sea & <b>the</b> wind", "operator": "factored:16", "ids": "5,6", "max_new_tokens": "9",
    "temperature": "1.5", "top_k": "3", "top_p": "0.5", "repetition_penalty": "1.2", "seed": "4", "layer": "3", "head": "5",
    "tensor": "G_LM", "length": "2", "scale": "own", "token": "1", "compared": "frozen,factored", "rank": "16", "score": "A text.",
    "held": "Held out.", "run": "ended", "step": "4",
}  # fmt: skip


def test_a_link_holds_all_that_can_be_set(visit):
    asked = {
        name: value for name, value in EVERYTHING.items() if name not in ("tensor", "run")
    }  # which have this value anyhow
    page = visit(urllib.parse.urlencode(EVERYTHING))
    expect(page.locator("#grid svg")).to_be_visible(timeout=PATIENCE)
    for screen in ("switch", "certify", "training", "write", "operator"):  # looking changes nothing
        page.locator(f"#tab-{screen}").click()
        page.wait_for_load_state("networkidle")
    expect(page.locator("#length-output")).to_contain_text("2 of ", timeout=PATIENCE)
    page.wait_for_timeout(300)
    there = dict(urllib.parse.parse_qsl(page.url.partition("#")[2]))
    assert {name: there.get(name) for name in asked} == asked
    state = page.evaluate("import('./state.js').then((module) => Object.keys(module.state))")
    assert set(state) == EVERYTHING.keys()
    controls = page.locator("[data-state]").evaluate_all("all => all.map((one) => one.dataset.state)")
    assert set(controls) <= EVERYTHING.keys()


def test_every_figure_is_saved_both_ways(visit):
    page = visit("screen=operator")
    expect(page.locator("#grid svg")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("tab", name="Switch").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#cards article").first).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#attended svg")).to_be_visible(timeout=PATIENCE)
    # The four tensors, two curves and the grid; five operators and three of attention; three curves and the operator.
    for screen, count in (("operator", 7), ("switch", 8), ("training", 4)):
        page.locator(f"#tab-{screen}").click()
        figures = page.locator("figure:visible", has=page.locator("svg"))
        expect(figures).to_have_count(count, timeout=PATIENCE)
        for one in figures.all():
            for kind, begins in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
                with page.expect_download() as download:
                    one.get_by_role("button", name=kind).click()
                assert Path(download.value.path()).read_bytes().startswith(begins)


class TestLooks:
    def test_dark_follows_the_system_and_the_button(self, visit):
        page = visit(color_scheme="dark")
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(ground)
        page.get_by_role("button", name="Dark").click()
        light = page.evaluate(ground)
        assert (light, dark) == ("rgb(255, 255, 255)", "rgb(22, 24, 27)")
        page.reload()
        expect(page.locator("#stage")).to_be_hidden(timeout=PATIENCE)
        assert page.evaluate(ground) == light

    @pytest.mark.parametrize("screen", ["write", "operator", "switch", "certify", "training", "share"])
    def test_a_narrow_screen_has_nothing_beyond_its_edge(self, visit, screen):
        look = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}
        page = visit(f"screen={screen}&operator=frozen&max_new_tokens=20&prompt=The+sea", **look)
        page.wait_for_load_state("networkidle")
        picture(page, f"narrow-{screen}")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None or subprocess.run([npm, "pack", AXE], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"needs {AXE} from node's registry")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", ["write", "operator", "switch", "certify", "training", "share"])
def test_no_serious_fault_of_accessibility(visit, axe, screen, scheme):
    page = visit(f"screen={screen}&operator=frozen&max_new_tokens=20&prompt=The+sea", color_scheme=scheme)
    if screen == "switch":
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#cards article").first).to_be_visible(timeout=PATIENCE)
    if screen == "write":
        written(page)
        page.locator("#written .token").last.click()
    page.wait_for_load_state("networkidle")
    page.evaluate(axe)
    faults = page.evaluate("axe.run()")["violations"]
    serious = [
        (fault["id"], fault["nodes"][0]["html"]) for fault in faults if fault["impact"] in ("serious", "critical")
    ]
    assert serious == []
