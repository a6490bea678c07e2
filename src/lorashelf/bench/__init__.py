"""Experiments as data: a suite in TOML becomes cells, each cell a versioned JSON result, the results a page.

suite.py        suite.toml → cells
assignment.py   a cell → which adapter serves which task
peers.py        other codes of adapters
loraquant.py    the quantisers of one of them
run.py          cells → measurements, resumable, shared by several processes
results.py      the JSON document of a cell, and statistics over several
page.py         tables in Markdown
plot.py         pictures
"""
