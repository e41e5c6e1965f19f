"""The table in docs/ecosystem.md is that of the record, and the record that of the tests with clients."""

import ast
import sys
from pathlib import Path

CLIENTS = Path(__file__).parent / "clients"
sys.path.insert(0, str(CLIENTS))
from table import OPERATORS, PAGE, page, read_record  # noqa: E402


def client_tests():
    for path in sorted(CLIENTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{path.name}::{node.name}", [argument.arg for argument in node.args.args]


def test_every_test_with_a_client_has_its_rows():
    """A test says by `row` what it tries of a client; one without it looks at what is ours."""
    tests = {test: arguments for test, arguments in client_tests() if "row" in arguments}
    assert {test.split("::")[0] for test in tests} == {test.split("::")[0] for test, _ in client_tests()}
    rows = read_record()
    assert {row["test"] for row in rows} == set(tests), "run: make test-clients"
    for test, arguments in tests.items():
        if "operator" in arguments:
            uses = {(row["client"], row["use"]) for row in rows if row["test"] == test}
            tried = {row["operator"] for row in rows if (row["client"], row["use"]) in uses}
            assert {"learned", "frozen"} <= tried <= set(OPERATORS), test


def test_the_page_shows_the_record():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text, read_record()), "run: python tests/clients/table.py"
    assert "fails" not in page("", read_record())
