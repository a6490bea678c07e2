"""A model card: what an exported object is, for its readers and for model hubs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from ..lora.adapter import in_16_bits
from ..lora.quality import quality
from ..shelf.slot import Slot
from ..shelf.snapshot import Snapshot
from ..version import VERSION

CARD = "README.md"
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~])")
_LICENCE = "license:  # fill in: those of the base, of every adapter below and of their data apply"


def card_path(written: Path) -> Path:
    """Return where the card of an exported folder or file is: in the folder, beside the file."""
    return written / CARD if written.is_dir() else written.with_name(f"{written.stem}.{CARD}")


def model_card(snapshot: Snapshot, slot: Slot, tasks: Sequence[str]) -> str:
    """Return the card of a slot's object as Markdown: base, tasks with their prompts, how it was made. The licence is
    left to the user.
    """
    base = snapshot.manifest.base
    known = [f"base_model: {json.dumps(base.name, ensure_ascii=False)}"] if base and base.name else []
    head = ["---", *known, _LICENCE, "tags: [lora, lorashelf]", "---"]
    named = base.name if base and base.name else "unknown"
    return "\n".join(
        [
            *head,
            "",
            f"# LoRA for {markdown_text(', '.join(tasks))}",
            "",
            f"Base model: {markdown_text(named)}. Rank at most {slot.object.rank}.",
            "",
            "## Tasks",
            "",
            *(f"- {markdown_text(task)}{_prompt(snapshot, task)}" for task in tasks),
            "",
            "## How it was made",
            "",
            *_made(slot),
            "",
            "## Licence",
            "",
            "Not stated by lorashelf: fill in the field `license` above.",
            "",
        ]
    )


def _made(slot: Slot) -> Iterator[str]:
    merged, history = slot.history.merged, slot.history
    if len(merged) == 1:
        yield f"The adapter of {markdown_text(merged[0].task)} alone; digest `{merged[0].digest}`."
    else:
        yield f"An average of {len(merged)} adapters (merge method `{history.method}`):"
        yield ""
        yield "| adapter | weight | rank | digest |"
        yield "|---|---:|---:|---|"
        yield from (f"| {markdown_text(s.task)} | {s.weight:.4g} | {s.rank} | `{s.digest}` |" for s in merged)
    yield ""
    if slot.object.encoding == "coded":
        share = 100 * slot.object.bytes / in_16_bits(sum(source.parameters for source in merged))
        yield f"Decoded from {slot.object.bytes} bytes, {share:.3g} % of its adapters in 16 bits."
    if history.error and len(merged) == 1:
        yield f"Relative error of ΔW {history.error:.2g}; predicted quality kept {quality(1.0 - history.error**2):.3f}."
    elif history.error:
        yield f"Relative error of ΔW {history.error:.2g}, beside what averaging loses."
    yield f"Exported by lorashelf {VERSION} from object `{slot.object.id}`."


def _prompt(snapshot: Snapshot, task: str) -> str:
    prompt = snapshot.manifest.tasks[task].get("prompt")
    return f": {markdown_text(str(prompt))}" if prompt else ""


def markdown_text(text: str) -> str:
    r"""Return a text on one line so that Markdown, and the HTML in it, shows it as it is.

    >>> print(markdown_text("<b>|a_1|"))
    &lt;b&gt;\|a\_1\|
    """
    return _MARKUP.sub(r"\\\1", escape(" ".join(text.split()), quote=False))
