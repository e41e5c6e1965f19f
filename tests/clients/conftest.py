"""Tests with other people's programs, as they are installed, and the record of what works with them.

`make test-clients` runs them in an environment of their own, with the versions of `.ci/clients.txt`. A test says by the fixture
`row` what it tries; `table.py` makes the table in docs/ecosystem.md of the record. To try one client alone, install it and run
its file: the record of other tests stays as it is.
"""

import copy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from table import OPERATORS, record

from pldr import freeze
from pldr.study.compress import factored_copy

HERE = Path(__file__).parent
_ROWS = pytest.StashKey[list]()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture
def row(request):
    """`row(client, use, *operators, refused="")`: what the test tries of a client (a package), and with which operators.

    With `refused`, the test shows that we say no, and that is why.
    """
    rows = request.node.stash.setdefault(_ROWS, [])

    def tried(client, use, *operators, refused=""):
        assert operators
        assert set(operators) <= set(OPERATORS), operators
        try:
            fields = {"client": client, "version": version(client), "use": use}
        except PackageNotFoundError:
            pytest.skip(f"{client} is not installed; run: make test-clients")
        test = f"{request.path.name}::{request.node.originalname}"
        rows.extend(
            fields | {"operator": operator, "outcome": refused or "works", "test": test} for operator in operators
        )

    return tried


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test tried replaces what was known of it, at once: a run that is stopped keeps what it has found."""
    report = yield
    if report.when == "call" and not report.skipped and _ROWS in item.stash:
        failed = {} if report.passed else {"outcome": f"fails: {call.excinfo.typename}"}
        record([row | failed for row in item.stash[_ROWS]])
    return report


# --- models to try them with ----------------------------------------------------------------------------------------


@pytest.fixture(params=OPERATORS)
def operator(request):
    """Each kind of operator in turn."""
    return request.param


@pytest.fixture(scope="session")
def model_folder(stories, tmp_path_factory):
    """`model_folder(operator)`: the model that ships with pldr, with such an operator, and its tokenizer in a folder.

    Made once for all tests; a test that writes into it takes a copy.
    """
    learned, tokenizer = stories
    made = {}

    def folder(operator):
        if operator not in made:
            model = learned
            if operator != "learned":
                ids = tokenizer("Once upon a time there was a king", return_tensors="pt").input_ids
                model = freeze(copy.deepcopy(learned), ids)
                model = factored_copy(model, ids) if operator == "factored" else model
            made[operator] = tmp_path_factory.mktemp("models") / f"stories-{operator}"
            model.save_pretrained(made[operator])
            tokenizer.save_pretrained(made[operator])
        return made[operator]

    return folder
