"""A clustering, found by whatever method or by hand, on its way to a shelf."""

from __future__ import annotations

from pathlib import Path

import pytest

from factory import make_adapter
from lorashelf import Clustering, Shelf, cluster, new_settings, partition, plan_cluster
from lorashelf.errors import UsageError

NAMED = {name: make_adapter(i) for i, name in enumerate("dbca")}


@pytest.mark.parametrize("method", ["random", "agglomerative", "single"])
def test_names_are_clustered_as_their_adapters(method: str) -> None:
    names = sorted(NAMED)
    blocks = partition([NAMED[name] for name in names], 2, method=method, seed=5)
    assert cluster(NAMED, 2, method=method, seed=5) == Clustering(
        tuple(tuple(names[i] for i in block) for block in blocks), method, 5
    )


def test_no_adapters_are_refused(tmp_path: Path) -> None:
    snapshot = Shelf.create(tmp_path / "s", new_settings(2, bytes=10**6)).snapshot()
    with pytest.raises(UsageError, match="no adapters are given"):
        plan_cluster(snapshot, {}, Clustering([], "by hand"))


def test_a_clustering_by_hand_is_stored_with_its_report(tmp_path: Path) -> None:
    by_hand = Clustering((("d", "c"), ("b", "a")), "by hand", report={"reason": "languages"})
    made, plan = Shelf.create_with(tmp_path / "s", new_settings(2), lambda s: plan_cluster(s, NAMED, by_hand))
    assert [slot.members for slot in made.manifest.slots] == [("a", "b"), ("c", "d")]
    assert plan.report["partition"] == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert (plan.report["method"], plan.report["seed"], plan.report["reason"]) == ("by hand", None, "languages")
    cause = made.manifest.cause
    assert (cause["method"], cause["seed"], cause["search"]) == ("by hand", None, {"reason": "languages"})
    assert (
        "search"
        not in Shelf.create_with(
            tmp_path / "t", new_settings(2), lambda s: plan_cluster(s, NAMED, cluster(NAMED, 2, method="random"))
        )[0].manifest.cause
    )


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ((("a", "b"), ("c",)), "does not match these adapters: d"),
        ((("a", "b"), ("c", "d", "e")), "does not match these adapters: e"),
        ((("a", "b"), ("b", "c", "d")), "a task occurs twice"),
        ((("a", "b", "c", "d"), ()), "a block is empty"),
        ((), "it is empty"),
        ((("a",), ("b",), ("c", "d")), "3 blocks, the shelf 2 slots"),
    ],
)
def test_a_clustering_that_does_not_fit_is_refused(
    blocks: tuple[tuple[str, ...], ...], said: str, tmp_path: Path
) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(2))
    with pytest.raises(UsageError, match=said):
        plan_cluster(shelf.snapshot(), NAMED, Clustering(blocks, "by hand"))
