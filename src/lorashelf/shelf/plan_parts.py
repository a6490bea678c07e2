"""Parts of every plan: the base that all agree on, what is stored with a task, the next manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..digest import canonical_json
from ..errors import CorruptShelf, NotStorable
from ..lora.adapter import Adapter, BaseId
from ..lora.alignment import aligned
from ..names import problem_type
from ..version import VERSION
from .manifest import PENDING_TIME, Manifest
from .plan import Plan
from .settings import Settings
from .snapshot import Snapshot


@contextlib.contextmanager
def all_damage(snapshot: Snapshot) -> Iterator[None]:
    """If the block meets a damaged slot, raise CorruptShelf that names all damaged slots."""
    try:
        yield
    except CorruptShelf:
        snapshot.check_bytes(*(slot for slot in snapshot.manifest.slots if slot.readable))
        raise


def kind_of(task: str, *stated: str | None) -> str:
    """Return the problem type: the first one stated, else the name before the first "-". Raises TaskNameError."""
    return next((problem_type(kind) for kind in stated if kind is not None), task.partition("-")[0])


def storable(task: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what is stored with a task. Raises NotStorable if JSON cannot hold it."""
    try:
        canonical_json(dict(details))
    except NotStorable as error:
        what = f"details of task {task!r} cannot be stored: {error.__cause__}"
        raise NotStorable(what, cure="give plain JSON values") from error
    return dict(details)


def planned(
    snapshot: Snapshot,
    manifest: Manifest,
    writes: Mapping[int, Adapter],
    cause: Mapping[str, Any],
    report: Mapping[str, Any],
    shrinks: bool = False,
) -> Plan:
    """Return the plan that makes this the manifest after the snapshot's, under the settings in force."""
    settings = snapshot.settings
    following = replace(
        manifest,
        parent=snapshot.head,
        sequence=snapshot.manifest.sequence + 1,
        recipe=settings.recipe,
        budget=settings.budget.document(),
        cause={**cause, "time": PENDING_TIME, "version": VERSION},
        state=None,
        undo=(),
        redo=(),
        ended=snapshot.timeline.redo,
    )
    return Plan(snapshot.head, following, writes, report, shrinks=shrinks)


def agreed_base(
    snapshot: Snapshot, adapters: Mapping[str, Adapter], held: Sequence[Adapter], assume: bool
) -> BaseId | None:
    """Return the base of the shelf with these adapters added to those `held`. Raises as `common_base`."""
    stored = snapshot.manifest.base if snapshot.manifest.slots else None
    return common_base(snapshot.settings, stored, adapters, held, assume, str(snapshot.path))


def common_base(
    settings: Settings,
    stored: BaseId | None,
    adapters: Mapping[str, Adapter],
    held: Sequence[Adapter],
    assume: bool,
    where: str | None = None,
) -> BaseId | None:
    """Return the base of the shelf with these adapters: the first known name. Raises BaseMismatch naming all others
    and every shape that disagrees with the rest or with those `held`; ShapeMismatch if only shapes disagree.
    """
    base, faults = settings.agreed(stored, {task: x.base for task, x in adapters.items()}, assume)
    cure = "if these are one model under two names: --assume-base, or --base-alias NAME (base_aliases in shelf.toml)"
    aligned([*held, *adapters.values()], faults, where, cure)
    return base
