"""Open the base model of a command, with a notice if that takes time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

from ..models.engines import open_model
from ..models.protocol import Model
from ..tasks.template import Template
from .arguments import template_arguments
from .output import note

PATIENCE = 1.0  # seconds without a terminal before a silent wait is explained
C = TypeVar("C", bound=Model)


def open_named(
    name: str | None,
    capability: type[C],
    *,
    engine: str = "hf",
    device: str | None,
    dtype: str | None,
    template: Sequence[str] | None,
    learns: bool = True,
) -> C:
    """Open the model named by a command's options, with the capability that the command needs.

    If losses are measured or trained on (`learns`), a notice shows the system turn that the prompt omits.
    """
    arguments = template_arguments(template)
    with explained(name):
        model = open_model(
            name, engine, capability=capability, device=device, dtype=dtype, template_arguments=arguments
        )
    if learns:
        note_system_turn(model.template)
    return model


def note_system_turn(template: Template) -> None:
    """Print the chat template's default system turn, which the prompt omits."""
    if template.system:
        note(f"the chat template's default system turn is left out of the prompt: {template.system!r}")


@contextlib.contextmanager
def explained(name: str | None) -> Iterator[None]:
    """Print that a model is being loaded: at once on a terminal, else after a second."""
    text = f"loading the base model{f' {name}' if name else ''} …"
    timer = threading.Timer(0.0 if sys.stderr.isatty() else PATIENCE, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
