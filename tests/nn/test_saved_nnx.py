"""Norms, gates and attention of NNX models whose inputs are saved by a recipe's policies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowprec import recipes
from lowprec.errors import UsageError
from lowprec.nn import linen
from lowprec.nn import nnx as quant_nnx
from lowprec.nn.gates import SiluGate
from lowprec.ops import KEEP, GemmRule
from lowprec.ops.saved import Codes, Recompute, RunningUint8, Stored
from lowprec.quantizers import REUSE, Quantizer
from lowprec.recipes import Recipe

WIDTH, HEADS, DEPTH = 16, 4, 2
X = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))
FP8 = Stored("e4m3fn@1x16/bf16", pad=True)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x = x + attention(nn.RMSNorm(name="norm")(x), mask=nn.make_causal_mask(x[..., 0]))
        h = nn.LayerNorm(name="mlp_norm")(x)
        h = SiluGate(name="gating")(nn.Dense(WIDTH, name="gate")(h), nn.Dense(WIDTH, name="up")(h))
        return x + nn.GroupNorm(4, name="group_norm")(h), None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(("params", linen.TAPS, linen.STATE), 0)
        split = {"params": True, linen.STREAM: True}
        return nn.scan(LinenBlock, variable_axes=axes, split_rngs=split, length=DEPTH)(name="layers")(x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.group_norm = nnx.GroupNorm(WIDTH, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.gate, self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.gating = quant_nnx.SiluGate()

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        h = self.mlp_norm(x)
        return x + self.group_norm(self.gating(self.gate(h), self.up(h)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock))(rngs)

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


PARAMS = jax.jit(LinenNet().init)(jax.random.key(1), X)["params"]


def nnx_net():
    model = NnxNet(nnx.Rngs(0))
    for names, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = PARAMS
        for name in names:
            value = value[name]
        leaf[...] = value
    return model


def saving(policy, rule=KEEP, heads=None):
    places = {".*norm|.*gating": policy, ".*core": heads or policy}
    return Recipe("saving", {".*(scores|context)": KEEP, ".*": rule}, saved=places)


@nnx.jit
def nnx_step(model):
    def loss(model):
        return jnp.mean(jnp.sin(model(X)))

    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, quant_nnx.QuantTap))
    value, gradients = nnx.value_and_grad(loss, argnums=wrt)(model)
    quant_nnx.next_state(model, gradients)
    return value, nnx.filter_state(gradients, nnx.Param)


def linen_step(recipe, state=None):
    model = linen.quantize(LinenNet(), recipe)
    if recipe.remembers and state is None:
        state = model.init_quantizers(PARAMS, X, rngs={"quant": jax.random.key(2)})[linen.STATE]
    slots = model.state_slots(X) if recipe.remembers else {}

    @jax.jit
    def step(params, slots, state):
        def loss(params, slots):
            variables = {"params": params, linen.STATE: state, linen.TAPS: slots}
            variables = {name: tree for name, tree in variables.items() if tree}
            return jnp.mean(jnp.sin(model.apply(variables, X, rngs={"quant": jax.random.key(3)})))

        value, (gradients, seen) = jax.value_and_grad(loss, argnums=(0, 1))(params, slots)
        return value, gradients, model.next_state(state, seen) if state else {}

    return step(PARAMS, slots, state or {})


def flat(gradients):
    """Of NNX, as a tree of Linen's."""
    tree = {}
    for names, leaf in nnx.to_flat_state(gradients):
        inner = tree
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = leaf[...]
    return tree


def distance(a, b):
    squares = lambda tree: sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))
    return (squares(jax.tree.map(jnp.subtract, a, b)) / squares(b)) ** 0.5


@pytest.fixture(scope="module")
def plain():
    return linen_step(Recipe("plain", {".*": KEEP}))


def test_what_is_computed_again_gives_the_plain_gradient(plain):
    value, gradients = nnx_step(quant_nnx.quantize(nnx_net(), saving(Recompute())))
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    assert distance(flat(gradients), plain[1]) < 1e-5


def test_fp8_gives_the_gradient_of_the_linen_model(plain):
    rule = GemmRule(saved=FP8)
    value, gradients = nnx_step(quant_nnx.quantize(nnx_net(), saving(FP8, rule)))
    expected = linen_step(saving(FP8, rule))
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    assert distance(expected[1], plain[1]) > 1e-3
    # A value on the edge between two codes may fall on either side when sums are ordered otherwise.
    assert distance(flat(gradients), expected[1]) < 2e-3


def test_running_ranges_are_those_of_the_linen_model(plain):
    recipe = saving(RunningUint8(), GemmRule(saved=RunningUint8()), RunningUint8(groups="heads"))
    model = quant_nnx.quantize(nnx_net(), recipe, nnx.Rngs(quant=0))
    value, gradients = nnx_step(model)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    assert 1e-4 < distance(flat(gradients), plain[1]) < 0.05
    state = linen_step(recipe)[2]["layers"]
    layers = model.layers
    found = {
        ("norm", "saved.0"): layers.norm.saved_inputs.state["saved.0"],
        ("gating", "saved.1"): layers.gating.saved_inputs.state["saved.1"],
        ("attention", "core", "saved.2"): layers.attention.attention_fn.state["saved.2"],
        ("up", "saved.x"): layers.up.dot_general.state["saved.x"],
    }
    for names, leaves in found.items():
        expected = state
        for name in names:
            expected = expected[name]
        assert leaves["range"].shape[0] == DEPTH
        for leaf in ("range", "shift", "steps"):
            np.testing.assert_allclose(leaves[leaf][...], expected[leaf], rtol=1e-4, atol=1e-5, err_msg=names)
    # The second step rounds in the ranges of the first, with noise of its own.
    assert distance(flat(nnx_step(model)[1]), flat(gradients)) > 1e-4


@pytest.mark.slow
def test_coat_gives_the_gradient_of_the_linen_model(plain):
    expected = linen_step(recipes.get("coat"))[1]
    assert distance(expected, plain[1]) > 0.1
    assert distance(flat(nnx_step(quant_nnx.quantize(nnx_net(), "coat"))[1]), expected) < 0.01


def test_mesa_draws_nothing_in_evaluation(plain):
    model = quant_nnx.quantize(nnx_net(), "mesa", nnx.Rngs(quant=0))
    assert type(model.layers.norm) is not nnx.RMSNorm and isinstance(model.layers.norm, nnx.RMSNorm)
    assert distance(flat(nnx_step(model)[1]), plain[1]) < 0.05
    counts = lambda: [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.RngCount))]
    before = counts()
    model.eval()
    model(X)
    jax.tree.map(np.testing.assert_array_equal, counts(), before)


@pytest.mark.slow
def test_codes_are_kept_of_products():
    fp8 = Quantizer("e4m3fn@tensor")
    gemm = lambda **saved: GemmRule(fwd=(fp8, fp8), dgrad=(fp8, REUSE), wgrad=(REUSE, REUSE), **saved)
    rules = lambda **saved: Recipe("codes", {".*(scores|context)": KEEP, ".*": gemm(**saved)})
    codes, exact = (flat(nnx_step(quant_nnx.quantize(nnx_net(), r))[1]) for r in (rules(saved=Codes()), rules()))
    assert distance(codes, exact) < 1e-6


def test_what_cannot_be_done_is_said():
    with pytest.raises(UsageError, match=r"pattern 'layers/nrm' .* saves the inputs of no norm.*layers/norm"):
        quant_nnx.quantize(nnx_net(), Recipe("r", {".*": KEEP}, saved={"layers/nrm": FP8}))
    with pytest.raises(UsageError, match=r"'saving' rounds or rotates at random.*layers/"):
        quant_nnx.quantize(nnx_net(), saving(RunningUint8()))
    int8 = recipes.parse("fwd=int8@row").rule_for("x")
    with pytest.raises(UsageError, match="saves the inputs of 'layers/attention' and quantizes its products"):
        quant_nnx.quantize(nnx_net(), Recipe("r", {".*": int8}, saved={".*core": FP8}))
    twice = quant_nnx.quantize(nnx_net(), saving(FP8))
    with pytest.raises(UsageError, match="'layers/attention' has a attention_fn of its own"):
        quant_nnx.quantize(twice, saving(FP8))
