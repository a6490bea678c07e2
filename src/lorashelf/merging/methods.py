"""The registry of merge methods and what a method declares about itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..registry import Registry

Tensor = NDArray[np.float32]
Draw = Callable[[int], Any]  # adapter i → its np.random.Generator
Rule = Callable[..., Any]  # a Tensor, or in space "exact" Factors
Space = Literal["factors", "exact", "delta"]


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A registered method: its rule, and the laws it obeys or is declared not to."""

    name: str
    rule: Rule
    space: Space
    cites: str
    weights: Literal["mean", "unary"]
    """Default weights: 1/n each, or 1 each."""
    rank: Literal["max", "sum"]
    """The rank of the result: the largest among the inputs, or their sum."""
    weighting: Literal["root", "plain"]
    """In factor space: √|w s| multiplies what the rule sums (PEFT), or √s goes into the tensors first and w multiplies.
    """
    average: float | None
    """For a rule that sums: merging n with weight 1/n equals n**-average · Σ of the √s-scaled tensors, on A and on B;
    so it can be inverted.
    """
    duplicate: bool
    """Whether n copies of one adapter with the default weights merge into that adapter."""
    gauge: bool
    """Whether the result depends on ΔW only."""
    random: bool
    """Whether the result depends on the seed."""
    parameters: Mapping[str, Any]
    """Parameter name → default."""

    def checked(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in. Raises UsageError naming every unknown or unusable one."""
        faults = [
            f"{self.name} has no parameter {name!r} (it has: {', '.join(self.parameters) or 'none'})"
            for name in params
            if name not in self.parameters
        ]
        for name, default in self.parameters.items():
            value = params.get(name, default)
            if name == "density" and not (_number(value) and 0.0 <= value <= 1.0):
                faults.append(f"density is {value!r}; it is the fraction kept, from 0 to 1")
            elif _number(default) and not _number(value):
                faults.append(f"{name} is {value!r}, not a number")
            elif (choices := self.choices(name)) and value not in choices:
                faults.append(f"{name} is {value!r}; choose from {', '.join(choices)}")
            elif isinstance(default, str) and not isinstance(value, str):
                faults.append(f"{name} is {value!r}, not a text")
        if faults:
            raise UsageError("; ".join(faults), cure="see docs/methods.md for the parameters of each method")
        return {**self.parameters, **params}

    def choices(self, name: str) -> tuple[str, ...]:
        """What a parameter that the rule annotates as a Literal may be; empty for any other."""
        try:
            hint = get_type_hints(self.rule).get(name)
        except NameError:  # a name that only a type checker sees
            return ()
        return get_args(hint) if get_origin(hint) is Literal else ()


METHODS: Registry[MergeMethod] = Registry("merge method")


def merge_method(
    name: str,
    *,
    space: Space,
    cites: str,
    weights: Literal["mean", "unary"] = "mean",
    rank: Literal["max", "sum"] = "max",
    weighting: Literal["root", "plain"] = "root",
    average: float | None = None,
    duplicate: bool = False,
    gauge: bool = False,
    random: bool = False,
) -> Callable[[Rule], Rule]:
    """Register a rule as merge method `name`; the declarations are those of MergeMethod, and the contract tests hold it
    to them.
    """

    def register(rule: Rule) -> Rule:
        parameters = {
            p.name: p.default for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        METHODS.add(
            name,
            MergeMethod(
                name=name,
                rule=rule,
                space=space,
                cites=cites,
                weights=weights,
                rank=rank,
                weighting=weighting,
                average=average,
                duplicate=duplicate,
                gauge=gauge,
                random=random,
                parameters=MappingProxyType(parameters),
            ),
        )
        return rule

    return register


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
