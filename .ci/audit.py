"""Compare versions with known vulnerabilities, through pip-audit: `python .ci/audit.py requirements-dev.lock …`.

Fails on one that a newer version mends. Says so, and does not fail, where no source of advisories can be reached.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pip_audit  # noqa: F401 (to fail here, and not to take its absence for that of a source)

_PIN = re.compile(r"^[A-Za-z0-9][\w.-]*==[^\\\n]+", re.MULTILINE)
_SOURCES = ("pypi", "osv")


def pins_of(files: list[Path]) -> list[str]:
    """Name, version and condition of every package, without hashes.

    Raises:
        ValueError: a file has none.
    """
    found = {file: _PIN.findall(file.read_text(encoding="utf-8")) for file in files}
    if empty := [str(file) for file, pins in found.items() if not pins]:
        raise ValueError(f"audit: no versions in {', '.join(empty)}")
    return [pin for pins in found.values() for pin in pins]


def ask(source: str, pins: Path) -> tuple[list[dict[str, Any]] | None, str]:
    """What a source says of each package, or None; and why, in one line.

    Raises:
        RuntimeError: pip-audit failed for another reason than its source.
    """
    options = ("--no-deps", "--disable-pip", "--progress-spinner=off", "--timeout=15", "--format=json")
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        f"--vulnerability-service={source}",
        *options,
        "--requirement",
        str(pins),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        if not re.search(r"Connection|Timeout|Resolution|ProxyError|ServiceError|HTTPError", last):
            raise RuntimeError(f"pip-audit: {last}")
        return None, f"{source}: can not be reached"
    packages = json.loads(done.stdout)["dependencies"]
    if not any("vulns" in package for package in packages):  # an index that passes packages on, and no advisories
        return None, f"{source}: knows none of the packages"
    return packages, ""


def findings(packages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Vulnerabilities that a newer version mends, and the others, each in one line."""
    mended, others = [], []
    for package in packages:
        for found in package.get("vulns", []):
            line = f"{package['name']} {package['version']}: {found['id']}"
            if fixes := found["fix_versions"]:
                mended.append(f"{line}, mended in {', '.join(fixes)}")
            else:
                others.append(f"{line}, not mended yet")
    return mended, others


def audit(files: list[Path]) -> int:
    """The exit code; what was found is printed."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("\n".join(pins_of(files)))
        reasons = []
        for source in _SOURCES:
            packages, reason = ask(source, pins)
            if packages is not None:
                break
            reasons.append(reason)
        else:
            print(f"audit: nothing was compared with known vulnerabilities ({'; '.join(reasons)})")
            return 0
    mended, others = findings(packages)
    skipped = sum("vulns" not in package for package in packages)
    print(
        "\n".join([*mended, *others]) or "audit: no known vulnerability",
        f"({source}; {skipped} packages it does not know)",
    )
    return 1 if mended else 0


if __name__ == "__main__":
    sys.exit(audit([Path(name) for name in sys.argv[1:]]))
