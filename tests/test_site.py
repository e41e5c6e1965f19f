"""The documentation site as it is built: nothing is fetched, nothing leads nowhere, nothing is missing. `make test-docs` runs this."""

import copy
import importlib.util
import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import pldr
from pldr.cli import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed; run: make test-docs"
    ),
]
ROOT = Path(__file__).parents[1]
REPOSITORY = re.compile(r"https://github\.com/pldr-llm/pldr/(?:blob|tree)/main/([^#]*)")


class Page(HTMLParser):
    """What a page refers to, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {"", "__skip"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if "src" in attrs or (tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload", "preconnect")):
            self.loaded.append(attrs.get("src") or attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site in a folder, built as `make docs` does; no warning and no connection."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder, asked = tmp_path_factory.mktemp("site"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
        patch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
        patch.setattr(sys, "argv", ["mkdocs"])
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))  # strict: it raises Abort at a warning
    assert not asked
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}


def test_pages_load_nothing_from_elsewhere(site, pages):
    assert len(pages) > 20
    for file, page in pages.items():
        for address in page.loaded:
            assert address.startswith("data:") or not urlsplit(address).netloc, f"{file}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_and_anchors_lead_somewhere(site, pages):
    for file, page in pages.items():
        for link in [*page.links, *page.loaded]:
            if named := REPOSITORY.fullmatch(link):
                assert (ROOT / unquote(named[1])).exists(), f"{file}: {link}"
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{file.relative_to(site)}: {link}"


def test_equations_are_drawn_without_scripts(site, pages):
    for file in pages:
        text = file.read_text(encoding="utf-8")
        assert text.count('class="arithmatex"') == len(re.findall(r'class="arithmatex"><math', text)), file
        assert "$$" not in text, file


def test_every_verb_and_public_name_has_its_place(site, pages):
    commands = typer.main.get_command(app).commands
    verbs = {
        f"pldr {name} {verb}".strip() for name, one in commands.items() for verb in getattr(one, "commands", {"": one})
    }
    assert {verb.replace(" ", "-") for verb in verbs} <= pages[site / "cli/index.html"].anchors
    named = {anchor.rpartition(".")[2] for anchor in pages[site / "api/index.html"].anchors}
    assert set(pldr._PUBLIC) <= named


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(file, tmp_path, monkeypatch):
    """From beginning to end in an empty folder; what they keep of an earlier run is of the same kinds, without an error."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    kept = nbformat.read(file, 4)
    nbformat.validate(kept)
    book = copy.deepcopy(kept)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, ran in zip(kept.cells, book.cells, strict=True):
        if cell.cell_type == "code":
            assert kinds(cell.outputs) == kinds(ran.outputs), cell.source
    text = file.read_text(encoding="utf-8")
    assert f"blob/main/notebooks/{file.name})" in text
    assert str(ROOT) not in text


def kinds(outputs):
    """What the outputs are, but for what libraries say on standard error."""
    return [output.output_type for output in outputs if output.get("name") != "stderr"]
