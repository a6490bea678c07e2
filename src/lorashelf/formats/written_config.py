"""The adapter_config.json that is written: the source's fields, with ranks and scales that PEFT resolves again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import combinations
from typing import Any

from ..lora.adapter import Adapter
from ..lora.matching import endings
from ..lora.module_names import TOWERS, WRAPPERS
from ..lora.targets import targets_of


def written_config(adapter: Adapter) -> dict[str, Any]:
    """Return the config to store: the adapter's kept fields, its targets, and ranks and alphas from which PEFT resolves
    the same s.
    """
    ranks: dict[str, float] = {path: shape.rank for path, shape in adapter.shapes.items()}
    alphas = {path: _alpha(scale, ranks[path]) for path, scale in adapter.modules.scales.items()}
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": None} | dict(adapter.config)
    config |= targets_of(config, ranks)
    if not isinstance(config.get("init_lora_weights", True), bool):
        config["init_lora_weights"] = True  # the source's init may refuse other ranks; the loaded factors replace it
    config |= {
        "base_model_name_or_path": adapter.base.name or None,
        "revision": adapter.base.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "inference_mode": True,
    }
    return dict(sorted(config.items()))


def stored_scale(scale: float, rank: int) -> float:
    """Return the scale as read back: the same, or the closest float that some alpha / rank equals."""
    return _alpha(scale, rank) / rank


def _alpha(scale: float, rank: float) -> float:
    """Return the alpha whose alpha / rank is the scale to the last bit, or nearest to it; an integer if possible."""
    alpha = scale * rank
    around = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((candidate for candidate in around if candidate / rank == scale), alpha)


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    r"""Return the most common value, and patterns for the others from which PEFT resolves every module's value.

    A key is the shortest suffix of a path that separates its modules from those with other values, longer keys before
    shorter: suffixes, because other versions of transformers rename the start of a path.

    >>> patterns({"m.0.q": 8, "m.0.v": 8, "m.1.q": 4, "m.1.v": 8})
    (8, {'1\\.q': 4})
    """
    common = Counter(values.values()).most_common(1)[0][0]
    root = _Endings()
    for path, value in values.items():
        root.add(path.split("."), value)
    keys = list(root.keys("", common))
    return common, dict(zip(_spelled([key for key, _ in keys], values), (value for _, value in keys), strict=True))


def _spelled(keys: Sequence[str], paths: Iterable[str]) -> list[str]:
    """Return suffixes as regular expressions in which names that transformers omits are optional, unless a path of
    the adapter has the shorter suffix itself.
    """
    inner = [_optional(key.split(".")) for key in keys]
    known = {ending for path in paths for ending in endings(path)} if any(inner) else set()
    return [_one_spelled(key.split("."), optional, known) for key, optional in zip(keys, inner, strict=True)]


def _optional(parts: Sequence[str]) -> list[int]:
    """Return the positions inside a key of names that transformers omits."""
    return [i for i in range(1, len(parts) - 1) if parts[i] in WRAPPERS or parts[i] in TOWERS]


def _one_spelled(parts: Sequence[str], optional: Sequence[int], known: Set[str]) -> str:
    for count in range(1, len(optional) + 1):
        for absent in combinations(optional, count):
            if ".".join(part for i, part in enumerate(parts) if i not in absent) in known:
                return re.escape(".".join(parts))
    dotted = [re.escape(f"{part}.") for part in parts[:-1]]
    return "".join(f"(?:{text})?" if i in optional else text for i, text in enumerate(dotted)) + re.escape(parts[-1])


class _Endings:
    """A tree of path suffixes: the nodes for one component more, and the values of the paths with this suffix."""

    def __init__(self) -> None:
        self.before: dict[str, _Endings] = {}
        self.values: set[float] = set()
        self.own: float | None = None
        """The value of the path that equals the suffix."""

    def add(self, parts: list[str], value: float) -> None:
        """Add a path, given by its components before the suffix."""
        node = self
        node.values.add(value)
        for part in reversed(parts):
            node = node.before.setdefault(part, _Endings())
            node.values.add(value)
        node.own = value

    def keys(self, ending: str, otherwise: float) -> Iterator[tuple[str, float]]:
        """Yield keys and values, of which the first that is a suffix of a path applies; other paths get `otherwise`."""
        if len(self.values) == 1:
            yield from ((ending, value) for value in self.values if value != otherwise)
            return
        here = self._unnamed(otherwise) if ending else otherwise
        for part, node in sorted(self.before.items()):
            yield from node.keys(f"{part}.{ending}" if ending else part, here)
        if here != otherwise:
            yield ending, here

    def _unnamed(self, otherwise: float) -> float:
        """Return the best value for the suffix alone: that of the path equal to it, else that of a component that other
        versions may rename.
        """
        if self.own is not None:
            return self.own
        uniform = (node for part, node in sorted(self.before.items()) if part in WRAPPERS and len(node.values) == 1)
        return next((value for node in uniform for value in node.values), otherwise)
