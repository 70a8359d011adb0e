"""Flax adapters, and the layers that methods change."""

import importlib


def __getattr__(name):
    if name in ("linen", "nnx"):
        return importlib.import_module(f"lowprec.nn.{name}")
    raise AttributeError(f"module 'lowprec.nn' has no attribute {name!r}")
