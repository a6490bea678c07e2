"""Fixtures and Hypothesis profiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import shapes

if TYPE_CHECKING:
    from command import Command
    from lorashelf import Shelf
    from lorashelf.models.hf import HFBackend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

shapes.install(["lorashelf.lora", "lorashelf.merging", "lorashelf.placement", "lorashelf.search"])

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, called in this process."""
    from command import Command

    return Command(capsys)


@pytest.fixture
def new_shelf(tmp_path: Path) -> Callable[..., Shelf]:
    """A function that makes an empty shelf: new_shelf(slots=3, **options of new_settings)."""

    from lorashelf import Shelf, new_settings

    def make(slots: int = 3, name: str = "a.shelf", **options: Any) -> Shelf:
        return Shelf.create(tmp_path / name, new_settings(slots, **options))

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: more cost more than they bring on small matrices."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> HFBackend:
    """The packaged base in float32, opened once per process."""
    from lorashelf.models.hf import HFBackend

    return HFBackend.open(device="cpu", dtype="f32")


ALLOWED_SKIPS = Path(__file__).parent / "skips.toml"
_skipped: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember every skip and its reason."""
    if report.skipped:
        _skipped[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def unlisted_skips(skipped: dict[str, str], allowed: dict[str, str]) -> list[str]:
    """The skips that the list does not name, as sentences."""
    return [f"{test}: {reason}" for test, reason in sorted(skipped.items()) if test.split("[")[0] not in allowed]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip that tests/skips.toml does not name with its reason fails the run."""
    allowed = tomllib.loads(ALLOWED_SKIPS.read_text()).get("skips", {})
    unlisted = unlisted_skips(_skipped, allowed)
    if unlisted and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for sentence in unlisted:
        print(f"\nskipped without being named in tests/skips.toml: {sentence}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A whole file that skips itself on collection counts as well."""
    if report.skipped:
        _skipped[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
