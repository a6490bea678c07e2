"""Folders as training tools, downloads and mistakes leave them: what is said of each, and that the cure works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as torch_load
from safetensors.torch import save_file as torch_save

import lorashelf as ls
from factory import BASE, assert_same_delta, make_adapter, peft_tensors, write_peft
from lorashelf.errors import AdapterFormatError, ShapeMismatch
from lorashelf.faults import natural, together
from lorashelf.tasks.folders import read_task_file
from test_attacks import CONFIG, TENSORS, command

ROOT = Path(__file__).parent.parent
Made = Callable[[Path], Path]


def refusal(folder: Path) -> AdapterFormatError:
    """The one error, the same from the command line."""
    with pytest.raises(AdapterFormatError) as caught:
        ls.read_adapter(folder)
    code, said = command("show", folder)
    assert code == 3
    assert str(caught.value) in said
    return caught.value


def without(name: str, *, adapter: Callable[[Path], Path] = write_peft) -> Made:
    def make(folder: Path) -> Path:
        (adapter(folder) / name).unlink()
        return folder

    return make


def with_file(name: str, content: bytes | str = b"x", make: Made = write_peft) -> Made:
    def made(folder: Path) -> Path:
        made_folder = make(folder)
        path = made_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return made_folder

    return made


def bare(*names: str) -> Made:
    """A folder with empty files of these names."""

    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return make


# what the folder is instead ------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 13587976\n"
NO_TENSORS = without(TENSORS)


def cut_off(folder: Path) -> Path:
    whole = (write_peft(folder) / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    return folder


def hub_snapshot(folder: Path) -> Path:
    return NO_TENSORS(folder / "models--acme--mail-lora" / "snapshots" / "0f3a")


def hub_link_to_nothing(folder: Path) -> Path:
    made = NO_TENSORS(folder / "models--acme--mail-lora" / "snapshots" / "0f3a")
    (made / TENSORS).symlink_to("../../blobs/gone")
    return made


def mlx(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora, "model": BASE}
    (folder / CONFIG).write_text(json.dumps(config))
    named = {}
    for path, f in make_adapter(1).modules.items():
        named |= {f"{path}.lora_a": np.ascontiguousarray(f.a.T), f"{path}.lora_b": np.ascontiguousarray(f.b.T)}
    save_file(named, folder / "adapters.safetensors")
    return folder


def shards(folder: Path) -> Path:
    named = peft_tensors(make_adapter(1))
    write_peft(folder, make_adapter(1))
    (folder / TENSORS).unlink()
    for number, half in enumerate("AB", 1):
        part = {name: value for name, value in named.items() if f"lora_{half}" in name}
        save_file(part, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    return folder


def run_folder(make: Made) -> Made:
    def made(folder: Path) -> Path:
        for step in (50, 200, 1000):
            write_peft(folder / f"checkpoint-{step}", make_adapter(1))
        make(folder)
        return folder

    return made


def shelf(folder: Path) -> Path:
    return ls.Shelf.create(folder, ls.new_settings(2)).path


INSTEAD: dict[str, tuple[Made, str, str]] = {
    "a Git LFS pointer": (with_file(TENSORS, POINTER), f"{TENSORS} is a Git LFS pointer", "git lfs pull"),
    "a config that is a pointer": (with_file(CONFIG, POINTER), f"{CONFIG} is a Git LFS pointer", "git lfs pull"),
    "a web page": (with_file(TENSORS, "<!DOCTYPE html><html>"), f"{TENSORS} is a web page", "hf download"),
    "a cut-off download": (cut_off, "(truncated?)", "download or copy the file again"),
    "an empty download": (with_file(TENSORS, b""), "truncated: 0 bytes", "download or copy the file again"),
    "a download under way": (
        with_file(f"{TENSORS}.part", make=NO_TENSORS),
        "download is incomplete",
        "download it again",
    ),
    "a hub cache with the config only": (hub_snapshot, "the download is incomplete", "hf download acme/mail-lora"),
    "a hub cache with a link to nothing": (hub_link_to_nothing, "a broken link", "hf download"),
    "a hub repository": (
        lambda folder: hub_snapshot(folder).parent.parent,
        "a repository of the hub's cache",
        "give its id: acme/mail-lora",
    ),
    "an MLX folder": (mlx, "an MLX adapter", "docs/adapters.md, 'From MLX'"),
    "shards": (shards, f"{TENSORS} is missing: it is in shards", "docs/adapters.md, 'Shards'"),
    "a run folder": (run_folder(bare("trainer_state.json")), "checkpoints inside", "checkpoint-1000"),
    "a run folder with a config": (run_folder(NO_TENSORS), "checkpoints inside", "checkpoint-1000"),
    "a config alone": (NO_TENSORS, f"{TENSORS} is missing", "a config alone contains no weights"),
    "a lone pickle": (
        with_file("adapter_model.bin", make=with_file("optimizer.pt", make=NO_TENSORS)),
        "adapter_model.bin is a pickle",
        "docs/adapters.md, 'Pickles'",
    ),
    "only a trainer's state": (
        with_file("optimizer.pt", make=NO_TENSORS),
        f"{TENSORS} is missing",
        "a config alone contains no weights",
    ),
    "a task folder": (bare("task.toml", "train.jsonl"), "a task's examples", "lorashelf train"),
    "a whole model": (bare("config.json", "model.safetensors"), "a whole model", "mergekit-extract-lora"),
    "a whole model in shards": (bare("model-00001-of-00002.safetensors"), "a whole model", "mergekit-extract-lora"),
    "GGUF files": (bare("mail-q4.gguf"), "a folder of GGUF files", "PEFT folder that they were converted from"),
    "a GGUF file": (
        lambda folder: with_file("mail.gguf", b"GGUF\3\0", bare("x"))(folder) / "mail.gguf",
        "mail.gguf is a GGUF file",
        "PEFT folder that it was converted from",
    ),
    "a file of the adapter": (lambda folder: write_peft(folder) / TENSORS, "(it is a file)", "give its folder: "),
    "a shelf": (shelf, "this is a shelf", "lorashelf route"),
    "a shelf's objects": (lambda folder: shelf(folder) / "objects", "this is a shelf", "lorashelf route"),
    "tensors alone": (without(CONFIG), f"{CONFIG} is missing", "save_pretrained wrote"),
}


@pytest.mark.parametrize(("make", "what", "cure"), INSTEAD.values(), ids=INSTEAD.keys())
def test_a_folder_that_is_something_else_is_named_with_its_own_cure(
    make: Made, what: str, cure: str, tmp_path: Path
) -> None:
    error = refusal(make(tmp_path / "given"))
    assert len(error.faults) == 1, error.faults
    assert what in error.faults[0]
    assert cure in (error.cure or "")


def test_the_checkpoint_that_is_named_can_be_read(tmp_path: Path) -> None:
    error = refusal(run_folder(bare("trainer_state.json"))(tmp_path / "run"))
    named = re.search(r"checkpoint: (.*)", error.cure or "")
    assert named
    assert_same_delta(ls.read_adapter(named[1]), make_adapter(1))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_the_file_of_a_folder_leads_to_the_folder(name: str, tmp_path: Path) -> None:
    error = refusal(write_peft(tmp_path / "x", make_adapter(1)) / name)
    assert_same_delta(ls.read_adapter((error.cure or "").removeprefix("give its folder: ")), make_adapter(1))


def test_a_shelf_leads_to_the_folder_of_a_task(tmp_path: Path) -> None:
    made = ls.Shelf.create(tmp_path / "a.shelf", ls.new_settings(2))
    made.commit(ls.plan_add(made.snapshot(), make_adapter(1), "mail"))
    error = refusal(made.path / "objects")
    words = (error.cure or "").partition("lorashelf ")[2].replace("TASK", "mail").split()
    code, printed = command(*words)
    assert code == 0
    assert_same_delta(ls.read_adapter(printed.strip()), make_adapter(1))


def mended(heading: str, folder: Path) -> None:
    """Run what docs/adapters.md has under a heading, where the adapter lies as adapter/ (or mlx-adapter/)."""
    page = (ROOT / "docs" / "adapters.md").read_text()
    (code,) = re.findall(rf"## {heading}\n.*?```python\n(.*?)```", page, re.DOTALL)[:1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def pickled(folder: Path) -> Path:
    torch.save(torch_load(write_peft(folder, make_adapter(1)) / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    return folder


def stored_as(dtype: torch.dtype) -> Made:
    def make(folder: Path) -> Path:
        file = write_peft(folder, make_adapter(1)) / TENSORS
        torch_save({name: value.to(dtype) for name, value in torch_load(file).items()}, file)
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "heading", "precision"),
    [
        (shards, "Shards", 0.0),
        (pickled, "Pickles", 0.0),
        (stored_as(torch.float64), "Other dtypes", 0.0),
        (stored_as(torch.float8_e4m3fn), "Other dtypes", 0.1),
        (mlx, "From MLX", 0.0),
    ],
)
def test_what_the_documents_say_mends_the_folder(make: Made, heading: str, precision: float, tmp_path: Path) -> None:
    folder = make(tmp_path / ("mlx-adapter" if make is mlx else "adapter"))
    assert f"docs/adapters.md, '{heading}'" in (refusal(folder).cure or "")
    mended(heading, tmp_path)
    assert_same_delta(ls.read_adapter(tmp_path / "adapter"), make_adapter(1), precision)


# each fault and its cure ----------------------------------------------------------------------------------------------


def spoilt(**changes: Any) -> Made:
    return lambda folder: write_peft(folder, make_adapter(1), **changes)


def with_tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Made:
    return lambda folder: write_peft(folder, make_adapter(1), tensors=change(peft_tensors(make_adapter(1))))


def added(name: str, *shape: int) -> Made:
    return with_tensors(lambda named: {**named, f"base_model.model.{name}": np.ones(shape, "<f4")})


CURES: dict[str, tuple[Made, str, str]] = {
    "DoRA": (spoilt(use_dora=True), "use_dora is set", "use_dora=False"),
    "trained modules": (spoilt(modules_to_save=["lm_head"]), "modules_to_save is set", "without modules_to_save"),
    "PiSSA": (spoilt(init_lora_weights="pissa"), "init_lora_weights", "path_initial_model_for_weight_conversion"),
    "LoftQ": (spoilt(init_lora_weights="loftq"), "init_lora_weights", "init_lora_weights=True"),
    "another method": (spoilt(peft_type="LOHA"), "peft_type is 'LOHA'", "peft.save_as_lora"),
    "another rank": (spoilt(r=8), "the config gives rank 8", "copy the config that was saved with the tensors"),
    "another pattern": (spoilt(rank_pattern={"q_proj(": 4}), "not a regular expression", f"correct {CONFIG}"),
    "targets that match a part": (spoilt(target_modules=["q_proj"]), "not matched", "copy the config"),
    "a head under a LoRA": (added("lm_head.base_layer.weight", 8, 16), "head", "save_embedding_layers=False"),
    "a whole embedding": (added("model.embed_tokens.weight", 8, 16), "embedding", "save_embedding_layers=False"),
    "a whole head": (added("lm_head.weight", 8, 16), "head", "save_embedding_layers=False"),
    "float64": (
        with_tensors(lambda named: {name: value.astype("<f8") for name, value in named.items()}),
        "dtype F64",
        "docs/adapters.md, 'Other dtypes'",
    ),
    "shards of ZeRO-3": (
        with_tensors(lambda named: dict.fromkeys(named, np.ones(0, "<f4"))),
        "not gathered",
        "stage3_gather_16bit_weights_on_model_save",
    ),
    "NaN": (
        with_tensors(lambda named: {name: value * np.nan for name, value in named.items()}),
        "values are NaN",
        "earlier checkpoint",
    ),
}


@pytest.mark.parametrize(("make", "what", "cure"), CURES.values(), ids=CURES.keys())
def test_a_fault_comes_with_the_cure_that_fits_it(make: Made, what: str, cure: str, tmp_path: Path) -> None:
    error = refusal(make(tmp_path / "given"))
    assert what in error.faults[0]
    assert cure in (error.cure or "")
    assert len((error.cure or "").splitlines()) == 1


def test_faults_of_several_kinds_bring_a_cure_each(tmp_path: Path) -> None:
    make = with_tensors(lambda named: {name: value.astype("<f8") for name, value in named.items()})
    folder = make(tmp_path / "x")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": True, "init_lora_weights": "pissa"}))
    error = refusal(folder)
    cures = (error.cure or "").splitlines()
    assert len(cures) == 3
    assert all(f"\n  cure:  {cure}" in str(error) for cure in cures)
    code, printed = command("show", folder, "--json")
    document = json.loads(printed[printed.index('{"error"') :])["error"]
    assert code == 3
    assert document["cure"] == error.cure
    assert document["faults"] == list(error.faults)


def test_each_adapter_of_several_keeps_the_cures_of_its_faults(tmp_path: Path) -> None:
    spoilt(use_dora=True)(tmp_path / "a")
    with_file(TENSORS, POINTER)(tmp_path / "b")
    code, said = command("compare", tmp_path / "a", tmp_path / "b")
    assert code == 3
    assert "  - a: use_dora is set" in said
    assert f"  - b: {TENSORS} is a Git LFS pointer" in said
    assert "cure:  train it again with use_dora=False\n" in said
    assert "cure:  git lfs pull" in said


# many modules, few lines ----------------------------------------------------------------------------------------------


def test_the_faults_of_a_deep_adapter_fit_a_screen(tmp_path: Path) -> None:
    deep = make_adapter(1, layers=64)
    named = {name.replace(".weight", ".default.weight"): value for name, value in peft_tensors(deep).items()}
    error = refusal(write_peft(tmp_path / "x", deep, tensors=named))
    prefix = "base_model.model.model.layers 0-63"
    assert [fault.partition(":")[0] for fault in error.faults] == [
        f"self_attn.{projection}.lora_{half}.default.weight in {prefix}"
        for projection in ("q_proj", "v_proj")
        for half in "AB"
    ]
    assert len(str(error)) < 1000


def test_values_that_are_not_numbers_are_counted_together(tmp_path: Path) -> None:
    deep, rng = make_adapter(1, layers=12), np.random.default_rng(0)
    named = peft_tensors(deep)
    for value in named.values():
        value.reshape(-1)[: rng.integers(1, 20)] = np.nan
    bad = sum(int(np.isnan(value).sum()) for value in named.values())
    error = refusal(write_peft(tmp_path / "x", deep, tensors=named))
    assert len(error.faults) == 4
    assert sum(int(re.search(r": (\d+) of", fault)[1]) for fault in error.faults) == bad


def test_a_file_cut_short_is_one_fault_however_many_tensors_are_gone(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "x", make_adapter(1, layers=50))
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    (fault,) = refusal(folder).faults
    assert re.search(r"are outside the file's \d+ \(truncated\?\), and \d+ more tensors$", fault)


def test_shapes_that_disagree_are_named_by_layers() -> None:
    wide = make_adapter(1, layers=12)
    shapes = {path: ls.Factors(np.ones((4, 20), "<f4"), np.ones((9, 4), "<f4")) for path in wide.modules}
    with pytest.raises(ShapeMismatch) as caught:
        ls.merge([wide, wide.with_factors(shapes)], method="linear")
    assert caught.value.faults == (
        "self_attn.q_proj in model.layers 0-11: ΔW is 9x20, elsewhere 12x16",
        "self_attn.v_proj in model.layers 0-11: ΔW is 9x20, elsewhere 8x16",
    )


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.layers.0.q"], "model.layers.0.q"),
        ([f"model.layers.{i}.mlp.q" for i in range(12)], "mlp.q in model.layers 0-11"),
        ([f"h.{i}.q" for i in (0, 2, 3, 10, 9)], "q in h 0, 2-3, 9-10"),
        ([f"h.{i}.experts.{j}.q" for i in range(2) for j in range(3)], "experts.0-2.q in h 0-1"),
        (["h.0.e.0.q", "h.0.e.1.q", "h.1.e.0.q"], "e.0-1.q in h 0-1 (3 modules)"),
        (["net.0", "net.1"], "net.0-1"),
    ],
)
def test_paths_that_differ_in_numbers_are_named_together(paths: list[str], expected: str) -> None:
    assert together(paths) == expected


def test_layers_are_listed_by_their_numbers(tmp_path: Path) -> None:
    write_peft(tmp_path / "x", make_adapter(1, layers=12))
    code, printed = command("show", tmp_path / "x", "--json")
    listed = [module["module"] for module in json.loads(printed)["modules"]]
    assert code == 0
    assert listed == sorted(listed, key=natural)
    assert listed.index("model.layers.9.self_attn.q_proj") < listed.index("model.layers.10.self_attn.q_proj")


# beside the factors --------------------------------------------------------------------------------------------------

TRAINED = [
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "value_head.safetensors",
    "value_head.bin",
    "v_head.safetensors",
    "new_embeddings.safetensors",
    "trainable_params.bin",
    "vit.safetensors",
    "pytorch_model.bin",
    "model-00001-of-00002.safetensors",
    "mystery.pt",
]


@pytest.mark.parametrize("name", TRAINED)
def test_weights_beside_the_factors_are_refused_and_the_cure_works(name: str, tmp_path: Path) -> None:
    folder = with_file(name)(tmp_path / "x")
    error = refusal(folder)
    assert error.faults[0].startswith(f"{name} is in the adapter's folder")
    assert f"a copy of the folder without {name}" in (error.cure or "")
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(name))
    ls.read_adapter(tmp_path / "copy")


STATE = [
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"),
    *("trainer_state.json", "README.md", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.json"),
    *(
        "merges.txt",
        "added_tokens.json",
        "adapter_model.bin",
        "runs/events.out",
        "checkpoint-50/optimizer.pt",
        "latest",
    ),
    *(
        "global_step50/mp_rank_00_model_states.pt",
        "zero_to_fp32.py",
        "random_states_0.pkl",
        "optimizer.bin",
        "all_results.json",
    ),
    *("training_loss.png", "axolotl.yaml", "preprocessor_config.json", "pytorch_model_fsdp.bin", ".DS_Store"),
]


def test_what_a_trainer_leaves_is_passed_over_without_a_word(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "checkpoint-50", make_adapter(1))
    for name in STATE:
        with_file(name, make=lambda folder: folder)(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"0": {"content": "<s>"}}}))
    read = ls.read_adapter(folder)
    assert_same_delta(read, make_adapter(1))
    assert read.notices == ()


def test_the_zoo_comes_without_a_notice() -> None:
    folders = sorted((ROOT / "examples" / "zoo").glob("*/"))
    assert len(folders) > 30
    assert {ls.read_adapter(folder).notices for folder in folders} == {()}


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
AS_FILE: Made = with_file("chat_template.jinja", TEMPLATE)
IN_CONFIG: Made = with_file("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}))


def give_base(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    """The base's tokenizer in a cache of the hub."""
    snapshot = folder / f"models--{BASE.replace('/', '--')}" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))


@pytest.mark.parametrize(("make", "name"), [(AS_FILE, "chat_template.jinja"), (IN_CONFIG, "tokenizer_config.json")])
def test_a_chat_template_is_noticed_unless_it_is_the_bases(
    make: Made, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "x")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    (unknown,) = ls.read_adapter(folder).notices
    assert f"({name}) is not kept" in unknown
    assert "not compared" in unknown
    give_base(tmp_path / "other", monkeypatch, chat_template="{{ messages }}")
    (other,) = ls.read_adapter(folder).notices
    assert f"({name}) differs from the base's and is not kept" in other
    give_base(tmp_path / "same", monkeypatch, chat_template=TEMPLATE + "\n")
    assert ls.read_adapter(folder).notices == ()


def test_tokens_that_the_base_lacks_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {str(number): {"content": content} for number, content in enumerate(["<s>", "<call>"])}
    folder = with_file("tokenizer_config.json", json.dumps({"added_tokens_decoder": tokens}))(tmp_path / "x")
    give_base(tmp_path / "hub", monkeypatch, added_tokens_decoder={"0": {"content": "<s>"}})
    (notice,) = ls.read_adapter(folder).notices
    assert notice.endswith("they are not kept: <call>")


def test_a_notice_is_printed_once_for_all_adapters(tmp_path: Path) -> None:
    for number in range(3):
        write_peft(tmp_path / f"task{number}", make_adapter(number))
        (tmp_path / f"task{number}" / "chat_template.jinja").write_text(TEMPLATE)
    ls.Shelf.create(tmp_path / "a.shelf", ls.new_settings(3))
    code, said = command("add", tmp_path / "a.shelf", tmp_path / "task0")
    assert code == 0
    assert "task0: its chat template (chat_template.jinja) is not kept" in said
    words = ["-o", tmp_path / "b.shelf", "--slots", 2, "--method", "random"]
    code, said = command("cluster", *(tmp_path / f"task{number}" for number in range(3)), *words)
    assert code == 0
    assert said.count("chat template") == 1
    assert "task0 and 2 more: its chat template" in said


@pytest.mark.parametrize("name", [CONFIG, "tokenizer_config.json"])
def test_a_byte_order_mark_is_passed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    folder = IN_CONFIG(tmp_path / "x")
    shutil.copytree(folder, tmp_path / "marked")
    (tmp_path / "marked" / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    plain, marked = ls.read_adapter(folder), ls.read_adapter(tmp_path / "marked")
    assert (marked.digest, marked.config, marked.notices) == (plain.digest, plain.config, plain.notices)


def test_a_byte_order_mark_in_a_task_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_bytes(b"\xef\xbb\xbf" + 'prompt = "Répondez."\n'.encode())
    assert read_task_file(tmp_path / "task.toml") == {"prompt": "Répondez."}
