"""Trees of arrays and QTensors as safetensors files, which any reader of that format opens.

A tensor is named by its path in the tree, "decoder/kernel". Of a QTensor there are "decoder/kernel/codes" and, where it
has them, "…/scales" and "…/tensor_scale"; the metadata of the file say its format, shape and axis.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats.grammar import parse
from lowprec.quantizers.qtensor import QTensor

_QTENSORS = "lowprec.qtensors"  # the entry of the metadata: path -> format, shape, axis, as JSON
_PARTS = ("codes", "scales", "tensor_scale")
_DTYPES = {  # of safetensors, from its version 0.5 on
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def save_safetensors(path: str | os.PathLike[str], tree: Mapping[str, Any]) -> None:
    """Writes a tree; the file appears under its name when it is whole.

    Args:
      tree: dicts of dicts, with str keys, of arrays and QTensors.
    Raises:
      UsageError: (a ValueError) the tree holds something else, or safetensors is not installed.
    """
    safetensors, path = _package(), Path(path)
    tensors: dict[str, Any] = {}
    quantized: dict[str, dict[str, Any]] = {}
    for name, leaf in _leaves(tree):
        if isinstance(leaf, QTensor):
            quantized[name] = {"format": _format_name(leaf, name), "shape": leaf.shape, "axis": leaf.axis}
            tensors |= {f"{name}/{part}": getattr(leaf, part) for part in _PARTS if getattr(leaf, part) is not None}
        else:
            tensors[name] = leaf
    arrays = {name: _on_host(leaf, name) for name, leaf in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.numpy.save_file(arrays, temporary, metadata={_QTENSORS: json.dumps(quantized)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree that `save_safetensors` wrote; its leaves are numpy arrays, also those of QTensors.

    Raises:
      UsageError: (a ValueError) the file is not whole, or not ours, or safetensors is not installed.
    """
    safetensors, content = _package(), Path(path).read_bytes()
    try:
        tensors: dict[str, Any] = {name: _array(**tensor) for name, tensor in safetensors.deserialize(content)}
    except (safetensors.SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is not a whole safetensors file of known dtypes: {error}") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if _QTENSORS not in header.get("__metadata__", {}):
        raise UsageError(f"{path} was not written by save_safetensors: its metadata have no {_QTENSORS}")
    for name, about in json.loads(header["__metadata__"][_QTENSORS]).items():
        parts = {part: tensors.pop(f"{name}/{part}", None) for part in _PARTS}
        shape, axis = tuple(about["shape"]), about["axis"]
        tensors[name] = QTensor(**parts, fmt=parse(about["format"]), shape=shape, axis=axis)
    return _nested(tensors)


def _package():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UsageError(
            "safetensors files need the package of that name: pip install 'lowprec[safetensors]'"
        ) from error
    return safetensors


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping) or not tree:
        raise UsageError(f"a safetensors file holds dicts of arrays, and none without any; not {prefix}{tree!r:.80}")
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise UsageError(f"the keys of a tree in a safetensors file are strings without '/', not {key!r}")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _on_host(leaf: Any, name: str) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or str(leaf.dtype) not in _DTYPES.values():
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise UsageError(f"{name}: a safetensors file holds arrays of {', '.join(_DTYPES.values())}; not {kind}")
    return np.asarray(leaf, order="C")


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, jnp.dtype(_DTYPES[dtype])).reshape(shape)


def _format_name(q: QTensor, name: str) -> str:
    """The name of its format, if that says all."""
    try:
        if parse(str(q.fmt)) == q.fmt:
            return str(q.fmt)
    except UsageError:
        pass
    raise UsageError(f"{name}: format {q.fmt} has no name that can be read back")
