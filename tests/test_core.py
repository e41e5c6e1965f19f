"""What an installation without extras does: `make test-core` runs this file where the wheel alone was installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pldr
from helpers import fails

EXTRAS = ("accelerate", "datasets", "matplotlib", "tensorboard", "lm_eval", "scipy")
core_only = pytest.mark.skipif(
    os.environ.get("PLDR_CORE_ONLY") != "1", reason="PLDR_CORE_ONLY=1 runs it: make test-core"
)


@core_only
def test_this_is_the_wheel_without_extras():
    assert "site-packages" in Path(pldr.__file__).parts
    assert not [name for name in EXTRAS if importlib.util.find_spec(name)]


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "pldr"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert {"generate", "info", "freeze", "convert"} <= set(done.stdout.split())
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
        == pldr.__version__
    )


def test_generate_info_freeze_and_convert(run, tmp_path):
    """With the model that ships with pldr, from its operator frozen to the published layout and back."""
    frozen, hub, back = (str(tmp_path / name) for name in ("frozen", "hub", "back"))
    prompt = ("Once upon a time there was a king", "--max-new-tokens", "8", "--json")
    code, out, err = run("generate", *prompt)
    assert code == 0, err
    tokens = json.loads(out)["token_ids"]
    assert len(tokens) == 8
    for command in (
        ("freeze", pldr.STORIES, frozen, "--prompt", "Once upon a time there was a king"),
        ("convert", frozen, hub, "--to", "hub"),
        ("convert", hub, back),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    code, out, _ = run("info", back, "--json")
    assert (code, set(json.loads(out)["operators"])) == (0, {"constant"})
    assert json.loads(run("generate", back, *prompt)[1])["token_ids"] == tokens


def test_recipes_are_found_where_the_package_is(tmp_path, monkeypatch):
    from pldr.recipe import find_recipe

    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo-cpu").is_file()


@core_only
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("train", "laptop", "data.train=[x.txt]"), "train"),
        (("eval", pldr.STORIES, "--tasks", "piqa"), "eval"),
        (("plot", "run"), "train"),
        (("merge", "run", "merged"), "train"),
        (("demo",), "train"),
        (("reproduce", "caching"), "train"),
    ],
)
def test_what_needs_an_extra_names_it(run, tmp_path, monkeypatch, command, extra):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("the cat sat\n")
    (tmp_path / "run").mkdir()
    fails(run(*command), f"pip install 'pldr[{extra}]'")
