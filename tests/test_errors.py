"""Errors: what happened, where and the cure are apart, and none is changed after it was made."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from lorashelf import errors
from lorashelf.atomic import refusals
from lorashelf.errors import Fault, LorashelfError

SOURCE = Path(inspect.getfile(errors)).parent
FIELDS = {"what", "where", "cure", "done", "exit_code"}
OWN: dict[str, tuple[Any, ...]] = {  # what the classes are made of that take more than one text
    "UnknownName": ("task", "gec-d", ["gec-de"]),
    "MissingExtra": ("this", "torch", "llm"),
    "AdapterError": ([Fault("one", "mend it"), Fault("two")],),
    "ShelfConfigError": (["one", "two"],),
    "TaskDataError": ({"one": "mend it", "two": "mend that"},),
}


def every_class(kind: type[LorashelfError] = LorashelfError) -> list[type[LorashelfError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in every_class(child))]


def made(kind: type[LorashelfError]) -> LorashelfError:
    own = next((OWN[base.__name__] for base in kind.__mro__ if base.__name__ in OWN), ("it failed",))
    return kind(*own)


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_an_amended_error_differs_in_what_was_given_only(kind: type[LorashelfError]) -> None:
    error = made(kind)
    before = dict(vars(error))
    amended = error.amended(where="there", done={"files": []})
    assert type(amended) is kind
    assert vars(amended) == {**before, "where": "there", "done": {"files": []}}
    assert vars(error) == before
    assert str(amended).startswith(f"{error.what}\n  where: there")
    again = error.amended(what="otherwise", cure="this", exit_code=7)
    assert (again.what, again.args, again.cure, again.exit_code) == ("otherwise", ("otherwise",), "this", 7)


def test_an_amended_error_keeps_its_cause_and_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(errors.DiskError) as caught, refusals(tmp_path):
        (tmp_path / "gone").read_bytes()
    amended = caught.value.amended(where="there")
    assert isinstance(amended.__cause__, FileNotFoundError)
    assert amended.__cause__ is caught.value.__cause__
    assert amended.__traceback__ is caught.value.__traceback__


@pytest.mark.parametrize("kind", ["AdapterError", "TaskDataError"])
def test_a_cure_is_a_line_of_its_own(kind: str) -> None:
    cure = made(getattr(errors, kind)).cure or ""
    assert cure.splitlines() == {"AdapterError": ["mend it"], "TaskDataError": ["mend it", "mend that"]}[kind]


def test_no_error_is_changed_after_it_was_made() -> None:
    changed = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr in FIELDS and not _is_own(target):
                    changed.append(f"{path.relative_to(SOURCE)}:{target.lineno}")
    assert changed == []


def _is_own(target: ast.Attribute) -> bool:
    """What a class sets of itself."""
    return isinstance(target.value, ast.Name) and target.value.id == "self"
