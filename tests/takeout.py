"""Take each check out of src/lorashelf in turn and print the test that notices: python tests/takeout.py [WORD…]

The checks are found in the syntax tree, so moves and renames leave nothing to keep up to date. A check is

- an `if`, of a statement or a comprehension, that leads to a `raise` or to a sentence about a fault; each operand of an
  `or` is taken out as well;
- an `except` that turns an error into such a sentence, for each exception that it catches;
- a statement that only calls a function which checks (`check_…`, `no_links`, …).

The package is copied, one check is taken out of the copy, and the tests that reached it run against the copy until one
fails. Which tests reach a check is measured once, by coverage with a context per test, and kept in
build/takeout.coverage; delete that file to measure again. Exit code 1 if a check can be taken out and no test fails.
With words, only checks whose place holds one of them: python tests/takeout.py shelf/ formats/peft.py
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS = ROOT / "src" / "lorashelf", ROOT / "tests"
MEASURED = ROOT / "build" / "takeout.coverage"
AT_ONCE, SECONDS, MOST_TESTS = 2, 300.0, 6
CHECKING = re.compile(r"_?(check|no_|ensure|together)")
COLLECTED = re.compile(r"fault|problem|wrong|odd|repeated|lacking")

PLUGIN = '''
"""Stop unless the copy is what is tested, and write down the test that fails."""
from pathlib import Path
import lorashelf

HERE = Path(__file__).resolve().parent
if Path(lorashelf.__file__).resolve().parent != HERE / "lorashelf":
    raise SystemExit(f"not the copy: {lorashelf.__file__}")

def pytest_runtest_logreport(report):
    if report.failed and report.when == "call":
        (HERE / "failed").write_text(report.nodeid)
'''


class Check(NamedTuple):
    """A check: where it stands, what stands there without it, and the lines that run when it refuses."""

    file: str
    line: int
    text: str
    start: int
    """Byte offsets into the file of what is replaced."""
    stop: int
    without: str
    refusal: range

    @property
    def place(self) -> str:
        """File, line and the text that is taken out."""
        return f"{self.file}:{self.line}: {self.text[:70]}"


def checks_in(source: str, file: str) -> Iterator[Check]:
    """The checks of a file, in the order of the syntax tree."""
    data = source.encode()
    starts = [0]
    for row in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def check(node: ast.expr | ast.stmt, without: str, refusal: ast.AST) -> Check:
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        text = " ".join(data[start:stop].decode().split())
        lines = range(refusal.lineno, (refusal.end_lineno or refusal.lineno) + 1)
        return Check(file, node.lineno, text, start, stop, without, lines)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and (refusal := _refusal(node.body)):
            yield from (check(part, "False", refusal) for part in _conditions(node.test))
        elif isinstance(node, ast.comprehension):
            yield from (check(part, "False", part) for condition in node.ifs for part in _conditions(condition))
        elif isinstance(node, ast.ExceptHandler) and node.type is not None and (refusal := _refusal(node.body)):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            yield from (check(kind, "()", refusal) for kind in caught)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if CHECKING.match(name):
                yield check(node, "pass", node)


def _conditions(test: ast.expr) -> list[ast.expr]:
    """The whole condition, and each operand of an `or`."""
    return [test, *(test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or) else [])]


def _refusal(body: list[ast.stmt]) -> ast.stmt | None:
    """The statement of a body that refuses: a raise, or a sentence that is collected, yielded or returned."""
    for statement in body:
        if isinstance(statement, ast.Raise):
            return statement
        if _collects(statement) and any(map(_is_sentence, ast.walk(statement))):
            return statement
    return None


def _collects(statement: ast.stmt) -> bool:
    """Whether what is in the statement goes to a list of faults or to the caller."""
    if isinstance(statement, ast.AugAssign):
        return bool(COLLECTED.search(ast.unparse(statement.target)))
    value = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "append":
        return bool(COLLECTED.search(ast.unparse(value.func.value)))
    return isinstance(statement, ast.Return) or isinstance(value, ast.Yield | ast.YieldFrom)


def _is_sentence(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip()


def all_checks() -> list[Check]:
    """Those of the whole package; a comprehension counts where it collects sentences about faults."""
    found: list[Check] = []
    for path in sorted(SOURCE.rglob("*.py")):
        file, source = str(path.relative_to(SOURCE)), path.read_text()
        found += [check for check in checks_in(source, file) if not _is_plain_comprehension(check, source)]
    return found


def _is_plain_comprehension(check: Check, source: str) -> bool:
    """Whether a condition in a comprehension only selects: its lines hold no word for a fault."""
    if check.without != "False" or len(check.refusal) > 1 or check.refusal[0] != check.line:
        return False
    rows = source.splitlines()[max(0, check.line - 4) : check.line + 1]
    return not COLLECTED.search(" ".join(rows))


def without(check: Check, source: bytes) -> bytes:
    """The file with the check taken out."""
    return source[: check.start] + check.without.encode() + source[check.stop :]


def copy_without(check: Check | None, folder: Path) -> None:
    """The package in `folder`, the check taken out, and the plugin beside it."""
    shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "takeout_plugin.py").write_text(PLUGIN)
    if check is not None:
        path = folder / "lorashelf" / check.file
        path.write_bytes(without(check, path.read_bytes()))


def run_tests(folder: Path, *tests: str) -> tuple[int, str]:
    """The exit code of pytest against a copy, and the end of its output."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "takeout_plugin", *tests]
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end after {SECONDS:.0f} s"
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def measure() -> None:
    """Run the whole suite once and record which test reaches which line."""
    MEASURED.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "COVERAGE_FILE": str(MEASURED)}
    words = ["-m", "pytest", "-q", "--cov", "lorashelf", "--cov-context", "test", "--cov-report", ""]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)


def reaching(checks: list[Check]) -> list[list[str]]:
    """For every check the tests that refuse by it, those that run the fewest lines of the package first.

    A refusal that only a process of its own reaches is not seen by coverage: then the tests that start processes.
    """
    from coverage import CoverageData

    data = CoverageData(str(MEASURED))
    data.read()
    reached: dict[tuple[str, int], set[str]] = {}
    lines: Counter[str] = Counter()
    for name in data.measured_files():
        file = str(Path(name).relative_to(SOURCE))
        for line, contexts in data.contexts_by_lineno(name).items():
            reached[file, line] = tests = {context.partition("|")[0] for context in contexts if context}
            lines.update(tests)
    processes = [str(path.relative_to(ROOT)) for path in TESTS.glob("test_*.py") if "subprocess" in path.read_text()]
    found = []
    for check in checks:
        tests = set().union(*(reached.get((check.file, line), set()) for line in check.refusal))
        found.append(sorted(tests, key=lambda test: (lines[test], test))[:MOST_TESTS] or sorted(processes))
    return found


def verdict(check: Check, tests: list[str]) -> tuple[bool, str]:
    """Whether a test notices that the check is gone, and a line that names it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_without(check, folder)
        code, printed = run_tests(folder, *tests)
        if code == 0:
            return False, f"{check.place}: NOT NOTICED"
        if not (folder / "failed").exists():
            return False, f"{check.place}: the tests did not run\n{printed}"
        return True, f"{check.place}: noticed by {(folder / 'failed').read_text().removeprefix('tests/')[:140]}"


def main(words: list[str]) -> int:
    """Take out all checks, or those whose place holds one of the words."""
    chosen = [check for check in all_checks() if not words or any(word in check.place for word in words)]
    if not chosen:
        print("no such check")
        return 1
    if not MEASURED.exists():
        print("the whole suite runs once, to measure which test reaches which check", flush=True)
        measure()
    missed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for noticed, line in pool.map(verdict, chosen, reaching(chosen)):
            missed += not noticed
            print(line, flush=True)
    print(f"{len(chosen)} checks taken out, {len(chosen) - missed} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
