"""Fine-tune NVIDIA Nemotron-H models on a Ray cluster."""

__version__ = "0.1.0"
