"""Models by their name on the hub: fetched by huggingface_hub's own client from a server on this machine, and found in its cache."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from helpers import fails
from pldr import load_model
from pldr.files import sha256

COMMIT = 40 * "a"


def in_cache(folder, cache):
    """The folder, as the hub's cache holds OWNER/NAME."""
    place = cache / "models--someone--toy"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    (place / f"snapshots/{COMMIT}").symlink_to(folder)


@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    """The name of a model in the cache, where the hub is out of reach."""
    in_cache(folder, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return "someone/toy"


@pytest.fixture
def hub(folder):
    """The address of a hub that has the folder as someone/toy, with code that nobody should fetch; and what it was asked for."""
    asked = []
    files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"modeling.py": b"raise SystemExit"}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/api/models/someone/toy/revision/"):
                named = [{"rfilename": name} for name in files]
                return self.reply(200, {"id": "someone/toy", "sha": COMMIT, "siblings": named})
            if self.path.startswith("/api/models/someone/toy/tree/"):
                sizes = [
                    {"type": "file", "path": n, "size": len(b), "oid": sha1(b).hexdigest()} for n, b in files.items()
                ]
                return self.reply(200, sizes)
            name = self.path.rpartition("/")[2]
            if self.path == f"/someone/toy/resolve/{COMMIT}/{name}" and name in files:
                return self.reply(200, files[name])
            return self.reply(404, {})

        do_HEAD = do_GET

        def reply(self, status, answer):
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for header, value in {"Content-Type": "application/json", "Content-Length": len(body), "X-Repo-Commit": COMMIT,
                                  "ETag": f'"{sha1(body).hexdigest()}"'}.items():  # fmt: skip
                self.send_header(header, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}", asked
        server.shutdown()


@pytest.mark.slow
def test_a_model_is_fetched_with_a_bar(folder, hub, tmp_path):
    """Without the code beside it, and with a bar where somebody looks."""
    termios = pytest.importorskip("termios", reason="a terminal is made as POSIX has it")
    address, asked = hub
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    terminal, behind = os.openpty()
    termios.tcsetwinsize(behind, (24, 80))
    command = [sys.executable, "-m", "pldr", "info", "someone/toy", "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=behind, timeout=120)
    os.close(behind)
    said = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert done.returncode == 0, said
    assert "100%" in said
    assert json.loads(done.stdout)["parameters"] == sum(p.numel() for p in load_model(folder).parameters())
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not any(path.endswith("/modeling.py") for path in asked)
    (snapshot,) = (tmp_path / "hub/models--someone--toy/snapshots").iterdir()
    assert sha256(snapshot / "model.safetensors") == sha256(folder / "model.safetensors")


def test_load_model_knows_it(cached, folder):
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(cached)(ids).logits, load_model(folder)(ids).logits)
        assert torch.equal(load_model(f"{cached}@{COMMIT}")(ids).logits, load_model(folder)(ids).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "MODEL"],
        ["generate", "MODEL", "the cat", "--max-new-tokens", "3"],
        ["convert", "MODEL", "out", "--to", "hub"],
        ["freeze", "MODEL", "out", "--prompt", "the cat sat"],
        ["inspect", "MODEL", "texts.txt"],
        ["certify", "MODEL", "texts.txt", "--passages", "2", "--length", "16", "--calibration", "1"],
        ["compress", "MODEL", "out", "--passages", "2", "--length", "16"],
        ["eval", "MODEL", "--perplexity", "texts.txt"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_verbs_know_it(run, cached, folder, tmp_path, arguments):
    (tmp_path / "texts.txt").write_text("the cat sat on a mat and saw a dog who ran to see him " * 20)
    code, out, err = run(*(cached if word == "MODEL" else word for word in arguments))
    assert code == (arguments[0] == "certify"), err  # 1: it is measured, and not certified
    assert out


def test_one_that_is_not_there(run, cached):
    fails(
        run("info", "someone/other"),
        "someone/other: no such folder here, and the hub can not be asked for a model of this name",
    )
    fails(run("info", "no/such/folder"), "no/such/folder: no such model folder")
