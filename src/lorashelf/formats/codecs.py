"""The registry of codecs, by the manifest's `encoding`."""

from __future__ import annotations

from ..registry import Registry
from .codec import Codec
from .coded.codec import Coded
from .peft import Peft

CODECS: Registry[Codec] = Registry("encoding")
for codec in (Peft(), Coded()):
    CODECS.add(codec.name, codec)
