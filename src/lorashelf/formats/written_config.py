"""The adapter_config.json that is written: the source's fields, and the ranks and scales that PEFT resolves again."""

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
    """The config to store: the fields that the adapter carries, its targets, and ranks and scales such that PEFT
    resolves the same s.
    """
    ranks: dict[str, float] = {path: shape.rank for path, shape in adapter.shapes.items()}
    alphas = {path: _alpha(scale, ranks[path]) for path, scale in adapter.modules.scales.items()}
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": None} | dict(adapter.config)
    config |= targets_of(config, ranks)
    if not isinstance(config.get("init_lora_weights", True), bool):
        config["init_lora_weights"] = True  # an init that fits the source's ranks may refuse others; it is loaded over
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
    """What a written scale comes back as: itself, or, where no alpha / rank is, its neighbour."""
    return _alpha(scale, rank) / rank


def _alpha(scale: float, rank: float) -> float:
    """The alpha whose alpha / rank is the scale to the last bit, or nearest to it; a whole number where it can be."""
    alpha = scale * rank
    around = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((candidate for candidate in around if candidate / rank == scale), alpha)


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    r"""The commonest value, and keys for the others under which PEFT's matching gives every module its own.

    A key is the shortest ending of a path that tells its modules from those of other values, longer keys before
    shorter: the start of a path is what another version of transformers renames.

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
    """Endings as regular expressions, in which a name that transformers leaves out may be lacking, unless a path of
    the adapter ends like that itself.
    """
    inner = [_optional(key.split(".")) for key in keys]
    known = {ending for path in paths for ending in endings(path)} if any(inner) else set()
    return [_one_spelled(key.split("."), optional, known) for key, optional in zip(keys, inner, strict=True)]


def _optional(parts: Sequence[str]) -> list[int]:
    """The places inside a key of names that transformers leaves out."""
    return [i for i in range(1, len(parts) - 1) if parts[i] in WRAPPERS or parts[i] in TOWERS]


def _one_spelled(parts: Sequence[str], optional: Sequence[int], known: Set[str]) -> str:
    for count in range(1, len(optional) + 1):
        for absent in combinations(optional, count):
            if ".".join(part for i, part in enumerate(parts) if i not in absent) in known:
                return re.escape(".".join(parts))
    dotted = [re.escape(f"{part}.") for part in parts[:-1]]
    return "".join(f"(?:{text})?" if i in optional else text for i, text in enumerate(dotted)) + re.escape(parts[-1])


class _Endings:
    """The paths of a common ending, by the part before it, and their values."""

    def __init__(self) -> None:
        self.before: dict[str, _Endings] = {}
        self.values: set[float] = set()
        self.own: float | None = None
        """The value of the path that is the ending itself."""

    def add(self, parts: list[str], value: float) -> None:
        """Take a path, the parts of which stand before the ending."""
        node = self
        node.values.add(value)
        for part in reversed(parts):
            node = node.before.setdefault(part, _Endings())
            node.values.add(value)
        node.own = value

    def keys(self, ending: str, otherwise: float) -> Iterator[tuple[str, float]]:
        """Keys and values, the first that is an ending of a path counts, for paths that else had `otherwise`."""
        if len(self.values) == 1:
            yield from ((ending, value) for value in self.values if value != otherwise)
            return
        here = self._unnamed(otherwise) if ending else otherwise
        for part, node in sorted(self.before.items()):
            yield from node.keys(f"{part}.{ending}" if ending else part, here)
        if here != otherwise:
            yield ending, here

    def _unnamed(self, otherwise: float) -> float:
        """The value that is best given to the ending alone: that of the path which ends there, else that of a part
        that may be called otherwise.
        """
        if self.own is not None:
            return self.own
        uniform = (node for part, node in sorted(self.before.items()) if part in WRAPPERS and len(node.values) == 1)
        return next((value for node in uniform for value in node.values), otherwise)
