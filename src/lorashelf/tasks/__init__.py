"""Task folders, their examples, and the text that a model reads."""
