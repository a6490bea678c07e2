"""The encoding `coded`: adapters in few bytes, as levels that refine one another; docs/coded.md is normative.

`encoder.Encoder` makes levels one by one (at a slope, within a size, for a quality), `decoder.decode` an adapter of the
first n of them, `decoder.inspect` what each is worth without decoding values, `files` a file of them.
"""
