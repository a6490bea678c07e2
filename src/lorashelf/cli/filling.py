"""Commands that create a shelf and fill it: init, add."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LorashelfError, Refused, TaskNameError, UsageError, numbered
from ..lora.adapter import Adapter
from ..lora.quality import MOST_QUALITY
from ..lora.similarity import SHARED_INIT
from ..names import task_name
from ..placement.policies import BYTES
from ..report.decisions import decision_lines
from ..report.numbers import size
from ..shelf.arrival import plan_add
from ..shelf.plans import check_arrivals
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from . import arguments as arg
from .output import Meter, note, print_fitting, show
from .process import interrupted

Arrivals = Sequence[tuple[str, Adapter]]
_GROWN = 4.0  # times the members' mean norm: `ties` reaches 2 to 3 in ten folds, DARE doubles the norm in each fold


def init(
    context: typer.Context,
    shelf: arg.ShelfPath,
    slots: Annotated[
        int | None, typer.Option("--slots", help="K, the number of slots; not with policy bytes.", show_default=False)
    ] = None,
    bytes: arg.Bytes = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="kmerge++ (default with --slots), kmerge, bytes (default without); half, random, oracle, all for "
            "experiments.",
            show_default=False,
        ),
    ] = None,
    threshold: arg.Threshold = None,
    floor: arg.Floor = None,
    held_out: arg.HeldOut = None,
    merge: arg.Merge = "linear",
    parameter: arg.Parameters = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    keep: arg.Keep = 1,
    seed: arg.Seed = 0,
    base: arg.BaseName = None,
    base_alias: arg.Aliases = None,
    restore_norm: arg.RestoreNorm = False,
    encoding: Annotated[
        str | None,
        typer.Option(
            "--encoding",
            help="How slots are stored: peft (default), or coded (compressed; `route` writes PEFT folders).",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality",
            help=f"With coded: the predicted share of each adapter that is kept; default 0.99, at most {MOST_QUALITY} "
            "(the default without slots).",
            show_default=False,
        ),
    ] = None,
    json: arg.Json = False,
) -> None:
    """Create an empty shelf of K slots, or of a number of bytes.

    With --bytes and without --slots, every task has a coded object of its own; objects get coarser as space runs out.
    """
    policy = policy or (BYTES if slots is None else "kmerge++")
    if slots is None and (bytes is None or policy != BYTES):
        what = "neither slots nor bytes are given" if policy == BYTES else f"policy {policy!r} needs slots"
        cure = "give --slots K, or --bytes SIZE and no other policy for a coded object per task"
        raise UsageError(what, cure=cure)
    if floor is not None and policy != BYTES:
        raise UsageError(f"policy {policy!r} has no floor", cure="omit --floor, or give --bytes SIZE without --slots")
    if policy == BYTES and (unread := arg.stated(context, {"merge": "--merge", "parameter": "-p"})):
        listed = ", ".join(unread)
        raise UsageError(
            f"policy 'bytes' merges nothing, and does not use {listed}", cure=f"omit {listed}, or give --slots K"
        )
    limit = arg.threshold(threshold, held_out, policy)
    settings = new_settings(
        slots,
        bytes=bytes,
        policy=policy,
        threshold=limit,
        floor=floor,
        merge=merge,
        parameters=arg.parameters(parameter),
        rank=rank,
        dtype=dtype,
        keep=keep,
        seed=seed,
        base=base,
        base_aliases=tuple(base_alias or ()),
        restore_norm=restore_norm,
        encoding=encoding,
        quality=quality,
    )
    made = Shelf.create(shelf, settings).snapshot()
    document = {"shelf": str(shelf), "head": made.head, "slots": slots, "policy": policy, "threshold": limit}
    if settings.placement.by_bytes:
        room = f"{size(bytes or 0)} for coded objects"
        show(document, json, lambda _: f"{shelf}: {room}, predicted quality at least {settings.placement.floor:g}")
    else:
        settled = f"policy {policy}, threshold {limit}, merge {merge}"
        show(document, json, lambda _: f"{shelf}: {numbered(slots or 0, 'free slot')}, {settled}")


def add(
    shelf: arg.ShelfPath,
    adapters: arg.Adapters,
    task: Annotated[str | None, typer.Option("--task", help="The task's name (one adapter only).")] = None,
    type: Annotated[
        str | None, typer.Option("--type", help="Problem type; default: the name before the first '-'.")
    ] = None,
    task_file: arg.TaskFile = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip tasks that are on the shelf with the same adapter.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would happen; change nothing.")] = False,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Put adapters on the shelf, in order: each opens a free slot or is folded into the nearest.

    All of them are read before the first is added. After an interrupt, --skip-existing continues.
    """
    report: dict[str, Any] = {"added": []} | ({"skipped": []} if skip_existing else {})
    with _reporting(report, shelf, dry_run):
        _check_names(adapters, task)
        opened = Shelf(shelf)
        arrivals = arg.read_each(adapters, task)
        details = arg.details([name for name, _ in arrivals], task_file)
        arg.note_adapters(dict(arrivals))
        with contextlib.nullcontext() if dry_run else opened.writing(), _watched(len(arrivals), json) as print_decision:
            snapshot = opened.snapshot()
            arrivals, skipped = _new(snapshot, arrivals, skip_existing)
            report |= {"skipped": skipped} if skip_existing else {}
            check_arrivals(snapshot, dict(arrivals), assume_base=assume_base)
            for name, adapter in arrivals:
                plan = plan_add(snapshot, adapter, name, type=type, details=details[name], assume_base=assume_base)
                arg.note_untrained({name: adapter})
                report["added"].append({**plan.report, "head": None})
                if not dry_run:
                    report["added"][-1]["head"] = opened.commit(plan)
                if plan.refused is not None:
                    raise Refused(f"{plan.report['task']} is refused: {plan.refused}", where=str(shelf))
                snapshot = snapshot.after(plan) if dry_run else opened.snapshot()
                print_decision(plan.report)
                if "shared" in plan.report:
                    arg.note_few_shared(f"{name} and slot {plan.report['slot']}", plan.report["shared"])
    if json or not report["added"]:
        show(report, json, lambda _: "nothing to add: every task is already on the shelf")


def _check_names(texts: Sequence[str], task: str | None) -> None:
    """Check the names before anything is read. Raises UsageError, TaskNameError."""
    if task is not None and len(texts) > 1:
        raise UsageError(f"--task is for one adapter, not {len(texts)}", cure="name each: NAME=ADAPTER")
    if task is not None and arg.named(texts[0])[0] is not None:
        raise UsageError(f"--task and a name in {texts[0]!r} exclude each other", cure="give one of them")
    names = [task_name(arg.name_of(text, task)) for text in arg.without_files(texts)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskNameError(f"several adapters are named {', '.join(map(repr, twice))}", cure="name them: NAME=ADAPTER")


def _new(snapshot: Snapshot, arrivals: Arrivals, skip: bool) -> tuple[list[tuple[str, Adapter]], list[str]]:
    """Return the arrivals to add, and the names of those already on the shelf. Raises TaskNameError."""
    held = {name: snapshot.manifest.tasks.get(task_name(name)) for name, _ in arrivals}
    there = [(name, adapter) for name, adapter in arrivals if held[name] is not None]
    if there and not skip:
        names, verb = ", ".join(repr(name) for name, _ in there), "are" if len(there) > 1 else "is"
        cure = "choose another name, or lorashelf update to replace the adapter, or --skip-existing to skip it"
        raise TaskNameError(f"{names} {verb} already on the shelf", where=str(snapshot.path), cure=cure)
    others = [name for name, adapter in there if adapter.digest != (held[name] or {})["digest"]]
    if others:
        what = f"on the shelf with another adapter: {', '.join(map(repr, others))}"
        cure = "lorashelf update SHELF TASK ADAPTER replaces it; or give another name"
        raise TaskNameError(what, where=str(snapshot.path), cure=cure)
    return [(name, adapter) for name, adapter in arrivals if held[name] is None], [name for name, _ in there]


@contextlib.contextmanager
def _reporting(report: dict[str, Any], path: Path, dry_run: bool) -> Iterator[None]:
    """Report what was added with every outcome: in an error's document, and in a notice before the error's message."""
    try:
        yield
    except (LorashelfError, KeyboardInterrupt) as error:
        _complete(report, path, dry_run)
        kept = [] if dry_run else [d["task"] for d in report["added"] if d["decision"] != "refuse"]
        if kept:
            note(f"added before that, and kept: {', '.join(kept)}")
            _noted(report)
        cure = "run the same command again" + (" with --skip-existing" if kept else "")
        known = interrupted(error, cure) if isinstance(error, KeyboardInterrupt) else error
        raise known.amended(done=report) from error.__cause__
    if not dry_run:
        _noted(report)


def _complete(report: dict[str, Any], path: Path, dry_run: bool) -> None:
    """Find out whether the last adapter was added: the commit may have been made but not reported."""
    last = report["added"][-1] if report["added"] and not dry_run else None
    if last is None or last["head"] is not None:
        return
    with contextlib.suppress(LorashelfError):
        now = Shelf(path).snapshot()
        if last["task"] in now.manifest.tasks:
            last["head"] = now.head
            return
    report["added"].pop()


def _noted(report: Mapping[str, Any]) -> None:
    _note_originals(report)
    _note_grown(report)
    arg.note_shared_init({f"slot {d['slot']}": (d["init_similarity"], 2) for d in report["added"] if _shares_init(d)})


def _note_grown(report: Mapping[str, Any]) -> None:
    """Print, once per command, which slots hold a merge that has outgrown its members, with their last ratio."""
    ratios = {d["slot"]: d["norm_ratio"] for d in report["added"] if "norm_ratio" in d and not _shares_init(d)}
    grown = [f"{slot} ({ratio:,.0f} times)" for slot, ratio in sorted(ratios.items()) if ratio > _GROWN]
    if grown:
        what = f"‖ΔW‖ is far above the mean of the merged adapters in slot {', '.join(grown)}"
        note(f"{what}: it grows with every fold of this merge method, and answers get worse; under linear it does not")


def _shares_init(added: Mapping[str, Any]) -> bool:
    return bool(added.get("init_similarity", 0.0) > SHARED_INIT)


def _note_originals(report: Mapping[str, Any]) -> None:
    """Print, once per command, that an averaged adapter can be removed again given its original, if that is true."""
    folds = [d for d in report["added"] if d["decision"] == "fold"]
    after = {d["slot"]: d["reversible"] for d in folds}
    if any(d["merged"] and after[d["slot"]] for d in folds):
        note("keep the original adapters: in a shared slot `update` and an exact `remove` need them")


@contextlib.contextmanager
def _watched(count: int, json: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that prints each decision as it is made, with a bar on stderr if no terminal shows them."""
    done = 0
    silent = count < 2 or (sys.stdout.isatty() and not json)
    with contextlib.nullcontext() if silent else Meter(count) as meter:

        def report(item: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            if "reason" in item:
                note(f"{item['task']}: {item['reason']}")
            if not json:
                print_fitting(*decision_lines(item))
            if meter is not None:
                meter.at(done, f"adding: {item['task']}")

        yield report


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "init": (init, "lorashelf init my.shelf --slots 5 --dtype f16"),
    "add": (
        add,
        "lorashelf add my.shelf adapters/gec-de adapters/qa-en  ·  lorashelf add my.shelf mail=out/run7 --dry-run",
    ),
}
