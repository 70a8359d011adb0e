"""Kinds of parameters, by their names."""

import re

# In a stack of layers norms and biases have two axes, so that the name decides and not the rank.
_SMALL = re.compile(r"(.*/)?([^/]*norm[^/]*|scale|bias)(/.*)?")


def is_small(path: str) -> bool:
    """Whether a path, names joined by slashes, is that of a norm's scale or a bias, not a kernel or an embedding."""
    return _SMALL.fullmatch(path) is not None
