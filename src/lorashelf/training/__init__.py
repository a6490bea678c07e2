"""One adapter per task folder, trained on a frozen base model."""
