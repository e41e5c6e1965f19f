"""Did a change of the code leave every number as it was? Runs the commands before and after it, and compares their JSON.

    python benchmarks/same_numbers.py --before 310322c              # that commit against the working tree
    python benchmarks/same_numbers.py --before 310322c --keep DIR   # and keep what was captured, to compare again sooner

Numbers and texts are compared bit for bit but timings, dates, versions and what is derived from them. What a later version says
in other words stands in `RENAMED`; keys that it adds are listed, and are no difference. Exit code 1 where there is one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "piqa-like"
TINY_RUN = ["train", "demo-cpu", "optimization.steps=12", "optimization.warmup_steps=4", "log_steps=3", "eval_steps=6",
            "save_steps=6", "data.sequence_length=64", "report_to=[]"]  # fmt: skip
# Names of 0.1.0.dev0 that say the same in other words now.
RENAMED = {
    "computed": "learned", "full": "learned", "mode": "cache", "comes with the package": "ships with pldr",
    "held-out excerpts that come with the package": "held-out excerpts that ship with pldr",
}  # fmt: skip
# What two runs of the same code differ in: timings, and what says when and with what it was run.
VARYING = {
    "seconds",
    "tokens_per_second",
    "seconds_per_token",
    "date",
    "versions",
    "command",
    "folder",
    "output",
    "size",
}


def capture(source: Path, folder: Path) -> dict[str, Any]:
    """Run every command with the package in `source`, and return what they say."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "PLDR_CACHE": str(folder)}
    stories = source / "src/pldr/models/stories-10m"
    held_out = stories / "held-out.jsonl"

    def pldr(*arguments: object) -> dict[str, Any]:
        command = [sys.executable, "-m", "pldr", *map(str, arguments)]
        print("  pldr", *arguments, file=sys.stderr)
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        # Code 1 of certify is a verdict.
        if done.returncode not in (0, 1) or not done.stdout.strip():
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        last = done.stdout.strip().splitlines()[-1]
        return json.loads(last) if last.startswith("{") else {"text": done.stdout.strip()}

    found: dict[str, Any] = {
        "demo": pldr("demo", "--output", "demo", "--json"),
        "certify": pldr(
            "certify", stories, held_out, "--passages", 8, "--length", 128, "--output", "certified", "--json"
        ),
        "eval": pldr("eval", stories, "--tasks", "piqa", "--compare", "--data-dir", FIXTURE, "--json"),
        "perplexity": pldr(
            "eval", stories, "--perplexity", FIXTURE / "piqa" / "valid.jsonl", "--window", 128, "--json"
        ),
        "inspect": pldr("inspect", stories, "--passages", 8, "--length", 128, "--html", "report.html", "--json"),
        "generate": pldr(
            "generate", "The old man", "--seed", 1, "--temperature", 0.8, "--top-k", 40, "--cache", "kv+g", "--json"
        ),
        "info": pldr("info", stories, "--json"),
        "train": pldr(*TINY_RUN, "output=run", "--json"),
        "train, handed off": pldr(*TINY_RUN, "output=handed", "optimization.handoff_step=6", "--json"),
    }
    pldr("freeze", stories, "frozen", "--prompt", "Any text will do.")
    pldr("convert", stories, "reference", "--to", "reference")
    pldr("convert", "frozen", "hub", "--to", "hub")
    pldr("reproduce", "caching", "--output", "reproduced")
    found["reproduce caching"] = json.loads((folder / "reproduced/caching/results.json").read_text(encoding="utf-8"))
    # The training logs, and the weights that were written.
    for run in ("run", "handed"):
        lines = (folder / run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        found[f"log of {run}"] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("train_", "total_flos", "epoch"))}
            for line in lines
        ]
    written = sorted([*folder.glob("*/*.safetensors"), *folder.glob("*/*.pth")])
    assert len(written) >= 6, written
    found["weights"] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in written
    }
    text = json.dumps(found)
    for path, name in ((FIXTURE, "FIXTURE"), (stories, "STORIES"), (source, "SOURCE"), (folder, "FOLDER")):
        text = text.replace(str(path), name)
    cleaned: dict[str, Any] = json.loads(text)
    cleaned["certify"].pop("sha256", None)  # over the date, too
    return cleaned


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """What `after` lacks or has otherwise, and, marked with +, what it adds."""
    if isinstance(before, dict) and isinstance(after, dict):
        # Another name wins where it is new, also over one that says something else by now: "mode" of the demo's texts.
        new = {name: RENAMED[name] for name in before if RENAMED.get(name) in after.keys() - before.keys()}
        named = {new.get(name, name): value for name, value in before.items()}
        for name, value in named.items():
            if name in VARYING:
                continue
            if name not in after:
                yield f"{place}.{name}: is gone"
            else:
                yield from differences(value, after[name], f"{place}.{name}")
        yield from (f"+ {place}.{name}" for name in after if name not in named)
    elif (
        isinstance(before, list)
        and isinstance(after, list)
        and (len(before) == len(after) or _adds_rows(before, after))
    ):
        for index, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
        yield from (f"+ {place}[{index}]" for index in range(len(before), len(after)))
    elif json.dumps(before) != json.dumps(after) and (not isinstance(before, str) or RENAMED.get(before) != after):
        yield f"{place}: {json.dumps(before)[:80]} before, {json.dumps(after)[:80]} after"


def _adds_rows(before: list[Any], after: list[Any]) -> bool:
    """Whether a table has more rows below those that it had; a list of numbers has no rows."""
    return len(after) > len(before) > 0 and all(isinstance(row, dict) for row in (*before, *after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit to compare the working tree with")
    parser.add_argument("--keep", type=Path, help="folder for what was captured of that commit, used again where it is")
    arguments = parser.parse_args()
    revision = subprocess.run(
        ["git", "rev-parse", arguments.before], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as place:
        kept = (arguments.keep or Path(place)) / f"{revision}.json"
        if not kept.is_file():
            print(f"before: {revision[:7]}", file=sys.stderr)
            old, results = Path(place) / "old", Path(place) / "before"
            subprocess.run(["git", "worktree", "add", "--detach", str(old), revision], cwd=ROOT, check=True)
            try:
                results.mkdir()
                captured = capture(old, results)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(captured), encoding="utf-8")
        print("after: the working tree", file=sys.stderr)
        results = Path(place) / "after"
        results.mkdir()
        found = list(differences(json.loads(kept.read_text(encoding="utf-8")), capture(ROOT, results)))
    for line in found:
        print(line)
    changed = [line for line in found if not line.startswith("+")]
    print(f"{len(changed)} differences")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
