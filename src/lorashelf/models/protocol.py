"""A language model as the rest of lorashelf sees it: its identity, and what it can do with an adapter on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from ..errors import ModelError, UsageError
from ..lora.adapter import Adapter
from ..lora.arrays import Array32, Float32, Square
from ..tasks.folders import ExampleSet
from ..tasks.template import Template
from .sampling import Sampler, Token
from .tokens import Tokenisation

Pair = tuple[Adapter | None, ExampleSet]


class Loss(NamedTuple):
    """The negative log-likelihood of one answer, in nats, summed over its tokens, and the number of tokens."""

    nll: float
    tokens: int


def mean_loss(losses: Sequence[Loss]) -> float:
    """Return Σ NLL / Σ tokens over examples: the loss of a task, in nats per token (arXiv 2601.17441)."""
    return sum(loss.nll for loss in losses) / sum(loss.tokens for loss in losses)


@runtime_checkable
class Model(Protocol):
    """A base model that an adapter can be put on; each engine has its own class."""

    @property
    def name(self) -> str:
        """The base model's name: a hub id or a path."""
        ...

    @property
    def weights(self) -> str:
        """A fingerprint of the base's weights: two files may share a name."""
        ...

    @property
    def dtype(self) -> str:
        """The number format that the base computes in."""
        ...

    @property
    def template(self) -> Template:
        """The text around a query and its answer."""
        ...

    @property
    def prompt_id(self) -> str:
        """Identifies the template."""
        return self.template.id

    @property
    def context(self) -> int | None:
        """The most tokens that a query and its answer may have together; None: no limit."""
        ...

    @property
    def id(self) -> str:
        """Identifies all that a result depends on besides the adapter, the text and the request's settings."""
        return f"{self.name} {self.weights} {self.dtype} {self.prompt_id}"

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter whose sizes differ from the base's; warn if only names differ."""
        ...


@runtime_checkable
class Scores(Model, Protocol):
    """A model that measures how likely answers are."""

    def fitting(self, examples: ExampleSet) -> tuple[ExampleSet, int]:
        """Return the examples that fit into the context with their answers, and the number of the others."""
        ...

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """Return −log p(answer | query) per example of every pair (adapter or None for the bare base, examples)."""
        ...


class Question(NamedTuple):
    """A text to answer, under its instruction, and the most tokens that the answer may have."""

    instruction: str
    text: str
    max_new_tokens: int = 64


@runtime_checkable
class Answers(Model, Protocol):
    """A model that answers texts by greedy decoding."""

    @property
    def together(self) -> int:
        """The least number of questions that are asked at once, where more than one task has questions."""
        return 1

    def answered(self, adapter: Adapter | None, questions: Sequence[Question]) -> list[str]:
        """Return the answer to each question, whatever their instructions."""
        ...

    def answers(
        self, adapter: Adapter | None, instruction: str, texts: Sequence[str], *, max_new_tokens: int = 64
    ) -> list[str]:
        """Return the answers to texts under one instruction."""
        return self.answered(adapter, [Question(instruction, text, max_new_tokens) for text in texts])

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """Return an iterator over the answer, piece by piece; checks come before the first piece."""
        ...


@runtime_checkable
class ReadsOnce(Scores, Answers, Protocol):
    """A model that reads the query of an example once for its loss and its answer."""

    def losses_and_answers(
        self, adapter: Adapter | None, asked: Sequence[tuple[ExampleSet, int]]
    ) -> list[tuple[list[Loss], list[str]]]:
        """Return, per set of examples, the losses of `nll` and the answers of `answered`, of at most so many tokens."""
        losses = self.nll([(adapter, examples) for examples, _ in asked])
        questions = [[Question(some.instruction, e.input, most) for e in some.examples] for some, most in asked]
        answers = iter(self.answered(adapter, [question for some in questions for question in some]))
        return [(mine, list(islice(answers, len(mine)))) for mine in losses]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A text that a model continues: its prompt's tokens, the adapter it is read with, how tokens are chosen."""

    prompt: Sequence[int]
    adapter: Adapter | None
    sampler: Sampler


class Decoding(Protocol):
    """Rows that a model continues side by side, each with its own adapter; they join and leave between two steps."""

    most: int
    """The most rows."""
    rows: list[Row]

    def join(self, rows: Sequence[Row]) -> list[Token | ModelError]:
        """Read the prompts of new rows; return the first token of each, an error where there is none.

        Raises ShapeMismatch, CorruptShelf and OutOfMemory, and then none of them has joined.
        """
        ...

    def step(self) -> list[Token | ModelError]:
        """Return the next token of every row, in the order of `rows`. Raises OutOfMemory."""
        ...

    def keep(self, rows: Collection[Row]) -> None:
        """Drop all rows but these."""
        ...


@runtime_checkable
class Continues(Model, Protocol):
    """A model that continues texts of different tasks side by side, token by token."""

    @property
    def text(self) -> Tokenisation:
        """Text to tokens and back."""
        ...

    def decoding(self, most: int) -> Decoding:
        """Return an empty batch of at most `most` rows, fewer if the engine cannot mix them; one user at a time."""
        ...


@runtime_checkable
class Embeds(Model, Protocol):
    """A model that maps texts to vectors in which similar texts are close."""

    @property
    def embedding_id(self) -> str:
        """Identifies all that a representation depends on besides the text."""
        ...

    def embed(self, texts: Sequence[str]) -> Float32[Array32, "texts width"]:
        """Return one representation per text: (n, d) float32."""
        ...


@runtime_checkable
class Effects(Model, Protocol):
    """A model that shows what adapters would add to the outputs of its modules."""

    def effects(self, adapters: Sequence[Adapter], sets: Sequence[ExampleSet]) -> Iterator[Square]:
        """Yield per example set G_uv = Σ_m Σ_x ⟨ΔW_u x, ΔW_v x⟩ / Σ_x ‖y‖², (n, n), over adapted modules m of the bare
        base, their inputs x at the positions that predict the answers, and their outputs y.
        """
        ...


@runtime_checkable
class GainGradients(Scores, Protocol):
    """A model that differentiates its loss with respect to the gains of an adapter's modules."""

    def gain_gradient(self, adapter: Adapter, examples: ExampleSet) -> Mapping[str, float]:
        """Return ∂ loss / ∂ log φ at φ = 1 by module path, with φ ΔW in place of ΔW.

        The loss is Σ NLL / Σ tokens of the answers, in nats per token. Raises ShapeMismatch, OutOfMemory, ModelError.
        """
        ...


@runtime_checkable
class LanguageModel(Scores, Answers, Embeds, Protocol):
    """A model with every capability."""


C = TypeVar("C", bound=Model)
_CAPABILITIES: Mapping[type, str] = {
    Scores: "measure losses",
    Answers: "answer texts",
    ReadsOnce: "take a loss and an answer from one reading",
    Continues: "continue texts side by side",
    Embeds: "represent texts",
    Effects: "show the inputs of its modules",
    GainGradients: "differentiate losses",
}


def capable(model: Model, capability: type[C]) -> C:
    """Return the model, typed as having a capability. Raises UsageError naming what the model cannot do."""
    if isinstance(model, capability):
        return model
    lacking = [verb for one, verb in _CAPABILITIES.items() if one in capability.__mro__ and not isinstance(model, one)]
    what = f"the model cannot {' or '.join(lacking)}"
    raise UsageError(what, where=model.name, cure="open it with another engine")
