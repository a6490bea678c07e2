"""The tool that takes checks out: it finds them, what it writes is Python, and a test notices."""

from __future__ import annotations

import ast
from pathlib import Path

import takeout

SAMPLE = """
def read(x, faults):
    if not x or x == "π":
        raise ValueError("x is empty")
    if x > 3:
        x = 3
    try:
        check_range(x)
    except (KeyError, TypeError) as error:
        faults.append(f"{x} is not a number")
    yield from (f"{part} is a fault" for part in x if part < 0)
    for part in x:
        if part > 9:
            faults += [f"{part} is too large"]
"""


def test_the_checks_of_a_file_are_found() -> None:
    found = {check.text: check.without for check in takeout.checks_in(SAMPLE, "sample.py")}
    whole = 'not x or x == "π"'
    assert found == {
        whole: "False",
        "not x": "False",
        'x == "π"': "False",
        "check_range(x)": "pass",
        "KeyError": "()",
        "TypeError": "()",
        "part < 0": "False",
        "part > 9": "False",
    }


def test_a_check_is_replaced_where_it_stands() -> None:
    (check,) = [check for check in takeout.checks_in(SAMPLE, "sample.py") if check.text == "not x"]
    assert 'if False or x == "π":' in takeout.without(check, SAMPLE.encode()).decode()


def test_the_package_without_any_of_its_checks_is_python() -> None:
    checks = takeout.all_checks()
    assert len(checks) > 400
    sources = {check.file: (takeout.SOURCE / check.file).read_bytes() for check in checks}
    for check in checks:
        ast.parse(takeout.without(check, sources[check.file]))


def test_a_test_notices_a_check_that_is_gone_and_none_that_is_there(tmp_path: Path) -> None:
    (check,) = [check for check in takeout.all_checks() if check.text == "name in self._values"]
    test = "tests/test_merging_laws.py::test_a_registered_method_is_offered_to_merge_and_a_taken_name_is_not"
    noticed, line = takeout.verdict(check, [test])
    assert noticed, line
    takeout.copy_without(None, tmp_path)
    assert takeout.run_tests(tmp_path, test)[0] == 0
