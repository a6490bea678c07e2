"""Arrays in signatures, by dtype and shape: `Float32[Array32, "rank din"]`.

A shape names its axes; within one call, one name is one size. `_` and `_name` mean any size, `...` any axes,
`*shape` any axes that are the same throughout, `#n` n or 1, a number itself. The notation is that of jaxtyping, which
checks it in the tests (tests/conftest.py); elsewhere it is documentation and costs nothing.

    din, dout   the sizes of an adapted module
    rank        the rank of one module's factors
    n, m        numbers of adapters, modules or directions
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if not TYPE_CHECKING and sys.modules.get("jaxtyping"):  # loaded by a caller that may check with it
    from jaxtyping import Bool, Float32, Float64, Int, Int64
else:
    from typing import Annotated as Bool
    from typing import Annotated as Float32
    from typing import Annotated as Float64
    from typing import Annotated as Int
    from typing import Annotated as Int64

Array32 = NDArray[np.float32]
Array64 = NDArray[np.float64]
Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]
Positions = NDArray[np.intp]

SideA = Float32[Array32, "rank din"]
"""A of ΔW = s B A."""
SideB = Float32[Array32, "dout rank"]
"""B of ΔW = s B A."""
Vector = Float64[Array64, "n"]
Square = Float64[Array64, "n n"]
Table = Float64[Array64, "n m"]
Cube = Float64[Array64, "n n n"]

__all__ = [
    "Array32",
    "Array64",
    "Bool",
    "Cube",
    "Flags",
    "Float32",
    "Float64",
    "Int",
    "Int64",
    "Integers",
    "Positions",
    "SideA",
    "SideB",
    "Square",
    "Table",
    "Vector",
]
