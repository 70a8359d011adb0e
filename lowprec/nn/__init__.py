"""Flax adapters, and the layers that methods change."""

import importlib


def __getattr__(name):
    if name == "linen":
        return importlib.import_module("lowprec.nn.linen")
    raise AttributeError(f"module 'lowprec.nn' has no attribute {name!r}")
