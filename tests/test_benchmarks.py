"""The script that shows whether a change left every number as it was: it must see a number that changed."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "same_numbers.py"
spec = importlib.util.spec_from_file_location("same_numbers", SCRIPT)
same_numbers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_numbers)


def differences(before, after):
    return list(same_numbers.differences(before, after))


def test_what_is_the_same_is_no_difference():
    before = {"losses": {"full": 1.25, "cached": [1.0, None]}, "seconds": 3.0, "calibration": "comes with the package"}
    after = {"losses": {"learned": 1.25, "cached": [1.0, None]}, "seconds": 4.0, "calibration": "ships with pldr"}
    assert differences(before, after) == []
    assert differences(before, after | {"new": 1}) == ["+ .new"]


def test_the_last_bit_counts():
    one, other = 0.1 + 0.2, 0.3
    (line,) = differences({"a": [{"b": one}]}, {"a": [{"b": other}]})
    assert line.startswith(".a[0].b: 0.30000000000000004 before, 0.3 after")
    assert differences({"a": 1}, {"a": 1.0})
    assert differences({"a": [1, 2]}, {"a": [1]})
    assert differences({"a": None}, {"a": 0})


def test_what_is_gone_counts():
    assert differences({"a": {"b": 1}}, {"a": {}}) == [".a.b: is gone"]


def test_rows_that_a_table_adds_are_additions_and_longer_lists_are_not():
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 1}, {"b": 2}]}) == ["+ .a[1]"]
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 3}, {"b": 2}]}) == [".a[0].b: 1 before, 3 after", "+ .a[1]"]
    assert len(differences({"a": [1]}, {"a": [1, 2]})) == 1
