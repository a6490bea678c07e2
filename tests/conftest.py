"""Fixtures and Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from lorashelf import Shelf, new_settings

settings.register_profile(
    "default", deadline=None, max_examples=40, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture
def new_shelf(tmp_path: Path) -> Callable[..., Shelf]:
    """A function that makes an empty shelf: new_shelf(slots=3, **options of new_settings)."""

    def make(slots: int = 3, name: str = "a.shelf", **options: Any) -> Shelf:
        return Shelf.create(tmp_path / name, new_settings(slots, **options))

    return make
