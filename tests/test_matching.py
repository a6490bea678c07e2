"""Names and patterns against PEFT's own functions, and the work of many modules: linear, counted in calls."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

import lorashelf as ls
from lorashelf import Adapter, BaseId, Factors, Modules
from lorashelf.faults import Faults
from lorashelf.formats.peft_config import resolved_scales, unmatched
from lorashelf.formats.written_config import written_config
from lorashelf.lora.adapter import Shape
from lorashelf.lora.matching import BAD_PATTERN, FirstMatch, Key, targets

NAMES = ["q_proj", "v_proj", "q-proj", "down_proj", "layers", "experts", "model", "xq_proj", "a.b"]
SPELLINGS: list[Callable[[str], str]] = [
    str,
    re.escape,
    lambda key: "^" + key,
    lambda key: ".*" + key,
    lambda key: key.replace("1", r"\d"),
    lambda key: key[:-3] + "[a-z]" + key[-2:],
    lambda key: key[:-3] + "." + key[-2:],
    lambda key: f"{key}|q_proj",
    lambda key: f"(?i:{key.upper()})",
    lambda key: f"({key})?",
    lambda key: key[:-2] + ".*" + key[-2:],
    lambda key: f"x*{key}",
    lambda key: key.replace(".", "_"),
    lambda key: f"{key}$",
    lambda key: f"a)?({key}",
]


def drawn_path(rng: random.Random) -> str:
    inside = ["experts", str(rng.randrange(12))] if rng.random() < 0.5 else ["self_attn"]
    return ".".join(["model", "layers", str(rng.randrange(13)), *inside, rng.choice(NAMES)][rng.randrange(2) :])


def drawn_key(rng: random.Random, paths: list[str]) -> str:
    parts = rng.choice(paths).split(".")
    return rng.choice(SPELLINGS)(".".join(parts[rng.randrange(len(parts)) :]))


def test_the_first_key_that_matches_is_that_of_peft() -> None:
    rng, hits = random.Random(0), 0
    for _ in range(1500):
        paths = [*(drawn_path(rng) for _ in range(6)), "modelXlayersX1Yq_proj"]
        keys = {drawn_key(rng, paths): number for number in range(rng.randrange(1, 7))}
        first = FirstMatch((Key(key), number) for key, number in keys.items())
        for path in paths:
            expected = keys.get(get_pattern_key(list(keys), path), -1)
            assert first.of(path, -1) == expected, (keys, path)
            hits += expected >= 0
    assert hits > 2000


def test_the_modules_that_are_matched_are_those_of_peft() -> None:
    rng, hits = random.Random(1), 0
    for _ in range(1500):
        paths = [drawn_path(rng) for _ in range(7)]
        config = {
            "exclude_modules": rng.choice([None, [], [drawn_key(rng, paths)], rng.choice(NAMES)]),
            "target_modules": rng.choice([[drawn_key(rng, paths) for _ in range(3)], f".*{rng.choice(NAMES)}"]),
            "layers_to_transform": rng.choice([None, [], 1, [1, 2]]),
            "layers_pattern": rng.choice([None, "", "layers", ["h", "layers"]]),
            "target_parameters": None,
        }
        matched = targets(config)
        for path in paths:
            found = check_target_module_exists(SimpleNamespace(**config), path)
            expected = bool(found) and not isinstance(found, _ExcludedModule)
            assert matched(path) == expected, (config, path)
            hits += expected
    assert hits > 500


@pytest.mark.parametrize("key", ["q_proj(", "a{99999999999}", "(" * 3000 + ")" * 3000, "(?i)q", "*"])
def test_a_key_that_does_not_compile_is_an_error_as_in_peft(key: str) -> None:
    with pytest.raises(BAD_PATTERN):
        get_pattern_key([key], "q_proj")
    with pytest.raises(BAD_PATTERN):
        Key(key)


# linear in the modules ------------------------------------------------------------------------------------------------


def experts(count: int) -> list[str]:
    """The paths of a mixture of experts, ten layers of them."""
    return [f"model.layers.{i % 10}.mlp.experts.{i // 10}.down_proj" for i in range(count)]


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, Python's own in C among them."""
    count = 0

    def tick(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    re.purge()  # no pattern is compiled already
    sys.setprofile(tick)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def assert_linear(work: Callable[[int], Callable[[], Any]], few: int, many: int) -> None:
    """Ten times the modules take about ten times the calls, not a hundred times."""
    ready = [work(few), work(many)]
    ready[0]()  # what is imported or cached once
    few_calls, many_calls = (calls(each) for each in ready)
    assert many_calls < 1.3 * many / few * few_calls, (few_calls, many_calls)


def mixed(adapter_paths: list[str]) -> Adapter:
    """Two ranks and two scales, so that the config needs a pattern for every second module."""
    modules = {}
    for number, path in enumerate(adapter_paths):
        rank = 1 + number % 2
        modules[path] = Factors(np.ones((rank, 3), "<f4"), np.ones((2, rank), "<f4"), 1.0 + number % 2)
    return Adapter(Modules(modules), BaseId("acme/moe"), "f16", {})


CONFIGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "names": lambda paths: {"target_modules": ["up_proj", "down_proj"]},
    "whole paths": lambda paths: {"target_modules": paths},
    "a pattern": lambda paths: {"target_modules": r".*\.experts\.\d+\.(up|down)_proj"},
    "paths excluded": lambda paths: {"exclude_modules": [f"x.{path}" for path in paths]},
    "layers": lambda paths: {"target_modules": ["down_proj"], "layers_to_transform": list(range(len(paths)))},
    "ranks by path": lambda paths: {"rank_pattern": dict.fromkeys(paths, 2)},
    "alphas by escaped path": lambda paths: {"alpha_pattern": dict.fromkeys(map(re.escape, paths), 2)},
    "ranks by anchored path": lambda paths: {"rank_pattern": {f"^{path}": 2 for path in paths}},
    "ranks by ending": lambda paths: {"rank_pattern": {path.removeprefix("model."): 2 for path in paths}},
    "alphas by pattern": lambda paths: {"alpha_pattern": {rf".*\.{re.escape(p[6:])}": 2 for p in paths}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_reading_a_config_is_linear_in_the_modules(config: Callable[[list[str]], dict[str, Any]]) -> None:
    def work(count: int) -> Callable[[], Any]:
        paths = experts(count)
        fields, shapes = {"r": 2, "lora_alpha": 2, **config(paths)}, dict.fromkeys(paths, Shape(2, 2, 3))

        def read() -> None:
            faults = Faults()
            assert len(resolved_scales(fields, shapes, faults)) == count
            unmatched(fields, shapes, faults)
            assert faults.listed() == []

        return read

    assert_linear(work, 300, 3000)


def test_writing_a_config_is_linear_in_the_modules() -> None:
    def work(count: int) -> Callable[[], Any]:
        adapter = mixed(experts(count))
        return lambda: written_config(adapter)

    assert_linear(work, 300, 3000)


def test_an_adapter_of_twenty_thousand_modules_comes_back_as_it_was(tmp_path: Path) -> None:
    adapter = mixed(experts(20_000))
    ls.write_adapter(adapter, tmp_path / "x")
    read = ls.read_adapter(tmp_path / "x")
    assert read.modules.scales == adapter.modules.scales
    assert read.shapes == adapter.shapes


@pytest.mark.parametrize("step", ["merge", "similarity", "add"])
def test_a_flow_is_linear_in_the_modules(step: str, tmp_path: Path) -> None:
    def work(count: int) -> Callable[[], Any]:
        xs = []
        for name in ("a", "b"):
            ls.write_adapter(mixed(experts(count)), tmp_path / f"{name}{count}")
            xs.append(ls.read_adapter(tmp_path / f"{name}{count}"))
        snapshot = ls.Shelf.create(tmp_path / f"{count}.shelf", ls.new_settings(1)).snapshot()
        flows: dict[str, Callable[[], Any]] = {
            "merge": lambda: ls.merge(xs, method="linear"),
            "similarity": lambda: ls.similarity([xs[0]], [xs[1]]),
            "add": lambda: ls.plan_add(snapshot, xs[0], "a"),
        }
        return flows[step]

    assert_linear(work, 200, 2000)
