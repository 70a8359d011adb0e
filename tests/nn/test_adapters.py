"""One battery for the Linen and the NNX adapter: equal models, equal parameters, equal recipes."""

import re
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lowprec import recipes
from lowprec.nn import linen
from lowprec.nn import nnx as quant_nnx
from lowprec.ops import KEEP, GemmRule, qconv, qdot, qeinsum
from lowprec.quantizers import REUSE, Quantizer
from lowprec.quantizers.delayed import Delayed
from lowprec.quantizers.learned_rules import LearnedStep

INT8, E5M2 = Quantizer("int8_symmetric@row"), Quantizer("e5m2@tensor")
NOISY = Quantizer("e5m2@tensor", rounding="stochastic")
NEAREST = GemmRule(fwd=(INT8, INT8), dgrad=(E5M2, REUSE), wgrad=(E5M2, INT8))
STOCHASTIC = GemmRule(fwd=(INT8, INT8), dgrad=(NOISY, REUSE), wgrad=(NOISY, INT8))
DELAYED = Quantizer("e4m3fn@tensor", scale=Delayed(history=3))
REMEMBERS = GemmRule(fwd=(DELAYED, DELAYED), dgrad=(DELAYED, DELAYED), wgrad=(DELAYED, DELAYED))
LEARNED = Quantizer("int4_symmetric@tensor", scale=LearnedStep())
LEARNS = GemmRule(fwd=(LEARNED, LEARNED))

ADAPTERS = ("linen", "nnx")
LAYERS = ("dense", "general", "einsum", "conv", "attend", "attention")
STACKS = ("loop", "stack", "remat")
SHAPES = {"general": (3, 4, 2), "einsum": (2, 3, 8), "conv": (2, 6, 6, 3), "attention": (2, 5, 8)}
DEPTH, WIDTH, HIDDEN = 2, 8, 12
HEADS_EINSUM = "btd,dnh->btnh"


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(x))), None


class LinenNet(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "dense":
            return nn.Dense(5, name="dense")(x)
        if self.kind == "general":
            return nn.DenseGeneral((2, 3), axis=(-2, -1), name="general")(x)
        if self.kind == "einsum":
            return nn.Einsum((WIDTH, 2, 3), HEADS_EINSUM, name="einsum")(x)
        if self.kind == "conv":
            return nn.Conv(4, (3, 3), strides=2, name="conv")(x)
        if self.kind == "attend":
            return nn.Embed(7, WIDTH, name="table").attend(x)
        if self.kind == "attention":
            mask = nn.make_causal_mask(x[..., 0])
            return nn.MultiHeadDotProductAttention(2, name="attention")(x, mask=mask)
        if self.kind == "loop":
            for i in range(DEPTH):
                x, _ = LinenBlock(name=f"layers_{i}")(x)
            return x
        block = nn.remat(LinenBlock) if self.kind == "remat" else LinenBlock
        axes = dict.fromkeys(("params", linen.TAPS, linen.LEARNED, linen.STATE), 0)
        split = {"params": True, linen.STREAM: True}
        return nn.scan(block, variable_axes=axes, split_rngs=split, length=DEPTH)(name="layers")(x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self, kind, rngs):
        self.kind = kind
        if kind == "dense":
            self.dense = nnx.Linear(WIDTH, 5, rngs=rngs)
        elif kind == "general":
            self.general = nnx.LinearGeneral((4, 2), (2, 3), axis=(-2, -1), rngs=rngs)
        elif kind == "einsum":
            self.einsum = nnx.Einsum(HEADS_EINSUM, (WIDTH, 2, 3), (2, 3), rngs=rngs)
        elif kind == "conv":
            self.conv = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        elif kind == "attend":
            self.table = nnx.Embed(7, WIDTH, rngs=rngs)
        elif kind == "attention":
            self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        elif kind == "loop":
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        else:
            self.layers = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock))(rngs)

    def __call__(self, x):
        if self.kind == "attend":
            return self.table.attend(x)
        if self.kind == "attention":
            return self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))
        if self.kind == "loop":
            for block in self.layers:
                x = block(x)
            return x
        if self.kind in STACKS:
            body = lambda block, x: block(x)
            body = nnx.remat(body) if self.kind == "remat" else body
            return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        return getattr(self, self.kind)(x)


@dataclass
class Step:
    """What one step with the loss Σ y · cotangent gave, leaves by path."""

    y: Any
    gradients: dict[str, Any]
    statistics: dict[str, Any]
    learned: dict[str, Any]
    learned_gradients: dict[str, Any]
    state: dict[str, Any]


def inputs(kind):
    return jax.random.normal(jax.random.key(1), SHAPES.get(kind, (6, WIDTH)))


def cotangent_like(y):
    # Given, so that the operands of backward products do not depend on how y was summed.
    return jax.random.normal(jax.random.key(2), y.shape)


def flat(tree) -> dict[str, Any]:
    """Leaves by path; "layers_0" of Linen is "layers/0" of NNX, whose products have hooks above their variables."""
    if isinstance(tree, nnx.State):
        tree = {names: leaf[...] for names, leaf in nnx.to_flat_state(tree)}
    else:
        tree = traverse_util.flatten_dict(tree)
    hooks = {"dot_general", "einsum_op", "conv_general_dilated", "attention_fn", "attend_product", "learned", "state"}
    join = lambda names: "/".join(str(name) for name in names if name not in hooks)
    return {re.sub(r"layers_(\d)", r"layers/\1", join(names)): leaf for names, leaf in tree.items()}


@cache
def plain_params(kind):
    params = LinenNet(kind).init(jax.random.key(0), inputs(kind))["params"]
    # Biases that are zero would hide one that is lost.
    return jax.tree.map(lambda p: p if p.any() else jax.random.normal(jax.random.key(7), p.shape), params)


def nnx_net(kind, params):
    model, values = NnxNet(kind, nnx.Rngs(0)), flat(params)
    for names, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert leaf.shape == values["/".join(map(str, names))].shape
        leaf[...] = values["/".join(map(str, names))]
    return model


def recipe_of(kind, rule):
    # Of the four projections of attention one is enough: they are "general".
    served = "attention/(query|scores|context)" if kind == "attention" else ".*"
    return recipes.Recipe("all", {served: rule} | ({} if served == ".*" else {".*": KEEP}))


# Scans are compiled as a whole. All else runs op by op: then all adapters share the compiled products.
COMPILED = ("stack", "remat")


@cache
def linen_program(kind, rule):
    model, x = linen.quantize(LinenNet(kind), recipe_of(kind, rule)), inputs(kind)

    def step(params, learned, state, taps, key):
        def loss(params, learned, taps):
            variables = {"params": params, linen.LEARNED: learned, linen.STATE: state, linen.TAPS: taps}
            y = model.apply(variables, x, rngs={linen.STREAM: key})
            return jnp.sum(y * cotangent_like(y)), y

        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, learned, taps)
        return gradients, y, model.next_state(state, gradients[2])

    return model, jax.jit(step) if kind in COMPILED else step


def linen_steps(kind, rule, params, *, seed=0, steps=1, taps=False):
    (model, step), x = linen_program(kind, rule), inputs(kind)
    quant = model.init_quantizers(params, x) if rule.learns or rule.remembers else {}
    learned, state = quant.get(linen.LEARNED, {}), quant.get(linen.STATE, {})
    slots = model.tap_slots(x) if taps else model.state_slots(x) if rule.remembers else {}
    for count in range(steps):
        gradients, y, state = step(params, learned, state, slots, jax.random.key(seed + 100 * count))
    statistics = {re.sub(r"layers_(\d)", r"layers/\1", k): s for k, s in linen.tap_statistics(gradients[2]).items()}
    return Step(y, flat(gradients[0]), statistics, flat(learned), flat(gradients[1]), flat(state))


def nnx_step(model, x):
    def loss(model):
        y = model(x)
        return jnp.sum(y * cotangent_like(y)), y

    wrt = nnx.DiffState(0, nnx.Any(nnx.Param, quant_nnx.QuantParam, quant_nnx.QuantTap))
    gradients, y = nnx.grad(loss, argnums=wrt, has_aux=True)(model)
    quant_nnx.next_state(model, gradients)
    return gradients, y


nnx_compiled_step = nnx.jit(nnx_step)


def nnx_steps(kind, rule, params, *, seed=0, steps=1, taps=False):
    model, x = nnx_net(kind, params), inputs(kind)
    quant_nnx.quantize(model, recipe_of(kind, rule), nnx.Rngs(quant=seed), example=(x,))
    if taps:
        quant_nnx.add_taps(model)
    step = nnx_compiled_step if kind in COMPILED else nnx_step
    for _ in range(steps):
        gradients, y = step(model, x)
    pick = lambda tree, kind: flat(nnx.filter_state(tree, kind))
    return Step(
        y,
        pick(gradients, nnx.Param),
        quant_nnx.tap_statistics(gradients),
        flat(nnx.state(model, quant_nnx.QuantParam)),
        pick(gradients, quant_nnx.QuantParam),
        flat(nnx.state(model, quant_nnx.QuantState)),
    )


STEPS = {"linen": linen_steps, "nnx": nnx_steps}


def assert_close(found, expected, rtol=1e-5):
    """Up to the order of summation."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * scale, err_msg=name)


def direct(kind, params, x):
    """The layer by the products themselves."""
    if kind == "attention":
        p, mask = params["attention"], jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        heads = lambda name, rule: qeinsum(HEADS_EINSUM, x, p[name]["kernel"], rule) + p[name]["bias"]
        q, k, v = heads("query", NEAREST), heads("key", KEEP), heads("value", KEEP)
        scores = qeinsum("...qhd,...khd->...hqk", q / jnp.sqrt(q.shape[-1]), k, NEAREST)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        context = qeinsum("...hqk,...khd->...qhd", weights, v, NEAREST)
        return jnp.einsum("bqhd,hdn->bqn", context, p["out"]["kernel"]) + p["out"]["bias"]
    if kind == "attend":
        return qdot(x, params["table"]["embedding"].T, NEAREST)
    kernel, bias = params[kind]["kernel"], params[kind]["bias"]
    if kind == "dense":
        return qdot(x, kernel, NEAREST) + bias
    if kind == "general":
        return qdot(x, kernel, NEAREST, dimension_numbers=(((1, 2), (0, 1)), ((), ()))) + bias
    if kind == "einsum":
        return qeinsum(HEADS_EINSUM, x, kernel, NEAREST) + bias
    numbers = ("NHWC", "HWIO", "NHWC")
    geometry = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": numbers}
    return qconv(x, kernel, NEAREST, **geometry) + bias


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_the_product_of_its_rule(kind):
    params, x = plain_params(kind), inputs(kind)

    def loss(params):
        y = direct(kind, params, x)
        return jnp.sum(y * cotangent_like(y)), y

    gradients, y = jax.grad(loss, has_aux=True)(params)
    for adapter in ADAPTERS:
        step = STEPS[adapter](kind, NEAREST, params, taps=True)
        assert_close({"y": step.y}, {"y": y})
        assert_close(step.gradients, flat(gradients))
        inner = {f"attention/{name}" for name in ("query", "scores", "context")}
        assert set(step.statistics) == {"attention": inner, "attend": {"table"}}.get(kind, {kind})
        plain = LinenNet(kind).apply({"params": params}, x)
        assert 0 < float(jnp.linalg.norm(step.y - plain) / jnp.linalg.norm(plain)) < 0.03


@pytest.mark.parametrize("kind", ["loop", "stack"])
def test_stacks_agree_layer_by_layer(kind):
    params = plain_params(kind)
    ours, theirs = (STEPS[adapter](kind, NEAREST, params, taps=True) for adapter in ADAPTERS)
    assert_close({"y": ours.y}, {"y": theirs.y})
    assert_close(ours.gradients, theirs.gradients)
    assert set(ours.statistics) == set(theirs.statistics)
    assert set(ours.statistics) == {f"layers/{i}/{name}" for i in range(DEPTH) for name in ("up", "down")}
    for path, operands in ours.statistics.items():
        assert set(operands) == {"fwd.x", "fwd.w", "dgrad.dy", "wgrad.dy", "wgrad.x"}
        for name, statistics in operands.items():
            assert statistics.sqnr_db == pytest.approx(theirs.statistics[path][name].sqnr_db, abs=1e-2)
            assert statistics.amax == pytest.approx(theirs.statistics[path][name].amax, rel=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_noise_depends_on_the_seed_and_on_the_layer(adapter):
    params = plain_params("stack")
    equal = {"layers": jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params["layers"])}
    run = lambda kind, seed, params=equal: STEPS[adapter](kind, STOCHASTIC, params, seed=seed).gradients
    one, again, other, rematerialized = run("stack", 3), run("stack", 3), run("stack", 4), run("remat", 3)
    for name, gradient in one.items():
        np.testing.assert_array_equal(gradient, again[name])
        if name.endswith("kernel"):
            assert not jnp.array_equal(gradient, other[name])
    assert_close(rematerialized, one)
    # With zeros in "down" all layers see the same x and the same dy: their gradients differ by noise alone.
    zero = jax.tree.map(jnp.zeros_like, equal["layers"]["down"])
    gradient = run("stack", 3, {"layers": equal["layers"] | {"down": zero}})["layers/down/kernel"]
    assert not jnp.array_equal(gradient[0], gradient[1])


@pytest.mark.parametrize("kind", ["stack", "attention"])
def test_state_rolls(kind):
    params = plain_params(kind)
    ours, theirs = (STEPS[adapter](kind, REMEMBERS, params, steps=2).state for adapter in ADAPTERS)
    assert_close(ours, theirs)
    layer = {"stack": "layers/up", "attention": "attention/query"}[kind]
    amax = np.abs(np.asarray(flat(params)[f"{layer}/kernel"])).max(axis=(1, 2) if kind == "stack" else None)
    np.testing.assert_array_equal(ours[f"{layer}/fwd.w/history"], np.stack([amax, amax, 0 * amax], axis=-1))
    np.testing.assert_allclose(ours[f"{layer}/fwd.w/scale"], amax / 448, rtol=1e-6)
    if kind == "attention":
        assert float(ours["attention/scores/dgrad.dy/scale"]) != 1


@pytest.mark.parametrize("kind", ["stack", "attention"])
def test_learned_parameters_start_from_data_and_get_gradients(kind):
    params = plain_params(kind)
    ours, theirs = (STEPS[adapter](kind, LEARNS, params) for adapter in ADAPTERS)
    assert_close(ours.learned, theirs.learned)
    assert_close(ours.learned_gradients, theirs.learned_gradients, rtol=1e-4)
    assert all(np.all(np.asarray(gradient) != 0) for gradient in ours.learned_gradients.values())
    layer = {"stack": "layers/up", "attention": "attention/query"}[kind]
    kernel = np.abs(np.asarray(flat(params)[f"{layer}/kernel"], np.float64))
    mean = kernel.mean(axis=(1, 2) if kind == "stack" else None)
    # LSQ, section 2.1: 2 · mean|w| / √Q, with Q = 7.
    np.testing.assert_allclose(np.ravel(ours.learned[f"{layer}/fwd.w/step"]), np.ravel(2 * mean / 7**0.5), rtol=1e-5)
    first = np.ravel(ours.learned[f"{layer}/fwd.x/step"])[0]
    np.testing.assert_allclose(first, 2 * np.abs(np.asarray(inputs(kind))).mean() / 7**0.5, rtol=1e-5)


# What a recipe cannot serve is said in the same words.


class LinenPair(nn.Module):
    odd: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(x), self.odd(name="odd")(x)


class NnxPair(nnx.Module):
    def __init__(self, odd):
        self.dense, self.odd = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), odd(rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.dense(x), self.odd(x)


PLAIN_PAIR = (partial(nn.Dense, 4), partial(nnx.Linear, WIDTH, 4))


def pair(adapter, recipe, linen_odd=PLAIN_PAIR[0], nnx_odd=PLAIN_PAIR[1]):
    """Both outputs of a quantized pair of layers."""
    x = inputs("dense")
    if adapter == "nnx":
        return quant_nnx.quantize(NnxPair(nnx_odd), recipe)(x)
    model = linen.quantize(LinenPair(linen_odd), recipe)
    return model.apply(model.init(jax.random.key(0), x), x)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_errors_name_the_culprit(adapter):
    rules = lambda **rules: recipes.Recipe("mine", {**rules, ".*": NEAREST})
    with pytest.raises(ValueError, match="rule 'od' of recipe 'mine' serves no layer; the nearest paths are odd"):
        pair(adapter, rules(od=KEEP))
    with pytest.raises(ValueError, match="rule 'odd' of recipe 'mine' serves no layer; earlier rules take odd"):
        pair(adapter, recipes.Recipe("mine", {".*": NEAREST, "odd": KEEP}))
    dot = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    own = (partial(nn.Dense, 4, dot_general=dot), partial(nnx.Linear, WIDTH, 4, dot_general=dot))
    with pytest.raises(ValueError, match="'odd' has a dot_general of its own; KEEP it in recipe 'mine'"):
        pair(adapter, rules(), *own)
    pair(adapter, rules(odd=KEEP), *own)
    transposed = (partial(nn.ConvTranspose, 4, (2,)), partial(nnx.ConvTranspose, WIDTH, 4, (2,)))
    with pytest.raises(ValueError, match=r"'odd', an nnx?\.ConvTranspose, whose product.*put a rule 'odd': KEEP"):
        pair(adapter, rules(), *transposed)
    pair(adapter, rules(odd=KEEP), *transposed)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_kept_layers_are_bit_for_bit_plain(adapter):
    recipe = recipes.Recipe("kept", {"dense": KEEP, ".*": NEAREST})
    plain = pair(adapter, recipes.Recipe("plain", {".*": KEEP}))
    kept, rounded = pair(adapter, recipe)
    np.testing.assert_array_equal(kept, plain[0])
    assert not jnp.array_equal(rounded, plain[1])


# What NNX alone can do or get wrong.


@pytest.mark.parametrize("kind", [*LAYERS, *STACKS])
def test_nnx_parameters_stay_the_same_objects_at_the_same_paths(kind):
    model = NnxNet(kind, nnx.Rngs(0))
    parameters = lambda: [(names, leaf) for names, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Param)]
    before, structure = parameters(), jax.tree.structure(nnx.state(model, nnx.Param))
    quantized = quant_nnx.quantize(model, recipes.Recipe("all", {".*": STOCHASTIC}), nnx.Rngs(0))
    assert quantized is model
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == structure
    after = dict(parameters())
    assert all(after[names] is leaf for names, leaf in before) and len(after) == len(before)


def test_nnx_streams_are_variables_that_count_calls():
    model = nnx_net("dense", plain_params("dense"))
    quant_nnx.quantize(model, recipes.Recipe("all", {".*": STOCHASTIC}), nnx.Rngs(5))
    gradient = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(inputs("dense"))))))
    stream = model.dense.dot_general.stream
    first = gradient(model)
    assert int(stream.count[...]) == 1
    copy = nnx.merge(*nnx.split(nnx.clone(model)))
    second = gradient(model)
    assert not jnp.array_equal(first["dense"]["kernel"][...], second["dense"]["kernel"][...])
    np.testing.assert_array_equal(gradient(copy)["dense"]["kernel"][...], second["dense"]["kernel"][...])
    model.eval()  # the forward product is deterministic: evaluation moves no stream
    model(inputs("dense"))
    nnx.view(model, deterministic=True)(inputs("dense"))
    assert int(stream.count[...]) == 2
    model.train()
    model(inputs("dense"))
    assert int(stream.count[...]) == 3


def test_nnx_says_what_is_missing():
    stochastic, learns = (recipes.Recipe("mine", {".*": rule}) for rule in (STOCHASTIC, LEARNS))
    model = NnxNet("dense", nnx.Rngs(0))
    for rngs in (None, nnx.Rngs(params=0)):
        with pytest.raises(ValueError, match=r"'mine' rounds.*layer 'dense': pass rngs=nnx.Rngs\(quant=seed\)"):
            quant_nnx.quantize(model, stochastic, rngs)
    assert model.dense.dot_general is jax.lax.dot_general  # refused, and untouched
    quant_nnx.quantize(model, learns)
    with pytest.raises(ValueError, match=r"layer 'dense' learns.*nnx.initialize\(module, \*inputs\)"):
        model(inputs("dense"))
    quant_nnx.initialize(model, inputs("dense"))
    assert model(inputs("dense")).shape == (6, 5)
    with pytest.raises(ValueError, match="'dense' has a dot_general of its own"):
        quant_nnx.quantize(model, learns)
    remembers = quant_nnx.quantize(NnxNet("dense", nnx.Rngs(0)), recipes.Recipe("mine", {".*": REMEMBERS}))
    gradients = nnx.grad(lambda model: jnp.sum(model(inputs("dense"))))(remembers)
    with pytest.raises(ValueError, match="layer 'dense' remembers, and the gradient with respect to its QuantTap"):
        quant_nnx.next_state(remembers, gradients)


def test_nnx_stacks_are_sliced_along_their_first_axis_or_refused():
    class Wrong(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.split_rngs(splits=2)(nnx.vmap(NnxBlock, out_axes=1))(rngs)

    recipe = recipes.Recipe("mine", {".*": STOCHASTIC})
    with pytest.raises(ValueError, match=r"'layers/down' has a kernel of shape \(12, 2, 8\).*out_axes=0"):
        quant_nnx.quantize(Wrong(nnx.Rngs(0)), recipe, nnx.Rngs(0))
    model = quant_nnx.quantize(NnxNet("stack", nnx.Rngs(0)), recipe, nnx.Rngs(0))
    only_parameters = nnx.StateAxes({nnx.Param: 0, ...: None})
    scan = nnx.scan(lambda block, x: block(x), in_axes=(only_parameters, nnx.Carry), out_axes=nnx.Carry)
    with pytest.raises(ValueError, match=r"one of a stack of \(2,\).*axis 0 to RngKey too"):
        scan(model.layers, inputs("stack"))


def test_nnx_initialize_runs_a_copy():
    class Counting(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(self.norm(self.dense(x)))

    model, x = Counting(), inputs("dense")
    quant_nnx.quantize(model, recipes.Recipe("mine", {".*": LEARNS}), example=(x,))
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(WIDTH))
    step = model.dense.dot_general.learned["fwd.x"]["step"][...]  # of the first call
    np.testing.assert_allclose(np.ravel(step), 2 * np.abs(np.asarray(x)).mean() / 7**0.5, rtol=1e-5)


def test_nnx_attention_has_the_options_of_the_plain_one():
    model = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    x = inputs("attention")
    plain = model(x, is_causal=True)
    fine = Quantizer("int16@row")
    quant_nnx.quantize(model, recipes.Recipe("fine", {".*": GemmRule(fwd=(fine, fine))}))
    np.testing.assert_allclose(model(x, is_causal=True), plain, rtol=1e-3, atol=1e-4)
    mask = nnx.make_causal_mask(x[..., 0])
    np.testing.assert_allclose(model(x, mask=mask, sow_weights=True), plain, rtol=1e-3, atol=1e-4)
    (weights,) = nnx.pop(model, nnx.Intermediate)["attention_weights"].get_value()
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, rtol=1e-6)
