"""Disks that refuse, and processes that are stopped: full, read-only, kill -9, Ctrl-C.

A full disk is a small real one (tmpfs), where root may mount it; the size limit of files (RLIMIT_FSIZE) is tried
everywhere, and stands in for tmpfs elsewhere. Then ENOSPC is injected from every call of every operation on. A
read-only disk is that tmpfs remounted, and a folder without write permission, which binds root too once it has given up
CAP_DAC_OVERRIDE; each stands in for the other. Which one it was is printed, and recorded as a property of the test.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from crash.disk import in_memory, picture, watched
from crash.judge import Case, state
from crash.scenes import SCENES, A, B, C, standing
from factory import make_adapter, write_peft
from lorashelf import Shelf, new_settings, plan_add, plan_remove, read_adapter, route, write_adapter
from lorashelf.atomic import replace_file
from lorashelf.errors import DiskError
from test_crash import every

PAGE = os.sysconf("SC_PAGE_SIZE")


def lorashelf(*words: object, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [*prefix, sys.executable, "-m", "lorashelf", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def which(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say, and record, how a disk was made to refuse."""

    def say(mechanism: str) -> None:
        record_property("mechanism", mechanism)
        print(f"disk: {mechanism}")

    return say


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 256 pages, None where it cannot be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={256 * PAGE}", "lorashelf-test", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as folder:
        yield folder


# full


@contextlib.contextmanager
def pages_left(disk: Path, count: int) -> Iterator[None]:
    """A disk on which only `count` pages are free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(bytes(PAGE)):
            pass
    os.truncate(filler, filler.stat().st_size // PAGE * PAGE - count * PAGE)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes (Python ignores SIGXFSZ, so a write fails with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["tmpfs", "size limit"])
def full(
    request: pytest.FixtureRequest, tmpfs: Path | None, tmp_path: Path, which: Callable[[str], None]
) -> tuple[Path, Callable[[int], contextlib.AbstractContextManager[None]], int]:
    """A folder, a function that leaves ever more room there, step by step from nothing, and what a full disk says."""
    if request.param == "tmpfs" and tmpfs:
        which("full: tmpfs")
        return tmpfs, lambda step: pages_left(tmpfs, step), errno.ENOSPC
    which("full: RLIMIT_FSIZE")
    return tmp_path, lambda step: largest_file(100 * step), errno.EFBIG


def refusal(operation: Callable[[], Any]) -> DiskError | None:
    """The error that says that the disk is full, None if it was done."""
    try:
        operation()
    except DiskError as error:
        return error
    return None


def fill(shelf: Shelf) -> None:
    shelf.commit(plan_add(shelf.snapshot(), C, "c"))


def free(shelf: Shelf) -> None:
    shelf.commit(plan_remove(shelf.snapshot(), "a"))


@pytest.mark.parametrize("operation", [fill, free, Shelf.undo], ids=["add", "remove", "undo"])
def test_a_full_disk_changes_nothing_however_far_it_came(full, operation):
    folder, leaving, number = full
    shelf = standing(a=A, b=B)(folder / "a.shelf")
    before = picture(shelf.path)
    for step in itertools.count():
        with leaving(step):
            error = refusal(lambda: operation(shelf))
            if error is None:
                break
            assert shelf.verify() == []
        assert picture(shelf.path) == before
        assert os.strerror(number) in str(error)
        assert str(shelf.path) in error.where
        assert "unchanged" in error.cure
        assert error.exit_code == 4
    assert step > 1
    assert shelf.snapshot().manifest.sequence == 3
    shelf.redo() if operation is Shelf.undo else shelf.undo()
    assert shelf.verify() == []
    assert [entry["sequence"] for entry in shelf.log()] == list(range(5))


@pytest.mark.parametrize(
    "make", [lambda path: Shelf.create(path, new_settings(2)), lambda path: write_adapter(A, path)]
)
def test_on_a_full_disk_nothing_half_made_appears(full, make):
    folder, leaving, number = full
    before = picture(folder)
    for step in itertools.count():
        with leaving(step):
            error = refusal(lambda: make(folder / "new"))
        if error is None:
            break
        assert os.strerror(number) in str(error)
        assert picture(folder) == before
    assert step > 1


def test_on_a_full_disk_the_command_line_says_so_and_goes_on_when_there_is_room(full, tmp_path):
    folder, leaving, number = full
    shelf = standing(a=A, b=B)(folder / "a.shelf")
    adapter = write_peft(tmp_path / "adapter", C)
    before = picture(shelf.path)
    with leaving(1):
        said = lorashelf("add", shelf.path, adapter, "--json")
    assert said.returncode == 4
    error = json.loads(said.stdout)["error"]
    assert error["kind"] == "disk"
    assert error["cure"]
    assert os.strerror(number) in error["message"]
    assert error["where"].startswith(str(shelf.path))
    assert f"{error['message']}\n  where: {error['where']}\n" in said.stderr
    assert picture(shelf.path) == before
    assert lorashelf("add", shelf.path, adapter).returncode == 0
    assert lorashelf("verify", shelf.path).stdout == "ok\n"


def asks_for_room(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a full disk may refuse this call."""
    if name == "open":
        return bool(arguments[1] & os.O_CREAT)
    if name == "fsync":
        return stat.S_ISREG(os.fstat(arguments[0]).st_mode)
    return name in ("mkdir", "write", "ftruncate", "rename", "replace")


def full_from(first: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """From call `first` on, what asks for room is refused."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number >= first and asks_for_room(name, arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return before


def interrupted_at(first: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """Ctrl-C at call `first`."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == first:
            raise KeyboardInterrupt

    return before


@pytest.mark.parametrize(("trouble", "error"), [(full_from, DiskError), (interrupted_at, KeyboardInterrupt)])
@every()
def test_trouble_at_any_call_changes_nothing_or_all(name, trouble, error, room):
    """Injected: ENOSPC, Ctrl-C. An error leaves the old state and nothing beside it, or once HEAD has moved the new."""
    scene = SCENES[name]
    one = Case.of(scene, room / "case")
    above = {str(path) for path in Path(scene.target).parents}
    old, states = picture(one.base), []
    for first in range(len(one.calls)):
        root = shutil.copytree(one.base, room / str(first))
        raised = None
        try:
            with watched(root, before=trouble(first)):
                scene.run(root)
        except error as caught:
            raised = caught
        states.append(state(root / scene.target))
        assert states[-1] == one.after or raised
        if states[-1] == one.before and name != "gc":  # which deletes as it goes
            left = picture(root)
            assert {path: left[path] for path in left if path not in above} == old, f"{first} {one.calls[first]}"
    changes = [i for i in range(1, len(states)) if states[i] != states[i - 1]]
    assert states[0] == one.before
    assert len(changes) <= 1
    assert states[-1] == one.after


# read-only


@contextlib.contextmanager
def remounted(disk: Path) -> Iterator[list[str]]:
    """The whole disk read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield []
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[list[str]]:
    """Nobody may write below the folder; root goes without the right to do so all the same."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture(params=["tmpfs", "permissions"])
def read_only(
    request: pytest.FixtureRequest, tmpfs: Path | None, tmp_path: Path, which: Callable[[str], None]
) -> tuple[Path, Callable[[], contextlib.AbstractContextManager[list[str]]], int]:
    """A folder, a function that makes it read-only (giving what a command has to begin with), and the errno of that."""
    bound = not os.geteuid() and not shutil.which("setpriv")
    if tmpfs and (request.param == "tmpfs" or bound):
        which("read-only: tmpfs, remounted")
        return tmpfs, lambda: remounted(tmpfs), errno.EROFS
    assert not bound, "root can neither mount a disk nor go without its rights here: run the tests as another user"
    which("read-only: permissions, " + ("as a user" if os.geteuid() else "as root without CAP_DAC_OVERRIDE"))
    folder = tmp_path / "unwritable"
    folder.mkdir()
    return folder, lambda: unwritable(folder), errno.EACCES


def use_read_only(path: str, number: int) -> None:
    """Everything that reads works, everything that writes is refused in the same words."""
    shelf = Shelf(path)
    snapshot = shelf.snapshot()
    assert [route(snapshot, task)["slot"] for task in "ab"] == [0, 1]
    assert read_adapter(route(snapshot, "a")["path"]).digest == A.digest
    assert [entry["sequence"] for entry in shelf.log()] == [0, 1, 2]
    assert shelf.verify() == []
    plan = plan_add(snapshot, C, "c")
    beside = Path(path).parent
    for write in (
        lambda: shelf.commit(plan),
        shelf.undo,
        shelf.gc,
        lambda: Shelf.create(beside / "new.shelf", new_settings(2)),
        lambda: Shelf.create(beside / "new" / "deep.shelf", new_settings(2)),
        lambda: write_adapter(A, beside / "adapter"),
    ):
        with pytest.raises(DiskError, match=os.strerror(number)) as caught:
            write()
        assert str(beside) in caught.value.where
        assert caught.value.cure
        assert caught.value.exit_code == 4


def test_a_read_only_shelf_can_be_read_and_not_written(read_only):
    folder, frozen, number = read_only
    shelf = standing(a=A, b=B)(folder / "a.shelf")
    before = picture(folder)
    with frozen() as prefix:
        if prefix:
            call = f"import test_disk; test_disk.use_read_only({str(shelf.path)!r}, {number})"
            subprocess.run([*prefix, sys.executable, "-c", call], cwd=Path(__file__).parent, check=True)
        else:
            use_read_only(str(shelf.path), number)
    assert picture(folder) == before


def test_a_read_only_shelf_on_the_command_line(read_only, tmp_path):
    folder, frozen, number = read_only
    shelf = standing(a=A, b=B)(folder / "a.shelf")
    adapter = write_peft(tmp_path / "adapter", C)
    before = picture(folder)
    with frozen() as prefix:
        said = {
            command: lorashelf(command, shelf.path, "--json", prefix=prefix)
            for command in ("ls", "route", "verify", "log")
        }
        refused = lorashelf("add", shelf.path, adapter, "--json", prefix=prefix)
    assert {command: ran.returncode for command, ran in said.items()} == dict.fromkeys(said, 0)
    documents = {command: json.loads(ran.stdout) for command, ran in said.items()}
    assert documents["ls"]["tasks"] == 2
    assert sorted(documents["route"]) == ["a", "b"]
    assert documents["verify"] == {"ok": True, "problems": []}
    assert len(documents["log"]) == 3
    assert refused.returncode == 4
    error = json.loads(refused.stdout)["error"]
    assert error["kind"] == "disk"
    assert os.strerror(number) in error["message"]
    assert error["where"].startswith(str(shelf.path))
    assert error["cure"]
    assert picture(folder) == before
    assert lorashelf("add", shelf.path, adapter).returncode == 0


# stopped


@pytest.fixture
def arrivals(tmp_path: Path) -> list[Path]:
    """Many adapters, in the order of their names."""
    return [write_peft(tmp_path / "in" / f"t{i:03}", make_adapter(i, rank=2, layers=1)) for i in range(150)]


def adding(shelf: Path, adapters: list[Path], *options: str) -> tuple[subprocess.Popen[str], str]:
    """A process that is adding: it has committed at least once; and the head by then."""
    first = (shelf / "HEAD").read_text()
    program = (
        "import signal\n"
        "from lorashelf.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has it ignored
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup, likewise
        "main()"
    )
    command = [sys.executable, "-c", program, "add", str(shelf), *map(str, adapters), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while (head := (shelf / "HEAD").read_text()) == first:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process, head.strip()


def on_shelf(shelf: Shelf, arrivals: list[Path]) -> int:
    """How many are there: the first ones in order, each in one slot; the shelf is sound."""
    assert shelf.verify() == []
    snapshot = shelf.snapshot()
    tasks = list(snapshot.manifest.tasks)
    assert tasks == [path.name for path in arrivals[: len(tasks)]]
    assert snapshot.manifest.arrived == len(tasks) == sum(len(slot.history.merged) for slot in snapshot.manifest.slots)
    logged = shelf.log()
    assert [entry["sequence"] for entry in logged] == list(range(len(tasks) + 1))
    assert [entry["task"] for entry in logged[1:]] == tasks
    return len(tasks)


def test_kill_9_of_a_process_that_adds_leaves_every_commit_that_was_seen(arrivals, tmp_path):
    shelf = Shelf.create(tmp_path / "a.shelf", new_settings(3, policy="kmerge"))
    draw = random.Random(0)
    done = 0
    for _ in range(12):
        process, _ = adding(shelf.path, arrivals[done : done + 40])
        time.sleep(draw.uniform(0, 0.15))
        seen = shelf.snapshot()
        process.kill()
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
        assert seen.head in [entry["id"] for entry in shelf.log()]
        before, done = done, on_shelf(shelf, arrivals)
        assert done >= len(seen.manifest.tasks) > before
    assert lorashelf("add", shelf.path, arrivals[done]).returncode == 0
    assert on_shelf(shelf, arrivals) == done + 1
    assert list((shelf.path / "tmp").iterdir()) == []
    held = {path.name for path in (shelf.path / "objects").iterdir()}
    snapshot = shelf.snapshot()
    assert held == {slot.object.id for each in (snapshot.manifest, *snapshot.ancestors.values()) for slot in each.slots}
    with pytest.raises(AssertionError):
        on_shelf(shelf, arrivals[::-1])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["for people", "--json"])
def test_a_signal_keeps_what_was_committed_and_says_so(options, name, arrivals, tmp_path):
    shelf = Shelf.create(tmp_path / "a.shelf", new_settings(3, policy="kmerge"))
    process, head = adding(shelf.path, arrivals, *options)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    assert "interrupted" in err
    assert "Traceback" not in err
    if options:
        document = json.loads(out)
        assert document["error"]["kind"] == "interrupted"
        assert len(document["added"]) == on_shelf(shelf, arrivals)
        assert "--skip-existing" in document["error"]["cure"]
    else:
        assert out.count("opens slot") + out.count("folds into slot") == out.count("\n") <= on_shelf(shelf, arrivals)
    done = on_shelf(shelf, arrivals)
    assert f"added before that, and kept: {', '.join(path.name for path in arrivals[:done])}\n" in err
    assert 0 < done < len(arrivals)
    assert head in [entry["id"] for entry in shelf.log()]
    assert list((shelf.path / "tmp").iterdir()) == []
    assert lorashelf("add", shelf.path, *arrivals[: done + 1], "--skip-existing").returncode == 0
    assert on_shelf(shelf, arrivals) == done + 1


@pytest.mark.parametrize("place", ["a-folder", "no-such-folder/file"])
def test_a_file_that_cannot_be_replaced_is_named_and_leaves_nothing(place: str, tmp_path: Path) -> None:
    (tmp_path / "a-folder").mkdir()
    target = tmp_path / place
    with pytest.raises(DiskError) as caught:
        replace_file(target, b"new", target.parent)
    assert caught.value.where == str(target)
    assert [path.name for path in tmp_path.rglob("*")] == ["a-folder"]


# a commit of which only the last fsync fails


class FailingFsync:
    """EIO from the fsync of the new HEAD, or from that of its folder once it has its name."""

    def __init__(self, of_folder: bool) -> None:
        self._of_folder = of_folder
        self._placed: list[str] = []

    def __call__(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        head_is_moved, manifest_is_there = "HEAD" in self._placed, "manifests" in self._placed
        if name == "replace":
            target = Path(arguments[1])
            self._placed += [target.name, target.parent.name]
        if name != "fsync" or stat.S_ISDIR(os.fstat(arguments[0]).st_mode) is not self._of_folder:
            return
        if head_is_moved if self._of_folder else manifest_is_there:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("of_folder", [False, True], ids=["HEAD", "its folder"])
def test_after_a_failed_fsync_the_error_reports_which_head_stands(of_folder: bool, room: Path) -> None:
    shelf = standing(a=A)(room / "a.shelf")
    before, plan = shelf.snapshot().head, plan_add(shelf.snapshot(), B, "b")
    with watched(room, before=FailingFsync(of_folder)), pytest.raises(DiskError) as caught:
        shelf.commit(plan)
    assert (shelf.snapshot().head != before) is of_folder
    assert ("the commit was made" in str(caught.value)) is of_folder
    assert "unchanged" not in str(caught.value)
    assert shelf.verify() == []


# two at once, and what a killed one leaves


MAKING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from crash.scenes import A, B
from lorashelf import Clustering, Shelf, new_settings, plan_cluster, write_adapter
from lorashelf.errors import LorashelfError

def planned(snapshot):
    print("planning", flush=True)
    sys.stdin.readline()
    return plan_cluster(snapshot, {"a": A, "b": B}, Clustering((("a", "b"),), "single"))

try:
    if sys.argv[1] == "init":
        print("planning", flush=True)
        sys.stdin.readline()
        Shelf.create(sys.argv[2], new_settings(2))
    else:
        Shelf.create_with(sys.argv[2], new_settings(2), planned)
    print("made")
except LorashelfError as error:
    print(error.exit_code, error.what)
"""


@contextlib.contextmanager
def making(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that makes a shelf and waits for a line before it goes on."""
    words = [sys.executable, "-c", MAKING, kind, str(path), "", str(Path(__file__).parent)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "planning\n"
        try:
            yield process
        finally:
            process.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kinds", [("init", "init"), ("cluster", "cluster"), ("cluster", "init")])
@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "an empty folder"])
def test_of_two_that_make_the_same_shelf_one_wins_and_the_other_is_told(
    kinds: tuple[str, str], there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.shelf"
    if there:
        path.mkdir()
    with making(kinds[0], path) as one, making(kinds[1], path) as other:
        said = [process.communicate("\n", timeout=60)[0] for process in (one, other)]
    assert said == ["made\n", "4 this path already exists\n"]
    assert Shelf(path).verify() == []
    assert hidden(tmp_path) == []


def test_what_a_killed_one_left_is_swept_by_the_next_and_what_a_live_one_needs_is_not(tmp_path: Path) -> None:
    beside = [tmp_path / f".{'0' * 16}", tmp_path / ".lorashelf-notes", tmp_path / ".lorashelf"]
    for folder in beside:
        folder.mkdir()
    with making("cluster", tmp_path / "killed.shelf") as process:
        process.kill()
        process.wait()
    left = set(hidden(tmp_path)) - {folder.name for folder in beside}
    assert len(left) == 1
    with making("cluster", tmp_path / "live.shelf") as process:
        mine = set(hidden(tmp_path)) - {folder.name for folder in beside}
        assert len(mine) == 1  # its own: the other is gone
        assert mine != left
        Shelf.create(tmp_path / "new.shelf", new_settings(2))
        write_adapter(A, tmp_path / "adapter")
        assert process.communicate("\n", timeout=60)[0] == "made\n"
    assert Shelf(tmp_path / "live.shelf").verify() == []
    assert hidden(tmp_path) == sorted(folder.name for folder in beside)


@pytest.mark.parametrize("make", ["init", "cluster", "merge"])
def test_an_empty_folder_is_taken_and_a_filled_one_is_not(make: str, tmp_path: Path) -> None:
    x, y = write_peft(tmp_path / "x", A), write_peft(tmp_path / "y", B)
    words: dict[str, Callable[[Path], list[object]]] = {
        "init": lambda path: ["init", path, "--slots", 2],
        "cluster": lambda path: ["cluster", x, y, "-o", path, "--slots", 1, "--method", "single"],
        "merge": lambda path: ["merge", x, y, "-o", path, "--method", "svd"],
    }
    empty, filled = tmp_path / "empty", tmp_path / "filled"
    empty.mkdir()
    filled.mkdir()
    (filled / "note").write_text("mine")
    assert lorashelf(*words[make](empty)).returncode == 0
    assert sorted(path.name for path in empty.iterdir()) != []
    refused = lorashelf(*words[make](filled))
    assert refused.returncode == (2 if make == "merge" else 4)
    assert "already exists" in refused.stderr
    assert (filled / "note").read_text() == "mine"
    assert hidden(tmp_path) == []
