"""A language model as the rest of lorashelf knows it: what identifies it, and what it can do with an adapter on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from ..errors import UsageError
from ..lora.adapter import Adapter, Matrix
from ..tasks.folders import ExampleSet
from ..tasks.template import Template

Pair = tuple[Adapter | None, ExampleSet]


class Loss(NamedTuple):
    """The negative log-likelihood of one answer, in nats, summed over its tokens, and how many tokens there are."""

    nll: float
    tokens: int


def mean_loss(losses: Sequence[Loss]) -> float:
    """Σ NLL / Σ tokens over examples: the loss of a task, in nats per token (arXiv 2601.17441)."""
    return sum(loss.nll for loss in losses) / sum(loss.tokens for loss in losses)


@runtime_checkable
class Model(Protocol):
    """A base model that an adapter can be put on; each engine has one of its own."""

    @property
    def name(self) -> str:
        """The name that the base model is known by: a hub id or a path."""
        ...

    @property
    def weights(self) -> str:
        """A fingerprint of the base's weights: two files may bear one name."""
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
        """Identifies that text."""
        return self.template.id

    @property
    def context(self) -> int | None:
        """How many tokens a query and its answer may have together; None: any number."""
        ...

    @property
    def id(self) -> str:
        """All that a result depends on beside adapter, text and settings of the request."""
        return f"{self.name} {self.weights} {self.dtype} {self.prompt_id}"

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter of other sizes than the base's; warn where only names differ."""
        ...


@runtime_checkable
class Scores(Model, Protocol):
    """A model that measures how likely answers are."""

    def fitting(self, examples: ExampleSet) -> tuple[ExampleSet, int]:
        """The examples that fit into the context with their answers, and how many do not."""
        ...

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """−log p(answer | query) of every example of every pair (adapter, or None for the bare base; examples)."""
        ...


@runtime_checkable
class Answers(Model, Protocol):
    """A model that answers texts, greedily: each token is the likeliest."""

    def answers(
        self, adapter: Adapter | None, instruction: str, texts: Sequence[str], *, max_new_tokens: int = 64
    ) -> list[str]:
        """The answers to texts under one instruction."""
        ...

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """The answer in pieces as they are written; what can be refused is refused before the first."""
        ...


@runtime_checkable
class Embeds(Model, Protocol):
    """A model that places texts in a space where texts of a kind lie together."""

    @property
    def embedding_id(self) -> str:
        """All that a representation depends on beside the text."""
        ...

    def embed(self, texts: Sequence[str]) -> Matrix:
        """(n, d) float32: one representation per text."""
        ...


@runtime_checkable
class LanguageModel(Scores, Answers, Embeds, Protocol):
    """A model with every capability."""


C = TypeVar("C", bound=Model)
_CAPABILITIES: Mapping[type, str] = {Scores: "measure losses", Answers: "answer texts", Embeds: "represent texts"}


def capable(model: Model, capability: type[C]) -> C:
    """The model as one with a capability. Raises UsageError naming what it cannot do."""
    if isinstance(model, capability):
        return model
    lacking = [verb for one, verb in _CAPABILITIES.items() if one in capability.__mro__ and not isinstance(model, one)]
    what = f"the model cannot {' or '.join(lacking)}"
    raise UsageError(what, where=model.name, cure="open it with another engine")
