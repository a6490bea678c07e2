"""The encoding `coded`: compressed adapters, as levels that refine one another; docs/coded.md is normative.

`encoder.Encoder` makes levels one by one (at a slope, within a size, for a quality), `decoder.decode` makes an adapter
from the first n, `decoder.inspect` describes each level without decoding values, `files` writes levels to a file.
"""

LEVELS = 6
"""The largest number of levels of a file unless another one is asked for."""
SUFFIX = ".lsc"
"""What the names of files of levels end with."""
