"""How a task's text becomes a model's input: one user turn, no system turn, the answer, the end of the turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..digest import canonical_json, digest


@dataclass(frozen=True, slots=True)
class Template:
    r"""The text around a query and its answer: `before` instruction ¶ input `between` `opening` answer `end`.

    A chat model's template gives them (without the system turn that a template would add by itself); a base model
    without one sees `instruction\n\ninput\n` and ends with its end-of-text token. What the model reads ends with
    `between`; `opening`, white space before the answer, is written by the model.
    """

    before: str
    between: str
    end: str
    opening: str = ""
    trims_query: bool = False
    """Whether the template drops white space around the user's text, as those of Llama 3 and Gemma do."""
    trims_answer: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the chat template was given beside the turns: enable_thinking and the like."""
    system: str = field(default="", compare=False)
    """The system turn that the chat template would add by itself, and that is left out."""
    difference: str = field(default="", compare=False)
    """What else differs from a training row as the chat template renders it: lines of `- ` its text, `+ ` ours."""

    def query(self, instruction: str, text: str) -> str:
        r"""What the model reads before it answers.

        >>> Template("<user>", "<bot>", "<end>").query("Mend:", "a text")
        '<user>Mend:\n\na text<bot>'
        """
        asked = f"{instruction}\n\n{text}"
        return f"{self.before}{asked.strip() if self.trims_query else asked}{self.between}"

    def answer(self, text: str) -> str:
        """What the model is to write: the text and the end of the turn."""
        return f"{self.opening}{text.strip() if self.trims_answer else text}{self.end}"

    @property
    def id(self) -> str:
        """Identifies the rendering and the template's arguments; losses and scores under two of them cannot be
        compared.
        """
        rendering: list[Any] = [self.query("{instruction}", "{input}"), self.answer("{output}")]
        if self.trims_query or self.trims_answer:
            rendering.append([self.trims_query, self.trims_answer])
        if self.arguments:
            rendering.append(json.dumps(dict(self.arguments), sort_keys=True, default=str))
        return "pr-" + digest([canonical_json(rendering)]).removeprefix("b2-")[:16]
