"""QTensors on disk: through Orbax and through safetensors, bit for bit, in the bytes that they claim."""

import importlib.util
import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats import TableFormat
from lowprec.quantizers import QTensor, load_safetensors, quantize, save_safetensors

FORMATS = ("nvfp4", "mxfp6_e3m2", "int4@row", "nf4@1x64", "e4m3fn", "posit8", "int16@16x16/bf16")
needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="not installed")


def tree():
    """A layer a format, plain leaves of several dtypes, and a format along an axis that is not the last."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 256)).astype(np.float32)
    layers = {name.replace("/", ":"): {"kernel": quantize(x, name), "bias": x[0]} for name in FORMATS}
    plain = {
        "step": jnp.int32(7),
        "half": jnp.asarray(x[:3], jnp.bfloat16),
        "fp8": jnp.asarray(x[:3], jnp.float8_e4m3fn),
        "double": np.arange(3, dtype=np.float64) / 3,
        "mask": x.T[:2] > 0,
        "none": np.zeros((0, 3), np.float32),
    }
    return {"layers": layers, "axis 0": quantize(x, "mxfp4", axis=0), "plain": plain}


def assert_same(actual, expected):
    """Structure (formats, shapes and axes with it), dtypes, shapes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@needs_safetensors
def test_a_tree_comes_back_from_safetensors_bit_for_bit(tmp_path):
    path = tmp_path / "tree.safetensors"
    save_safetensors(path, tree())
    loaded = load_safetensors(path)
    assert_same(loaded, tree())
    kernel = loaded["layers"]["nvfp4"]["kernel"]
    assert isinstance(kernel, QTensor)
    np.testing.assert_array_equal(kernel.dequantize(), tree()["layers"]["nvfp4"]["kernel"].dequantize())
    assert [each.name for each in tmp_path.iterdir()] == ["tree.safetensors"]  # nothing temporary is left


@needs_safetensors
@pytest.mark.parametrize("name", FORMATS)
def test_a_safetensors_file_takes_the_bytes_of_the_tensor_and_a_header(name, tmp_path):
    q = quantize(np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32), name)
    save_safetensors(tmp_path / "q", {"q": q})
    content = (tmp_path / "q").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert len(content) - 8 - header == q.nbytes
    assert header < 600


@needs_safetensors
def test_other_readers_see_codes_and_scales(tmp_path):
    from safetensors import safe_open

    q = tree()["layers"]["nvfp4"]["kernel"]
    save_safetensors(tmp_path / "q", {"decoder": {"kernel": q}})
    with safe_open(tmp_path / "q", framework="np") as file:
        for part in ("codes", "scales", "tensor_scale"):
            np.testing.assert_array_equal(file.get_tensor(f"decoder/kernel/{part}"), getattr(q, part))
        about = json.loads(file.metadata()["lowprec.qtensors"])
    assert about == {"decoder/kernel": {"format": "e2m1fn@1x16/e4m3fn.tensor", "shape": [64, 256], "axis": -1}}


@needs_safetensors
def test_what_is_not_a_whole_file_of_ours_is_refused(tmp_path):
    path = tmp_path / "q"
    save_safetensors(path, {"q": quantize(jnp.ones((4, 32)), "nvfp4")})
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-1], whole + b"1", b"PK" + whole):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="q is not a whole safetensors file"):
            load_safetensors(path)
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, path)
    with pytest.raises(UsageError, match="was not written by save_safetensors"):
        load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent")


@needs_safetensors
def test_a_tree_that_cannot_be_stored_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "tree"
    save_safetensors(path, {"a": np.ones(3, np.float32)})
    mine = TableFormat("mine", (-1.0, 0.5))
    for bad, message in (
        ({"a": [jnp.ones(3)]}, "a: a safetensors file holds arrays of bool, .*; not list"),
        ({"a": jax.random.key(0)}, r"not key<fry>"),
        ({"a": jnp.ones(4, jnp.int4)}, "not int4"),
        ({"a/b": jnp.ones(3)}, "strings without '/', not 'a/b'"),
        ({"a": {"b": {}}}, "not a/b/{}"),
        (jnp.ones(3), "holds dicts of arrays"),
        ({"a": quantize(jnp.ones(4), mine)}, "a: format mine has no name that can be read back"),
    ):
        with pytest.raises(UsageError, match=message):
            save_safetensors(path, bad)
    assert_same(load_safetensors(path), {"a": np.ones(3, np.float32)})
    assert [each.name for each in tmp_path.iterdir()] == ["tree"]


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match=r"pip install 'lowprec\[safetensors\]'"):
        save_safetensors(tmp_path / "q", {"a": np.ones(3)})


@pytest.mark.parametrize("target", ["values", "abstract"])
def test_a_tree_comes_back_from_orbax_bit_for_bit(target, tmp_path):
    import orbax.checkpoint as ocp

    saved = jax.tree.map(jnp.asarray, tree()["layers"] | {"axis 0": tree()["axis 0"]})
    if target == "values":
        like = jax.tree.map(jnp.zeros_like, saved)
    else:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tree", like)
    assert_same(restored, saved)


@pytest.mark.parametrize("name", FORMATS)
def test_orbax_takes_the_bytes_of_the_tensor_and_little_more(name, tmp_path):
    import orbax.checkpoint as ocp

    q = quantize(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32), name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", {"q": q})
        checkpointer.wait_until_finished()
    written = sum(path.stat().st_size for path in (tmp_path / "q").rglob("*") if path.is_file())
    assert 0.5 * q.nbytes < written < 1.02 * q.nbytes + 20_000  # Orbax compresses
