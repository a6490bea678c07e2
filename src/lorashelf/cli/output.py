"""What the commands print: one JSON document, or tables for people; progress goes to stderr."""

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
TELLING = 30.0  # seconds between lines of progress where there is no terminal


def show(document: Any, as_json: bool, view: Callable[[Any], Any]) -> None:
    """Print the document of a command that is done: as JSON, or the lines and tables that `view` makes of it. Raises
    DiskError, saying that it is done.
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


def print_parts(parts: Iterable[Any]) -> None:
    """Print lines and tables for people."""
    from rich.console import Console  # here and below: a tenth of the start, which --json never needs

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # a pipe gets whole lines
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def print_fitting(*texts: str) -> None:
    """Print, at once, the first of these lines that fits the terminal's width, the last one cut if none does. A pipe
    gets the first.
    """
    text = texts[0]
    if sys.stdout.isatty():
        width = get_terminal_size().columns
        text = next((each for each in texts if cells(each) <= width), texts[-1])
        while cells(text) > width:
            text = text.removesuffix("…")[:-1] + "…"
    print(text, flush=True)


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide letter, none for a mark on another letter."""
    return sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in text)


def print_json(document: Any) -> None:
    """One JSON document on stdout, escaped where stdout cannot hold all of Unicode."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_finite(document), ensure_ascii=not unicode, allow_nan=False))


def _finite(value: Any) -> Any:
    """The document with null in place of NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; columns whose name starts with '>' are aligned to the right."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        number = name.startswith(">")  # names are folded where a line is too short, numbers are not
        justify: Literal["left", "right"] = "right" if number else "left"
        drawn.add_column(name.lstrip(">"), justify=justify, overflow="fold", no_wrap=number)
    for row in rows:
        drawn.add_row(*(cell if isinstance(cell, str) else _cell(cell) for cell in row))
    return drawn


def progress(items: Sequence[T], title: str) -> Iterable[T]:
    """The items, with a progress bar and an ETA on stderr where that is a terminal and there are several."""
    if len(items) < 2 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, console=Console(stderr=True), transient=True)


class Meter:
    """Counted work on stderr: a bar with the time left on a terminal, else lines."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun: tuple[int, float] | None = None
        self._told = time.monotonic()
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

    def at(self, done: int, text: str, telling: bool = False) -> None:
        """Show how far the work is: without a terminal as a line, if `telling` or if the last is half a minute old."""
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=done, description=text)
            return
        now = time.monotonic()
        first, since = self._begun = self._begun or (done, now)
        if telling or now - self._told >= TELLING:
            self._told = now
            left = "" if done == first else f", {duration((now - since) * (self._total - done) / (done - first))} left"
            note(f"{text}  ({done} of {self._total}{left})")


def counted(items: Sequence[T], said: Callable[[T], str]) -> Iterator[T]:
    """The items, each said, with the time left on stderr: a bar on a terminal, else a line now and then."""
    with Meter(len(items)) as meter:
        for done, item in enumerate(items):
            meter.at(done, said(item))
            yield item


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42.4), duration(130), duration(7500)
    ('42 s', '2 min 10 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def note(text: str) -> None:
    """A line for people on stderr."""
    print(text, file=sys.stderr)


def size(count: float) -> str:
    """A number of bytes in units of 1000, as `--bytes` takes it.

    >>> size(597), size(1234), size(499_000), size(2_500_000_000)
    ('597 B', '1.2 kB', '0.50 MB', '2.50 GB')
    """
    if count < 1e3:
        return f"{count:.0f} B"
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def rate(coded: Mapping[str, Any]) -> str:
    """What a coded object takes and keeps.

    >>> rate({"bytes": 18432, "percent": 1.0, "predicted_quality": 0.954})
    '18.4 kB (1.00 % of 16 bits), predicted quality 0.954'
    """
    kept = coded["predicted_quality"]
    quality = "" if kept is None else f", predicted quality {kept:.3f}"
    return f"{size(coded['bytes'])} ({coded['percent']:.2f} % of 16 bits){quality}"


def coded_lines(item: Mapping[str, Any]) -> list[str]:
    """How a task was coded on a shelf that counts bytes, on one line, from the longest wording to the shortest."""
    coded = f"{item['task']}: {rate(item['coded'][item['task']])}"
    if not item["coarser"]:
        return [coded]
    return [
        f"{coded}; coarser now: {', '.join(item['coarser'])}",
        f"{coded}; {len(item['coarser'])} coarser now",
        coded,
    ]


def score(value: float | None) -> str:
    """A similarity with its sign, four decimals; '-' for none."""
    return "-" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
