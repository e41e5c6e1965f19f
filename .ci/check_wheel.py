"""`python .ci/check_wheel.py dist/pldr-….whl`: does the wheel hold what .ci/wheel.txt says, no file more and none less?"""

import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]


def differences(wheel: Path) -> list[str]:
    """One line for each file of the wheel that nobody expects, and for each expected one that it lacks."""
    lines = (ROOT / ".ci" / "wheel.txt").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    held = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "pldr").rglob("*.py")}
    recipes = {f"pldr/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    expected = [pattern for pattern in patterns if not any(path.match(pattern) for path in held)]
    expected += sorted((modules | recipes) - set(map(str, held)))
    return [f"too many: {path}" for path in held if not any(path.match(pattern) for pattern in patterns)] + [
        f"too few: {name}" for name in expected
    ]


if __name__ == "__main__":
    found = differences(Path(sys.argv[1]))
    print("\n".join(found) or f"{Path(sys.argv[1]).name}: holds what .ci/wheel.txt says")
    sys.exit(1 if found else 0)
