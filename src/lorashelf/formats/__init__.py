"""Adapters as bytes: PEFT folders and the safetensors that they hold."""
