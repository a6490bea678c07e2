"""JSON documents that other programs rely on: these keys stay, and more may be added. docs/cli.md is generated from
them.

The keys of a class that is `total=False` may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict


class Coded(TypedDict):
    """The rate of a coded object."""

    bytes: int
    """the size of its levels"""
    percent: float
    """`bytes` as a percentage of its adapters in 16 bits"""
    predicted_quality: float | None
    """the predicted share of the gain in loss that is kept; null for an average of several adapters"""


class Coarser(TypedDict):
    """A stored object that lost levels to make room: each key has `[before, after]`."""

    levels: list[int]
    """the number of levels"""
    bytes: list[int]
    """their size"""
    predicted_quality: list[float]
    """the predicted share of the gain in loss that is kept"""


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


class Summary(TypedDict):
    """The predicted qualities of several tasks."""

    mean: float
    """their mean"""
    least: float
    """the least"""
    task: str
    """the task that has the least"""


class Packed(TypedDict):
    """The answer of `pack` and `convert`."""

    shelf: str
    """the new shelf"""
    head: str
    """the id of its manifest"""
    bytes: int
    """everything under its folder"""
    budget: dict[str, Any]
    """`{slots, bytes, keep}`; null means no limit"""
    predicted_quality: Summary | None
    """`{mean, least, task}`: the mean over tasks, the least, and the task that has it; null without tasks"""
    tasks: dict[str, Coded]
    """task → the rate of its object"""


class CurvePoint(Summary):
    """A point of `curve`: what all adapters together take and keep."""

    bytes: int
    """the size of the coded objects"""
    percent: float
    """`bytes` as a percentage of the adapters in 16 bits"""


class Curve(TypedDict):
    """The answer of `plan --coded`."""

    adapters: int
    """the number of adapters"""
    budget: int | None
    """`--bytes`"""
    within: CurvePoint | None
    """the best point within `budget`"""
    curve: list[CurvePoint]
    """all points, the smallest first"""


class CodeLevel(TypedDict):
    """An entry of `levels` of a coded file: the file up to a level."""

    bytes: int
    """the bytes up to this level"""
    percent: float
    """`bytes` as a percentage of the adapter in 16 bits"""
    energy_kept: float
    """the share of ‖ΔW‖² that is kept"""
    predicted_quality: float
    """the predicted share of the gain in loss that is kept"""
    directions: int
    """the number of directions that the level adds"""


class Fit(TypedDict):
    """`fit` of `compress --examples`: losses of the validation split, by which the step of the fit is chosen, in nats
    per token.
    """

    examples: int
    """their number"""
    own: float
    """with the adapter itself"""
    as_coded: float
    """with the code of the adapter"""
    fitted: float
    """with the code that is written"""


class _CodeFile(TypedDict):
    output: str
    """what was written"""
    bytes: int
    """the bytes of all levels, and of the file that `compress` writes"""
    percent: float
    """`bytes` as a percentage of the adapter in 16 bits"""
    energy_kept: float
    """the share of ‖ΔW‖² that all levels keep, before gains are fitted"""
    predicted_quality: float
    """the predicted share of the gain in loss that is kept, without examples"""
    levels: list[CodeLevel]
    """the file up to each level"""


class CodeFile(_CodeFile, total=False):
    """The answer of `compress` and `extract`."""

    fit: Fit
    """of `compress --examples`"""


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
