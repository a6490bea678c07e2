"""Loading a model with transformers: without progress bars, complete or not at all, and with our own errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..digest import canonical_json, digest
from ..errors import MissingExtra, ModelError

if TYPE_CHECKING:
    import torch


def libraries() -> tuple[Any, Any]:
    """Return the modules torch and transformers. Raises MissingExtra."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra("a language model", "torch and transformers", "llm") from error
    return torch, transformers


def whole_model(*source: Any, **options: Any) -> Any:
    """Load a model with all its weights. Raises ModelError if some are missing: they would be random."""
    _, transformers = libraries()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(*source, output_loading_info=True, **options)
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))})
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        what = f"the base model lacks weights: {shown}"
        raise ModelError(what, where=str(source[0]), cure="download or convert it again")
    return model


def fingerprint(model: torch.nn.Module) -> str:
    """Return a fingerprint of the weights: a digest of names, shapes and 64 values spread over each, in float32."""
    chunks = []
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        spread = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
        chunks += [canonical_json([name, *weight.shape]), spread.tobytes()]
    return "w-" + digest(chunks).removeprefix("b2-")[:16]


@contextlib.contextmanager
def loading(name: str, source: Path) -> Iterator[None]:
    """Disable transformers' progress bars in the block, which would mix with ours; turn any failure into ModelError."""
    _, transformers = libraries()
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # on a damaged file the libraries may raise anything
        raise _unloadable(name, str(source), error) from error
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Disable in the block the progress bar that transformers draws for a GGUF file whatever its settings."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another version of transformers
        yield
        return
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = bar


def _unloadable(name: str, tried: str, error: Exception) -> ModelError:
    message = str(error).strip().splitlines()
    kind = "" if isinstance(error, OSError | ValueError | RuntimeError) and message else f"{type(error).__name__} "
    reason = f"{kind}{message[0] if message else ''}".strip()
    cure = "give a hub id (in the cache or online), a folder saved by transformers, or a GGUF file"
    return ModelError(f"the base model {name!r} cannot be loaded: {reason}", where=f"tried {tried}", cure=cure)
