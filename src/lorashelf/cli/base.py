"""The base model of a command: opened, with word of it while that takes time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence

from ..models.base_model import BaseModel, open_base
from .arguments import template_arguments
from .output import note

PATIENCE = 1.0  # seconds before a silent wait is explained where there is no terminal


def opened(
    name: str | None, *, device: str | None, dtype: str | None, template: Sequence[str] | None, learns: bool = True
) -> BaseModel:
    """The base model that a command's options name.

    Where losses are measured or learned from (`learns`), the system turn that is left out of the prompt is named.
    """
    arguments = template_arguments(template)
    with _explained(f"loading the base model{f' {name}' if name else ''} …"):
        base = open_base(name, device=device, dtype=dtype, template_arguments=arguments)
    if learns and base.template.system:
        note(f"the chat template's own system turn is left out of the prompt: {base.template.system!r}")
    return base


@contextlib.contextmanager
def _explained(text: str) -> Iterator[None]:
    """Print what is being waited for: at once on a terminal, else when it takes longer than a second."""
    timer = threading.Timer(0.0 if sys.stderr.isatty() else PATIENCE, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
