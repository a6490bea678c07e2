"""How a task's text becomes a model's input: one user turn, no system turn, the answer, the end of the turn."""

from __future__ import annotations

from dataclasses import dataclass

from .digest import canonical_json, digest


@dataclass(frozen=True, slots=True)
class Template:
    r"""The text around a query and its answer: `before` instruction ¶ input `between` answer `end`.

    A chat model's template gives them (without the system turn that a template would add by itself); a base model
    without one sees `instruction\n\ninput\n` and ends with its end-of-text token.
    """

    before: str
    between: str
    end: str

    def query(self, instruction: str, text: str) -> str:
        r"""What the model reads before it answers.

        >>> Template("<user>", "<bot>", "<end>").query("Mend:", "a text")
        '<user>Mend:\n\na text<bot>'
        """
        return f"{self.before}{instruction}\n\n{text}{self.between}"

    def answer(self, text: str) -> str:
        """What the model is to write: the text and the end of the turn."""
        return text + self.end

    @property
    def id(self) -> str:
        """Identifies the rendering; losses and scores of two renderings cannot be compared."""
        rendering = [self.query("{instruction}", "{input}"), self.answer("{output}")]
        return "pr-" + digest([canonical_json(rendering)]).removeprefix("b2-")[:16]
