"""The page in headless Chromium: a text is tried, an adapter added, a change undone; no error, nothing inaccessible."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lorashelf import Shelf, plan_add, write_adapter
from lorashelf.models.hf import HFBackend
from lorashelf.report.shelf_report import write_report
from lorashelf.serving.generate import answer
from served import Served, adapter, serving, shelf_of
from tiny_base import tiny_base

AXE = Path(__file__).parent.parent / "build" / "axe" / "package" / "axe.min.js"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
LACKING = [
    name
    for name, there in {"playwright": find_spec("playwright"), "chromium": CHROMIUM, "axe-core": AXE.exists()}.items()
    if not there
]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)} (make browser)"),
]
LONG = "a-long-name-without-blanks-" + "x" * 80
SIZES = {"desktop": (1200, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    return HFBackend.open(str(folder), device="cpu", dtype="f32")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """A function that loads a page; at the end it must have logged nothing."""
    logged: list[str] = []
    contexts = []

    def load(url: str, size: str = "desktop", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        # the policy is for the page's own scripts; axe-core is put in from outside
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True))
        page = contexts[-1].new_page()
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.goto(url)
        return page

    yield load
    for context in contexts:
        context.close()
    assert logged == []


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_of(tmp_path / "a.shelf", "mend", "<b>talk", LONG, slots=5)


@pytest.fixture
def served(shelf: Shelf, model: HFBackend) -> Iterator[Served]:
    with serving(shelf.path, model) as made:
        yield made


def violations(page: Any) -> list[str]:
    """What axe-core objects to, with everything unfolded."""
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run()")["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


def fits(page: Any) -> bool:
    """Whether nothing is wider than the screen."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def press(page: Any, name: str) -> None:
    """Press the button of this name."""
    page.get_by_role("button", name=name, exact=True).click()


def compared(page: Any) -> Any:
    """The page when the similarity map is there."""
    page.wait_for_selector("#compared svg, #compared .empty")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_the_page_is_accessible_and_fits(
    opened: Open, tmp_path: Path, model: HFBackend, tasks: int, size: str, scheme: str
) -> None:
    made = shelf_of(tmp_path / "b.shelf", *["mend", "<b>talk", LONG][:tasks])
    with serving(made.path, model) as running:
        page = compared(opened(running.url, size, scheme))
        assert fits(page)
        assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_report_is_accessible_and_fits(opened: Open, tmp_path: Path, shelf: Shelf, size: str, scheme: str) -> None:
    write_report(shelf.snapshot(), shelf.log(), tmp_path / "report.html")
    page = opened((tmp_path / "report.html").as_uri(), size, scheme)
    assert fits(page)
    assert violations(page) == []


def test_axe_objects_to_a_page_without_a_language_or_labels(browser: Any) -> None:
    page = browser.new_page()
    page.set_content("<html><body><input></body></html>")
    assert {each.split(":")[0] for each in violations(page)} >= {"html-has-lang", "label"}
    page.close()


def test_a_text_is_tried_on_three_side_by_side(opened: Open, served: Served, model: HFBackend) -> None:
    page = compared(opened(served.url))
    page.select_option("#try-task", "mend")
    page.fill("#try-text", "the cats sleeps")
    press(page, "Ask")
    page.wait_for_function("document.getElementById('try-status').textContent === 'Done.'")
    wanted = answer(model, served.served.snapshot(), "mend", "the cats sleeps")
    assert page.text_content("#own") == wanted
    others = page.text_content("#near"), page.text_content("#base")
    assert all(others)
    assert wanted not in others
    assert page.text_content("#answer-near").startswith("Slot ")


def test_answers_are_stopped(opened: Open, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compared(opened(served.url))
    served.held(monkeypatch)
    page.fill("#try-text", "the cats sleeps")
    press(page, "Ask")
    press(page, "Stop")
    page.wait_for_function("document.getElementById('try-status').textContent === 'Stopped.'")


def test_a_dropped_folder_is_planned_then_added_then_undone(
    opened: Open, served: Served, shelf: Shelf, tmp_path: Path
) -> None:
    write_adapter(adapter(9), tmp_path / "song")
    page, before = compared(opened(served.url)), shelf.snapshot().head
    assert page.is_disabled("#add-commit")
    page.set_input_files("#add-folder", tmp_path / "song")
    assert page.input_value("#add-task") == "song"
    assert page.text_content("#add-chosen").startswith("song: 2 files")
    press(page, "See what would happen")
    page.wait_for_selector("#plan .plan")
    assert "song: opens slot 3" in page.text_content("#plan")
    assert shelf.snapshot().head == before
    assert violations(page) == []
    press(page, "Add it")
    page.wait_for_selector("#notice .done")
    assert "song: opens slot 3" in page.text_content("#notice")
    assert page.evaluate("document.activeElement.id") == "notice"
    assert "song" in shelf.snapshot().manifest.tasks
    compared(page)
    page.click("form[action='/page/undo'] button")
    page.wait_for_selector("#notice .done >> text=undo: add song")
    assert "song" not in shelf.snapshot().manifest.tasks
    assert page.is_enabled("form[action='/page/redo'] button")


def test_a_file_is_dropped(opened: Open, served: Served, tmp_path: Path) -> None:
    """A zip dropped on the page is planned at once."""
    write_adapter(adapter(9), tmp_path / "song")
    data = shutil.make_archive(str(tmp_path / "dropped"), "zip", tmp_path / "song")
    page = compared(opened(served.url))
    content = base64.b64encode(Path(data).read_bytes()).decode()
    moved = page.evaluate_handle(
        """(text) => {
            const moved = new DataTransfer(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            moved.items.add(new File([bytes], "dropped.zip"));
            return moved;
        }""",
        content,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": moved})
    page.wait_for_selector("#plan .plan")
    assert "dropped: opens slot 3" in page.text_content("#plan")


def test_what_is_no_adapter_is_explained_and_nothing_can_be_added(browser: Any, served: Served, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    page = browser.new_page()
    page.goto(served.url)
    compared(page).set_input_files("#add-zip", tmp_path / "x.zip")
    press(page, "See what would happen")
    page.wait_for_selector("#plan .fault")
    assert "not a zip that can be read" in page.text_content("#plan")
    assert page.is_disabled("#add-commit")
    page.close()


def test_a_key_opens_the_page(browser: Any, shelf: Shelf, model: HFBackend) -> None:
    with serving(shelf.path, model, key="secret") as made:
        page = browser.new_page()
        page.goto(made.url)
        assert "mend" not in page.content()
        page.fill("#key-field", "wrong")
        press(page, "Open the shelf")
        page.wait_for_selector("#key-fault:has-text('the API key is wrong')")
        page.fill("#key-field", "secret")
        press(page, "Open the shelf")
        compared(page)
        page.click("form[action='/page/undo'] button")
        page.wait_for_selector("#notice .done")
        page.reload()
        compared(page)  # the tab keeps the key
        page.close()
    assert LONG not in shelf.snapshot().manifest.tasks


def test_every_part_works_from_the_keyboard(opened: Open, served: Served) -> None:
    page, seen = compared(opened(served.url)), []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert seen[0] == "Skip to the tasks"
    for needed in ("try-task", "try-text", "add-folder", "add-zip", "add-task", "add-plan"):
        assert needed in seen
    assert any(name.startswith("Undo") for name in seen)


def test_without_scripts_the_shelf_is_shown_and_can_be_undone(browser: Any, served: Served, shelf: Shelf) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(served.url)
    page.click("form[action='/page/undo'] button")
    assert "undo: add" in page.text_content("#notice")
    assert LONG not in shelf.snapshot().manifest.tasks
    context.close()


def test_many_tasks_fit(opened: Open, tmp_path: Path, model: HFBackend) -> None:
    made = shelf_of(tmp_path / "many.shelf", "task-0", slots=8)
    for number in range(1, 60):
        made.commit(plan_add(made.snapshot(), adapter(number), f"task-{number}"))
    with serving(made.path, model) as running:
        page = compared(opened(running.url, "phone"))
        assert fits(page)
        assert page.locator("#try-task option").count() == 60
