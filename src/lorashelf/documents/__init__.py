"""JSON documents that other programs rely on; docs/cli.md is generated from them.

These keys stay, and more may be added. The keys of a class that is `total=False` may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from .coded import Coarser, Coded, CodeFile, CodeLevel, Curve, CurvePoint, Fit, Packed


class Shared(TypedDict):
    """How many modules adapters have in common."""

    modules: int
    """the number of modules that all have"""
    of: int
    """the number of modules of the adapter with the fewest"""


class _Fitted(TypedDict, total=False):
    coded: dict[str, Coded]
    """on a shelf of bytes: task → the rate of the object that serves it now"""
    coarser: dict[str, Coarser]
    """on a shelf of bytes: stored task → what it lost to make room"""


class _Arrived(TypedDict):
    task: str
    """its name"""
    decision: str
    """`open`, `fold` or `refuse`"""
    slot: int | None
    """the slot that serves the task; null if refused"""
    scores: dict[str, float]
    """slot → similarity"""
    threshold: float | None
    """the least similarity for a fold; null for a policy without one"""
    members: list[str]
    """the tasks of the slot"""
    merged: bool
    """whether the adapter was stored or averaged in; false if the task was only routed"""
    reversible: bool | None
    """whether an exact `remove` will be possible; null if refused"""
    head: str | None
    """the id of the shelf's manifest afterwards; null if only tried (`--dry-run`)"""


class Arrived(_Arrived, _Fitted, total=False):
    """An adapter that was offered to a shelf."""

    untrained: bool
    """true for an adapter whose ΔW is 0"""
    shared: Shared
    """after a fold: the modules in common with the slot"""
    norm_ratio: float
    """after a fold: the norm of the merge over the mean norm of its members, before norm restoration"""
    init_similarity: float
    """after a fold by `linear`: the cosine of the A of slot and adapter, near 1 if they share an initialisation"""
    reason: str
    """why it was refused, or folded for lack of bytes"""


class _Added(TypedDict):
    added: list[Arrived]
    """one per adapter, in order, also if only one is given"""


class Added(_Added, total=False):
    """The answer of `add`; `error` is beside it if an adapter failed or was refused."""

    skipped: list[str]
    """with `--skip-existing`: the tasks that are on the shelf already"""


class _Updated(TypedDict):
    task: str
    """its name"""
    slot: int
    """the slot that serves the task"""
    members: list[str]
    """the tasks of the slot"""
    precision: float | None
    """the relative precision of what is left of an average, if the old adapter was taken out of one"""
    head: str
    """the id of the new manifest"""


class Updated(_Updated, _Fitted):
    """The answer of `update`."""


class Removed(TypedDict):
    """The answer of `remove`."""

    task: str
    """its name"""
    slot: int
    """the slot that served the task"""
    removed: str
    """`slot`, `average` (taken out of it) or `route` (the adapter is still averaged in)"""
    reason: str | None
    """why not more than the route was removed"""
    members: list[str]
    """the tasks that are left in the slot"""
    precision: float | None
    """the relative precision of what is left of an average, if the adapter was taken out of one"""
    head: str
    """the id of the new manifest"""


class Route(TypedDict):
    """The answer of `route SHELF TASK`; without TASK, a document of task → this."""

    task: str
    """its name"""
    slot: int
    """the slot that serves it"""
    path: str | None
    """the absolute path of the PEFT folder that serves it; null for a coded slot without TASK"""
    members: list[str]
    """the tasks of the slot"""


class _StoredSlot(TypedDict):
    slot: int
    """its number"""
    object: str
    """the id of its object"""
    rank: int
    """the largest rank of a module"""
    dtype: str
    """`f32`, `f16` or `bf16`"""
    bytes: int
    """the size of the object"""
    merged: list[dict[str, Any]]
    """every adapter averaged in: `{task, type, digest, weight, rank, parameters, dtype, norm}`"""
    members: list[str]
    """the tasks routed to it"""
    error: float
    """the relative error of what compression or coding left out"""
    average: str | None
    """the method by which the content is an equal average; null if it is none"""
    restored: float
    """the factor of norm restoration"""
    encoding: str
    """`peft` or `coded`"""


class StoredSlot(_StoredSlot, total=False):
    """A slot, without its path."""

    worn: int
    """roundings beyond those of folding; written by earlier versions"""
    fixed: str
    """why no adapter can be taken out"""
    percent: float
    """of a coded slot in a list: `bytes` as a percentage of its adapters in 16 bits"""
    predicted_quality: float | None
    """of a coded slot in a list: the predicted share of the gain in loss that is kept; null for an average"""


class ListedSlot(StoredSlot):
    """One of `slots`."""

    path: str | None
    """the absolute path of its PEFT folder; null if it is coded"""


class Listing(TypedDict):
    """The answer of `ls`."""

    slots: list[ListedSlot]
    """every filled slot"""
    tasks: int
    """the number of tasks"""
    bytes: int
    """everything under the shelf's folder"""
    budget: dict[str, Any]
    """`{slots, bytes, keep}`; null means no limit"""
    head: str
    """the id of the manifest"""
    adapters: int
    """the number of different adapters averaged in"""
    adapter_bytes: int
    """what they would take separately, in the dtypes of their slots"""


class _Clustered(TypedDict):
    partition: dict[str, int]
    """task → slot"""
    slots: list[ListedSlot]
    """as in `ls`"""
    method: str
    """the method of partition"""
    seed: int
    """its seed"""
    evaluations: int | None
    """the number of losses measured in this run; null for a method that needs none"""
    shared: dict[str, Shared]
    """slot → the modules in common"""
    merge: str
    """the merge method of the clusters"""
    later_merge: str
    """that of later adds"""
    head: str
    """the id of the manifest"""


class Clustered(_Clustered, total=False):
    """The answer of `cluster`; a method by loss also reports its search."""

    init_similarity: dict[str, float]
    """of a merge by `linear`: slot → the mean cosine of the factors A of its adapters, 0 for one adapter"""


class Compared(TypedDict):
    """The answer of `compare`."""

    names: list[str]
    """the adapters"""
    metric: str
    """the similarity"""
    matrix: list[list[float]]
    """their similarities, in the order of `names`"""


class Verified(TypedDict):
    """The answer of `verify`; the exit code is 4 if there are problems."""

    ok: bool
    """whether there are none"""
    problems: list[str]
    """sentences"""


class Restored(TypedDict):
    """The answer of `undo` and `redo`."""

    head: str
    """the id of the new manifest"""
    to: str
    """the id of the state that it restores"""
    tasks: list[str]
    """the tasks on the shelf now"""
    changed: list[str]
    """the tasks that are served by another object, or have other details"""
    left: list[str]
    """the tasks that are gone"""
    returned: list[str]
    """the tasks that are back"""
    slots: list[int]
    """the slots that changed"""
    undo: int
    """how many states further back `undo` can go"""
    redo: int
    """how many states forward `redo` can go"""


class Collected(TypedDict):
    """The answer of `gc`."""

    head: str
    """the id of the manifest"""
    deleted: list[str]
    """the files and folders deleted"""


class ExportedObject(TypedDict):
    """One of `objects`."""

    slot: int
    """its slot"""
    tasks: list[str]
    """the exported tasks that it serves"""
    path: str
    """its file or folder, relative to `output`"""
    bytes: int
    """its size"""
    error: float
    """the relative error ‖ΔW − ΔŴ‖ / ‖ΔW‖ of what was read back"""
    tolerance: float
    """the most that the format may cause"""


class Exported(TypedDict):
    """The answer of `export`."""

    output: str
    """the absolute path of the new folder"""
    format: str
    """`--format`"""
    objects: list[ExportedObject]
    """one per object"""
    routes: dict[str, str]
    """task → `path` of its object"""
    files: list[str]
    """all files, relative to `output`"""


class _Failure(TypedDict):
    kind: str
    """the kind of error, for programs"""
    message: str
    """what happened"""
    where: str | None
    """the file or folder"""
    cure: str | None
    """what helps, one line per cure"""


class Failure(_Failure, total=False):
    """`error` of every command that fails."""

    faults: list[str]
    """of a refused adapter: all its faults"""
    cures: list[str | None]
    """the cure of each"""


DOCUMENTS: Mapping[str, tuple[type, ...]] = {
    "add": (Added, Arrived, Coded, Coarser),
    "update": (Updated,),
    "remove": (Removed,),
    "route": (Route,),
    "ls": (Listing, ListedSlot),
    "undo": (Restored,),
    "redo": (Restored,),
    "verify": (Verified,),
    "gc": (Collected,),
    "cluster": (Clustered,),
    "pack": (Packed,),
    "convert": (Packed,),
    "compare": (Compared,),
    "plan": (Curve, CurvePoint),
    "export": (Exported, ExportedObject),
    "compress": (CodeFile, CodeLevel, Fit),
    "extract": (CodeFile, CodeLevel),
}
"""Command → its document under `--json`, followed by documents inside it."""
