"""How the next token is chosen from logits: the likeliest, or a draw at a temperature from the likeliest few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import ModelError
from ..lora.arrays import Array32, Array64, Float32, Float64

COLDEST = 1e-5  # lower temperatures are 0
_FIRST = 256  # candidates sorted first: most draws with top_p need no more


@dataclass(frozen=True, slots=True)
class Sampling:
    """Softmax(logits / temperature) over the fewest tokens that have the share `top_p`; at temperature 0 the likeliest.

    A `seed` fixes the draws. `logprobs` is the number of alternatives to report with each token; None: no logprobs.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature < COLDEST


class Token(NamedTuple):
    """A generated token; with logprobs also log p of the token and of the likeliest ones, at temperature 1."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def no_next_token() -> ModelError:
    """Return the error of a text whose next token has no finite logits."""
    cure = "check the adapter for values that overflow, or give the base another dtype"
    return ModelError("the next token has no finite logits", cure=cure)


class Sampler:
    """Chooses the tokens of one text, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._draws = np.random.default_rng(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether a token is the likeliest one and nothing else is reported, so that no logits are needed."""
        return self.sampling.greedy and self.sampling.logprobs is None

    def choose(self, logits: Float32[Array32, " vocabulary"]) -> Token:
        """Return the next token."""
        wide = logits.astype(np.float64)
        wide -= wide.max()
        chosen = int(wide.argmax()) if self.sampling.greedy else self._drawn(wide)
        if self.sampling.logprobs is None:
            return Token(chosen)
        wide -= np.log(np.exp(wide).sum())
        return Token(chosen, float(wide[chosen]), tuple(_likeliest(wide, self.sampling.logprobs)))

    def _drawn(self, logits: Float64[Array64, " vocabulary"]) -> int:
        weights = np.exp(logits / self.sampling.temperature)
        weights /= weights.sum()
        kept = None if self.sampling.top_p >= 1 else _nucleus(weights, self.sampling.top_p)
        sums = np.cumsum(weights if kept is None else weights[kept])
        place = min(int(np.searchsorted(sums, self._draws.random() * sums[-1], side="right")), len(sums) - 1)
        return place if kept is None else int(kept[place])


def _nucleus(weights: Float64[Array64, " vocabulary"], share: float) -> np.ndarray:
    """Return the indices of the fewest tokens whose weights sum to at least the share, the likeliest first."""
    order = np.argsort(-weights, kind="stable") if len(weights) <= _FIRST else _largest(weights, _FIRST)
    if weights[order].sum() < share:
        order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), share)) + 1
    return order[:count]


def _largest(values: Float64[Array64, " n"], count: int) -> np.ndarray:
    """Return the indices of the largest values, the largest first."""
    found = np.argpartition(-values, count)[:count] if count < len(values) else np.arange(len(values))
    return found[np.argsort(-values[found], kind="stable")]


def _likeliest(logprobs: Float64[Array64, " vocabulary"], count: int) -> Iterator[tuple[int, float]]:
    for token in _largest(logprobs, count) if count else ():
        yield int(token), float(logprobs[token])
