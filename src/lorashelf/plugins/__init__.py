"""Entry points by which other programs find shelves: vLLM and llm."""
