"""A tuned model and its task file: saved, loaded, swapped, merged, unloaded."""

from .delta import dequantize, load_delta, merge, read_metadata, save_delta, unload

__all__ = ["dequantize", "load_delta", "merge", "read_metadata", "save_delta", "unload"]
