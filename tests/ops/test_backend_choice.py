"""Who computes a product on which device; the programs are made for devices that are not there."""

import re

import jax
import jax.numpy as jnp
import pytest

from lowprec import recipes
from lowprec.ops import qdot
from lowprec.pallas.target import on

LARGE, SMALL = (256, 512, 384), (8, 512, 384)
DEVICES = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "TPU v5p")


def lowered(recipe, device, backend="auto", shape=LARGE, dtype=jnp.float32):
    """The text of the program of a product and its gradients."""
    rule = recipes.parse(recipe).rule_for("layers/0/mlp/up")
    m, k, n = shape
    x, w, dy = (jax.ShapeDtypeStruct(s, dtype) for s in ((m, k), (k, n), (m, n)))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def run(x, w, dy, key):
        y, vjp = jax.vjp(lambda x, w: qdot(x, w, rule, key=key, backend=backend), x, w)
        return y, *vjp(dy)

    platform = "tpu" if device.startswith("TPU") else "cuda"
    with on(device):
        return jax.jit(run).trace(x, w, dy, key).lower(lowering_platforms=(platform,)).as_text()


PRODUCT = re.compile(
    r"dot_general .*contracting_dims = \[(\d)\] x \[(\d)\].*\(tensor<\d+x\d+x(\w+)>, tensor<\d+x\d+x(\w+)>\)"
)


def products(text):
    """(dtype, dtype, whether both have the contraction axis last) of each product of two matrices."""
    return [(a, b, (i, j) == ("1", "1")) for i, j, a, b in PRODUCT.findall(text)]


def test_fp8_is_multiplied_as_codes_with_the_contraction_axis_last_where_tensor_cores_have_it():
    expected = [("f8E4M3FN", "f8E4M3FN", True), ("f8E5M2", "f8E4M3FN", True), ("f8E4M3FN", "f8E5M2", True)]
    for device in ("NVIDIA H200", "NVIDIA B200"):
        text = lowered("fp8", device)
        assert products(text) == expected
        # At the default precision the sums would be those of the tensor cores.
        assert text.count("precision = [HIGHEST, HIGHEST]") == 3
    for device in ("NVIDIA A100-SXM4-80GB", "TPU v5p"):
        assert [found[:2] for found in products(lowered("fp8", device))] == [("bf16", "bf16")] * 3


def test_what_has_scales_a_row_is_scaled_after_the_product():
    for recipe, dtype in (("fwd=e4m3fn@row", "f8E4M3FN"), ("fwd=e2m1fn@row", "f8E4M3FN"), ("fwd=int4@row", "i8")):
        assert products(lowered(recipe, "NVIDIA H200"))[0] == (dtype, dtype, True)


@pytest.mark.parametrize("device", DEVICES)
def test_int8_is_multiplied_as_codes_everywhere(device):
    assert products(lowered("int8_full", device)) == [("i8", "i8", True)] * 3


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "TPU v5p"])
@pytest.mark.parametrize("recipe", ["mxfp8", pytest.param("quartet", marks=pytest.mark.slow), "nvfp4"])
def test_narrow_blocks_are_multiplied_in_bfloat16_before_blackwell(recipe, device):
    assert [found[:2] for found in products(lowered(recipe, device))].count(("bf16", "bf16")) == 3


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4", pytest.param("fp4_all_the_way", marks=pytest.mark.slow)])
def test_narrow_blocks_are_scaled_by_blackwell_but_for_small_products(recipe):
    text = lowered(recipe, "NVIDIA B200")
    assert "stablehlo.custom_call @__op$block_scaled_dot" in text
    assert ("bf16", "bf16") not in [found[:2] for found in products(text)]
    assert ("bf16", "bf16") in [found[:2] for found in products(lowered(recipe, "NVIDIA B200", shape=SMALL))]


def test_scales_of_no_power_of_two_by_blocks_are_served_by_the_kernel_alone_and_not_for_small_products():
    text = lowered("fp8_block", "NVIDIA H200")
    assert text.count("custom_call @mosaic_gpu") == 3 and not products(text)
    text = lowered("fp8_block", "NVIDIA H200", shape=SMALL)
    assert "mosaic_gpu" not in text and [found[:2] for found in products(text)] == [("f32", "f32")] * 3


@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("recipe", "kernels"), [("fp8", 3), ("fp8_block", 7), ("int8", 2), ("jetfire", 3)])
def test_a_backend_by_name_takes_its_kernels_for_any_shape(recipe, kernels, shape):
    """Of products, and of operands that it rounds: four of fp8_block, whose tiles are left to XLA."""
    text = lowered(recipe, "NVIDIA H200", "pallas", shape)
    assert len(re.findall(r"custom_call @mosaic_gpu\w*\(", text)) == kernels


def test_what_is_bfloat16_anyway_is_multiplied_in_bfloat16():
    """The weight gradient of SwitchBack, in a model of bfloat16 and in one of float32."""
    narrow, wide = (products(lowered("int8", "NVIDIA H200", dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert [found[:2] for found in narrow] == [("i8", "i8"), ("i8", "i8"), ("bf16", "bf16")]
    assert [found[:2] for found in wide] == [("i8", "i8"), ("i8", "i8"), ("f32", "f32")]


def test_a_cpu_multiplies_integers_and_emulates_the_rest():
    kinds = {recipe: products(lowered_here(recipe))[0][:2] for recipe in ("int8", "fp8", "nvfp4", "bf16")}
    assert kinds == {"int8": ("i8", "i8"), "fp8": ("f32", "f32"), "nvfp4": ("f32", "f32"), "bf16": ("f32", "f32")}


def lowered_here(recipe):
    rule = recipes.get(recipe).rule_for("layers/0/mlp/up")
    x, w = jnp.ones((32, 64)), jnp.ones((64, 32))
    return jax.jit(lambda x, w: qdot(x, w, rule)).lower(x, w).as_text()
