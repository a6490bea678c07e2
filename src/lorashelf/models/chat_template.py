"""Chat templates: how a tokenizer spells a user turn, the answer to it and the end of the turn.

The template is rendered with marks in place of the texts; the text between the marks is the spelling. The result is
compared with a training row (one user turn and its answer) as transformers renders it, and differences are reported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from types import MappingProxyType
from typing import Any, NamedTuple

from ..digest import Json
from ..errors import ModelError, UnknownName, UsageError
from ..tasks.template import Template

NAMED = "chat_template"  # the argument that chooses among named templates
_SYSTEM, _QUERY, _ANSWER, _LATER = "⟨system⟩", "⟨query⟩", "⟨answer⟩", "⟨later⟩"
_PADDED = " \n{}\n "
_PIECES = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\s+|\w+|.")
_NO_ARGUMENTS: Mapping[str, Json] = MappingProxyType({})


def template_of(tokenizer: Any, arguments: Mapping[str, Json] = _NO_ARGUMENTS) -> Template:
    """Return how a tokenizer's chat template spells a user turn and its answer, without the default system turn.

    `arguments` go to the template (enable_thinking=False; chat_template="rag" chooses a named one). Without a chat
    template: instruction, input, end of text. Raises UsageError for arguments that the template does not take or
    if none of several named templates is the default; ModelError if the template cannot render a conversation.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        if arguments:
            what = f"the base has no chat template that could take {', '.join(arguments)}"
            raise UsageError(what, where=tokenizer.name_or_path, cure="omit --template-arg")
        begins = bos if bos and tokenizer("x").input_ids[0] == tokenizer.bos_token_id else ""
        return Template(begins, "\n", eos)
    chat = _Chat(tokenizer, _checked(tokenizer, arguments))
    asked, row = chat.render(_QUERY), chat.row(_QUERY, _ANSWER)
    if asked.count(_QUERY) != 1 or any(row.count(mark) != 1 for mark in (_QUERY, _ANSWER)):
        raise chat.unspelled(row)
    before, between = asked.split(_QUERY)
    row_before, written = row.split(_QUERY)
    if row_before != before:
        raise chat.unspelled(row)
    middle, tail = written.split(_ANSWER)
    turn = _turn(chat, before, between, tail)
    if between.startswith(middle):  # do not open a thought that a training row does not have
        between = middle
    opening = middle.removeprefix(between) if middle.startswith(between) else ""
    made = Template(
        before=turn.before,
        between=between,
        end=turn.end.rstrip() or eos,
        opening=opening if opening.isspace() else "",
        trims_query=chat.row(_PADDED.format(_QUERY), _ANSWER) == row,
        trims_answer=chat.row(_QUERY, _PADDED.format(_ANSWER)) == row,
        arguments=dict(arguments),
        earlier=turn.earlier,
        system=before.removesuffix(turn.header).removeprefix(turn.begins) if turn.before != before else "",
    )
    return _compared(made, chat, before)


def _compared(made: Template, chat: _Chat, before: str) -> Template:
    """Set `difference` to what differs from the template's own prompt or training row, the system turn aside.

    White space after the end of the turn does not count: nothing is learned or read after it.
    """
    for query, answer in ((_QUERY, _ANSWER), (_PADDED.format(_QUERY), _PADDED.format(_ANSWER))):
        asked = f"{made.before}{query.strip() if made.trims_query else query}{made.between}"
        lines = _differing(made.before + chat.render(query).removeprefix(before), asked)
        row = made.before + chat.row(query, answer).removeprefix(before)
        lines = lines or _differing(row.rstrip(), f"{asked}{made.answer(answer)}".rstrip())
        if lines:
            return replace(made, difference="\n".join(lines))
    return made


def _differing(theirs: str, ours: str) -> list[str]:
    """Return a diff of two texts, piece by piece: `- ` only in theirs, `+ ` only in ours."""
    a, b = _PIECES.findall(theirs), _PIECES.findall(ours)
    lines = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            lines += [f"- {''.join(a[i:j])!r}"] if j > i else []
            lines += [f"+ {''.join(b[k:m])!r}"] if m > k else []
    return lines


class _Turn(NamedTuple):
    """A user turn without a system turn: the conversation's start, the turn's header, the end of an answer.

    `earlier` is Template's.
    """

    begins: str
    header: str
    end: str
    earlier: tuple[str, str] | None = None

    @property
    def before(self) -> str:
        """All text before the user's."""
        return self.begins + self.header


def _turn(chat: _Chat, before: str, between: str, tail: str) -> _Turn:
    """Return the spelling of a user turn, from a conversation with a second user turn; `tail` ends a training row.

    Nothing is removed if the same text also precedes a system turn given by the caller ([gMASK]<sop>, the
    BOS token), or if the template does not take a second turn.
    """
    rendered = chat.attempted(("user", _QUERY), ("assistant", _ANSWER), ("user", _LATER))
    if rendered is None:
        return _Turn("", before, tail)
    if any(rendered.count(mark) != 1 for mark in (_ANSWER, _LATER)) or rendered.index(_ANSWER) > rendered.index(_LATER):
        raise chat.unspelled(rendered)
    gap, later = rendered.split(_ANSWER)[1].split(_LATER)
    earlier = rendered.split(_QUERY)[1].split(_ANSWER)[0], gap
    header, end = _header(chat, before, gap, tail)
    begins = before.removesuffix(header)
    explicit = chat.attempted(("system", _SYSTEM), ("user", _QUERY))
    if before.endswith(header) and (explicit is None or explicit.startswith(begins)):
        return _Turn(begins, header, end, earlier)
    if later != between:
        raise chat.unspelled(rendered)
    return _Turn(_before_system(begins, explicit or "", header, chat.bos), header, end, earlier)


def _header(chat: _Chat, before: str, gap: str, tail: str) -> tuple[str, str]:
    """Return the gap between an answer and the next query, cut into the next turn's header and the answer's end."""
    ends = [end for end in (tail, tail.removesuffix(chat.eos)) if gap.startswith(end)]
    for end in ends:
        if before.endswith(gap[len(end) :]):
            return gap[len(end) :], end
    for header in (before, before.removeprefix(chat.bos)):
        if header and gap.endswith(header):
            return header, gap.removesuffix(header)
    if not ends:
        raise chat.unspelled(before + _QUERY + gap)
    return gap[len(ends[0]) :], ends[0]


def _before_system(begins: str, explicit: str, header: str, bos: str) -> str:
    """Return the part of a conversation's beginning that also precedes a given system turn."""
    shared = next((i for i, (a, b) in enumerate(zip(begins, explicit)) if a != b), min(len(begins), len(explicit)))
    for start in (header.replace("user", "system").replace("USER", "SYSTEM"), header):
        if start and start in begins[:shared]:
            return begins[: begins.index(start)]
    return bos if begins.startswith(bos) else ""


class _Chat:
    """A tokenizer's chat template with its arguments. Whatever the template raises becomes a ModelError."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Json]) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments
        self.bos, self.eos = tokenizer.bos_token or "", tokenizer.eos_token or ""

    def render(self, query: str) -> str:
        """Return the prompt for an answer to one user turn."""
        return self._rendered([("user", query)], True)

    def row(self, query: str, answer: str) -> str:
        """Return a training row: a user turn and its answer."""
        return self._rendered([("user", query), ("assistant", answer)], False)

    def attempted(self, *turns: tuple[str, str]) -> str | None:
        """Return the prompt for an answer to a conversation; None if the template cannot render it."""
        try:
            return self._rendered(turns, True)
        except ModelError:
            return None

    def _rendered(self, turns: Sequence[tuple[str, str]], ask: bool) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {"tokenize": False, "add_generation_prompt": ask}
        try:
            text: str = self._tokenizer.apply_chat_template(messages, **options, **self._arguments)
        except Exception as error:  # a template may raise anything
            roles = ", ".join(message["role"] for message in messages)
            what = f"the chat template cannot render a conversation ({roles}): {type(error).__name__}: {error}"
            cure = "give the arguments that it needs with --template-arg NAME=VALUE, or choose another base"
            raise ModelError(what, where=self._tokenizer.name_or_path, cure=cure) from error
        return text

    def unspelled(self, rendered: str) -> ModelError:
        """Return the error of a template that does not render the turns in order, with their texts as given."""
        what = f"the chat template does not render the turns in order, with their texts as given: {rendered!r}"
        return ModelError(what, where=self._tokenizer.name_or_path, cure="choose another base")


def _checked(tokenizer: Any, arguments: Mapping[str, Json]) -> dict[str, Any]:
    """Return the arguments, and the template's name if only one is named. Raises UsageError, UnknownName."""
    where, named = tokenizer.name_or_path, tokenizer.chat_template
    given = dict(arguments)
    if isinstance(named, dict):
        if NAMED not in given and "default" not in named:
            if len(named) > 1:
                what = f"the base has several chat templates and no default: {', '.join(sorted(named))}"
                raise UsageError(what, where=where, cure=f"name one: --template-arg {NAMED}={min(named)}")
            given[NAMED] = next(iter(named))
        if given.get(NAMED, "default") not in named:
            raise UnknownName("chat template", str(given[NAMED]), sorted(named), where=where)
        text = named[given.get(NAMED, "default")]
    elif NAMED in given:
        raise UsageError("the base has one chat template, without a name", where=where, cure=f"omit {NAMED}")
    else:
        text = named
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
    unknown = [n for n in arguments if n != NAMED and (n in ours or not re.search(rf"\b{re.escape(n)}\b", text))]
    if unknown:
        what = f"the chat template does not take the argument {' or '.join(map(repr, unknown))}"
        raise UsageError(what, where=where, cure="give names that the template uses, as in enable_thinking=false")
    return given
