"""The error tree: every failure that a caller can meet: what happened, where, and the cure.

    LorashelfError
    ├── UsageError            2  the request cannot be carried out
    │   ├── UnknownName       2  no such task, method, policy …; has the closest names
    │   ├── MissingExtra      2  an optional package is not installed; has the install command
    │   ├── NotStorable       2  a value that JSON cannot represent
    │   └── TaskNameError     2  a task name that is taken or not valid
    ├── AdapterError          3  an adapter is refused
    │   ├── AdapterFormatError    3  the files are not a LoRA adapter that can be read exactly
    │   ├── BaseMismatch          3  trained on another base model than the other adapters
    │   ├── ShapeMismatch         3  the factors do not fit the other adapters or the base
    │   ├── NameMismatch          3  the modules may be those of the other adapters under different names
    │   └── NotExportable         6  the format of an export cannot hold the adapters
    ├── ShelfError            4  the shelf cannot do what was asked
    │   ├── ShelfNotFound         4  there is no shelf at this path
    │   ├── ShelfConfigError      4  shelf.toml is invalid or contradicts what is stored
    │   ├── CorruptShelf          4  stored bytes differ from what the manifest records
    │   ├── NewerFormat           4  written by a newer version of lorashelf
    │   ├── ShelfLocked           4  another writer holds the lock
    │   ├── StaleShelf            4  the head has moved since the plan was made
    │   ├── OverBudget            4  the result exceeds the limit on slots or bytes
    │   ├── Refused               4  the policy or the budget refuses an adapter
    │   └── NotReversible         4  the history needed to undo something is gone
    ├── DiskError             4  the file system refused: full, read-only, no permission
    ├── ModelError            5  the language model, or an evaluation with it, failed
    │   ├── OutOfMemory           5  memory ran out, on any device
    │   ├── TooLong               5  a text does not fit into the model's context
    │   ├── TimedOut              5  an answer was not finished in time
    │   └── Busy                  5  too many requests wait for the model, or it is shutting down
    ├── TaskDataError         5  a task folder cannot be read or used
    ├── Interrupted         130  Ctrl-C, SIGTERM or SIGHUP after part of the work; `done` says which
    └── Unread              141  the reader of standard output has closed the pipe

The number is the exit code of the command line. All faults of one adapter are raised at once, in `faults`; each
has its own cure, and `cure` holds the distinct ones, one per line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own needs Python 3.11


def numbered(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> numbered(1, "adapter"), numbered(2, "adapter")
    ('1 adapter', '2 adapters')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class LorashelfError(Exception):
    """Base of every error that lorashelf raises on purpose: `what` happened, `where`, and the `cure`, one per line."""

    exit_code = 1
    kind = "error"

    def __init__(self, what: str, *, where: str | None = None, cure: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.cure = cure
        self.done: Mapping[str, Any] = {}
        """What was done before the failure, for the error's document."""

    def amended(
        self,
        *,
        what: str | None = None,
        where: str | None = None,
        cure: str | None = None,
        done: Mapping[str, Any] | None = None,
        exit_code: int | None = None,
    ) -> Self:
        """Return the same error with details that the caller knows, to raise instead of this one."""
        changes = {"what": what, "where": where, "cure": cure, "done": done, "exit_code": exit_code}
        known = type(self).__new__(type(self), what or self.what)
        known.__dict__ |= self.__dict__ | {name: value for name, value in changes.items() if value is not None}
        known.__cause__ = self.__cause__
        return known.with_traceback(self.__traceback__)

    def __str__(self) -> str:
        where = f"\n  where: {self.where}" if self.where else ""
        cures = "".join(f"\n  cure:  {line}" for line in (self.cure or "").splitlines())
        return f"{self.what}{where}{cures}"


class UsageError(LorashelfError):
    """The request cannot be carried out."""

    exit_code = 2
    kind = "usage"


class UnknownName(UsageError):
    """A name that does not exist; `nearest` holds the closest existing names."""

    kind = "unknown_name"

    def __init__(self, noun: str, name: str, known: Sequence[str], *, where: str | None = None) -> None:
        from difflib import get_close_matches

        self.name = name
        self.nearest = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, self.nearest))}?" if self.nearest else None
        listing = ", ".join(known) if known else "none"
        super().__init__(f"unknown {noun} {name!r}", where=where, cure=hint or f"known: {listing}")


class MissingExtra(UsageError):
    """An optional package is not installed; `extra` is the extra that installs it."""

    kind = "missing_extra"

    def __init__(self, purpose: str, package: str, extra: str, *, instead: str | None = None) -> None:
        """`instead` is a cure other than the installation."""
        self.package = package
        self.extra = extra
        installation = f"pip install 'lorashelf[{extra}]'"
        super().__init__(
            f"{purpose} needs {package}", cure=f"{instead}, or {installation}" if instead else installation
        )


class NotStorable(UsageError, ValueError):
    """A value that JSON cannot represent: NaN, infinity, a number beyond 2^53."""

    kind = "not_storable"


class TaskNameError(UsageError):
    """A task name that is taken or not valid."""

    kind = "task_name"


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason why an adapter is refused: what is wrong, and its cure."""

    what: str
    cure: str | None = None

    def at(self, name: str) -> Fault:
        """Return the same fault, naming the module or adapter."""
        return replace(self, what=f"{name}: {self.what}")


class AdapterError(LorashelfError):
    """An adapter is refused; `faults` lists all reasons, `reasons` each with its cure."""

    exit_code = 3
    kind = "adapter"
    verdict = "adapter refused"

    def __init__(self, faults: Sequence[str | Fault], *, where: str | None = None, cure: str | None = None) -> None:
        """`cure` is for the faults without their own."""
        reasons = (fault if isinstance(fault, Fault) else Fault(fault) for fault in faults)
        self.reasons = tuple(reason if reason.cure else replace(reason, cure=cure) for reason in reasons)
        self.faults = tuple(reason.what for reason in self.reasons)
        shown = "\n".join(f"  - {fault}" for fault in self.faults)
        count = numbered(len(self.faults), "fault")
        cures = dict.fromkeys(reason.cure for reason in self.reasons if reason.cure)
        super().__init__(f"{self.verdict} ({count}):\n{shown}", where=where, cure="\n".join(cures) or cure)


class AdapterFormatError(AdapterError):
    """The files are not a LoRA adapter that can be read exactly."""

    kind = "adapter_format"


class BaseMismatch(AdapterError):
    """The adapter was trained on another base model than the other adapters."""

    kind = "base_mismatch"


class ShapeMismatch(AdapterError):
    """The adapter's factors do not fit those of the other adapters or the base."""

    kind = "shape_mismatch"


class NameMismatch(AdapterError):
    """The adapter's modules may be those of the other adapters under different names, and no rule decides."""

    kind = "name_mismatch"


class NotExportable(AdapterError):
    """The format of an export cannot hold the adapters."""

    exit_code = 6
    kind = "export"
    verdict = "not exported"


class ShelfError(LorashelfError):
    """The shelf cannot do what was asked."""

    exit_code = 4
    kind = "shelf"


class ShelfNotFound(ShelfError):
    """There is no shelf at this path."""

    kind = "shelf_not_found"


class ShelfConfigError(ShelfError):
    """shelf.toml cannot be read, or contradicts what is stored; `faults` lists all reasons."""

    kind = "shelf_config"

    def __init__(self, faults: Sequence[str], *, where: str | None = None, cure: str | None = None) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults), where=where, cure=cure)


class CorruptShelf(ShelfError):
    """Stored bytes differ from what the manifest records."""

    kind = "corrupt"


class NewerFormat(ShelfError):
    """The shelf was written by a newer version of lorashelf."""

    kind = "newer_format"


class ShelfLocked(ShelfError):
    """Another writer holds the lock."""

    kind = "locked"


class StaleShelf(ShelfError):
    """The head has moved since the plan was made."""

    kind = "stale"


class OverBudget(ShelfError):
    """The result exceeds the limit on slots or bytes."""

    kind = "over_budget"


class Refused(ShelfError):
    """The policy or the budget refuses an adapter."""

    kind = "refused"


class NotReversible(ShelfError):
    """The history needed to undo something is gone."""

    kind = "not_reversible"


class DiskError(LorashelfError):
    """The file system refused: full, read-only, no permission."""

    exit_code = 4
    kind = "disk"


class ModelError(LorashelfError):
    """The language model, or an evaluation with it, failed."""

    exit_code = 5
    kind = "model"


class OutOfMemory(ModelError):
    """Memory ran out, on any device; smaller pieces may fit."""

    kind = "out_of_memory"


class TooLong(ModelError):
    """A text does not fit into the model's context."""

    kind = "too_long"


class TimedOut(ModelError):
    """An answer was not finished in time."""

    kind = "timed_out"


class Busy(ModelError):
    """Too many requests wait for the model, or it is shutting down; later they may be taken."""

    kind = "busy"


class TaskDataError(LorashelfError):
    """A task folder cannot be read or used; `faults` lists file, line and field, `cures` the cure of each fault."""

    exit_code = 5
    kind = "task_data"

    def __init__(self, faults: Mapping[str, str], *, where: str | None = None) -> None:
        self.faults = tuple(faults)
        self.cures = dict(faults)
        super().__init__("; ".join(faults), where=where, cure="\n".join(dict.fromkeys(faults.values())))


class Interrupted(LorashelfError):
    """Ctrl-C, SIGTERM or SIGHUP after part of the work, which is kept; `done` lists it. The exit code is 128 plus the
    signal's number.
    """

    exit_code = 130
    kind = "interrupted"


class Unread(LorashelfError):
    """The reader of standard output has closed the pipe."""

    exit_code = 141
    kind = "unread"
