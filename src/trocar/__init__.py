"""Trocar: keyhole surgery for pretrained transformers."""

__version__ = "0.1.0"
