"""A folder given as an adapter: what it is if not an adapter, and which other files it contains.

Besides the adapter's two files, trainers leave their own state (optimizer, scheduler, random state, logs), which is
ignored; further trained weights, without which the adapter computes something else: refused; and a chat template or a
tokenizer, which are not kept: reported, unless they are the base's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..atomic import expanded, open_file, read_file
from ..errors import AdapterFormatError, Fault, MissingExtra
from .objects import CONFIG_FILE, TENSOR_FILE

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_GIVE = "give the folder of a PEFT adapter, readable by you"
_MODEL_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)|(pytorch_)?model\.\w+\.index\.json")
_TRAINERS_STATE = (
    re.compile(  # of transformers, accelerate, DeepSpeed, FSDP; and copies of the adapter that PEFT ignores
        r"adapter(_model(-\d+-of-\d+)?|_\d+)\.\w+|training_args\.\w+|pytorch_model_fsdp.*"
        r"|(optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|.*_optim_states|.*_model_states)"
        r"(_\d+)*\.\w+"
    )
)
_TRAINED_BESIDE = (
    (re.compile(r"non_lora_trainables"), "further weights trained by LLaVA, such as the projector"),
    (re.compile(r"projector"), "a trained projector"),
    (re.compile(r"^(value_head|v_head|vhead|reward_head|score|classifier)\b"), "a trained head"),
    (re.compile(r"embed|lm_head|trainable_params"), "trained embeddings"),
    (re.compile(r"^vit\b|vision|visual"), "a trained vision tower"),
    (_MODEL_FILE, "a whole model, or the value head that TRL writes under this name"),
)


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter: a path, or a hub id in the local cache, owner/name or owner/name@revision.

    Raises AdapterFormatError for what is neither, MissingExtra for a hub id without huggingface_hub.
    """
    folder, hub = expanded(path), _HUB_ID.fullmatch(str(path))
    if hub is None or os.path.lexists(folder):
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        purpose = f"there is no folder {str(path)!r}; as a hub id it"
        raise MissingExtra(purpose, "huggingface_hub", "llm", instead="give an existing folder") from error
    try:
        return Path(snapshot_download(hub[1], revision=hub[2], local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        cure = "give an existing folder, or download the adapter first (hf download)"
        raise AdapterFormatError([f"{str(path)!r} is not a folder or a hub id in the cache"], cure=cure) from error


def not_a_folder(path: Path, error: OSError) -> Fault:
    """Return the fault of a path that cannot be read as a folder."""
    what = f"cannot be read: {error.strerror}"
    if not os.path.isfile(path):
        return Fault(what, _GIVE)
    if found := not_the_file(path.name, path):
        return found
    if os.path.exists(path.parent / CONFIG_FILE):
        return Fault(f"{what} (it is a file)", f"give its folder: {path.parent}")
    return Fault(f"{what} (it is a file)", _GIVE)


def something_else(folder: Path, names: set[str]) -> Fault | None:
    """Return the fault of a folder that is recognisably not an adapter, else None. Raises OSError."""
    config, tensors = CONFIG_FILE in names, TENSOR_FILE in names
    if {"shelf.toml", "HEAD"} <= names:
        return _shelf(folder)
    if folder.name == "objects" and (folder.parent / "shelf.toml").exists():
        return _shelf(folder.parent)
    if not tensors and ("adapters.safetensors" in names or (config and _is_mlx(folder / CONFIG_FILE))):
        what = "an MLX adapter: the factors are transposed, under other names, with a scale instead of an alpha"
        return Fault(what, "convert it to PEFT's files: docs/adapters.md, 'From MLX'")
    if found := _shared_basis(folder, names):
        return found
    if config and not tensors:
        return _without_tensors(folder, names)
    return None if config else _without_config(folder, names)


def not_the_file(name: str, path: Path) -> Fault | None:
    """Return the fault of a file that, by its first bytes, is not a config or tensors; None if they do not show it."""
    begins = b""
    with contextlib.suppress(OSError), os.fdopen(open_file(path), "rb") as file:
        begins = file.read(200)
    if begins.startswith(b"version https://git-lfs.github.com/spec/"):
        return Fault(f"{name} is a Git LFS pointer, not the file itself", "git lfs pull, in its repository")
    if begins.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return Fault(f"{name} is a web page, not the file itself", "download the file itself (hf download)")
    if begins.startswith(b"GGUF"):
        return Fault(f"{name} is a GGUF file", "give the PEFT folder that it was converted from")
    return None


def _shelf(shelf: Path) -> Fault:
    cure = f"give the folder that serves a task, as printed by: lorashelf route {shelf} TASK"
    return Fault("this is a shelf, not an adapter", cure)


def _shared_basis(folder: Path, names: set[str]) -> Fault | None:
    """Return the fault of a folder of vlora or lorashare, which have several adapters in one basis."""
    if "subspace_meta.json" in names:
        command = f"vlora export {folder} TASK -o TASK --alpha ALPHA --base-model BASE"
        cure = f"write each as a PEFT folder, with the alpha of the originals, which vlora does not store: {command}"
        return Fault("a subspace of vlora, in which several adapters share a basis", cure)
    top = folder if "share_config.json" in names else folder.parent.parent if "loadings.safetensors" in names else None
    if top is None:
        return None
    cure = f"write each as a PEFT folder: lorashare reconstruct {top} --all -o adapters"
    return Fault("a checkpoint of lorashare, in which several adapters share a basis", cure)


def _is_mlx(config: Path) -> bool:
    return not {"fine_tune_type", "lora_parameters"}.isdisjoint(document(config))


def _without_config(folder: Path, names: set[str]) -> Fault | None:
    checkpoints = _checkpoints(folder, names)
    hub = re.fullmatch(r"models--(.+?)--(.+)", folder.name)
    if "task.toml" in names or any(f"{split}.jsonl" in names for split in ("train", "validation", "test")):
        return Fault("a task's examples, not an adapter", f"train one on them: lorashelf train {folder} -o trained")
    if hub and "snapshots" in names:
        return Fault("a repository of the hub's cache, not an adapter", f"give its id: {hub[1]}/{hub[2]}")
    if checkpoints:
        what = f"{CONFIG_FILE} is missing: a training run, with checkpoints inside"
        return Fault(what, f"give its latest checkpoint: {checkpoints[-1]}")
    if next(folder.glob(f"*/{CONFIG_FILE}"), None):
        return Fault(f"{CONFIG_FILE} is missing", f"this folder contains adapters: give each one, {folder}/*/")
    if any(map(_MODEL_FILE.fullmatch, names)):
        what = f"{CONFIG_FILE} is missing: a whole model, not an adapter"
        return Fault(what, "give the adapter that was trained, or extract one: mergekit-extract-lora")
    if any(name.endswith(".gguf") for name in names):
        what = f"{CONFIG_FILE} is missing: a folder of GGUF files"
        return Fault(what, "give the PEFT folder that they were converted from")
    return None


def _without_tensors(folder: Path, names: set[str]) -> Fault:
    missing = f"{TENSOR_FILE} is missing"
    hub = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    if hub and folder.parent.name == "snapshots":
        return Fault(f"{missing}: the download is incomplete", f"hf download {hub[1]}/{hub[2]}")
    if checkpoints := _checkpoints(folder, names):
        return Fault(f"{missing}: a training run, with checkpoints inside", f"give its latest: {checkpoints[-1]}")
    if any(re.fullmatch(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)", name) for name in names):
        return Fault(f"{missing}: it is in shards", "join them: docs/adapters.md, 'Shards'")
    if any(name.startswith(f"{TENSOR_FILE}.") for name in names):
        return Fault(f"{missing}: its download is incomplete", "download it again")
    if pickles := sorted(filter(_is_pickle, names)):
        cure = "if you trust it, save it again with safe_serialization=True, or convert it: docs/adapters.md, 'Pickles'"
        return Fault(f"{pickles[0]} is a pickle, which can run code when loaded: refused, never opened", cure)
    return Fault(missing, "copy or download it too: a config alone contains no weights")


def _is_pickle(name: str) -> bool:
    """Return whether a file may hold an adapter's tensors as written by torch.save."""
    state = _TRAINERS_STATE.fullmatch(name) and not name.startswith("adapter")
    return name.endswith((".bin", ".pt", ".pth")) and not state


def _checkpoints(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the checkpoints of a training run that contain an adapter, the latest last."""
    numbered = sorted((int(found[1]), name) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name)))
    return [folder / name for _, name in numbered if (folder / name / CONFIG_FILE).exists()]


def document(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or damaged one is empty."""
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# other files in the folder -------------------------------------------------------------------------------------------


def trained_beside(names: Iterable[str]) -> Iterator[Fault]:
    """Yield a fault for every other file of trained weights: PEFT reads only its own."""
    for name in sorted(names):
        if name == TENSOR_FILE or not name.endswith(WEIGHTS) or _TRAINERS_STATE.fullmatch(name):
            continue
        meaning = next((meaning for pattern, meaning in _TRAINED_BESIDE if pattern.search(name)), "other weights")
        cure = f"if you want ΔW alone, give a copy of the folder without {name}"
        yield Fault(f"{name} is in the adapter's folder: {meaning}, which would be dropped", cure)


def prompt_notices(folder: Path, names: set[str], base: str) -> Iterator[str]:
    """Yield sentences on how a folder's prompt files differ from its base's, if the base is on this disk."""
    if not names & {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}:
        return
    theirs = _base_folder(base)
    if own := _chat_template(folder):
        name, text = own
        known = _chat_template(theirs) if theirs else None
        if theirs is None:
            yield f"its chat template ({name}) is not kept; the base's is used (not on this disk, so not compared)"
        elif known is None or known[1] != text:
            yield f"its chat template ({name}) differs from the base's and is not kept; the base's is used"
    if theirs and (added := sorted(_added_tokens(folder) - _added_tokens(theirs))):
        listed = ", ".join(added[:5]) + (f" and {len(added) - 5} more" if len(added) > 5 else "")
        yield f"its tokenizer has tokens that the base's lacks; they are not kept: {listed}"


def _chat_template(folder: Path) -> tuple[str, Any] | None:
    """Return the name of the file with the chat template, and the template."""
    try:
        return "chat_template.jinja", read_file(folder / "chat_template.jinja").decode(errors="replace").strip()
    except OSError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template := document(folder / name).get("chat_template"):
            return name, template.strip() if isinstance(template, str) else template
    return None


def _added_tokens(folder: Path) -> set[str]:
    """Return the contents of the tokens that a tokenizer adds to its vocabulary."""
    added = document(folder / "tokenizer_config.json").get("added_tokens_decoder")
    values = added.values() if isinstance(added, dict) else []
    return {str(value["content"]) for value in values if isinstance(value, dict) and "content" in value}


def _base_folder(base: str) -> Path | None:
    """Return the folder of the base's tokenizer, the base itself or in the hub's cache; None if not on this disk."""
    if not base:
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    repository = hub / "--".join(["models", *base.split("/")])
    try:
        found = [Path(base) / "tokenizer_config.json", *repository.glob("snapshots/*/tokenizer_config.json")]
        there = [(path.stat().st_mtime, path.parent) for path in found if path.is_file()]
    except (OSError, ValueError):  # not a valid file name
        return None
    return max(there)[1] if there else None
