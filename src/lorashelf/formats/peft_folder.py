"""What lies in a folder that is given as an adapter: what it is instead, and what lies beside the adapter's two files.

Beside them, trainers leave their own state (optimizer, scheduler, random state, logs), which the adapter does not need;
further trained weights, without which it is another function: refused; and a chat template or a tokenizer, which are
not kept: noticed, unless they are the base's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..atomic import open_file, read_file
from ..errors import Fault
from .objects import CONFIG_FILE, TENSOR_FILE

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_GIVE = "give a PEFT adapter's folder that this user can read"
_MODEL_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)|(pytorch_)?model\.\w+\.index\.json")
_TRAINERS_STATE = (
    re.compile(  # of transformers, accelerate, DeepSpeed, FSDP; copies of the adapter that PEFT passes over
        r"adapter(_model(-\d+-of-\d+)?|_\d+)\.\w+|training_args\.\w+|pytorch_model_fsdp.*"
        r"|(optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|.*_optim_states|.*_model_states)"
        r"(_\d+)*\.\w+"
    )
)
_TRAINED_BESIDE = (
    (re.compile(r"non_lora_trainables"), "what LLaVA trained beside the adapter, such as the projector"),
    (re.compile(r"projector"), "a trained projector"),
    (re.compile(r"^(value_head|v_head|vhead|reward_head|score|classifier)\b"), "a trained head"),
    (re.compile(r"embed|lm_head|trainable_params"), "trained embeddings"),
    (re.compile(r"^vit\b|vision|visual"), "a trained vision tower"),
    (_MODEL_FILE, "a whole model, or the value head that TRL writes under this name"),
)


def not_a_folder(path: Path, error: OSError) -> Fault:
    """Why a path cannot be read as a folder, and what to give."""
    what = f"cannot be read: {error.strerror}"
    if not path.is_file():
        return Fault(what, _GIVE)
    if found := not_the_file(path.name, path):
        return found
    if (path.parent / CONFIG_FILE).exists():
        return Fault(f"{what} (it is a file)", f"give its folder: {path.parent}")
    return Fault(f"{what} (it is a file)", _GIVE)


def something_else(folder: Path, names: set[str]) -> Fault | None:
    """What a folder with these names in it is in place of an adapter; None where it may be one. Raises OSError."""
    config, tensors = CONFIG_FILE in names, TENSOR_FILE in names
    if {"shelf.toml", "HEAD"} <= names:
        return _shelf(folder)
    if folder.name == "objects" and (folder.parent / "shelf.toml").exists():
        return _shelf(folder.parent)
    if not tensors and ("adapters.safetensors" in names or (config and _is_mlx(folder / CONFIG_FILE))):
        what = "an MLX adapter: its factors are transposed, under other names, with a scale in place of an alpha"
        return Fault(what, "convert it to PEFT's files: docs/adapters.md, 'From MLX'")
    if config and not tensors:
        return _without_tensors(folder, names)
    return None if config else _without_config(folder, names)


def not_the_file(name: str, path: Path) -> Fault | None:
    """What a file is in place of a config or tensors, by how it begins; None where that is not plain to see."""
    begins = b""
    with contextlib.suppress(OSError), os.fdopen(open_file(path), "rb") as file:
        begins = file.read(200)
    if begins.startswith(b"version https://git-lfs.github.com/spec/"):
        return Fault(f"{name} is a Git LFS pointer, not the file itself", "git lfs pull, in the repository it lies in")
    if begins.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return Fault(f"{name} is a web page, not the file itself", "download the file itself (hf download)")
    if begins.startswith(b"GGUF"):
        return Fault(f"{name} is a GGUF file", "give the PEFT folder that it was converted from")
    return None


def _shelf(shelf: Path) -> Fault:
    cure = f"give the folder that serves one of its tasks, as printed by: lorashelf route {shelf} TASK"
    return Fault("this is a shelf, not an adapter", cure)


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
        return Fault(f"{CONFIG_FILE} is missing", f"this folder holds adapters: give them one by one, {folder}/*/")
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
        return Fault(f"{missing}: only a part was downloaded", f"hf download {hub[1]}/{hub[2]}")
    if checkpoints := _checkpoints(folder, names):
        return Fault(f"{missing}: a training run, with checkpoints inside", f"give its latest: {checkpoints[-1]}")
    if any(re.fullmatch(r"adapter_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)", name) for name in names):
        return Fault(f"{missing}: it is in shards", "join them: docs/adapters.md, 'Shards'")
    if any(name.startswith(f"{TENSOR_FILE}.") for name in names):
        return Fault(f"{missing}: a download of it has not ended", "download it again")
    if pickles := sorted(filter(_is_pickle, names)):
        cure = (
            "where you trust it, save it again with safe_serialization=True, or convert it: docs/adapters.md, 'Pickles'"
        )
        return Fault(f"{pickles[0]} is a pickle, which can run code when loaded: refused, never opened", cure)
    return Fault(missing, "copy or download it too: a config alone holds no weights")


def _is_pickle(name: str) -> bool:
    """Whether a file may hold an adapter's tensors as torch.save writes them."""
    state = _TRAINERS_STATE.fullmatch(name) and not name.startswith("adapter")
    return name.endswith((".bin", ".pt", ".pth")) and not state


def _checkpoints(folder: Path, names: Iterable[str]) -> list[Path]:
    """The checkpoints of a training run that hold an adapter, the latest last."""
    numbered = sorted((int(found[1]), name) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name)))
    return [folder / name for _, name in numbered if (folder / name / CONFIG_FILE).exists()]


def document(path: Path) -> dict[str, Any]:
    """A JSON object that may be absent or damaged: then it is empty."""
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# beside the adapter's two files --------------------------------------------------------------------------------------


def trained_beside(names: Iterable[str]) -> Iterator[Fault]:
    """A fault for every file of weights that belongs to what was trained, as PEFT reads none but its own."""
    for name in sorted(names):
        if name == TENSOR_FILE or not name.endswith(WEIGHTS) or _TRAINERS_STATE.fullmatch(name):
            continue
        meaning = next((meaning for pattern, meaning in _TRAINED_BESIDE if pattern.search(name)), "other weights")
        cure = f"if ΔW alone is wanted, give a copy of the folder without {name}"
        yield Fault(f"{name} lies beside the adapter: {meaning}, which would be dropped", cure)


def prompt_notices(folder: Path, names: set[str], base: str) -> Iterator[str]:
    """What a folder says about prompts that its base does not, in sentences; the base is looked for on the disk."""
    if not names & {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"}:
        return
    theirs = _base_folder(base)
    if own := _chat_template(folder):
        name, text = own
        known = _chat_template(theirs) if theirs else None
        if theirs is None:
            yield f"its chat template ({name}) is not kept; the base's, which is not here to compare with, is used"
        elif known is None or known[1] != text:
            yield f"its chat template ({name}) differs from the base's and is not kept; the base's is used"
    if theirs and (added := sorted(_added_tokens(folder) - _added_tokens(theirs))):
        listed = ", ".join(added[:5]) + (f" and {len(added) - 5} more" if len(added) > 5 else "")
        yield f"its tokenizer has tokens that the base's lacks, which are not kept: {listed}"


def _chat_template(folder: Path) -> tuple[str, Any] | None:
    """The file that holds the chat template, and the template."""
    try:
        return "chat_template.jinja", read_file(folder / "chat_template.jinja").decode(errors="replace").strip()
    except OSError:
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template := document(folder / name).get("chat_template"):
            return name, template.strip() if isinstance(template, str) else template
    return None


def _added_tokens(folder: Path) -> set[str]:
    """The contents of the tokens that a tokenizer adds to its vocabulary."""
    added = document(folder / "tokenizer_config.json").get("added_tokens_decoder")
    values = added.values() if isinstance(added, dict) else []
    return {str(value["content"]) for value in values if isinstance(value, dict) and "content" in value}


def _base_folder(base: str) -> Path | None:
    """Where the base's tokenizer lies: a folder, or the hub's cache; None if it is not on this disk."""
    if not base:
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    repository = hub / "--".join(["models", *base.split("/")])
    try:
        found = [Path(base) / "tokenizer_config.json", *repository.glob("snapshots/*/tokenizer_config.json")]
        there = [(path.stat().st_mtime, path.parent) for path in found if path.is_file()]
    except (OSError, ValueError):  # a name that no file can have
        return None
    return max(there)[1] if there else None
