"""A process that dies at any moment, a power cut at any moment: the shelf stands at the old head or at the new one.

Real processes end with os._exit before, or in the middle of, every filesystem call of every operation (crash/child.py);
a power cut leaves what was fsynced, and of the rest nothing or a part (crash/disk.py). Whatever is left is judged the
same way (crash/judge.py); the twins show that the judge objects where fsync does nothing or HEAD is written in place.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crash import child
from crash.disk import Disk, Picture, in_memory, picture, restored
from crash.judge import Case, faults, head, state, tidy
from crash.scenes import LONG, SCENES, SHELF, A, standing
from lorashelf import Shelf, plan_add

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "VECLIB")}
Left = Iterator[tuple[str, Picture, Path]]


def every(names: Iterable[str] = SCENES) -> pytest.MarkDecorator:
    """The parameter `name` of a test that is run in each of these scenes."""
    named = [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in names]
    return pytest.mark.parametrize("name", named)


every_scene = every()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """case(name): the scene of this name, run once unharmed."""
    with in_memory(tmp_path_factory.mktemp("scenes")) as top:
        yield functools.cache(lambda name: Case.of(SCENES[name], top / name))


def killed(name: str, base: Path, out: Path, *options: str) -> Left:
    """What the killed processes left, in order; the last one lived to acknowledge."""
    command = [sys.executable, child.__file__, name, str(base), str(out), *options]
    ran = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    for point in json.loads(ran.stdout):
        yield f"killed before call {point}", picture(out / point), out / point


def power_cuts(case: Case, out: Path, seed: int | None, **options: Any) -> Left:
    """What a power cut leaves before each call, and after the last one."""
    disk = Disk(case.base, **options)
    for number, call in enumerate(case.calls):
        yield f"power cut before {call[:2]}", disk.after_power_cut(seed and seed + number), out / str(number)
        disk.play([call])
    yield "power cut after the acknowledgement", disk.after_power_cut(seed), out / "acknowledged"


def objections(case: Case, left: Left) -> list[str]:
    """What the judge says; the last thing left was acknowledged."""
    *points, last = left
    found = faults(points, lambda root: (case.check(root, acknowledged=False), case.follow(root)))
    return found + faults([last], lambda root: (case.check(root, acknowledged=True), case.follow(root)))


@every_scene
def test_a_process_killed_at_any_call_leaves_the_old_or_the_new(name, case, room):
    one = case(name)
    left = list(killed(name, one.base, room))
    roots = [root for _, _, root in left]
    assert [root.name for root in roots if "-" not in root.name] == [str(i) for i in range(len(one.calls) + 1)]
    assert left[-1][1] == one.final
    heads = [head(root / one.scene.target) for root in roots]
    assert [each for each, _ in itertools.groupby(heads)] == list(dict.fromkeys([one.before[0], one.after[0]]))
    found = objections(one, iter(left))
    assert not found, "\n".join(found)


@every_scene
@pytest.mark.parametrize("seed", [None, 1000, 2000], ids=lambda seed: f"part {seed}" if seed else "none")
def test_a_power_cut_at_any_call_leaves_the_old_or_the_new(name, seed, case, room):
    one = case(name)
    found = objections(one, power_cuts(one, room, seed))
    assert not found, "\n".join(found)


@every(name for name, scene in SCENES.items() if scene.prepare)
def test_what_the_writer_after_a_kill_acknowledges_survives_a_power_cut(name, case, room):
    """Only on shelves whose making was acknowledged: the name of another may go, and all of it with the name."""
    one = case(name)

    def next_writer(root: Path) -> None:
        disk = Disk(one.base)
        disk.play(one.calls[: int(root.name)])
        disk.play(one.follow(root))
        for seed in (None, 1):
            cut = restored(disk.after_power_cut(seed), root.with_suffix(f".{seed}"))
            assert state(cut / SHELF) == state(root / SHELF), "what was acknowledged is lost"

    disk, points = Disk(one.base), []
    for number, call in enumerate(one.calls):
        points.append((f"killed before {call[:2]}", disk.standing(), room / str(number)))
        disk.play([call])
    found = faults(points, next_writer)
    assert not found, "\n".join(found)


@every_scene
def test_the_watched_disk_is_the_real_one(name, case):
    """Nothing is written past lorashelf.atomic, and the replay of what was seen is what is there."""
    one = case(name)
    disk = Disk(one.base)
    disk.play(one.calls)
    assert disk.standing() == one.final


def test_an_add_makes_stored_objects_coarser(case):
    one = case("an add that makes stored objects coarser")
    before, after = (Shelf(root / SHELF).snapshot().manifest for root in (one.base, one.base.parent / "run"))
    for old in before.slots:
        new = after.slot(old.id)
        assert new.object.files == old.object.files[: len(new.object.files)] != old.object.files


# the twins: a disk, a commit and a judge that are wrong


@pytest.mark.parametrize(
    "dropped",
    [lambda inode: True, lambda inode: isinstance(inode.durable, dict), lambda inode: isinstance(inode.durable, bytes)],
    ids=["every fsync", "fsync of folders", "fsync of files"],
)
@pytest.mark.parametrize("name", ["init", "cluster", "write_adapter", "an add that opens", "undo"])
def test_a_power_cut_is_noticed_where_fsync_does_nothing(name, dropped, case, room):
    assert objections(case(name), power_cuts(case(name), room, None, dropped=dropped))


def test_a_kill_is_noticed_where_head_is_written_in_place(case, room):
    one = case("an add that opens")
    assert objections(one, killed("an add that opens", one.base, room, "--in-place"))


@pytest.mark.parametrize("wrong", ["before", "after"])
def test_the_judge_notices_another_state_than_the_old_or_the_new(wrong, case, room):
    one = case("an add that folds")
    mistaken = replace(one, **{wrong: case("an add that opens").before})
    assert objections(mistaken, power_cuts(one, room, None))


def left_in_tmp(shelf: Shelf) -> None:
    (shelf.path / "tmp" / ".left").write_text("")


def unreached_object(shelf: Shelf) -> None:
    (shelf.path / "objects" / f"b2-{0:064}").mkdir()


def older_manifest(shelf: Shelf) -> None:
    (shelf.path / "manifests" / f"b2-{0:064}.json").write_text("")


def forgotten_operation(shelf: Shelf) -> None:
    (shelf.path / "log.jsonl").unlink()


def damaged_object(shelf: Shelf) -> None:
    path = next(shelf.path.glob("objects/*/adapter_model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("damage", [left_in_tmp, unreached_object, older_manifest, forgotten_operation, damaged_object])
def test_the_judge_notices_what_is_not_tidy(damage, tmp_path):
    shelf = standing(a=A)(tmp_path / SHELF)
    plan = plan_add(shelf.snapshot(), SCENES["undo"].later, "later")
    predicted = shelf.snapshot().at_rest(plan)
    shelf.commit(plan)
    tidy(shelf, predicted)
    with pytest.raises(AssertionError):
        tidy(shelf, predicted + 1)
    damage(shelf)
    with pytest.raises(AssertionError):
        tidy(shelf, predicted)
