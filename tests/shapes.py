"""Checks the arrays that functions of some packages are given and return: dtype and shape, as they are annotated.

jaxtyping's own import hook checks every argument of every function: bad input would never reach the code that refuses
it, and the tests would take more than twice as long. This one asks jaxtyping about arrays only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped


def install(packages: Sequence[str]) -> None:
    """Check the arrays that functions, methods and dataclasses of these packages pass; import them afterwards."""
    if early := [name for name in packages if name in sys.modules]:
        raise RuntimeError(f"imported before its arrays could be checked: {', '.join(early)}")
    sys.meta_path.insert(0, _Finder(tuple(packages)))


class _Finder(MetaPathFinder):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not f"{name}.".startswith(tuple(f"{package}." for package in self.packages)):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Checking(spec.loader.name, spec.loader.path)
        return spec


class _Checking(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value):
                for method, function in list(vars(value).items()):
                    if method != "__init__" or not hasattr(value, "__post_init__"):  # which refuses wrong arrays itself
                        _replace(value, method, function)
            else:
                _replace(module, name, value)


def _replace(owner: Any, name: str, value: Any) -> None:
    if isinstance(value, property) and value.fget is not None:
        setattr(owner, name, property(checked(value.fget), doc=value.__doc__))
    elif isinstance(value, FunctionType):
        setattr(owner, name, checked(value))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arrays checked at every call; itself where it passes none."""
    hints = {name: _evaluated(hint, function) for name, hint in function.__annotations__.items()}
    arrays = {name: hint for name, hint in hints.items() if _holds_arrays(hint)}
    if not arrays:
        return function
    everything, function.__annotations__ = function.__annotations__, arrays
    try:
        return jaxtyped(beartype(function), typechecker=None)  # half the time of typechecker=beartype
    finally:
        function.__annotations__ = everything


def _evaluated(hint: Any, function: Callable[..., Any]) -> Any:
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:  # imported for a type checker only
        return None


def _holds_arrays(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_holds_arrays, get_args(hint)))
