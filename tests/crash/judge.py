"""What must be true of whatever a crash, a power cut or a full disk left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory import dense
from lorashelf import Adapter, Shelf, plan_add, read_adapter
from lorashelf.formats.objects import object_digest
from lorashelf.formats.peft import peft_files
from manifests import manifest, references

from .disk import Call, Picture, picture, restored, watched
from .scenes import Scene, clock


def head(target: Path) -> str | None:
    """What names the state: the head of a shelf, the digest of an adapter; None where nothing stands."""
    if not target.exists():
        return None
    return (target / "HEAD").read_text().strip() if is_shelf(target) else object_digest(peft_files(target))


def state(target: Path) -> Any:
    """Its head and all a user has of it: settings, tasks, slots, the bytes of every ΔW. Fails unless it is sound."""
    if not target.exists():
        return None, None
    if not is_shelf(target):
        return head(target), _delta(read_adapter(target))
    shelf = Shelf(target, clock)
    _sound(shelf)
    return head(target), (shelf.snapshot().settings, content(shelf))


def content(shelf: Shelf) -> Any:
    snapshot = shelf.snapshot()
    slots = snapshot.manifest.slots
    documents = [slot.document() for slot in slots]  # facts are inline in format 1, on pages in format 2
    return snapshot.manifest.tasks, documents, [_delta(snapshot.stored(slot)) for slot in slots]


def is_shelf(target: Path) -> bool:
    return target.suffix == ".shelf"


def tidy(shelf: Shelf, predicted: int) -> None:
    """Fails if something is left that nothing reaches, if the bytes are not those told, if the log forgot something."""
    _sound(shelf)
    snapshot = shelf.snapshot()
    window = {snapshot.head: snapshot.manifest, **snapshot.kept}
    assert set(window) == must_stay(shelf.path, snapshot.keep), "not exactly the states that must stay are there"
    reached = {path for identity in window for path in references(shelf.path, identity)}
    held = {str(path.relative_to(shelf.path)) for path in shelf.path.glob("[mopt]*/*")}
    assert held == reached, f"left over: {held - reached}, missing: {reached - held}"
    size = sum(path.stat().st_size for path in shelf.path.rglob("*") if path.is_file())
    assert snapshot.bytes == size, f"{snapshot.bytes} bytes are told, {size} are there"
    assert predicted == size, f"{predicted} bytes were predicted, {size} are there"
    logged = [entry["sequence"] for entry in shelf.log()]
    assert logged == list(range(snapshot.manifest.sequence + 1)), f"the log has {logged}"


def must_stay(path: Path, keep: int) -> set[str]:
    """The manifests of a shelf without a byte budget by docs/format.md, from the JSON documents alone."""
    identity = (path / "HEAD").read_text().strip()
    stay: set[str] = set()
    reach: list[str] | None = None  # what undo and redo reach, once a manifest is met that lists it
    for distance in range(keep + 1):
        if identity is None:
            break
        document = manifest(path, identity)
        stay |= {identity, *document.get("ended", ())}
        if reach is None and "state" in document:
            reach = [document["state"], *document["undo"], *(document["redo"] if distance == 0 else ())]
            stay |= set(reach[: keep + 1 - distance])
        identity = document["parent"]
    return stay


@dataclass(frozen=True)
class Case:
    """A scene that was run once, unharmed: the folder before it, its calls, the states before and after, the folder."""

    scene: Scene
    base: Path
    calls: list[Call]
    before: Any
    after: Any
    final: Picture

    @classmethod
    def of(cls, scene: Scene, top: Path) -> Case:
        top.mkdir()
        with watched(top):
            base, root = scene.setup(top / "base"), scene.setup(top / "run")
        with watched(root) as watcher:
            scene.run(root)
        states = [state(folder / scene.target) for folder in (base, root)]
        return cls(scene, base, watcher.calls, *states, picture(root))

    def check(self, root: Path, acknowledged: bool) -> None:
        """The old state or the new one; the new one if it was acknowledged."""
        found = state(root / self.scene.target)
        assert found in (self.before, self.after), "neither the old state nor the new one"
        assert found == self.after or not acknowledged, "what was acknowledged is lost"

    def follow(self, root: Path) -> list[Call]:
        """The next writer: makes what is not there yet, else adds one more, undoes, redoes and undoes it; its calls."""
        target = root / self.scene.target
        with watched(root, seed=1) as watcher:
            if not target.exists():
                self.scene.run(root)
                assert state(target) == self.after, "making it again makes something else"
                return watcher.calls
            if not is_shelf(target):
                return []
            shelf = Shelf(target, clock)
            earlier, before = shelf.snapshot(), content(shelf)
            plan = plan_add(earlier, self.scene.later, "later")
            predicted = earlier.at_rest(plan)
            assert shelf.commit(plan) == head(target)
            tidy(shelf, predicted)
            added = content(shelf)
            for move, wanted in ((shelf.undo, before), (shelf.redo, added), (shelf.undo, before)):
                move()
                assert content(shelf) == wanted, f"{move.__name__} leads elsewhere"
                _sound(shelf)
        return watcher.calls


def faults(left: Iterable[tuple[str, Picture, Path]], judge: Callable[[Path], Any]) -> list[str]:
    """What the judge says, a line for each thing left: its name, what it looks like, where it is or is to be made.

    Equal ones are judged once.
    """
    found: list[str] = []
    judged: list[Picture] = []
    for name, seen, root in left:
        if seen in judged:
            continue
        judged.append(seen)
        try:
            judge(root if root.exists() else restored(seen, root))
        except Exception as error:
            found.append(f"{name}: {(str(error) or repr(error)).splitlines()[0][:200]}")
    return found


def _sound(shelf: Shelf) -> None:
    problems = shelf.verify()
    assert not problems, problems[0]


def _delta(adapter: Adapter) -> dict[str, bytes]:
    return {path: value.tobytes() for path, value in dense(adapter).items()}
