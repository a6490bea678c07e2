"""Documents of coded adapters: rates, curves of bytes and quality, files of levels."""

from __future__ import annotations

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
    """`fit` of `compress --examples`: losses of the validation split, in nats per token; they choose the fit's step."""

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
