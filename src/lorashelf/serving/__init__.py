"""A task's answers, and the choice of a task by text."""
