"""The report: what it contains in HTML and Markdown, that it loads nothing, what is refused; model cards of exports."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from command import Command
from factory import make_adapter, tree
from lorashelf import Shelf, combine, export_shelf, plan_add, plan_remove
from lorashelf.errors import MissingExtra
from lorashelf.report.overview import overview, similarity_map
from lorashelf.report.rendering import TEMPLATES

NewShelf = Callable[..., Shelf]
HOSTILE = '<img src=x onerror="alert(1)"> & <b>|*_`[x](y)'


class Page(HTMLParser):
    """A page's elements, the text of cells, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.texts.append(" ".join(data.split()))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def filled(shelf: Shelf, *tasks: str, **options: Any) -> Shelf:
    for seed, task in enumerate(tasks):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(seed), task, **options))
    return shelf


def evaluation(path: Path, adapters: dict[str, str | None], **changes: Any) -> Path:
    """A document as `eval --json` prints it, of tasks measured with adapters of these digests."""
    task = {"loss": 1.25, "score": 40.0, "low": 30.0, "high": 50.0, "metric": "F1", "n": 9, "tokens": 90, "dropped": 0}
    tasks = {name: {**task, "adapter": each, "examples": "b2", "max_new_tokens": 8} for name, each in adapters.items()}
    document = {"tasks": tasks, "average": 40.0, "average_loss": 1.25, "normalised": None, "storage": 0.5}
    document |= {"base": "acme/tiny", "prompt": "p", "backend": "b", "split": "validation", "left_out": {}}
    path.write_text(json.dumps(document | changes))
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys, "report")


@pytest.fixture
def shelf(new_shelf: NewShelf) -> Shelf:
    """Four tasks in three slots, one undone change, a budget."""
    made = filled(new_shelf(3, policy="kmerge", keep=3, bytes=60_000), "a", "b", "c", "d")
    made.commit(plan_remove(made.snapshot(), "b"))
    made.undo()
    return made


def written(command: Command, shelf: Shelf, path: Path, *more: object) -> str:
    code, document = command(shelf.path, "-o", path, *more)
    assert code == 0, document
    assert document == {"output": str(path), "bytes": path.stat().st_size}
    return path.read_text()


def test_every_task_has_its_slot_rate_and_quality(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    html = written(command, shelf, tmp_path / "r.html")
    text = written(command, shelf, tmp_path / "r.md")
    page, snapshot = Page(html), shelf.snapshot()
    assert page.open == []
    assert [name for name in page.texts if name in "abcd"][:4] == [
        task for slot in snapshot.manifest.slots for task in slot.members
    ]
    for row in overview(snapshot, shelf.log()).objects:
        whole = 2 * sum(source.parameters for source in snapshot.manifest.slot(row.slot).history.merged)
        assert row.percent == pytest.approx(100 * row.bytes / whole)
        assert row.quality == (1.0 if len(row.tasks) == 1 else None)
        kept = "1.000" if len(row.tasks) == 1 else "2 averaged"
        for task in row.tasks:
            assert f"| {task} | {row.slot} | {row.bytes / 1000:.1f} kB | {row.percent:.0f} % | {kept} |" in text
        assert kept in page.texts


def test_the_parts_of_the_bytes_are_all_of_them(shelf: Shelf) -> None:
    snapshot = shelf.snapshot()
    found = overview(snapshot, shelf.log()).bytes
    on_disk = {path: len(data) for path, data in tree(shelf.path).items()}
    used = {slot.object.id for slot in snapshot.manifest.slots}
    by_kind = {part.kind: part.bytes for part in found.parts}
    assert found.total == sum(on_disk.values()) == sum(by_kind.values())
    assert by_kind["serving"] == sum(
        n for p, n in on_disk.items() if Path(p).parts[:1] == ("objects",) and p[8:75] in used
    )
    assert by_kind["kept"] > 0
    assert found.budget == 60_000


def test_the_similarity_map_is_the_matrix_in_clustered_order(new_shelf: NewShelf) -> None:
    """Two families of adapters, each one adapter with a little noise, stand apart."""
    families, shelf = {"a": make_adapter(0), "b": make_adapter(50)}, new_shelf(6, policy="kmerge")
    for seed, task in enumerate(("a1", "b1", "b2", "a2", "a3", "b3")):
        adapter = combine([families[task[0]], make_adapter(100 + seed)], [1.0, 0.1])
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    found = similarity_map(shelf.snapshot())
    assert [name[0] for name in found.labels] in (list("aaabbb"), list("bbbaaa"))
    assert found.borders == (3,)
    assert all(found.labels[i][0] == found.labels[j][0] and value > 0.9 for i, j, value in found.nearest())
    drawn = {shade: sum(map(int, re.findall(r"h(\d+)v1", path))) for shade, path in found.shades()}
    pale = sum(abs(value) < found.most / 24 for row in found.matrix for value in row)
    assert sum(drawn.values()) == 36 - pale
    assert drawn["self"] == 6
    assert drawn["more-12"] >= 2
    assert found.strong(found.most)
    assert not found.strong(0.0)


def test_the_history_shows_where_undo_and_redo_lead(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    found = overview(shelf.snapshot(), shelf.log())
    assert [event.operation for event in found.events] == ["undo", "remove", "add", "add", "add", "add", "init"]
    assert [event.state for event in found.events][:3] == ["", "redo", "now"]
    assert found.events[0].what == "to #4"
    assert found.undo is not None
    assert found.redo is not None
    assert (found.undo.what, found.redo.what) == (found.events[2].what, found.events[1].what)
    assert found.events[2].what.startswith("d, folded into slot ")
    assert "| #5 |" in written(command, shelf, tmp_path / "r.md")


def test_it_loads_nothing_and_can_be_read_aloud(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    page = Page(written(command, shelf, tmp_path / "r.html"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "href", "style") or a[:2] == "on"]
    assert re.search(r"url\(|@import", (TEMPLATES / "style.css").read_text()) is None
    assert page.tags[0] == ("html", {"lang": "en"})
    assert all(th["scope"] in ("col", "row") for th in page.named("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in page.tags:
        assert {*(attributes.get("aria-labelledby") or "").split()} <= {*identities}
    assert all(svg.get("aria-hidden") == "true" or svg.get("role") == "img" for svg in page.named("svg"))


def test_names_are_shown_as_they_are(command: Command, new_shelf: NewShelf, tmp_path: Path) -> None:
    shelf = filled(new_shelf(2, name="<i>s", policy="kmerge"), HOSTILE, "plain")
    html = written(command, shelf, tmp_path / "r.html")
    page = Page(html)
    assert HOSTILE in page.texts
    assert page.named("img") == page.named("b") == page.named("i") == []
    text = written(command, shelf, tmp_path / "r.md")
    assert "<img" not in text
    assert r"&lt;b&gt;\|\*\_\`\[x\]\(y\)" in text


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_shelf_and_one_task_have_a_report(
    command: Command, new_shelf: NewShelf, tmp_path: Path, count: int
) -> None:
    shelf = filled(new_shelf(2), *["only"][:count])
    html = written(command, shelf, tmp_path / "r.html")
    assert f"A comparison needs two objects; the shelf has {count}." in Page(html).texts
    assert f"the shelf has {count}" in written(command, shelf, tmp_path / "r.md")


def test_a_shelf_of_bytes_states_what_each_task_keeps(command: Command, new_shelf: NewShelf, tmp_path: Path) -> None:
    shelf = filled(new_shelf(None, bytes=200_000), "a", "b")
    found = overview(shelf.snapshot(), shelf.log())
    listed = shelf.snapshot().manifest.slots
    assert found.filled == "2 objects"
    assert found.mean_quality == pytest.approx(sum(row.quality or 0 for row in found.objects) / 2)
    assert all(0.9 < (row.quality or 0) <= 1 for row in found.objects)
    assert f"{found.objects[0].quality:.3f}" in written(command, shelf, tmp_path / "r.html")
    assert [row.bytes for row in found.objects] == [slot.object.bytes for slot in listed]


def test_a_report_is_the_same_every_time(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    assert written(command, shelf, tmp_path / "1.html") == written(command, shelf, tmp_path / "2.html")


# evaluations ----------------------------------------------------------------------------------------------------------


def test_evaluations_are_tables_that_say_what_was_measured(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    snapshot = shelf.snapshot()
    slot = next(slot for slot in snapshot.manifest.slots if len(slot.members) == 2)
    first, second = slot.members
    through = evaluation(tmp_path / "through.json", {t: snapshot.adapter(t).digest for t in slot.members})
    own = evaluation(tmp_path / "own.json", {s.task: s.digest for s in slot.history.merged})
    bare = evaluation(tmp_path / "bare.json", {first: None})
    html = written(command, shelf, tmp_path / "r.html", "--eval", through, "--eval", own, "--eval", bare)
    page = Page(html)
    titles = [text for text in page.texts if text.startswith("Evaluation: ")]
    assert titles == [
        f"Evaluation: {of}" for of in ("through this shelf", "the tasks' own adapters", "the bare base model")
    ]
    assert page.texts.count("40.0 [30.0, 50.0]") == 5
    assert "scored by F1: " + ", ".join([first, second]) in page.texts
    assert "| 40.0 \\[30.0, 50.0\\] |" in written(command, shelf, tmp_path / "r.md", "--eval", through)


def test_an_evaluation_of_another_shelf_is_refused(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    digest = make_adapter(77).digest
    other = evaluation(tmp_path / "other.json", {"a": digest, "z": None})
    broken = evaluation(tmp_path / "broken.json", {"a": None}, average=None, normalised={})
    code, document = command(shelf.path, "-o", tmp_path / "r.html", "--eval", other)
    assert (code, document["error"]["where"]) == (2, str(other))
    assert "of another shelf, or of an earlier state" in document["error"]["message"]
    code, document = command(shelf.path, "-o", tmp_path / "r.html", "--eval", other, "--eval", broken)
    assert code == 2
    assert f"{other}: this is an evaluation of another shelf" in document["error"]["message"]
    assert f"{broken}: this is not a whole evaluation" in document["error"]["message"]
    assert not (tmp_path / "r.html").exists()


def test_a_task_measured_otherwise_is_named(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    digest = shelf.snapshot().adapter("a").digest
    mixed = evaluation(tmp_path / "mixed.json", {"a": digest, "c": make_adapter(77).digest})
    html = written(command, shelf, tmp_path / "r.html", "--eval", mixed)
    assert "not with an adapter that is on this shelf: c" in Page(html).texts


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [("r.pdf", "reports are not .pdf files"), ("r", "without an extension"), ("no/r.md", "folder does not exist")],
)
def test_where_no_report_can_be_written(command: Command, shelf: Shelf, tmp_path: Path, name: str, what: str) -> None:
    code, document = command(shelf.path, "-o", tmp_path / name)
    assert (code, document["error"]["kind"]) == (2, "usage")
    assert what in document["error"]["message"]


def test_an_existing_file_stays(command: Command, shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("mine")
    code, document = command(shelf.path, "-o", tmp_path / "r.html")
    assert (code, document["error"]["message"]) == (2, "the output already exists")
    assert (tmp_path / "r.html").read_text() == "mine"


def test_what_is_not_installed_is_named(
    command: Command, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorashelf.report.shelf_report._NEEDED", {"no_such": "Jinja2", "nor_this": "SciPy"})
    code, document = command(shelf.path, "-o", tmp_path / "r.html")
    assert (code, document["error"]["kind"]) == (2, "missing_extra")
    assert document["error"]["message"] == "a report needs Jinja2 and SciPy"
    monkeypatch.setitem(sys.modules, "lorashelf.report.arrangement", None)
    with pytest.raises(MissingExtra, match="a similarity map needs SciPy and scikit-learn"):
        similarity_map(shelf.snapshot())


def test_a_full_disk_leaves_no_file(
    command: Command, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource
    import signal

    folder = tmp_path / "out"
    folder.mkdir()
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, document = command(shelf.path, "-o", folder / "r.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (code, document["error"]["kind"]) == (4, "disk")
    assert list(folder.iterdir()) == []


# model cards ----------------------------------------------------------------------------------------------------------


def test_an_exported_slot_has_a_model_card(new_shelf: NewShelf, tmp_path: Path) -> None:
    shelf = filled(new_shelf(1, policy="kmerge"), "a", "<b>", details={"prompt": "Answer *briefly*:"})
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "peft")
    card = (tmp_path / "out" / "slot-0" / "README.md").read_text()
    slot = shelf.snapshot().manifest.slot(0)
    assert 'base_model: "acme/tiny-llama"' in card
    assert re.search(r"^license:  #", card, re.MULTILINE)
    assert r"- a: Answer \*briefly\*:" in card
    assert "<b>" not in card
    assert "An average of 2 adapters (merge method `linear`)" in card
    for source in slot.history.merged:
        assert f"| 0.5 | 4 | `{source.digest}` |" in card
    assert "slot-0/README.md" in document["files"]


def test_the_card_of_a_file_is_beside_it(new_shelf: NewShelf, tmp_path: Path) -> None:
    shelf = filled(new_shelf(1, encoding="coded"), "a")
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "gguf", {"arch": "qwen2"})
    card = (tmp_path / "out" / "slot-0.README.md").read_text()
    slot = shelf.snapshot().manifest.slot(0)
    assert "slot-0.README.md" in document["files"]
    assert f"Decoded from {slot.object.bytes} bytes" in card
    assert "predicted quality kept 0.9" in card
