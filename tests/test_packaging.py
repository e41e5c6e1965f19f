"""What is handed out: the wheel and its metadata; what an import costs; what CI and the workflows call."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pldr

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
MATRIX = WORKFLOW["jobs"]["make"]["strategy"]["matrix"]


def lines(file):
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="a tool of development")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


class TestWheel:
    def test_it_holds_what_the_list_says(self, wheel, tmp_path):
        check = [sys.executable, str(ROOT / ".ci" / "check_wheel.py")]
        done = subprocess.run([*check, str(wheel)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        # And the comparison sees a stranger, and what is gone.
        other = tmp_path / "other.whl"
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
            for name in set(old.namelist()) - {"pldr/py.typed", "pldr/cache.py", "pldr/recipes/laptop.yaml"}:
                new.writestr(name, "")
            new.writestr("start_up.pth", "import os\n")
        done = subprocess.run([*check, str(other)], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout.splitlines() == [
            "too many: start_up.pth", "too few: pldr/py.typed",
            "too few: pldr/cache.py", "too few: pldr/recipes/laptop.yaml",
        ]  # fmt: skip

    def test_one_version(self, wheel):
        assert PROJECT["dynamic"] == ["version"]
        assert wheel.name == f"pldr-{pldr.__version__}-py3-none-any.whl"

    def test_entry_points_load(self, wheel):
        name = f"pldr-{pldr.__version__}.dist-info/entry_points.txt"
        text = zipfile.ZipFile(wheel).read(name).decode()
        points = re.findall(r"^\[(\S+)\]\n(\S+) = (\S+)$", text, re.MULTILINE)
        assert [point[:2] for point in points] == [
            ("console_scripts", "pldr"), ("lm_eval.models", "pldr"), ("transformer_lens.architectures", "PldrForCausalLM"),
            ("vllm.general_plugins", "pldr"),
        ]  # fmt: skip
        for group, name, value in points:
            if not group.startswith("transformer_lens"):  # whose classes that one's are made of; tests/clients loads it
                assert callable(importlib.metadata.EntryPoint(name, value, group).load())

    def test_metadata(self, wheel):
        text = zipfile.ZipFile(wheel).read(f"pldr-{pldr.__version__}.dist-info/METADATA").decode()
        fields = HeaderParser().parsestr(text)
        assert set(fields.get_all("Provides-Extra")) == {
            "train",
            "eval",
            "export",
            "quantize",
            "serve",
            "serve-light",
            "studio",
            "docs",
            "dev",
        }
        assert fields["License-Expression"] == "Apache-2.0"
        assert {url.split(",")[0] for url in fields.get_all("Project-URL")} == {
            "Homepage", "Source", "Issues", "Changelog", "Documentation"
        }  # fmt: skip

    def test_the_package_page_shows_its_pictures(self, wheel):
        text = zipfile.ZipFile(wheel).read(f"pldr-{pldr.__version__}.dist-info/METADATA").decode()
        assert HeaderParser().parsestr(text)["Author"]
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
        assert len(pictures) == 2
        for picture in pictures:
            path = picture.removeprefix("https://raw.githubusercontent.com/pldr-llm/pldr/main/")
            assert path != picture
            assert (ROOT / path).is_file()


@pytest.mark.slow
class TestDistributions:
    """Wheel and source distribution, built twice of what is in the repository."""

    @pytest.fixture(scope="class")
    @staticmethod
    def built(tmp_path_factory):
        pytest.importorskip("hatchling", reason="a tool of development")
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if listed.returncode:
            pytest.skip("not a clone: which files are the repository's is not known")
        folders = [tmp_path_factory.mktemp(name) / "tree" for name in ("first", "second")]
        for number, folder in enumerate(folders):
            for name in filter(None, listed.stdout.split("\0")):
                if (ROOT / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, folder / name)
                    os.utime(folder / name, (1e9 + number, 1e9 + number))
                    mode = (ROOT / name).stat().st_mode
                    (folder / name).chmod(mode & 0o700 if number else mode | 0o044)
            command = [sys.executable, "-m", "hatchling", "build"]
            environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(number)}
            subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)
        return [sorted((folder / "dist").iterdir()) for folder in folders]

    def test_they_are_the_same_to_the_byte(self, built):
        first, second = built
        assert [file.name for file in first] == [file.name for file in second]
        assert len(first) == 2
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name

    def test_they_name_no_place_on_this_machine(self, built):
        source, wheel = sorted(built[0], key=lambda file: file.suffix)
        with tarfile.open(source) as archive:
            held = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
            assert {(member.uid, member.gid, member.uname, member.gname) for member in archive} == {(0, 0, "", "")}
        with zipfile.ZipFile(wheel) as archive:
            held |= {name: archive.read(name) for name in archive.namelist()}
        places = {str(ROOT), f"{Path.home()}/", str(built[0][0].parents[2]), "/Users/", "C:\\Users"}
        found = [(name, place) for name, content in held.items() for place in places if place.encode() in content]
        assert [pair for pair in found if not pair[0].endswith("tests/test_packaging.py")] == []

    def test_the_source_distribution_holds_what_development_needs(self, built):
        (source,) = (file for file in built[0] if file.name.endswith(".tar.gz"))
        with tarfile.open(source) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"CONTRIBUTING.md", "LICENSE", "Makefile", "constraints-dev.txt", "requirements-dev.lock", ".ci/run",
                "recipes/laptop.yaml", "tests/conftest.py", "mkdocs.yml", "docs/certify.md"} <= names  # fmt: skip


class TestImports:
    def test_the_package_alone_is_light(self):
        code = (
            "import sys, pldr; print(*sorted({'torch', 'transformers', 'rich', 'numpy', 'typer'} & set(sys.modules)))"
        )
        assert run_python(code).split() == []

    # What an extra brings, and the rooms that need it.
    EXTRAS = {  # noqa: RUF012
        "train": (["accelerate", "matplotlib", "tensorboard", "scipy"], ("training.", "study.demo", "study.run")),
        "eval": (["lm_eval", "scipy"], ("evaluation.harness", "evaluation.lm_eval")),
        "serve-light": (["prometheus_client"], ("serving.",)),
        "studio": (["fastapi", "uvicorn"], ("serving.", "studio.app")),
        "serve": (["vllm"], ("integrations.vllm_model",)),
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("extras", [[*EXTRAS], *([name] for name in EXTRAS)], ids=" ".join)
    def test_only_these_rooms_need_the_extra(self, extras):
        """Every other module is imported without it; what it needs of it, it imports where it is used.

        The model comes first, and brings nothing of training or text.
        """
        code = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(sys.argv[1:])
import pldr.modeling_pldr
print(*(name for name in ("datasets", "sentencepiece", "matplotlib") if sys.modules.get(name)))
for module in pkgutil.walk_packages(pldr.__path__, "pldr."):
    try:
        module.name == "pldr.__main__" or importlib.import_module(module.name)
    except ImportError:
        print(module.name.removeprefix("pldr."))
"""
        missing, rooms = zip(*(self.EXTRAS[extra] for extra in extras), strict=True)
        brought, *found = run_python(code, *chain(*missing)).splitlines()
        assert brought == ""
        for needing in rooms:
            assert any(name.startswith(needing) for name in found)
        # Kernels need Triton, which torch's build for the CPU does not bring; and vLLM and TransformerLens are not developed with.
        kernels = tuple(f"ops.decoding.{name}" for name in ("attention", "choice", "few", "launch", "many"))
        known = (*chain(*rooms), *kernels, "integrations.vllm_model", "integrations.lens")
        assert [name for name in found if not name.startswith(known)] == []


class TestVersions:
    """What pyproject.toml allows is what is tried."""

    def test_the_oldest_are_the_lower_bounds(self):
        extras = PROJECT["optional-dependencies"]
        needed = [
            Requirement(text)
            for text in [*PROJECT["dependencies"], *extras["train"], *extras["eval"], *extras["serve-light"]]
        ]
        bounds = {need.name: next(s.version for s in need.specifier if s.operator == ">=") for need in needed}
        torch = bounds.pop("torch")
        pins = [Requirement(line) for line in lines(ROOT / ".ci" / "oldest.txt")]
        assert [canonicalize_name(pin.name) for pin in pins] == list(bounds)
        for pin in pins:
            assert pin.specifier.contains(bounds[canonicalize_name(pin.name)]), pin
        (oldest,) = (entry for entry in MATRIX["include"] if entry["target"] == "test-oldest")
        assert Requirement(oldest["torch"]).specifier.contains(torch)

    def test_torch_is_one_version_in_development(self):
        assert f"TORCH ?= {next(iter(lines(ROOT / 'constraints-dev.txt')))}\n" in MAKEFILE

    def test_pythons(self):
        named = [name.split(" :: ")[-1] for name in PROJECT["classifiers"] if " :: Python :: 3." in name]
        assert named == MATRIX["python"]
        assert PROJECT["requires-python"] == f">={named[0]}"


class TestConda:
    RECIPE = yaml.safe_load((ROOT / "deploy/conda/recipe.yaml").read_text(encoding="utf-8"))

    def test_its_requirements_are_those_of_the_project(self):
        ours = [Requirement(text) for text in PROJECT["dependencies"]]
        named = {
            {"pytorch": "torch"}.get(need.name, need.name): need
            for need in map(Requirement, self.RECIPE["requirements"]["run"])
        }
        assert named.pop("python").specifier == Requirement(f"python{PROJECT['requires-python']}").specifier
        assert {name: need.specifier for name, need in named.items()} == {need.name: need.specifier for need in ours}
        assert {Requirement(text).name for text in self.RECIPE["requirements"]["host"]} == {
            "python",
            "pip",
            "hatchling",
        }

    def test_it_is_this_version_with_its_command(self):
        assert self.RECIPE["context"]["version"] == pldr.__version__
        assert self.RECIPE["about"]["license"] == PROJECT["license"]
        assert self.RECIPE["build"]["python"]["entry_points"] == [f"pldr = {PROJECT['scripts']['pldr']}"]

    @pytest.mark.slow
    def test_its_script_and_its_tests_run(self, tmp_path):
        """As conda would run them, into a folder of their own; the builder itself is on no Python package index."""
        pytest.importorskip("hatchling", reason="a tool of development")
        script = shlex.split(self.RECIPE["build"]["script"])
        assert script[0] == "python"
        # Without --ignore-installed pip would take away the pldr that these tests run with.
        aside = ["--prefix", str(tmp_path), "--ignore-installed"]
        subprocess.run([sys.executable, *script[1:], *aside], cwd=ROOT, check=True, capture_output=True)
        (site,) = tmp_path.rglob("site-packages")
        scripts = tmp_path / ("Scripts" if os.name == "nt" else "bin")
        environment = os.environ | {"PYTHONPATH": str(site)}
        imported, commands = (test.get("python", test.get("script")) for test in self.RECIPE["tests"])
        code = "".join(f"import {name}\n" for name in imported["imports"]) + "print(pldr.__file__)"
        lines = [[str(scripts / "pldr"), *shlex.split(command)[1:]] for command in commands]
        said = [
            subprocess.run(
                line, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
            ).stdout.strip()
            for line in ([sys.executable, "-c", code], *lines)
        ]
        assert said[:2] == [str(site / "pldr/__init__.py"), f"pldr {pldr.__version__}"]
        assert all(said)
        assert importlib.metadata.distribution("pldr").version == pldr.__version__


class TestRepository:
    @pytest.mark.parametrize(
        "file", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / "CITATION.cff"], ids=lambda p: p.name
    )
    def test_it_is_yaml(self, file):
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)

    def test_ci_and_workflows_call_targets_that_exist(self):
        targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
        assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets)
        script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        release = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
        called = re.search(r"for target in (.*); do", script)[1].split()
        in_matrix = {*MATRIX["target"], *(entry["target"] for entry in MATRIX["include"])}
        assert set(called) == in_matrix
        assert in_matrix | set(re.findall(r"run: make (\S+)", release)) <= targets

    def test_citation(self):
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        assert citation["cff-version"] == "1.2.0"
        assert citation["repository-code"] == PROJECT["urls"]["Source"]
        assert citation["license"] == PROJECT["license"]
        assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2502.13502"
