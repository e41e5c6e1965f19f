"""The locked versions of development, offline: in step with pyproject.toml and constraints-dev.txt, and what an audit makes of
advisories. `make audit` compares with the index, and asks for advisories."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
NOT_LOCKED = {"torch"}


def pins(text):
    """Canonical name → versions; one for each condition."""
    found = {}
    for name, version in re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", text, re.MULTILINE):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


@pytest.fixture
def audit(monkeypatch):
    """.ci/audit.py, without pip-audit."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pip_audit", module)
    spec.loader.exec_module(module)
    return module


class TestLock:
    def test_it_has_the_versions_of_development(self):
        locked = pins(LOCK)
        for name, versions in pins((ROOT / "constraints-dev.txt").read_text(encoding="utf-8")).items():
            assert name in NOT_LOCKED or locked[name] == versions, name
        assert not NOT_LOCKED & locked.keys()

    def test_it_has_all_that_development_needs(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        # Environments of their own: make test-vllm, test-clients, docs.
        elsewhere = {"serve", "export", "quantize", "docs"}
        extras = {name: texts for name, texts in project["optional-dependencies"].items() if name not in elsewhere}
        for need in map(
            Requirement, [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
        ):
            name = canonicalize_name(need.name)
            if name not in {*NOT_LOCKED, "pldr"}:
                assert all(need.specifier.contains(version) for version in pins(LOCK)[name]), need

    def test_it_is_names_versions_conditions_and_hashes(self):
        """No place to fetch from; and every version has hashes."""
        for line in LOCK.splitlines():
            assert re.fullmatch(
                r"#.*|[\w.-]+==[\w.+-]+( ; [\w\s.'<>=!()]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?|    # .*", line
            ), line
        assert "://" not in LOCK
        assert not re.search(r"\w\.(org|com|io|net)\b", LOCK)
        assert len(re.findall(r"^\S+==.* \\\n    --hash=", LOCK, re.MULTILINE)) == sum(map(len, pins(LOCK).values()))


FOUND = {"name": "x", "version": "1.0", "vulns": [{"id": "V-1", "fix_versions": ["1.1", "2.0"]}]}
NOT_MENDED = {"name": "y", "version": "2.0", "vulns": [{"id": "V-2", "fix_versions": []}]}
WELL = {"name": "z", "version": "3.0", "vulns": []}
UNKNOWN = {"name": "u", "skip_reason": "not found"}


class TestAudit:
    @pytest.mark.parametrize(
        ("packages", "code", "printed"),
        [
            ([FOUND, NOT_MENDED, WELL], 1, "x 1.0: V-1, mended in 1.1, 2.0\ny 2.0: V-2, not mended yet"),
            ([NOT_MENDED, WELL], 0, "y 2.0: V-2, not mended yet"),
            ([WELL, UNKNOWN], 0, "audit: no known vulnerability (pypi; 1 packages it does not know)"),
            (None, 0, "audit: nothing was compared with known vulnerabilities (pypi: away; osv: away)"),
        ],
    )
    def test_verdict(self, audit, monkeypatch, capsys, packages, code, printed):
        monkeypatch.setattr(audit, "ask", lambda source, pins: (packages, "" if packages else f"{source}: away"))
        assert audit.audit([ROOT / "requirements-dev.lock", ROOT / "constraints-dev.txt"]) == code
        assert capsys.readouterr().out.startswith(printed)

    @pytest.mark.parametrize(
        ("out", "err", "answer"),
        [
            ('{"dependencies": [{"name": "u", "skip_reason": "not found"}]}', "", "pypi: knows none of the packages"),
            ("", "requests.exceptions.ConnectionError: no route", "pypi: can not be reached"),
            ("", "ERROR: requirement x does not contain a hash", RuntimeError),
            ("", "", RuntimeError),
        ],
    )
    def test_a_source_that_does_not_answer(self, audit, monkeypatch, out, err, answer):
        """An index that passes packages on, and no advisories, has found nothing; pip-audit calls that "no vulnerabilities"."""
        done = type("Done", (), {"stdout": out, "stderr": err})
        monkeypatch.setattr(audit.subprocess, "run", lambda *args, **kwargs: done)
        if isinstance(answer, str):
            assert audit.ask("pypi", Path("pins.txt")) == (None, answer)
        else:
            with pytest.raises(answer, match="pip-audit: "):
                audit.ask("pypi", Path("pins.txt"))

    def test_every_version_is_asked_about(self, audit):
        found = audit.pins_of([ROOT / "requirements-dev.lock", ROOT / "constraints-dev.txt"])
        assert {canonicalize_name(pin.partition("==")[0]) for pin in found} == {*pins(LOCK), *NOT_LOCKED}
        with pytest.raises(ValueError, match="no versions in"):
            audit.pins_of([ROOT / "LICENSE"])
