"""The Linen adapter: any model, its parameters untouched, in loops, scans and remat."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import models, recipes
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.ops import KEEP, GemmRule, qdot
from lowprec.quantizers import EXACT, REUSE, Quantizer, fake_quant

# Small and every kind of operand: stochastic, rotated nowhere, reused.
RULE = GemmRule(
    fwd=(Quantizer("int8_symmetric@row"),) * 2,
    dgrad=(Quantizer("e5m2@tensor", rounding="stochastic"), REUSE),
    wgrad=(Quantizer("e5m2@tensor", rounding="stochastic"), EXACT),
)
RECIPE = recipes.everywhere("small", RULE)
X = jax.random.normal(jax.random.key(1), (8, 16))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(16, name="down")(nn.relu(nn.Dense(24, name="up")(x))), None


class Net(nn.Module):
    mode: str
    taps: bool = True

    @nn.compact
    def __call__(self, x):
        if self.mode == "loop":
            for i in range(3):
                x, _ = Block(name=f"block_{i}")(x)
        else:
            block = nn.remat(Block) if "remat" in self.mode else Block
            axes = {"params": 0} | ({linen.TAPS: 0} if self.taps else {})
            split = {"params": True, linen.STREAM: True}
            x, _ = nn.scan(block, variable_axes=axes, split_rngs=split, length=3)(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x)


MODES = ("loop", "scan", "scan with remat")


def gradient_of(model, params, key, taps=None):
    variables = lambda p, t: {"params": p} if t is None else {"params": p, linen.TAPS: t}

    def loss(p, t):
        return jnp.mean(model.apply(variables(p, t), X, rngs={linen.STREAM: key}) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, taps)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_and_their_initial_values_are_those_of_the_plain_model(mode):
    plain, quantized = Net(mode), linen.quantize(Net(mode), RECIPE)
    expected = plain.init(jax.random.key(0), X)
    found = quantized.init(jax.random.key(0), X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with_stream = quantized.init({"params": jax.random.key(0), linen.STREAM: jax.random.key(5)}, X)
    jax.tree.map(np.testing.assert_array_equal, with_stream, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_depend_on_the_key_and_on_nothing_else(mode):
    model = linen.quantize(Net(mode), RECIPE)
    params = model.init(jax.random.key(0), X)["params"]
    one, again, other = (gradient_of(model, params, jax.random.key(k))[1][0] for k in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    differ = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), one, other)
    assert all(jax.tree.leaves(differ["block_0" if mode == "loop" else "blocks"]))


def test_scan_with_remat_is_scan():
    params = Net("scan").init(jax.random.key(0), X)["params"]
    results = [gradient_of(linen.quantize(Net(mode), RECIPE), params, jax.random.key(3)) for mode in MODES[1:]]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *results)


def test_layers_of_a_scan_draw_different_noise():
    model = linen.quantize(Net("scan"), RECIPE)
    params = model.init(jax.random.key(0), X)["params"]
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params["blocks"])
    gradient = gradient_of(model, params | {"blocks": same}, jax.random.key(3))[1][0]["blocks"]["up"]["kernel"]
    assert not jnp.array_equal(jnp.sign(gradient[0]), jnp.sign(gradient[1]))


@pytest.mark.parametrize("mode", MODES)
def test_taps_measure_every_layer_and_change_no_gradient(mode):
    model = linen.quantize(Net(mode), RECIPE)
    params = model.init(jax.random.key(0), X)["params"]
    taps = model.tap_slots(X)
    plain = gradient_of(model, params, jax.random.key(3))
    tapped = gradient_of(model, params, jax.random.key(3), taps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), plain[1][0], tapped[1][0])
    statistics = linen.tap_statistics(tapped[1][1])
    layers = [f"block_{i}" if mode == "loop" else f"blocks/{i}" for i in range(3)]
    assert set(statistics) == {f"{layer}/{name}" for layer in layers for name in ("up", "down")}
    assert all(set(s) == {"fwd.x", "fwd.w", "dgrad.dy", "wgrad.dy"} for s in statistics.values())
    assert all(35 < s["fwd.x"].sqnr_db < 55 for s in statistics.values())  # int8


def test_a_dense_layer_computes_qdot():
    model = linen.quantize(
        nn.Dense(5), recipes.Recipe("all", {".*": GemmRule(fwd=(Quantizer("mxfp4", pad=True),) * 2)})
    )
    params = model.init(jax.random.key(0), X)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    x_rounded, w_rounded = fake_quant(X, "mxfp4", pad=True), fake_quant(kernel, "mxfp4", axis=0, pad=True)
    np.testing.assert_allclose(model.apply(params, X), x_rounded @ w_rounded + bias, rtol=1e-6, atol=1e-6)


def test_kept_layers_are_bit_for_bit_the_plain_ones():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="kept")(x), nn.Dense(8, name="rounded")(x)

    model = linen.quantize(
        Two(), recipes.Recipe("two", {"kept": KEEP, "rounded": recipes.parse("fwd=int2@row").rule_for("x")})
    )
    params = model.init(jax.random.key(0), X)
    (kept, rounded), (kept_plain, rounded_plain) = model.apply(params, X), Two().apply(params, X)
    np.testing.assert_array_equal(kept, kept_plain)
    assert not jnp.array_equal(rounded, rounded_plain)


def test_dense_general_and_the_projections_of_attention_are_served():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 8), name="split")(x).reshape(*x.shape[:-1], 16)
            return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)

    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    model = linen.quantize(Attention(), RECIPE)
    inner = ("query", "key", "value", "out", "scores", "context")
    assert set(model.layers(x)) == {"split", *(f"attention/{name}" for name in inner)}
    assert model.layers(x)["attention/scores"].exact and not model.layers(x)["attention/query"].exact
    params = model.init(jax.random.key(0), x)
    expected = Attention().init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    error = jnp.max(jnp.abs(model.apply(params, x) - Attention().apply(params, x)))
    assert 0 < error < 0.05


def test_the_product_with_an_embedding_table_is_served():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 16, name="table")
            return embed.attend(embed(tokens))

    tokens = jnp.arange(5)
    recipe = recipes.Recipe("all", {".*": RULE})
    model = linen.quantize(Tied(), recipe)
    params = model.init(jax.random.key(0), tokens)
    table = params["params"]["table"]["embedding"]
    expected = qdot(table[tokens], table.T, RULE)
    np.testing.assert_allclose(model.apply(params, tokens), expected, rtol=1e-6)
    # The library keeps embeddings: then it is the plain product, bit for bit.
    kept = linen.quantize(Tied(), recipes.Recipe("kept", {"table": KEEP}))
    np.testing.assert_array_equal(kept.apply(params, tokens), Tied().apply(params, tokens))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ConvTranspose(4, (3,), name="filter"), "nn.ConvTranspose"),
        (nn.ConvLocal(4, (3,), name="filter"), "nn.ConvLocal"),
    ],
)
def test_layers_without_a_hook_are_refused_by_name_unless_kept(layer, kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(layer.clone(parent=self)(x)[..., :4])

    with pytest.raises(ValueError, match=f"'filter', an {kind}.*rule 'filter': KEEP"):
        linen.quantize(Net(), RECIPE).init(jax.random.key(0), X)
    kept = recipes.Recipe("kept", {"filter": KEEP, ".*": RULE})
    linen.quantize(Net(), kept).init(jax.random.key(0), X)


def test_a_layer_with_a_product_of_its_own_is_refused_unless_kept():
    layer = nn.Dense(4, dot_general=jax.lax.dot_general, name="own")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer.clone(parent=self)(x)

    with pytest.raises(ValueError, match="'own' has a dot_general of its own"):
        linen.quantize(Net(), RECIPE).init(jax.random.key(0), X)


def test_a_rule_that_serves_no_layer_is_an_error_that_names_near_paths():
    recipe = recipes.Recipe("typo", {"haed": KEEP, ".*": RULE})
    with pytest.raises(ValueError, match="'haed' of recipe 'typo' serves no layer; the nearest paths are head"):
        linen.quantize(Net("loop"), recipe).init(jax.random.key(0), X)


def test_a_rule_in_the_shadow_of_another_is_an_error_that_says_so():
    recipe = recipes.Recipe("shadow", {".*": RULE, "head": KEEP})
    with pytest.raises(ValueError, match="'head' of recipe 'shadow' serves no layer; earlier rules take head"):
        linen.quantize(Net("loop"), recipe).init(jax.random.key(0), X)


def test_a_missing_key_and_a_scan_that_does_not_pass_it_on():
    model = linen.quantize(Net("loop"), RECIPE)
    params = model.init(jax.random.key(0), X)["params"]
    model.apply({"params": params}, X)  # evaluation rounds nothing at random
    with pytest.raises(ValueError, match=r"rngs=\{'quant': key\}"):
        jax.grad(lambda p: model.apply({"params": p}, X).sum())(params)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]

    scanned = linen.quantize(Scanned(), RECIPE)
    params = scanned.init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"split_rngs=\{'quant': True\}"):
        jax.grad(lambda p: scanned.apply({"params": p}, X, rngs={"quant": jax.random.key(0)}).sum())(params)


def test_a_layer_called_twice_is_quantized_twice():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(16, name="shared")
            return dense(dense(x))

    model = linen.quantize(Shared(), recipes.Recipe("all", {".*": GemmRule(fwd=(Quantizer("int8@row"),) * 2)}))
    params = model.init(jax.random.key(0), X)
    kernel = params["params"]["shared"]["kernel"]
    product = lambda x: fake_quant(x, "int8@row") @ fake_quant(kernel, "int8@row", axis=0)
    np.testing.assert_allclose(model.apply(params, X), product(product(X)), rtol=1e-5, atol=1e-5)
    taps = model.tap_slots(X)
    _, gradient = jax.value_and_grad(lambda t: model.apply({**params, linen.TAPS: t}, X).sum())(taps)
    assert float(gradient["shared"]["sums"][0, 0]) == 2  # the calls add up


def test_quantize_takes_a_name_or_a_short_form():
    assert linen.quantize(Net("loop"), "fp8").recipe == recipes.get("fp8")
    assert linen.quantize(Net("loop"), "fwd=int4@row").recipe == recipes.parse("fwd=int4@row")


def test_learned_parameters_and_state_live_in_collections_of_their_own():
    """In a loop and in a scan that lists the collections; "params" stay the plain model's."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict.fromkeys(("params", linen.LEARNED, linen.STATE, linen.TAPS), 0)
            block = nn.scan(Block, variable_axes=axes, split_rngs={"params": True, linen.STREAM: True}, length=3)
            return block(name="blocks")(x, None)[0]

    learns, remembers = linen.quantize(Scanned(), "lsq_4"), linen.quantize(Scanned(), "fp8_delayed")
    variables = learns.init(jax.random.key(0), X)
    assert set(variables) == {"params", "quant_params"}
    assert variables["quant_params"]["blocks"]["up"]["fwd.w"]["step"].shape == (3, 1, 1)
    # 2 · mean|w| / √7 of each layer's own kernel.
    kernels = variables["params"]["blocks"]["up"]["kernel"]
    expected = 2 * jnp.mean(jnp.abs(kernels), axis=(1, 2)) / np.sqrt(7)
    steps = variables["quant_params"]["blocks"]["up"]["fwd.w"]["step"]
    np.testing.assert_allclose(steps.ravel(), expected, rtol=1e-5)
    again = learns.init_quantizers(variables["params"], X)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # means of two programs
    jax.tree.map(close, again["quant_params"], variables["quant_params"])

    variables = remembers.init(jax.random.key(0), X)
    slots = remembers.state_slots(X)

    def loss(taps):
        return jnp.sum(remembers.apply({**variables, linen.TAPS: taps}, X) ** 2)

    after = remembers.next_state(variables["quant"], jax.jit(jax.grad(loss))(slots))
    scales = after["blocks"]["up"]["fwd.w"]["scale"]
    np.testing.assert_allclose(scales, jnp.max(jnp.abs(kernels), axis=(1, 2)) / 448, rtol=1e-6)


def test_what_is_missing_is_named():
    model = linen.quantize(Net("loop"), "lsq_4")
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"needs learned parameters.*'quant_params'"):
        model.apply({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=r"needs state.*'quant'"):
        linen.quantize(Net("loop"), "fp8_delayed").apply({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match="list it in variable_axes"):
        linen.quantize(Net("scan"), "lsq_4").apply(Net("scan").init(jax.random.key(0), X), X)


def test_a_stack_keeps_the_variables_of_layers_under_different_rules_apart():
    """The first layer as it is, the others with a learned step: parameters stacked, the rest run by run."""
    config = ModelConfig(layers=3, width=16, heads=2)
    rule = recipes.get("lsq_4").rules[-1].gemm
    recipe = recipes.Recipe("mine", {"layers/0/.*": KEEP, ".*(scores|context)": KEEP, "layers/.*": rule, ".*": KEEP})
    model, tokens = linen.quantize(models.build(config, 11), recipe), jnp.zeros((2, 5), jnp.int32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), tokens))()
    assert set(variables["quant_params"]["layers"]) == {"1:3"}
    assert variables["quant_params"]["layers"]["1:3"]["mlp"]["up"]["fwd.w"]["step"].shape == (2, 1, 1)
    taps = model.tap_slots(tokens)
    gradient = jax.jit(jax.grad(lambda taps: jnp.sum(model.apply({**variables, "taps": taps}, tokens) ** 2)))(taps)
    measured = {path for path, of in linen.tap_statistics(gradient).items() if of}
    assert {path.split("/")[1] for path in measured} == {"1", "2"}
