"""The thread that owns a model: many tasks at once answer as each alone; cancelling, refusing, closing, stop texts."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lorashelf import Adapter, BaseId, Factors, Modules
from lorashelf.errors import Busy, CorruptShelf, LorashelfError, ShapeMismatch
from lorashelf.models.hf import HFBackend
from lorashelf.models.sampling import Sampling
from lorashelf.serving.scheduler import End, Event, Piece, Request, Scheduler, Ticket
from tiny_base import tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")
INSTRUCTION = "Do:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    return HFBackend.open(str(tiny_base(tmp_path_factory.mktemp("base") / "tiny")), device="cpu", dtype="f32")


@pytest.fixture
def scheduler(model: HFBackend) -> Iterator[Scheduler]:
    made = Scheduler(model, rows=4, waiting=40)
    yield made
    made.close()


def adapter(seed: int, width: int = 16) -> Adapter:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, width)), 0.6 * rng.standard_normal((16, 2))
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    return Adapter(Modules({p: Factors(a.astype("f4"), b.astype("f4")) for p in paths}), BaseId(""))


class Heard:
    """What a request is told."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def result(self) -> tuple[str, Event]:
        """The text, and the last event."""
        text = ""
        while True:
            event = self.events.get(timeout=30)
            if not isinstance(event, Piece):
                return text, event
            text += event.text


def ask(scheduler: Scheduler, model: HFBackend, adapted: Adapter | None, text: str, **options: Any) -> Heard:
    heard = Heard()
    scheduler.submit(Request(model.text.query(INSTRUCTION, text), adapted, **{"most": 20, **options}), heard.events.put)
    return heard


def test_many_requests_of_different_tasks_get_what_each_gets_alone(scheduler: Scheduler, model: HFBackend) -> None:
    tasks = [*(adapter(seed) for seed in range(5)), None]
    texts = [f"text {'long ' * (i % 4)}{i}" for i in range(24)]
    heard = [ask(scheduler, model, tasks[i % 6], text, most=5 + i % 20) for i, text in enumerate(texts)]
    found = [each.result() for each in heard]
    for i, (text, (answer, end)) in enumerate(zip(texts, found, strict=True)):
        alone = model.answers(tasks[i % 6], INSTRUCTION, [text], max_new_tokens=5 + i % 20)[0]
        assert answer == alone
        assert isinstance(end, End)
        assert end.reason == "stop" or end.tokens == 5 + i % 20
    assert len({answer for answer, _ in found}) > 12
    assert scheduler.steps["rows"] > 2 * scheduler.steps["steps"]  # they ran side by side


def slowly(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Every step waits for the semaphore."""
    step, gate = scheduler._batch.step, threading.Semaphore(0)

    def gated() -> Any:
        gate.acquire()
        return step()

    monkeypatch.setattr(scheduler._batch, "step", gated)
    return gate


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_newcomer_joins_between_two_tokens(
    scheduler: Scheduler, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = slowly(scheduler, monkeypatch)
    first = ask(scheduler, model, adapter(1), "a", most=400)
    until(lambda: scheduler.running == 1)
    second = ask(scheduler, model, adapter(2), "b", most=2)
    for _ in range(3):
        gate.release()
    assert second.result()[1] == End("length", 2)
    assert scheduler.running == 1
    assert first.events.qsize() < 6
    for _ in range(400):
        gate.release()
    assert first.result()[0] == model.answers(adapter(1), INSTRUCTION, ["a"], max_new_tokens=400)[0]


def test_a_cancelled_request_leaves_its_row_and_hears_nothing_more(
    scheduler: Scheduler, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = slowly(scheduler, monkeypatch)
    heard = Heard()
    ticket = scheduler.submit(Request(model.text.query("", "a"), None, 400), heard.events.put)
    until(lambda: scheduler.running == 1)
    ticket.cancel()
    gate.release()
    until(lambda: scheduler.running == 0)
    told = heard.events.qsize()
    gate.release()
    assert ask(scheduler, model, None, "b", most=1).result()[1] == End("length", 1)
    assert heard.events.qsize() == told <= 2


def test_a_full_queue_refuses_and_a_cancelled_request_makes_room(
    model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(model, rows=1, waiting=2)
    gate = slowly(scheduler, monkeypatch)
    running = ask(scheduler, model, None, "a", most=400)
    until(lambda: scheduler.running == 1)
    tickets: list[Ticket] = []
    for _ in range(2):
        tickets.append(scheduler.submit(Request(model.text.query("", "a"), None, 1), lambda _: None))
    with pytest.raises(Busy, match="2 requests wait"):
        ask(scheduler, model, None, "c")
    assert scheduler.patience >= 1
    tickets[0].cancel()
    accepted = ask(scheduler, model, None, "d", most=1)
    for _ in range(500):
        gate.release()
    assert isinstance(running.result()[1], End)
    assert accepted.result()[1] == End("length", 1)
    scheduler.close()
    with pytest.raises(Busy, match="shutting down"):
        ask(scheduler, model, None, "e")


def test_an_adapter_that_cannot_be_put_on_fails_alone(scheduler: Scheduler, model: HFBackend) -> None:
    heard = [ask(scheduler, model, each, "a") for each in (adapter(0), adapter(1, width=17), adapter(2))]
    ends = [each.result()[1] for each in heard]
    assert [type(end) for end in ends] == [End, ShapeMismatch, End]


def test_an_error_of_the_model_ends_what_runs_and_nothing_else(
    scheduler: Scheduler, model: HFBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = pytest.MonkeyPatch()

    def fail() -> Any:
        broken.undo()
        raise ZeroDivisionError("whatever")

    broken.setattr(scheduler._batch, "step", fail)
    _, end = ask(scheduler, model, None, "a").result()
    assert isinstance(end, LorashelfError)
    assert "ZeroDivisionError" in str(end)
    assert "bug" in caplog.text
    assert isinstance(ask(scheduler, model, None, "a").result()[1], End)


def test_other_work_is_done_between_two_tokens(scheduler: Scheduler) -> None:
    assert scheduler.call(lambda: threading.current_thread().name).result(30) == "lorashelf-model"

    def fail() -> None:
        raise CorruptShelf("x")

    with pytest.raises(CorruptShelf):
        scheduler.call(fail).result(30)


def test_closing_tells_everybody(model: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(model, rows=1)
    gate = slowly(scheduler, monkeypatch)
    heard = [ask(scheduler, model, None, "a", most=400) for _ in range(2)]
    until(lambda: scheduler.running == 1)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    until(lambda: scheduler._closed)
    gate.release()
    closing.join(30)
    assert [type(each.result()[1]) for each in heard] == [Busy, Busy]
    with pytest.raises(Busy, match="shutting down"):
        scheduler.call(lambda: None)


# stop texts -----------------------------------------------------------------------------------------------------------


def test_a_stop_text_ends_the_answer_before_it(scheduler: Scheduler, model: HFBackend) -> None:
    whole = model.answers(adapter(3), INSTRUCTION, ["a"], max_new_tokens=60)[0]
    stop = whole[12:15]
    place = whole.index(stop)
    heard = ask(scheduler, model, adapter(3), "a", most=60, stop=[stop, "not there"])
    answer, end = heard.result()
    assert answer == whole[:place].strip()
    assert isinstance(end, End)
    assert (end.reason, end.tokens < 60) == ("stop", True)


def test_pieces_never_show_the_beginning_of_a_stop_text(model: HFBackend) -> None:
    from lorashelf.models.tokens import Pieces

    pieces = Pieces(model.text, ["cde"])
    assert [pieces.add(token) for token in model.text.encoded("abcdxcde")] == ["a", "b", "", "", "cdx", "", "", ""]
    assert pieces.ended
    unfinished = Pieces(model.text, ["cde"])
    shown = "".join(unfinished.add(token) for token in model.text.encoded("abcd"))
    assert (shown, unfinished.rest(), unfinished.ended) == ("ab", "cd", False)


def test_a_text_that_is_not_trimmed_keeps_its_white_space(model: HFBackend) -> None:
    from lorashelf.models.tokens import Pieces

    pieces = Pieces(model.text, trims=False)
    assert [pieces.add(token) for token in model.text.encoded(" a \n")] == [" ", "a", " ", "\n"]


def test_a_seed_gives_the_same_draws_beside_others(scheduler: Scheduler, model: HFBackend) -> None:
    options = {"sampling": Sampling(temperature=1.0, seed=7), "most": 12}
    heard = [ask(scheduler, model, adapter(1), "a", **options) for _ in range(3)]
    assert len({each.result()[0] for each in heard}) == 1
    others = [
        ask(scheduler, model, adapter(1), "a", sampling=Sampling(temperature=1.0, seed=seed), most=12)
        for seed in range(3)
    ]
    assert len({each.result()[0] for each in others}) == 3
