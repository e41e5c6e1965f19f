"""What the documentation site has besides docs/: README and its neighbours, the command line, the public names, the notebooks; and equations.

A hook of mkdocs.yml. Pages are made when the site is built, so that each text stands in the repository once.
"""

import importlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import matplotlib
import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

import pldr
from pldr.cli import app

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/pldr-llm/pldr"
# Equations need a font that has their letters, which not every system brings; this one may be passed on.
MATH = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSerif.ttf"
RAW = "https://raw.githubusercontent.com/pldr-llm/pldr/main/"
# Pages of the site that are documents of the repository outside docs/.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "report.md": "SECURITY.md",
    "stories-10m.md": "src/pldr/models/stories-10m/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand nowhere in docs/."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in ELSEWHERE.items()}
    made |= {"cli.md": command_line(), "api.md": public_names()}
    made |= {f"notebooks/{file.stem}.md": notebook(file) for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "assets/math.ttf", abs_src_path=str(MATH)))
    return files


# --- links ----------------------------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links lead to pages where the site has one, and else into the repository; pictures are the site's own."""
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files} | {name: uri for uri, name in ELSEWHERE.items()}
    pages |= {file.src_uri.replace(".md", ".ipynb"): file.src_uri for file in files if "notebooks/" in file.src_uri}

    def follow(match: re.Match[str]) -> str:
        target, anchor = match[1].replace(RAW, os.path.relpath(".", os.path.dirname(source)) + "/"), match[2] or ""
        if "://" in target:
            return match[0]
        named = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if named in pages:
            return f"]({os.path.relpath(pages[named], os.path.dirname(page.file.src_uri) or '.')}{anchor})"
        kind = "tree" if (ROOT / named).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{named}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", lambda match: follow(match), markdown)


# --- equations ------------------------------------------------------------------------------------------------------


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Equations become MathML, which browsers draw by themselves."""

    def draw(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return match[1] + convert(_unescaped(match[3]), display=display) + match[4]

    return re.sub(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</)', draw, html, flags=re.S)


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()


# --- the command line -----------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every verb with its arguments, options and example, as the parser knows them."""
    program = typer.main.get_command(app)
    parts = [f"# Command line\n\n{program.help} `-h` after any verb says in the terminal what stands here.\n"]
    for name, command in program.commands.items():
        for verb, one in getattr(command, "commands", {"": command}).items():
            parts.append(_verb(f"pldr {name} {verb}".strip(), one))
    return "\n".join(parts)


def _verb(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    rows = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    example = re.sub(r"\[/?bold\]|\\(?=\[)", "", command.epilog).removeprefix("Example: ")
    table = "\n".join(f"| `{words}` | {_cell(text)} |" for words, text in rows)
    usage = command.get_usage(context).removeprefix("Usage: ")
    return (
        f"## {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n| argument or option | |\n| --- | --- |\n{table}\n\n"
        f"For example:\n\n```bash\n{example}\n```\n"
    )


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("_", "\\_")


# --- the public names -----------------------------------------------------------------------------------------------


def public_names() -> str:
    """What `import pldr` offers, kind by kind, for mkdocstrings to fill."""
    kinds: dict[str, list[str]] = {"Functions": [], "Models": [], "Classes": [], "Places": []}
    for name, module in pldr._PUBLIC.items():
        value = getattr(pldr, name)
        kind = "Functions" if inspect.isfunction(value) else "Places" if not inspect.isclass(value) else "Classes"
        kind = "Models" if kind == "Classes" and name.startswith("Pldr") else kind
        home = value.__module__ if kind != "Places" else f"pldr.{module}"
        kinds[kind].append(f"::: {importlib.import_module(home).__name__}.{name}\n")
    text = "# Python\n\nThe names of `pldr`: `from pldr import load_model`. They are imported on first use.\n"
    return text + "".join(f"\n## {kind}\n\n" + "\n".join(names) for kind, names in kinds.items())


# --- notebooks ------------------------------------------------------------------------------------------------------


def notebook(file: Path) -> str:
    """Its texts, code and the outputs that are kept in it, with a link to where it can be run."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\[!\[(.*?)\]\(.*?\)\]", r"[\1]", source))  # the badge is a picture from elsewhere
        else:
            parts += [f"```python\n{source}\n```", *map(_output, cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="what the cell draws" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/html" in data:
        return f'<div class="output">{"".join(data["text/html"])}</div>'
    return f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).strip()}\n```"
