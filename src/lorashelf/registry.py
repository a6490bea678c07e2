"""Registries: names to values, filled by decorators, read wherever a choice is offered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from .errors import UnknownName

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to values of one kind; an unknown name raises UnknownName with the closest names.

    >>> colours = Registry[int]("colour")
    >>> colours.add("red", 1)
    >>> colours["red"], list(colours)
    (1, ['red'])
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._values: dict[str, T] = {}

    def add(self, name: str, value: T) -> None:
        """Register `value` under `name`. Raises ValueError if the name is taken."""
        if name in self._values:
            raise ValueError(f"{self.noun} {name!r} is already registered")
        self._values[name] = value

    def __getitem__(self, name: str) -> T:
        try:
            return self._values[name]
        except KeyError:
            raise UnknownName(self.noun, name, sorted(self._values)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
