"""Folders and files that are there whole or not at all, whatever happens meanwhile; JSON, sums and errors in one line."""

import hashlib
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

from pldr.files import (
    check_output,
    is_running,
    one_line,
    process_mark,
    read_json,
    read_sums,
    to_json,
    whole_file,
    whole_folder,
    write_json,
    write_sums,
    write_text,
)


def dead_mark():
    """Of a process that has ended."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    return process_mark().rpartition("-")[0] + "-" + done.stdout.strip()


def put(target, name, then=lambda: None, **options):
    """A folder with one empty file; `then` is what happens before it is done."""
    with whole_folder(target, **options) as folder:
        (folder / name).touch()
        then()


def fail():
    raise ZeroDivisionError


class TestFolder:
    def test_it_appears_whole_with_ordinary_permissions(self, tmp_path):
        with whole_folder(tmp_path / "a" / "b") as folder:
            (folder / "sub").mkdir()
            private = folder / "sub" / "file"
            private.touch(mode=0o600)
            assert not (tmp_path / "a").exists()
        umask = os.umask(0)
        os.umask(umask)
        assert (tmp_path / "a/b/sub/file").stat().st_mode & 0o777 == 0o666 & ~umask
        assert (tmp_path / "a/b/sub").stat().st_mode & 0o777 == 0o777 & ~umask
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_what_comes_meanwhile_is_not_removed(self, tmp_path):
        target = tmp_path / "out"
        (tmp_path / "out-1").mkdir()

        def come():
            target.mkdir()
            (target / "theirs").touch()

        with pytest.raises(FileExistsError, match=r"come there meanwhile; the result is in .*out-2"):
            put(target, "new", come)
        assert [path.name for path in target.iterdir()] == ["theirs"]
        assert [path.name for path in (tmp_path / "out-2").iterdir()] == ["new"]

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "old").touch()
        (tmp_path / "link").symlink_to("disk")
        put(tmp_path / "link", "new", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]

    def test_an_error_leaves_everything_as_it_was(self, tmp_path):
        target = tmp_path / "out"
        put(target, "old")
        with pytest.raises(ZeroDivisionError):
            put(target, "new", fail, overwrite=True)
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]

    def test_what_killed_processes_left_goes_and_what_they_set_aside_comes_back(self, tmp_path):
        dead, target = dead_mark(), tmp_path / "out"
        (tmp_path / f".out.partial-{dead}-abc").mkdir()
        (tmp_path / f".out.old-{dead}-abc" / "out").mkdir(parents=True)
        (tmp_path / f".out.old-{dead}-abc" / "out" / "weights").touch()
        alive = tmp_path / f".out.partial-{process_mark()}-abc"
        other = tmp_path / f".outer.partial-{dead}-abc"
        elsewhere = tmp_path / ".out.partial-anotherhost-1-abc"
        for folder in (alive, other, elsewhere):
            folder.mkdir()
        with pytest.raises(ZeroDivisionError):
            put(target, "new", fail, overwrite=True)
        assert (target / "weights").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, other.name, elsewhere.name}
        assert is_running(process_mark())
        assert not is_running(dead)

    def test_as_windows_wants_it(self, tmp_path, monkeypatch):
        """No folder is opened, a file that is to be synced is opened to be written, an empty folder goes before another comes."""
        monkeypatch.setattr("pldr.files._WINDOWS", True)
        opened, real = {}, os.open

        def note(place, flags, *rest, **options):
            opened[str(place).rpartition("/")[2]] = flags
            return real(place, flags, *rest, **options)

        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os, "open", note)
        put(tmp_path / "out", "file")
        monkeypatch.undo()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
        assert opened["file"] & os.O_RDWR
        assert "out" not in opened

    def test_outputs_that_can_not_be(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        (tmp_path / "file").touch()
        for place, message in ((".", "current folder"), ("file", "is a file"), ("full", "is not empty")):
            with pytest.raises(FileExistsError, match=message):
                check_output(place)


def test_errors_name_the_place_that_was_meant(tmp_path):
    """Not the hidden one beside it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder: is a folder; name a file"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(OSError, match="No such file") as hidden, whole_file(tmp_path / "file") as partial:
        partial.with_name(f"{partial.name}-none").open()
    assert hidden.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="No such file") as hidden, whole_folder(tmp_path / "new") as partial:
        (partial / "none").open()
    assert hidden.value.filename == str(tmp_path / "new")
    for place in ("/proc/self/new", "/proc/self/new/below"):
        with pytest.raises(PermissionError, match=f"{place}: /proc/self is not writable"):
            check_output(place)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestFile:
    def test_whole_or_as_it_was(self, tmp_path):
        file = tmp_path / "file.txt"
        write_text(file, "old")

        def half():
            with whole_file(file) as partial:
                partial.write_text("half")
                fail()

        with pytest.raises(ZeroDivisionError):
            half()
        assert file.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]

    def test_a_link_stays_a_link(self, tmp_path):
        write_text(tmp_path / "file", "old")
        (tmp_path / "link").symlink_to("file")
        write_text(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == "new"

    def test_what_killed_processes_left_goes(self, tmp_path):
        (tmp_path / f".file.partial-{dead_mark()}-1").touch()
        write_text(tmp_path / "file", "text")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("existing", [False, True])
def test_what_is_finished_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, existing):
    """Each file and folder, and behind the move the names in the folder above, so that a loss of power costs nothing."""
    happened = []
    original_sync, original_replace, original_rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(os.fstat(handle).st_ino) or original_sync(handle))
    for name, original in (("replace", original_replace), ("rename", original_rename)):
        monkeypatch.setattr(os, name, lambda old, new, move=original: happened.append("moved") or move(old, new))
    target, file = tmp_path / "out", tmp_path / "file"
    if existing:
        target.mkdir()
        file.touch()
    with whole_folder(target, overwrite=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").touch()
        parts = {place.stat().st_ino for place in (folder, folder / "sub", folder / "sub" / "a")}
    moved = happened.index("moved")
    assert parts <= set(happened[:moved])
    assert happened[-1] == tmp_path.stat().st_ino
    happened.clear()
    write_text(file, "x")
    assert happened == [file.stat().st_ino, "moved", tmp_path.stat().st_ino]


def test_json_holds_no_infinity():
    text = to_json({"a": math.inf, "b": [1.5, math.nan], "c": {"d": "é"}, "e": (-math.inf, 2)})
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1.5, None], "c": {"d": "é"}, "e": [None, 2]}
    assert "é" in text


def test_a_file_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"a": math.nan})
    assert read_json(file) == {"a": None}
    for damaged in (b"{", b"", b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.json: not valid"):
            read_json(file)


SHAPE = {"kind": "a 1", "steps": int, "loss": float, "more": {"name": str, "done": bool}, "rows": [{"n": int}], "last": (float,),
         "none": None, "any": Any}  # fmt: skip
FITS = {
    "kind": "a 1",
    "steps": 3,
    "loss": -1,
    "more": {"name": "", "done": False},
    "rows": [{"n": 0}],
    "other": [],
    "any": [],
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "a 2", "kind must be 'a 1', got 'a 2'"),
        ("steps", True, "steps must be a count, got True"),
        ("steps", -1, "steps must be a count, got -1"),
        ("steps", 1 << 53, "steps must be a count, got 9007199254740992"),
        ("loss", math.nan, "loss must be a finite number, got nan"),
        ("loss", 10**400, "loss must be a finite number, got 1000.*"),
        ("loss", None, "loss is missing"),
        ("more", [], r"more must be an object, got \[\]"),
        ("more", {"done": True}, "more.name is missing"),
        ("more", {"name": "x", "done": 1}, "more.done must be true or false, got 1"),
        ("rows", {}, r"rows must be a list, got \{\}"),
        ("rows", [{"n": 1}, 2], r"rows\[1\] must be an object, got 2"),
        ("rows", [{"n": 1}, {"n": "x" * 10**6}], r"rows\[1\].n must be a count, got 'x{,20}\.\.\.x{,20}'"),
        ("last", "x", "last must be a finite number, got 'x'"),
        ("none", 0, "none must be None, got 0"),
    ],
)
def test_json_of_another_shape_says_where(tmp_path, field, value, message):
    file = tmp_path / "a.json"
    for last in (None, 2.5):
        file.write_text(json.dumps(FITS | {"last": last}))
        assert read_json(file, SHAPE)["last"] == last
    file.write_text(json.dumps(FITS | {field: value}))
    with pytest.raises(ValueError, match=rf"a\.json: {message}$"):
        read_json(file, SHAPE)


def test_sums_are_as_sha256sum_writes_them(tmp_path):
    (tmp_path / "b c.txt").write_bytes(b"b")
    (tmp_path / "a.txt").write_bytes(b"a")
    write_sums(tmp_path, tmp_path.glob("*.txt"))
    sums = {"a.txt": hashlib.sha256(b"a").hexdigest(), "b c.txt": hashlib.sha256(b"b").hexdigest()}
    assert (tmp_path / "SHA256SUMS").read_text() == "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    assert read_sums(tmp_path) == sums


def test_an_error_is_one_short_line():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 300), limit=10) == "x" * 9 + "…"
