"""The page at `/`: what it shows, who may change the shelf through it, and what an upload may hold."""

from __future__ import annotations

import io
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from factory import tree
from lorashelf import Shelf, new_settings, plan_remove, write_adapter
from lorashelf.errors import UsageError
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import Row
from lorashelf.models.sampling import Sampler, Sampling
from lorashelf.server import upload
from lorashelf.server.upload import MOST_FILES, Sent, unpacked
from served import PROMPT, Served, adapter, serving, shelf_of
from tiny_base import tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    return HFBackend.open(str(folder), device="cpu", dtype="f32")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_of(tmp_path / "a.shelf", "mend", "<b>talk", slots=4)


@pytest.fixture
def served(shelf: Shelf, model: HFBackend) -> Iterator[Served]:
    with serving(shelf.path, model) as made:
        yield made


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of an adapter's folder; and a temporary folder that is empty after every test."""
    write_adapter(adapter(9), tmp_path / "song")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tree(tmp_path / "song")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    temporary = tmp_path / "temporary"
    assert not temporary.exists() or list(temporary.iterdir()) == []


def zipped(files: dict[str, bytes], **entries: zipfile.ZipInfo) -> bytes:
    """A zip of these files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(entries.get(name, name), content)
    return data.getvalue()


class Page:
    """A client that sends what the page's forms send."""

    def __init__(self, served: Served) -> None:
        self.client = served.http()
        self.origin = served.url
        self.load()

    def load(self) -> str:
        self.html = self.client.get("/").text
        self.fields = {name: self.hidden(name) for name in ("token", "head")}
        return self.html

    def hidden(self, name: str) -> str:
        found = re.search(rf'name="{name}" value="([^"]+)"', self.html)
        assert found is not None
        return found[1]

    def send(self, path: str, files: Any = (), headers: dict[str, str] | None = None, **fields: str) -> httpx.Response:
        parts = [(name, (None, value)) for name, value in {**self.fields, **fields}.items()]
        parts += [("files", (name, content)) for name, content in dict(files).items()]
        return self.client.post(path, files=parts, headers={"origin": self.origin} if headers is None else headers)


@pytest.fixture
def page(served: Served) -> Page:
    return Page(served)


def snapshot_of(shelf: Shelf) -> tuple[str, dict[str, bytes]]:
    return shelf.snapshot().head, tree(shelf.path)


# reading --------------------------------------------------------------------------------------------------------------


def test_it_shows_the_shelf_and_loads_only_from_the_server(page: Page, served: Served) -> None:
    response = page.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert response.headers["cache-control"] == "no-store"
    loaded = re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="([^"]*)"', response.text)
    assert loaded == ["data:,", "/page.css", "/page.js"]
    for path, kind in (("/page.css", "text/css"), ("/page.js", "text/javascript")):
        assert page.client.get(path).headers["content-type"].startswith(kind)
    assert "&lt;b&gt;talk" in response.text
    assert "<b>" not in response.text
    assert f'data-prompt="{PROMPT}"' in response.text
    assert str(served.served.path.parent) not in response.text


def test_the_similarity_map_is_a_part_that_is_computed_once(
    page: Page, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashelf.server import page as module

    computed: list[str] = []
    real = module.similarity_map

    def counting(snapshot: Any) -> Any:
        computed.append(snapshot.head)
        return real(snapshot)

    monkeypatch.setattr(module, "similarity_map", counting)
    first, second = (page.client.get("/page/similarity").text for _ in range(2))
    assert first == second
    assert 'data-slot="0" data-nearest="1"' in first
    shelf.commit(plan_remove(shelf.snapshot(), "mend"))
    assert "A comparison needs two objects" in page.client.get("/page/similarity").text
    assert len(computed) == 2


def test_a_shelf_that_becomes_corrupt_is_shown_as_it_was(page: Page, shelf: Shelf) -> None:
    (shelf.path / "HEAD").write_text("nonsense\n")
    response = page.client.get("/")
    assert response.status_code == 200
    assert "The last good state is shown" in response.text
    assert "mend" in response.text


def test_damaged_objects_cannot_be_compared_but_the_page_is_there(page: Page, shelf: Shelf) -> None:
    for path in (shelf.path / "objects").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    assert "The objects cannot be compared" in page.client.get("/page/similarity").text
    assert page.client.get("/").status_code == 200


def test_the_bare_base_is_a_model_id(page: Page, served: Served, model: HFBackend) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    answer = page.client.post("/v1/chat/completions", json=body).json()
    assert answer["lorashelf"] == {"task": "base", "slot": None}
    prompt, alone = model.text.encoded(model.template.conversation(["hello"], [])), model.decoding(1)
    tokens = [alone.join([Row(prompt, None, Sampler(Sampling()))])[0].id]
    while len(tokens) < 8 and not model.text.ended(tokens):
        tokens.append(alone.step()[0].id)
    assert answer["choices"][0]["message"]["content"] == model.text.decoded(tokens, trims=True)
    assert page.client.get("/v1/models/base").json()["id"] == "base"


def test_with_a_key_only_who_has_it_sees_the_shelf(shelf: Shelf, model: HFBackend, sent: dict[str, bytes]) -> None:
    with serving(shelf.path, model, key="secret") as made:
        page = Page(made)
        bare = httpx.Client(base_url=made.url)
        asked = bare.get("/")
        assert (asked.status_code, "mend" in asked.text, 'id="key"' in asked.text) == (401, False, True)
        assert bare.get("/page.js").status_code == 200
        before = shelf.snapshot().head
        for path in ("/page/undo", "/page/redo", "/page/add", "/page/plan"):
            parts = {name: (None, value) for name, value in page.fields.items()}
            assert bare.post(path, files=parts, headers={"origin": made.url}).status_code == 401
        assert bare.get("/page/similarity").status_code == 401
        wrong = bare.get("/", headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert shelf.snapshot().head == before
        assert page.send("/page/add", {f"song/{name}": data for name, data in sent.items()}).status_code == 200
        assert "song" in shelf.snapshot().manifest.tasks
        bare.close()


# changes --------------------------------------------------------------------------------------------------------------


def test_undo_and_redo(page: Page, shelf: Shelf) -> None:
    undone = page.send("/page/undo")
    assert undone.status_code == 200
    assert "undo: add &lt;b&gt;talk, in a new slot, 1" in undone.text
    assert set(shelf.snapshot().manifest.tasks) == {"mend"}
    page.load()
    redone = page.send("/page/redo")
    assert "redo: add &lt;b&gt;talk, in a new slot, 1" in redone.text
    assert set(shelf.snapshot().manifest.tasks) == {"mend", "<b>talk"}


def test_a_dry_run_changes_nothing_and_says_what_add_then_does(
    page: Page, shelf: Shelf, sent: dict[str, bytes]
) -> None:
    before, files = snapshot_of(shelf), {f"song/{name}": data for name, data in sent.items()}
    planned = page.send("/page/plan", files)
    assert planned.status_code == 200
    assert "song: opens slot 2 (best score" in planned.text
    assert "Nothing is changed yet." in planned.text
    assert snapshot_of(shelf) == before
    added = page.send("/page/add", files, prompt="Sing:")
    assert added.status_code == 200
    assert "song: opens slot 2 (best score" in added.text
    slot, details = shelf.snapshot().located("song")
    assert (slot.id, details["prompt"]) == (2, "Sing:")
    assert shelf.verify() == []
    assert 'value="song"' in page.load()


def test_a_zip_is_a_folder(page: Page, shelf: Shelf, sent: dict[str, bytes]) -> None:
    for name, files in (("one.zip", sent), ("two.ZIP", {f"deep/er/{name}": data for name, data in sent.items()})):
        response = page.send("/page/add", {name: zipped(files)})
        assert response.status_code == 200, response.text
        page.load()
    assert {"one", "er"} <= set(shelf.snapshot().manifest.tasks)


def test_a_page_that_is_out_of_date_changes_nothing(page: Page, shelf: Shelf, sent: dict[str, bytes]) -> None:
    shelf.commit(plan_remove(shelf.snapshot(), "mend"))
    before = snapshot_of(shelf)
    for path, files in (("/page/undo", {}), ("/page/add", sent)):
        response = page.send(path, files, task="song")
        assert response.status_code == 409
        assert "the shelf changed since the page was loaded" in response.text
    assert snapshot_of(shelf) == before


@pytest.mark.parametrize("path", ["/page/undo", "/page/redo", "/page/plan", "/page/add"])
def test_requests_of_other_sites_are_refused(page: Page, shelf: Shelf, sent: dict[str, bytes], path: str) -> None:
    before = snapshot_of(shelf)
    for origin in ("https://evil.example", "null", f"{page.origin}.evil.example", page.origin.replace("127.", "126.")):
        assert page.send(path, sent, headers={"origin": origin}).status_code == 403, origin
    assert page.send(path, sent, headers={}).status_code == 403
    assert page.send(path, sent, token="x" * 43).status_code == 403
    form = page.client.post(path, data=page.fields, headers={"origin": page.origin})
    assert form.status_code == 415
    assert page.client.get(path).status_code == 405
    assert snapshot_of(shelf) == before


def test_what_the_shelf_refuses_is_shown(page: Page, tmp_path: Path, model: HFBackend, sent: dict[str, bytes]) -> None:
    taken = page.send("/page/plan", sent, task="mend")
    assert (taken.status_code, "already on the shelf" in taken.text) == (400, True)
    odd = page.send("/page/plan", sent, task="a/b")
    assert (odd.status_code, "has a slash" in odd.text) == (400, True)
    full = Shelf.create(tmp_path / "full.shelf", new_settings(1, bytes=2_000))
    with serving(full.path, model) as made:
        other = Page(made)
        for path in ("/page/plan", "/page/add"):
            refused = other.send(path, sent, task="b")
            assert refused.status_code in (400, 409)
            assert "the budget is 2000" in refused.text
    assert full.snapshot().manifest.tasks == {}


# uploads --------------------------------------------------------------------------------------------------------------


def link(name: str) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = (stat.S_IFLNK | 0o777) << 16
    return made


def twice(files: dict[str, bytes], name: str) -> bytes:
    """A zip in which a name is used a second time."""
    data = io.BytesIO(zipped(files))
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, b"other")
    return data.getvalue()


def encrypted(files: dict[str, bytes]) -> bytes:
    """A zip whose directory has the flag of encryption at its first file."""
    data = bytearray(zipped(files))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


Hostile = Callable[[dict[str, bytes]], dict[str, bytes]]
HOSTILE: dict[str, tuple[Hostile, str]] = {
    "nothing": (lambda sent: {}, "not an adapter"),
    "not an adapter": (lambda sent: {"notes.txt": b"hello"}, "not an adapter: no adapter_config.json among notes.txt"),
    "not a zip": (lambda sent: {"a.zip": b"PK nonsense"}, "not a zip that can be read"),
    "a torn zip": (lambda sent: {"a.zip": zipped(sent)[:-200]}, "not a zip that can be read"),
    "a damaged zip": (
        lambda sent: {"a.zip": zipped(sent).replace(b"adapter_model.safetensors", b"Adapter_model.safetensors", 1)},
        "zip",
    ),
    "out of the zip": (lambda sent: {"a.zip": zipped({**sent, "../../evil": b"x"})}, "../../evil leads out of the zip"),
    "absolute": (lambda sent: {"a.zip": zipped({**sent, "/tmp/evil": b"x"})}, "/tmp/evil leads out of the zip"),
    "backslashes": (lambda sent: {"a.zip": zipped({**sent, "..\\evil": b"x"})}, "leads out of the zip"),
    "a link": (
        lambda sent: {"a.zip": zipped({**sent, WEIGHTS: b"/etc/passwd"}, **{WEIGHTS: link(WEIGHTS)})},
        f"{WEIGHTS} is a link",
    ),
    "a name twice": (lambda sent: {"a.zip": twice(sent, CONFIG)}, f"{CONFIG} is in it twice"),
    "encrypted": (lambda sent: {"a.zip": encrypted(sent)}, f"{CONFIG} is encrypted"),
    "too many files": (
        lambda sent: {"a.zip": zipped({**sent, **{f"f{i}": b"" for i in range(MOST_FILES)}})},
        f"at most {MOST_FILES} are unpacked",
    ),
    "two adapters": (
        lambda sent: {f"{folder}/{name}": data for folder in "ab" for name, data in sent.items()},
        "several adapters: a, b",
    ),
    "out of the folder": (lambda sent: {**sent, "../evil": b"x"}, "../evil leads out of the folder"),
    "a broken config": (lambda sent: {**sent, CONFIG: b"{"}, "adapter_config.json cannot be read"),
    "a pickle": (lambda sent: {CONFIG: sent[CONFIG], "adapter_model.bin": b"x"}, "is a pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_sound_adapter_is_refused_and_nothing_is_left(
    page: Page, shelf: Shelf, sent: dict[str, bytes], name: str
) -> None:
    make, what = HOSTILE[name]
    before = snapshot_of(shelf)
    for path in ("/page/plan", "/page/add"):
        response = page.send(path, make(sent), task="song")
        assert response.status_code in (400, 422), response.text
        assert what in response.text.replace("&#39;", "'"), response.text
        assert "temporary" not in response.text  # where it was unpacked
    assert snapshot_of(shelf) == before


def test_a_zip_bomb_is_stopped_by_what_it_states_and_by_what_comes_out(sent: dict[str, bytes]) -> None:
    bomb = zipped({**sent, "zeros": bytes(3_000_000)})
    assert len(bomb) < 60_000

    def open_it(data: bytes) -> None:
        with unpacked([Sent("a.zip", io.BytesIO(data))], most_bytes=1_000_000):
            pytest.fail("it was unpacked")

    with pytest.raises(UsageError, match=r"unpacked it has 30\d+ bytes; at most 1000000 are unpacked"):
        open_it(bomb)
    lying = bomb.replace((3_000_000).to_bytes(4, "little"), (5).to_bytes(4, "little"))
    assert lying != bomb
    with pytest.raises(UsageError, match=r"damaged|unpacked"):
        open_it(lying)
    with (
        pytest.raises(UsageError, match="more than 1000 bytes"),
        unpacked([Sent(f"song/{name}", io.BytesIO(data)) for name, data in sent.items()], most_bytes=1000),
    ):
        pytest.fail("it was written")


def test_a_body_over_the_limit_is_413(page: Page, sent: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorashelf.server.page.MOST_BYTES", 10_000)
    assert page.send("/page/plan", {**sent, "more": bytes(20_000)}).status_code == 413
    assert upload.MOST_BYTES == 2**30


def test_more_files_than_the_limit_are_refused(page: Page, sent: dict[str, bytes]) -> None:
    response = page.send("/page/plan", {**sent, **{f"song/f{i}": b"" for i in range(MOST_FILES)}})
    assert response.status_code == 400
    assert "Too many files" in response.json()["error"]["message"]
