"""Output of the commands: one JSON document, or tables for people; progress goes to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from unicodedata import combining, east_asian_width

from ..errors import DiskError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

T = TypeVar("T")
INTERVAL = 30.0  # seconds between lines of progress without a terminal


def show(document: Any, as_json: bool, view: Callable[[Any], Any]) -> None:
    """Print the document of a finished command: as JSON, or as the lines and tables that `view` makes of it. Raises
    DiskError with a message that the command is done.
    """
    try:
        if as_json:
            print_json(document)
        else:
            shown = view(document)
            print_parts(shown if isinstance(shown, list) else [shown])
        sys.stdout.flush()
    except DiskError as error:
        what = f"the command is done, but its output is lost: {error.what}"
        raise error.amended(what=what) from error.__cause__


def print_parts(parts: Iterable[object]) -> None:
    """Print lines and tables for people."""
    from rich.console import Console  # here and below: a tenth of the start-up time, which --json never needs

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # a pipe gets whole lines
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def print_fitting(*texts: str) -> None:
    """Print, unbuffered, the first of these lines that fits the terminal's width, or the last one cut if none does. A
    pipe gets the first.
    """
    text = texts[0]
    if sys.stdout.isatty():
        width = get_terminal_size().columns
        text = next((each for each in texts if cells(each) <= width), texts[-1])
        while cells(text) > width:
            text = text.removesuffix("…")[:-1] + "…"
    print(text, flush=True)


def cells(text: str) -> int:
    """Return a text's width in terminal columns: two for a wide character, none for a combining mark."""
    return sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in text)


def print_json(document: object) -> None:
    """Print one JSON document on stdout, escaped if stdout cannot encode all of Unicode."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_finite(document), ensure_ascii=not unicode, allow_nan=False))


def _finite(value: object) -> object:
    """Return the document with null instead of NaN and infinity, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a plain table; columns whose name starts with '>' are right-aligned."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        number = name.startswith(">")  # in a narrow terminal names are wrapped, numbers are not
        justify: Literal["left", "right"] = "right" if number else "left"
        drawn.add_column(name.lstrip(">"), justify=justify, overflow="fold", no_wrap=number)
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, str) else _cell(cell) for cell in row))
    return drawn


def progress(items: Sequence[T], title: str) -> Iterable[T]:
    """Return the items, with a progress bar and an ETA if stderr is a terminal and there are several items."""
    if len(items) < 2 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True), transient=True)


class Meter:
    """Progress of counted work on stderr: a bar with the remaining time on a terminal, else lines."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun: tuple[int, float] | None = None
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        self._row: TaskID | None = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            console = Console(stderr=True)
            self._bar = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, speed_estimate_period=600
            )
            self._row = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int, text: str, force: bool = False) -> None:
        """Show the progress: without a terminal as a line, if `force` or if the last line is half a minute old."""
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=done, description=text)
            return
        now = time.monotonic()
        first, since = self._begun = self._begun or (done, now)
        if force or now - self._printed >= INTERVAL:
            self._printed = now
            left = "" if done == first else f", {duration((now - since) * (self._total - done) / (done - first))} left"
            note(f"{text}  ({done} of {self._total}{left})")


def coding(names: Iterable[str]) -> Iterator[str]:
    """Yield the names of adapters, showing each as progress: it is being coded."""
    return counted(list(names), lambda name: f"coding {name}")


def counted(items: Sequence[T], describe: Callable[[T], str]) -> Iterator[T]:
    """Yield the items, showing each as progress with the remaining time: a bar on a terminal, else a line at times."""
    with Meter(len(items)) as meter:
        for done, item in enumerate(items):
            meter.at(done, describe(item))
            yield item


def duration(seconds: float) -> str:
    """Format seconds for people.

    >>> duration(42.4), duration(130), duration(7500)
    ('42 s', '2 min 10 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def note(text: str) -> None:
    """Print a line for people on stderr."""
    print(text, file=sys.stderr)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
