"""Engines: what opens a base model and runs it, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, overload

from ..digest import Json
from ..registry import Registry
from .protocol import LanguageModel, Model, capable

C = TypeVar("C", bound=Model)


class Engine(Protocol):
    """Opens a base model. Arguments and errors are those of `open_model`."""

    def __call__(
        self,
        name: str | None,
        *,
        device: str | None,
        dtype: str | None,
        template_arguments: Mapping[str, Json] | None,
    ) -> Model:
        """Open the model."""
        ...


ENGINES: Registry[Engine] = Registry("engine")


@overload
def open_model(
    name: str | None = None,
    engine: str = "hf",
    *,
    device: str | None = None,
    dtype: str | None = None,
    template_arguments: Mapping[str, Json] | None = None,
) -> LanguageModel: ...


@overload
def open_model(
    name: str | None = None,
    engine: str = "hf",
    *,
    capability: type[C],
    device: str | None = None,
    dtype: str | None = None,
    template_arguments: Mapping[str, Json] | None = None,
) -> C: ...


def open_model(
    name: str | None = None,
    engine: str = "hf",
    *,
    capability: type[Any] = LanguageModel,
    device: str | None = None,
    dtype: str | None = None,
    template_arguments: Mapping[str, Json] | None = None,
) -> Any:
    """Open a base model by hub id, folder or GGUF file; None is SmolLM2-135M-Instruct from its package.

    `engine` is one of ENGINES; `capability` is the protocol that the model must have (Scores, Answers, Embeds).
    `device` is cuda, mps or cpu (default: the first available), `dtype` f32, f16 or bf16 (default: the fastest that is
    safe); `template_arguments` go to the chat template (enable_thinking=False). Raises UnknownName for an engine,
    MissingExtra, UsageError without a default base, for arguments that the template does not take and for a capability
    that the engine lacks, ModelError naming the path or id tried.
    """
    opened = ENGINES[engine](name, device=device, dtype=dtype, template_arguments=template_arguments)
    return capable(opened, capability)


def _transformers(name: str | None, **options: Any) -> Model:
    from .hf import HFBackend

    return HFBackend.open(name, **options)


def _llama_cpp(name: str | None, **options: Any) -> Model:
    from .llamacpp import LlamaCppBackend

    return LlamaCppBackend.open(name, **options)


ENGINES.add("hf", _transformers)
ENGINES.add("llamacpp", _llama_cpp)
