"""The format `ollama`: LoRA files of llama.cpp, each with a Modelfile for the models of its tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from .. import atomic
from ..formats.gguf.header import read_header
from ..models.chat_template import template_of
from ..models.gguf_chat import GgufChat
from .gguf import Gguf, GgufFiles
from .target import Item, Target, Written

README = "README.md"
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_TEXT = """# Models for Ollama

One model per task; Ollama stores the base once. In this folder:

```bash
{commands}
```

`FROM` in the Modelfiles is the base's path at the export: change it if the base is elsewhere or is a model of Ollama's.
An adapter was trained with its task's prompt: give it with the text, `ollama run TASK "PROMPT, an empty line, TEXT"`.
"""


class Ollama(Gguf):
    """LoRA files with Modelfiles."""

    name = "ollama"
    summary = "the same, with Modelfiles for Ollama"
    options: ClassVar[Sequence[str]] = ("base", "outtype")

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target. Raises as `Gguf`."""
        return _Modelfiles(*self.settings(options, base))


class _Modelfiles(GgufFiles):
    def write(self, item: Item, folder: Path) -> Written:
        written = super().write(item, folder)
        lines = [f"FROM {self.base.source}", f"ADAPTER ./{written.path.name}", *self._prompt]
        atomic.write_file(written.path.with_suffix(".Modelfile"), ["\n".join([*lines, ""]).encode()])
        return written

    def finish(self, paths: Mapping[str, str], folder: Path) -> None:
        commands = [
            f"ollama create {task if _NAME.fullmatch(task) else Path(path).stem} -f {Path(path).stem}.Modelfile"
            for task, path in paths.items()
        ]
        atomic.write_file(folder / README, [_TEXT.format(commands="\n".join(dict.fromkeys(commands))).encode()])

    @cached_property
    def _prompt(self) -> Sequence[str]:
        """Return the lines for the text around a query as lorashelf writes it, without a default system turn; none if
        the base has no chat template, since Ollama then has none either.
        """
        if self.base.source is None or self.base.source.is_dir():
            return ()
        header = read_header(self.base.source)
        chat = GgufChat(header, self.base.name)
        if not chat.chat_template:
            return ()
        template = template_of(chat)
        begins = chat.bos_token if header.fields.get("tokenizer.ggml.add_bos_token") else ""  # Ollama adds it, too
        text = f"{template.before.removeprefix(begins or '')}{{{{ .Prompt }}}}{template.between}"
        return f'TEMPLATE """{text}"""', f'PARAMETER stop "{template.end.strip()}"', "PARAMETER temperature 0"
