"""The table in docs/ecosystem.md, from the record of `make test-clients`: python tests/clients/table.py."""

import json
from pathlib import Path

from pldr.files import write_text

OPERATORS = ("learned", "frozen", "factored")
RECORD = Path(__file__).parent / "record.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
BEGIN, END = "<!-- table: tests/clients/table.py -->\n", "<!-- end of table -->\n"


def read_record():
    """A row a line: client, its version, use, operator, outcome ("works", or why not), test."""
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()] if RECORD.exists() else []


def record(rows):
    """Put the rows into the record, in place of those of the same tests, uses and operators."""

    def tried(row):
        return row["test"], row["use"], row["operator"]

    anew = {tried(row) for row in rows}
    rows = [*rows, *(row for row in read_record() if tried(row) not in anew)]
    lines = {json.dumps(row, ensure_ascii=False) for row in rows}
    write_text(RECORD, "".join(f"{line}\n" for line in sorted(lines)))


def table(rows):
    """Markdown: a line for each use of a client, a column for each kind of operator."""
    lines = [
        f"| client | use | {' | '.join(OPERATORS)} | test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    uses = {}
    for row in rows:
        key = f"{row['client']} {row['version']}", row["use"]
        cells, tests = uses.setdefault(key, ({}, set()))
        cells[row["operator"]] = row["outcome"]
        tests.add(row["test"])
    for (client, use), (cells, tests) in sorted(uses.items()):
        outcomes = " | ".join(cells.get(operator, "") for operator in OPERATORS)
        lines.append(f"| {client} | {use} | {outcomes} | {', '.join(f'`{test}`' for test in sorted(tests))} |")
    return "\n".join(lines) + "\n"


def page(text, rows):
    """The page with its table anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read_record()), encoding="utf-8")
