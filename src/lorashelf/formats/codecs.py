"""The codecs that there are, by the name that a manifest has (`encoding`)."""

from __future__ import annotations

from ..registry import Registry
from .codec import Codec
from .peft import Peft

CODECS: Registry[Codec] = Registry("encoding")
CODECS.add(Peft.name, Peft())
