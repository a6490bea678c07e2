"""OpenAI's API over a shelf, asked with OpenAI's client: answers, streams, limits, a shelf that changes meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lorashelf import plan_add, plan_update
from lorashelf.models.hf import HFBackend
from lorashelf.models.protocol import Row
from lorashelf.models.sampling import Sampler, Sampling
from lorashelf.server import app
from lorashelf.server.app import Limits
from lorashelf.server.auto import Auto
from lorashelf.serving.generate import answer
from lorashelf.tasks.folders import Example, Task
from served import PROMPT, Served, adapter, serving, shelf_of, until
from tiny_base import tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the cats sleeps"
CONTEXT = 512
TASKS = ("mend", "talk", "sing", "größer & more")
USER = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFBackend:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=CONTEXT)
    return HFBackend.open(str(folder), device="cpu", dtype="f32")


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, model: HFBackend) -> Iterator[Served]:
    """A server over a shelf that nobody changes."""
    path = tmp_path_factory.mktemp("shelf") / "a.shelf"
    shelf = shelf_of(path, *TASKS)
    shelf.commit(plan_add(shelf.snapshot(), adapter(7), "bare"))
    with serving(path, model, limits=Limits(tokens=400, body=20_000)) as made:
        yield made


@pytest.fixture
def client(standing: Served) -> openai.OpenAI:
    return standing.openai()


def expected(standing: Served, model: HFBackend, task: str, **options: Any) -> str:
    """What `generate` answers."""
    return answer(model, standing.served.snapshot(), task, options.pop("text", TEXT), **options)


def greedy(standing: Served, model: HFBackend, task: str, prompt: list[int], most: int, *, trims: bool = True) -> str:
    """The greedy continuation of tokens, one row alone."""
    row = Row(prompt, standing.served.snapshot().adapter(task), Sampler(Sampling()))
    alone = model.decoding(1)
    tokens = [alone.join([row])[0].id]
    while len(tokens) < most and not model.text.ended(tokens):
        tokens.append(alone.step()[0].id)
    return model.text.decoded(tokens, trims=trims)


# answers --------------------------------------------------------------------------------------------------------------


def test_tasks_are_the_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [*sorted([*TASKS, "bare"]), "base"]
    assert client.models.retrieve("mend").model_extra == {
        "lorashelf": {"slot": 0, "members": ["mend"], "prompt": PROMPT}
    }
    assert client.models.retrieve("größer & more").id == "größer & more"
    with pytest.raises(openai.NotFoundError, match="did you mean 'mend'"):
        client.models.retrieve("mned")


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_is_answered_as_generate_does(
    client: openai.OpenAI, standing: Served, model: HFBackend, task: str
) -> None:
    found = client.chat.completions.create(model=task, messages=USER)
    assert found.choices[0].message.content == expected(standing, model, task)
    assert found.model == task
    assert found.model_extra == {"lorashelf": {"task": task, "slot": TASKS.index(task)}}
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.prompt_tokens == len(model.text.query(PROMPT, TEXT))
    assert found.usage.completion_tokens <= 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_has_the_same_text_in_pieces(client: openai.OpenAI, standing: Served, model: HFBackend) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(model="talk", messages=USER, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(piece or "" for piece in pieces) == expected(standing, model, "talk")
    assert len(pieces) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    whole = client.chat.completions.create(model="talk", messages=USER)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_system_message_replaces_the_stored_instruction(
    client: openai.OpenAI, standing: Served, model: HFBackend
) -> None:
    texts = [{"type": "text", "text": "Say"}, {"type": "text", "text": ":"}]
    for system in ("Say:", texts):
        messages = [{"role": "system", "content": system}, *USER]
        found = client.chat.completions.create(model="mend", messages=messages)
        assert found.choices[0].message.content == expected(standing, model, "mend", prompt="Say:")


def test_without_a_stored_instruction_the_text_stands_alone(
    client: openai.OpenAI, standing: Served, model: HFBackend
) -> None:
    found = client.chat.completions.create(model="bare", messages=USER, max_tokens=9)
    prompt = model.text.encoded(f"{model.template.before}{TEXT}{model.template.between}")
    assert found.choices[0].message.content == greedy(standing, model, "bare", prompt, 9)


def test_a_conversation_is_rendered_by_the_chat_template(
    client: openai.OpenAI, standing: Served, model: HFBackend
) -> None:
    turns = [*USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    found = client.chat.completions.create(model="mend", messages=turns, max_tokens=9)
    asked = [{"role": "user", "content": f"{PROMPT}\n\n{TEXT}"}, *turns[1:]]
    text = model.base.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert found.choices[0].message.content == greedy(standing, model, "mend", model.text.encoded(text), 9)


def test_a_text_completion_reads_the_prompt_as_it_is(client: openai.OpenAI, standing: Served, model: HFBackend) -> None:
    found = client.completions.create(model="sing", prompt="Once upon", max_tokens=9)
    wanted = greedy(standing, model, "sing", model.text.raw("Once upon"), 9, trims=False)
    assert found.choices[0].text == wanted
    assert found.usage.prompt_tokens == len(model.text.raw("Once upon"))
    with client.completions.create(model="sing", prompt="Once upon", max_tokens=9, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_stop_texts_end_an_answer(client: openai.OpenAI, standing: Served, model: HFBackend) -> None:
    whole = expected(standing, model, "mend", max_new_tokens=200)
    stop = whole[20:22]
    for given in (stop, ["not in it", stop]):
        found = client.chat.completions.create(model="mend", messages=USER, max_tokens=200, stop=given)
        assert found.choices[0].message.content == whole[: whole.index(stop)].strip()
        assert found.choices[0].finish_reason == "stop"


def test_max_tokens_ends_an_answer_by_length(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.chat.completions.create(model="mend", messages=USER, **{name: 3})
        assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 3)


def test_a_seed_fixes_what_is_sampled(client: openai.OpenAI) -> None:
    def sampled(seed: int | None) -> str:
        found = client.chat.completions.create(
            model="mend", messages=USER, temperature=1.5, top_p=0.9, seed=seed, max_tokens=20
        )
        return found.choices[0].message.content or ""

    assert sampled(3) == sampled(3)
    assert len({sampled(seed) for seed in (1, 2, -3, None)}) == 4


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "mend", "messages": USER, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    found = client.chat.completions.create(**options)
    content = found.choices[0].logprobs.content
    assert len(content) == 5
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob == max(each.logprob for each in token.top_logprobs) <= 0
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    with client.chat.completions.create(**options, stream=True) as stream:
        streamed = [one for chunk in stream if (logprobs := chunk.choices[0].logprobs) for one in logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    bare = client.chat.completions.create(model="mend", messages=USER, logprobs=True, max_tokens=2)
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content] == [[], []]


def test_logprobs_of_a_text_completion(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "mend", "prompt": "ab", "logprobs": 2, "max_tokens": 5}
    found = client.completions.create(**options).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 5
    assert found.text_offset[0] == 0
    with client.completions.create(**options, stream=True) as stream:
        pieces = [chunk.choices[0].logprobs for chunk in stream if chunk.choices[0].logprobs]
    assert [token for piece in pieces for token in piece.tokens] == found.tokens


def test_the_context_ends_an_answer(client: openai.OpenAI, model: HFBackend) -> None:
    prompt = "y" * (CONTEXT - 3)
    found = client.completions.create(model="mend", prompt=prompt, max_tokens=300)
    assert found.usage.completion_tokens <= 3


def test_a_hundred_clients_of_different_tasks_get_their_own_answers(standing: Served, model: HFBackend) -> None:
    texts = [f"text {'long ' * (i % 5)}{i}" for i in range(100)]
    asked = [(TASKS[i % 4], text, 4 + i % 9) for i, text in enumerate(texts)]

    async def ask(client: openai.AsyncOpenAI, task: str, text: str, most: int, streamed: bool) -> tuple[str, str]:
        options: dict[str, Any] = {"model": task, "messages": [{"role": "user", "content": text}], "max_tokens": most}
        if not streamed:
            found = await client.chat.completions.create(**options)
            return found.model, found.choices[0].message.content or ""
        pieces = ""
        async with await client.chat.completions.create(**options, stream=True) as stream:
            async for chunk in stream:
                pieces += chunk.choices[0].delta.content or ""
        return chunk.model, pieces

    async def everybody() -> list[tuple[str, str]]:
        client = openai.AsyncOpenAI(base_url=f"{standing.url}/v1", api_key="x", max_retries=20, timeout=120)
        async with client:
            return await asyncio.gather(*(ask(client, *one, i % 2 == 0) for i, one in enumerate(asked)))

    before = dict(standing.scheduler.steps)
    found = asyncio.run(everybody())
    wanted = [(task, expected(standing, model, task, text=text, max_new_tokens=most)) for task, text, most in asked]
    assert found == wanted
    assert len({text for _, text in found}) > 80
    steps, rows = (standing.scheduler.steps[name] - before[name] for name in ("steps", "rows"))
    assert rows > 3 * steps


# bad input ------------------------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


def posted(standing: Served, body: Any, path: str = CHAT, **options: Any) -> tuple[int, dict[str, Any]]:
    """Post a body, and return the status and the error."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"content-type": "application/json", **options}
    response = standing.http().post(path, content=body, headers=headers)
    return response.status_code, response.json().get("error", {})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"model": NaN}', "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b'{"temperature": 1e999, "model": "mend", "messages": []}', "temperature is Infinity"),
        ([], "the body is an array; give object"),
        ({}, "model is missing; messages is missing"),
        ({"model": 3}, "model is 3; give string"),
        ({"messages": []}, "messages has 0 items; give at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'messages[0].role is "robot"; give "system" or'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content is an array"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages are from system"),
        ({"messages": [*USER, *USER]}, "messages are from user, user"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "the last message is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not Unicode"),
        ({"max_tokens": 0}, "max_tokens is 0; give at least 1"),
        ({"max_tokens": 10**12}, "max_tokens is 1000000000000; give at most 400"),
        ({"max_tokens": True}, "max_tokens is true; give integer or null"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; give integer or null"),
        ({"temperature": -0.1}, "temperature is -0.1; give at least 0"),
        ({"top_p": 0}, "top_p is 0; give more than 0"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop is an array"),
        ({"stop": ""}, 'stop is ""'),
        ({"n": 2}, "n is 2; give 1 or null"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5; give 0 or null"),
        ({"top_logprobs": 2}, "top_logprobs is given without logprobs"),
        ({"response_format": {"type": "json_object"}}, 'response_format.type is "json_object"; give "text"'),
        ({"tools": []}, "tools is not supported"),
        ({"top_k": 5, "min_p": 0.1}, "top_k is not supported; min_p is not supported"),
    ],
)
def test_a_bad_request_is_400_with_what_is_wrong(standing: Served, body: Any, said: str) -> None:
    if isinstance(body, dict) and body:
        body = {"model": "mend", "messages": USER, **body}
    status, error = posted(standing, body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert said in error["message"]


def test_what_changes_nothing_may_be_sent(client: openai.OpenAI, standing: Served, model: HFBackend) -> None:
    found = client.chat.completions.create(
        model="mend", messages=USER, n=1, user="me", presence_penalty=0, response_format={"type": "text"}, stop=None
    )
    assert found.choices[0].message.content == expected(standing, model, "mend")


def test_an_unknown_task_is_404_with_the_nearest(standing: Served) -> None:
    status, error = posted(standing, {"model": "mned", "messages": USER})
    assert (status, error["code"], error["nearest"]) == (404, "model_not_found", ["mend"])
    assert "did you mean 'mend'?" in error["message"]
    assert str(standing.served.path) not in json.dumps(error)


def test_a_prompt_beyond_the_context_is_400(standing: Served) -> None:
    status, error = posted(standing, {"model": "mend", "prompt": "y" * CONTEXT}, "/v1/completions")
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert f"{CONTEXT} tokens" in error["message"]


def test_a_body_over_the_limit_is_413(standing: Served) -> None:
    status, error = posted(standing, {"model": "mend", "messages": [{"role": "user", "content": "y" * 20_000}]})
    assert (status, error["code"]) == (413, "too_large")


def test_another_content_type_is_415_so_that_no_web_page_can_ask(standing: Served) -> None:
    status, error = posted(standing, {"model": "mend", "messages": USER}, **{"content-type": "text/plain"})
    assert (status, error["code"]) == (415, "unsupported_media_type")


def test_unknown_routes_and_methods_have_the_same_documents(standing: Served) -> None:
    missing, wrong = standing.http().get("/v2"), standing.http().get(CHAT)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_a_bug_is_500_with_a_document(standing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing.server, "_prepared", lambda _: 1 / 0)
    status, error = posted(standing, {"model": "mend", "messages": USER})
    assert (status, error["type"]) == (500, "server_error")
    assert "bug" in error["message"]


# keys and hosts -------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_except_by_probes(tmp_path: Path, model: HFBackend) -> None:
    shelf_of(tmp_path / "a.shelf", "mend")
    with serving(tmp_path / "a.shelf", model, key="secret") as made:
        http = made.http()
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            for given in ("", "Bearer wrong", "Basic secret"):
                response = http.get(path, headers={"authorization": given})
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
                assert response.json()["error"]["code"] == "invalid_api_key"
            found = http.get(path, headers={"authorization": "Bearer secret"})
            assert found.status_code == 200
        for path in ("/healthz", "/readyz"):
            assert http.get(path, headers={"authorization": ""}).status_code == 200


def test_without_a_key_no_other_name_is_answered(standing: Served) -> None:
    http = standing.http()
    for host in ("evil.example", "evil.example:8000", "[", "10.0.0.1"):
        response = http.get("/v1/models", headers={"host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden_host")
    for host in ("localhost:9", "127.0.0.1", "[::1]:80"):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200


# clients that are slow, or go -----------------------------------------------------------------------------------------


def raw(made: Served, body: dict[str, Any], *, size: int | None = None, buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent, by hand; closed with the server at the latest."""
    host, port = made.url.removeprefix("http://").split(":")
    connection = made.clients.enter_context(socket.socket())
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {size or len(data)}\r\n\r\n".encode() + data)
    return connection


def requests_counted(made: Served, status: str) -> float:
    lines = made.http().get("/metrics").text.splitlines()
    named = [line for line in lines if line.startswith("lorashelf_requests_total") and f'status="{status}"' in line]
    return sum(float(line.split()[-1]) for line in named)


@pytest.fixture
def slow(tmp_path: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of one row whose every step waits to be let go."""
    shelf_of(tmp_path / "a.shelf", "mend", "talk")
    with serving(tmp_path / "a.shelf", model, rows=1, waiting=2, limits=Limits(tokens=400)) as made:
        made.held(monkeypatch)
        yield made


LONG = {"model": "mend", "messages": USER, "max_tokens": 400}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_frees_its_row_and_its_place_in_the_queue(slow: Served, streamed: bool) -> None:
    connections = [raw(slow, {**LONG, "stream": streamed})]
    until(lambda: slow.scheduler.running == 1)
    connections.append(raw(slow, {**LONG, "stream": streamed}))
    until(lambda: slow.scheduler.waiting == 1)
    connections[1].close()
    until(lambda: slow.scheduler.waiting == 0)
    connections[0].close()
    until(lambda: slow.scheduler._running[0].cancelled)
    slow.steps.release()
    until(lambda: slow.scheduler.running == 0)
    until(lambda: requests_counted(slow, "gone") == 2)


def test_a_full_queue_is_429_with_when_to_try_again(slow: Served) -> None:
    connections = [raw(slow, LONG)]
    until(lambda: slow.scheduler.running == 1)
    connections += [raw(slow, LONG) for _ in range(2)]
    until(lambda: slow.scheduler.waiting == 2)
    response = slow.http().post(CHAT, json=LONG)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    for connection in connections:
        connection.close()


def test_a_body_that_does_not_arrive_is_408(standing: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    with raw(standing, {"model": "mend"}, size=9000) as connection:
        assert b"408" in connection.recv(100)


def test_a_client_that_does_not_read_is_cut_off(
    tmp_path: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf_of(tmp_path / "a.shelf", "mend")
    monkeypatch.setattr(app, "BODY_SECONDS", 0.5)
    with serving(tmp_path / "a.shelf", model, limits=Limits(tokens=450, seconds=5)) as made:
        for server in made.process.servers:
            for listening in server.sockets:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 420, "stop": ["\x00\x00"]}
        with raw(made, body, buffer=2048):
            until(lambda: requests_counted(made, "gone") == 1)
            until(lambda: made.scheduler.running == 0)


def test_an_answer_that_is_not_finished_in_time_is_504(
    tmp_path: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf_of(tmp_path / "a.shelf", "mend")
    with serving(tmp_path / "a.shelf", model, limits=Limits(tokens=400, seconds=0.5)) as made:
        made.held(monkeypatch)
        with pytest.raises(openai.InternalServerError) as caught:
            made.openai().chat.completions.create(**LONG)
        assert (caught.value.status_code, caught.value.code) == (504, "timed_out")
        made.steps.release()
        until(lambda: made.scheduler.running == 0)
        with (
            made.openai().chat.completions.create(**LONG, stream=True) as stream,
            pytest.raises(openai.APIError) as late,
        ):
            list(stream)
        assert "not finished in time" in str(late.value)


# a shelf that changes -------------------------------------------------------------------------------------------------


def content(made: Served, task: str) -> str:
    found = made.openai().chat.completions.create(model=task, messages=USER)
    return found.choices[0].message.content or ""


def test_what_another_process_commits_is_served_and_running_answers_finish_as_they_began(
    tmp_path: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_of(tmp_path / "a.shelf", "mend", "talk")
    before = answer(model, shelf.snapshot(), "mend", TEXT)
    with serving(shelf.path, model) as made:
        with pytest.MonkeyPatch.context() as patched:
            gate = made.held(patched)
            stream = made.openai().chat.completions.create(model="mend", messages=USER, stream=True)
            first = next(stream).choices[0].delta.content or ""
            shelf.commit(plan_update(shelf.snapshot(), "mend", adapter(11)))
            shelf.commit(plan_add(shelf.snapshot(), adapter(12), "new", details={"prompt": PROMPT}))
            gate.release(10_000)
            assert first + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == before
        after = answer(model, shelf.snapshot(), "mend", TEXT)
        assert content(made, "mend") == after != before
        assert content(made, "new") == answer(model, shelf.snapshot(), "new", TEXT)
        assert "new" in [each.id for each in made.openai().models.list()]
        shelf.undo()
        with pytest.raises(openai.NotFoundError):
            content(made, "new")


def test_a_request_whose_adapter_is_deleted_while_it_waits_is_answered_by_the_new_one(
    tmp_path: Path, model: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorashelf.formats.safetensors._HELD", threading.Semaphore(0))  # files are opened when read
    shelf = shelf_of(tmp_path / "a.shelf", "mend", "talk")
    shelf.commit(plan_update(shelf.snapshot(), "talk", adapter(20)))  # one that no other test has left in the pool
    with serving(shelf.path, model, rows=1) as made:
        gate = made.held(monkeypatch)
        raw(made, LONG | {"max_tokens": 300})
        until(lambda: made.scheduler.running == 1)
        second = raw(made, {"model": "talk", "messages": USER})
        until(lambda: made.scheduler.waiting == 1)
        for seed in (21, 22):
            shelf.commit(plan_update(shelf.snapshot(), "talk", adapter(seed)))
        gate.release(10_000)
        received = b""
        while not received.endswith(b"}"):
            received += second.recv(9000)
        found = json.loads(received[received.index(b"\r\n\r\n") :])
        assert found["choices"][0]["message"]["content"] == answer(model, shelf.snapshot(), "talk", TEXT)


def test_a_locked_shelf_is_served(tmp_path: Path, model: HFBackend) -> None:
    shelf = shelf_of(tmp_path / "a.shelf", "mend")
    with serving(shelf.path, model) as made, shelf.writing():
        assert content(made, "mend") == answer(model, shelf.snapshot(), "mend", TEXT)
        assert made.http().get("/readyz").status_code == 200


def test_a_shelf_that_becomes_corrupt_is_served_as_it_was_and_readyz_reports_it(
    tmp_path: Path, model: HFBackend, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = shelf_of(tmp_path / "a.shelf", "mend", "talk")
    wanted = {task: answer(model, shelf.snapshot(), task, TEXT) for task in ("mend", "talk")}
    with serving(shelf.path, model) as made:
        assert content(made, "mend") == wanted["mend"]
        head = (shelf.path / "HEAD").read_text()
        (shelf.path / "HEAD").write_text("nonsense")
        response = made.http().get("/readyz")
        assert (response.status_code, response.json()["ready"]) == (503, False)
        assert "HEAD" in response.json()["why"]
        assert {task: content(made, task) for task in wanted} == wanted
        assert "the last good state is served" in caplog.text
        (shelf.path / "HEAD").write_text(head)
        assert made.http().get("/readyz").json() == {"ready": True, "head": head.strip(), "tasks": 2}


def test_a_damaged_slot_concerns_its_own_tasks(tmp_path: Path, model: HFBackend) -> None:
    shelf = shelf_of(tmp_path / "a.shelf", "mend", "talk")
    wanted = answer(model, shelf.snapshot(), "mend", TEXT)
    with serving(shelf.path, model) as made:
        assert content(made, "mend") == wanted
        for task in ("mend", "talk"):
            slot, _ = shelf.snapshot().located(task)
            file = shelf.snapshot().slot_path(slot) / "adapter_model.safetensors"
            data = bytearray(file.read_bytes())
            data[-5] ^= 0xFF
            file.write_bytes(data)
        assert content(made, "mend") == wanted  # it is on the base's device
        with pytest.raises(openai.InternalServerError) as caught:
            content(made, "talk")
        assert (caught.value.status_code, caught.value.code) == (503, "corrupt")
        assert str(shelf.path) not in str(caught.value)
        response = made.http().get("/readyz")
        assert response.status_code == 503
        assert "talk" in response.json()["why"]
        assert "lorashelf_shelf_ready 0.0" in made.http().get("/metrics").text


def test_an_adapter_that_does_not_fit_the_base_is_503_for_its_task(tmp_path: Path, model: HFBackend) -> None:
    shelf = shelf_of(tmp_path / "a.shelf")
    shelf.commit(plan_add(shelf.snapshot(), adapter(0, width=17), "wide", details={"prompt": PROMPT}))
    with serving(shelf.path, model) as made:
        with pytest.raises(openai.InternalServerError) as caught:
            content(made, "wide")
        assert (caught.value.status_code, caught.value.code) == (503, "shape_mismatch")


# auto -----------------------------------------------------------------------------------------------------------------


def test_auto_chooses_a_task_by_the_text_and_names_it(tmp_path: Path, model: HFBackend) -> None:
    shelf = shelf_of(tmp_path / "a.shelf", "mend", "talk")
    kinds = {"mend": "aaaa aaa aa", "talk": "zzz zz zzzz", "later": "0000 000"}
    tasks = {
        name: Task(name, PROMPT, "", splits={"train": tuple(Example(f"{text} {i}", "x") for i in range(4))})
        for name, text in kinds.items()
    }
    with serving(shelf.path, model, auto=Auto(model, tasks, tmp_path / "cache")) as made:
        client = made.openai()
        assert [each.id for each in client.models.list()] == ["auto", "mend", "talk", "base"]
        assert client.models.retrieve("auto").id == "auto"
        for task in ("mend", "talk"):
            messages = [{"role": "user", "content": kinds[task]}]
            found = client.chat.completions.create(model="auto", messages=messages)
            about = found.model_extra["lorashelf"]
            assert (found.model, about["task"]) == (task, task)
            assert about["auto"]["confidence"] > 0.5
            assert found.choices[0].message.content == answer(model, shelf.snapshot(), task, kinds[task])
        shelf.commit(plan_add(shelf.snapshot(), adapter(5), "later", details={"prompt": PROMPT}))
        found = client.completions.create(model="auto", prompt=kinds["later"], max_tokens=2)
        assert found.model == "later"


def test_auto_without_examples_is_400(standing: Served) -> None:
    status, error = posted(standing, {"model": "auto", "messages": USER})
    assert status == 400
    assert "--examples" in error["message"]


# metrics, and what the document promises ------------------------------------------------------------------------------


def test_metrics_count_requests_tokens_and_forward_passes(tmp_path: Path, model: HFBackend) -> None:
    shelf_of(tmp_path / "a.shelf", "mend")
    with serving(tmp_path / "a.shelf", model) as made:
        used = made.openai().chat.completions.create(model="mend", messages=USER, max_tokens=4).usage
        posted(made, {"model": "unknown", "messages": USER})
        text = made.http().get("/metrics").text
        for line in (
            'lorashelf_requests_total{status="200",task="mend"} 1.0',
            'lorashelf_requests_total{status="404",task=""} 1.0',
            f'lorashelf_tokens_total{{kind="prompt",task="mend"}} {used.prompt_tokens}.0',
            f'lorashelf_tokens_total{{kind="answer",task="mend"}} {used.completion_tokens}.0',
            "lorashelf_first_token_seconds_count 1.0",
            "lorashelf_request_seconds_count 1.0",
            "lorashelf_rows_running 0.0",
        ):
            assert line in text.splitlines()


def test_a_dead_model_thread_is_not_healthy(tmp_path: Path, model: HFBackend) -> None:
    shelf_of(tmp_path / "a.shelf", "mend")
    with serving(tmp_path / "a.shelf", model) as made:
        assert made.http().get("/healthz").json() == {"alive": True}
        made.scheduler.close()
        assert made.http().get("/healthz").status_code == 503
