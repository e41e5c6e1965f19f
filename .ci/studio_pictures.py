"""The pictures of docs/studio.md: screens of `pldr studio` with the story model, in light and in dark.

    .ci/envs/clients/bin/python .ci/studio_pictures.py

It needs Playwright, Chromium and Pillow. Colours are reduced to 240, which keeps a picture below 100 kB.
"""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from pldr import HELD_OUT

FOLDER = Path(__file__).parents[1] / "docs" / "studio"
TEXT = "Once upon a time there was an old king who lived in a castle by the sea. He had three daughters, and"
PATIENCE = 300_000  # milliseconds


def write(page: Page) -> None:
    expect(page.locator("#write-status")).to_contain_text("tokens/s")
    page.locator("#written .token:not(.given)").nth(5).click()


def operator(page: Page) -> None:
    expect(page.locator("#grid svg")).to_be_visible()
    page.locator("#walk").click()
    expect(page.locator("#walk")).to_have_text("Stop")
    expect(page.locator("#walk")).to_have_text("Walk from 1 to all")
    page.locator("#heads-tensors figure").last.locator("svg").hover(position={"x": 90, "y": 120})


def switch(page: Page) -> None:
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#cards article")).to_have_count(3)
    page.locator("#compared").scroll_into_view_if_needed()


def certify(page: Page) -> None:
    page.locator("#held-out").fill(json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])["text"][:20_000])
    page.get_by_role("button", name="Certify", exact=True).click()
    expect(page.get_by_role("heading", name="Safe to freeze")).to_be_visible()


# Screen: what is done there, what the address says besides, in light or in dark, and the part that is shown.
SCREENS: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "write": (write, {"temperature": 0.7, "seed": 1, "max_new_tokens": 60}, "light", 790),
    "operator": (operator, {"layer": 5, "head": 3, "scale": "own"}, "dark", 890),
    "switch": (switch, {"compared": "learned,frozen,identity"}, "light", 1320),
    "certify": (certify, {}, "dark", 800),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pldr", "studio", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as studio, sync_playwright() as player:
        assert studio.stderr is not None
        found = re.search(r"http://\S+", studio.stderr.readline())
        assert found, "no address in the first line"
        browser = player.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for screen, (act, state, scheme, height) in SCREENS.items():
            page = browser.new_page(viewport={"width": 1100, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            page.set_default_timeout(PATIENCE)
            expect.set_options(timeout=PATIENCE)
            page.goto(f"{found[0]}#{urlencode({'screen': screen, 'prompt': TEXT} | state)}")
            expect(page.locator("#stage")).to_be_hidden()
            act(page)
            page.wait_for_timeout(500)
            seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            seen.quantize(240, dither=Image.Dither.NONE).save(FOLDER / f"{screen}.png", optimize=True)
            page.close()
        browser.close()
        studio.terminate()


if __name__ == "__main__":
    main()
