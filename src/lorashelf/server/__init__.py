"""The HTTP server: OpenAI's API over a shelf, a task to a model id; and a page."""
