"""Arrays in signatures carry their shapes, which the tests check at every call (tests/shapes.py)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation

import lorashelf
import shapes
from lorashelf import Factors
from lorashelf.errors import ShapeMismatch, UsageError
from lorashelf.lora import algebra, allocation, arrays, directions, kernels, quantiser
from lorashelf.lora.adapter import Stack
from lorashelf.lora.arrays import Array32, Array64, Float32, Float64
from lorashelf.merging import inverse, rules
from lorashelf.placement import surrogate

SOURCE = Path(lorashelf.__file__).parent
FOLDERS = ("lora", "merging", "placement", "search")
ARRAYS = {"NDArray", "ndarray", "Array32", "Array64", "Flags", "Integers", "Positions"}


def singles(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def doubles(*shape: int) -> Any:
    return np.ones(shape)


WRONG: dict[str, Callable[[], object]] = {
    "a side of another length": lambda: kernels._in_pieces(singles(2, 3, 4), singles(2, 5, 3)),
    "Gram matrices of another rank": lambda: kernels._squared(singles(2, 3, 3), singles(2, 4, 4)),
    "Gram matrices of another dtype": lambda: kernels._squared(doubles(2, 3, 3), doubles(2, 3, 3)),
    "stacked factors of two ranks": lambda: Stack(singles(2, 3, 8), singles(2, 6, 4), doubles(2)),
    "stacked factors, too few scales": lambda: Stack(singles(2, 3, 8), singles(2, 6, 3), doubles(1)),
    "an update that is a vector": lambda: algebra.truncate_dense(singles(12), 2),
    "factors of two ranks": lambda: algebra._canonical(doubles(3, 8), doubles(6, 4)),
    "masses of one table": lambda: quantiser.frequencies(np.ones(4, np.int64)),
    "fewer sums than counts": lambda: directions.Sides(singles(4, 385), singles(3, 385), doubles(4), doubles(4)),
    "a choice for too few directions": lambda: allocation._best(doubles(4), [(doubles(4, 2), doubles(3, 2))] * 2, 1, 0),
    "a table of weights": lambda: rules.linear([singles(2, 8)], singles(1, 1), np.random.default_rng),
    "weights of another dtype": lambda: rules.agree([singles(2, 8)], doubles(1), "total"),
    "ranks kept that are not there": lambda: inverse._cleared(doubles(3, 8), doubles(6, 3), np.ones(4, np.bool_)),
    "noise of three sides": lambda: inverse.Noise({}, doubles(3)),
    "inner products that are not square": lambda: surrogate.Surrogate(doubles(3, 4)),
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_disagree_with_a_signature_fail(what: str) -> None:
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        WRONG[what]()


def test_what_is_returned_is_checked_against_what_was_given() -> None:
    def product(x: Float64[Array64, "n k"], y: Float64[Array64, "k m"]) -> Float64[Array64, "n m"]:
        return (x @ y).T

    assert shapes.checked(product)(doubles(3, 2), doubles(2, 3)).shape == (3, 3)
    with pytest.raises(BeartypeCallHintViolation, match="the size of dimension n is 5"):
        shapes.checked(product)(doubles(3, 2), doubles(2, 5))


def test_only_arrays_are_checked() -> None:
    """Bad input of another kind reaches the code that refuses it in words."""

    def repeated(x: Float32[Array32, " n"], times: int) -> int:
        return len(x) * len(times)

    assert shapes.checked(repeated)(singles(2), "three") == 10
    with pytest.raises(UsageError, match="not a list of adapters"):
        lorashelf.gram("three")
    with pytest.raises(ShapeMismatch, match=r"are not \(r, din\) and \(dout, r\)"):
        Factors(singles(2, 3), singles(4, 1))


def annotations(tree: ast.AST) -> list[ast.expr]:
    """What functions take and return, and the fields of classes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [hint for hint in (node.returns, *(arg.annotation for arg in taken)) if hint]
        elif isinstance(node, ast.ClassDef):
            found += [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
    return found


def without_shape(hint: ast.expr) -> list[str]:
    """The arrays of an annotation that stand outside of `Float32[array, "shape"]`."""
    if isinstance(hint, ast.Name):
        return [hint.id] if hint.id in ARRAYS else []
    if isinstance(hint, ast.Subscript):
        name = ast.unparse(hint.value)
        return (
            []
            if hasattr(arrays, name) and name not in ARRAYS
            else without_shape(hint.value) + without_shape(hint.slice)
        )
    return [
        name for child in ast.iter_child_nodes(hint) if isinstance(child, ast.expr) for name in without_shape(child)
    ]


@pytest.mark.parametrize("file", [p for f in FOLDERS for p in sorted((SOURCE / f).glob("*.py"))], ids=lambda p: p.stem)
def test_arrays_in_signatures_carry_shapes(file: Path) -> None:
    hints = annotations(ast.parse(file.read_text()))
    assert [ast.unparse(hint) for hint in hints if without_shape(hint)] == []


def test_an_array_without_a_shape_is_seen() -> None:
    code = 'def f(x: Float32[Array32, "n"], y: list[Array32]) -> NDArray[np.float32]: ...\nclass C:\n    z: Integers'
    assert [without_shape(hint) for hint in annotations(ast.parse(code))] == [
        ["NDArray"],
        [],
        ["Array32"],
        ["Integers"],
    ]


def test_the_library_needs_no_checker() -> None:
    code = (
        "import sys, typing; sys.modules['jaxtyping'] = sys.modules['beartype'] = None\n"
        "import lorashelf as ls; [getattr(ls, name) for name in ls.__all__]\n"
        "print(typing.get_type_hints(ls.Factors)['a'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy.float32" in run.stdout
