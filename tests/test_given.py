"""The public functions take any iterable where several are wanted, and refuse what is none in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import assert_same_delta, make_adapter
from lorashelf import (
    Adapter,
    Clustering,
    Shelf,
    combine,
    gram,
    merge,
    new_settings,
    partition,
    plan_add,
    plan_cluster,
    plan_update,
    similarity,
)
from lorashelf.errors import LorashelfError, TaskNameError, UsageError

X, Y = make_adapter(1), make_adapter(2)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf.create(tmp_path / "s", new_settings(2))


LISTS: dict[str, Callable[[Any], Any]] = {
    "merge": lambda xs: merge(xs, method="linear"),
    "combine": lambda xs: combine(xs, [1, 1]),
    "similarity": similarity,
    "similarity to": lambda xs: similarity([X, Y], xs),
    "gram": gram,
    "partition": lambda xs: partition(xs, 1, method="single"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("form", [iter, tuple, reversed, lambda xs: dict(enumerate(xs)).values()])
def test_any_iterable_is_a_list(name: str, form: Callable[[list[Adapter]], Any]) -> None:
    given = form([X, Y])
    expected = LISTS[name]([Y, X] if form is reversed else [X, Y])
    found = LISTS[name](given)
    if isinstance(expected, Adapter):
        assert_same_delta(found, expected, tolerance=0)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("adapters/one", "is the string 'adapters/one', not a list of adapters"),
        (X, "is of type Adapter, not a list of adapters"),
        (None, "is of type NoneType, not a list of adapters"),
        (7, "is of type int, not a list of adapters"),
        ({"a": X}, "is of type dict, not a list of adapters"),
        ([X, "adapters/one"], "[1] is the string 'adapters/one', not an Adapter"),
        ([X, Path("one")], "[1] is of type PosixPath, not an Adapter"),
    ],
)
def test_what_is_no_list_of_adapters_is_refused_in_words(name: str, wrong: Any, said: str) -> None:
    if wrong is None and name == "similarity to":
        return  # without, it is the similarity within
    with pytest.raises(UsageError) as caught:
        LISTS[name](wrong)
    assert said in caught.value.what
    assert caught.value.cure


@pytest.mark.parametrize("function", [combine, lambda xs, ws: merge(xs, ws, method="linear")])
def test_weights_are_numbers(function: Callable[[Any, Any], Adapter]) -> None:
    expected = function([X, Y], [0.25, 0.75])
    for form in (iter([0.25, 0.75]), np.array([0.25, 0.75]), (w for w in ("0.25", "0.75"))):
        assert_same_delta(function([X, Y], form), expected, tolerance=0)
    for wrong, said in (("0.25,0.75", "not a list of numbers"), (1.0, "not a list"), ([1, "x"], "not a number")):
        with pytest.raises(UsageError) as caught:
            function([X, Y], wrong)
        assert said in caught.value.what


@pytest.mark.parametrize(
    ("wrong", "said"),
    [([X, Y], "of type list, not a mapping"), ("adapters", "the string"), ({"a": "adapters/a"}, "not an Adapter")],
)
def test_cluster_takes_a_mapping(shelf: Shelf, wrong: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_cluster(shelf.snapshot(), wrong, Clustering((("a",),), "by hand"))
    assert said in caught.value.what


def test_one_adapter_is_an_adapter_and_a_name_is_text(shelf: Shelf) -> None:
    with pytest.raises(UsageError, match="the string 'adapters/a', not an Adapter"):
        plan_add(shelf.snapshot(), "adapters/a", "a")
    with pytest.raises(TaskNameError, match="7 is not text"):
        plan_add(shelf.snapshot(), X, 7)
    with pytest.raises(TaskNameError, match="7 is not text"):
        plan_cluster(shelf.snapshot(), {7: X, "a": Y}, Clustering((("a",),), "by hand"))
    shelf.commit(plan_add(shelf.snapshot(), X, "a"))
    with pytest.raises(UsageError, match="not an Adapter"):
        plan_update(shelf.snapshot(), "a", "adapters/a")


def test_several_aliases_are_a_list() -> None:
    assert new_settings(2, base_aliases=(name for name in ("a", "b"))).base_aliases == ("a", "b")
    with pytest.raises(LorashelfError, match="the string 'acme/one', not a list of strings"):
        new_settings(2, base_aliases="acme/one")
