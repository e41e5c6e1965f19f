"""What stands beside a measurement."""

import shutil
import subprocess

import pytest

from pldr.conditions import commit, device_name


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_of_a_checkout_that_holds_the_package(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@a.example"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    file = tmp_path / "pldr/conditions.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr("pldr.conditions.__file__", str(file))
    git("init")
    assert commit() is None
    git("commit", "--allow-empty", "--message", "somebody else's")
    assert commit() is None
    git("add", ".")
    git("commit", "--message", "ours")
    ours = git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "results.json").write_text("of no weight")
    assert commit() == ours
    file.write_text("changed")
    assert commit() == f"{ours} with changes"


def test_a_processor_has_a_name():
    assert device_name("cpu").strip()
