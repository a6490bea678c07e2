"""GGUF, the files of llama.cpp: bases are read, adapters are written and read back."""
