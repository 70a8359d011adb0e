"""The state of an optimizer: its bytes, its checkpoints, its conversion into other formats, the list of optimizers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import optim
from lowprec.errors import UsageError
from lowprec.optim.adam import adam, scale_by_adam
from lowprec.optim.state_formats import state_format
from lowprec.optim.state_tensor import is_stored, load, store


def sized(optimizer):
    """Bytes of state a parameter, of two matrices of 2^18; counts are too few to be seen."""
    params = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32), "v": jax.ShapeDtypeStruct((1024, 256), jnp.float32)}
    return optim.state_bytes(jax.eval_shape(optimizer.init, params)) / 2**19


@pytest.mark.parametrize(
    ("mu", "nu", "expected"),
    [
        (None, None, 8.0),
        ("bf16", None, 6.0),
        ("de8", "de8", 2.03125),
        ("fp8", "fp8", 2.03125),
        ("de8", "log8(stochastic)", 2.03125),
        ("cmp8", "cmp8", 2.125),  # FlashOptim
        ("cmp8@128", "log8(stochastic)", 2.03125),  # adam8
        ("coat8", "coat8", 2.078125),
        ("de4", "lin4", 1.0625),
        ("de4", "log4(stochastic)", 1.0625),
        ("de4/bf16", "log4/bf16", 1.03125),
        ("de4", "log2", 0.84375),  # SOLO
        ("de4", "lin4@rank1", 1.03125 + 4 * (256 + 1024) / 2**18),  # lpmm
    ],
)
def test_bytes_are_those_of_the_published_table(mu, nu, expected):
    """To 0.1 %: the steps are counted, too."""
    for optimizer in (optim.quantize_state(optax.adam(1.0), mu=mu, nu=nu), adam(1.0, mu_format=mu, nu_format=nu)):
        assert sized(optimizer) == pytest.approx(expected, rel=1e-3)


def test_bytes_are_those_that_arrays_take():
    params = {"w": jnp.zeros((16, 300)), "odd": jnp.zeros((3, 5)), "gain": jnp.zeros(())}
    state = optim.quantize_state(optax.adam(1.0), mu="de4", nu="log4", min_size=1).init(params)
    # Nibbles: 150 bytes a row of 300, 3 of 5, 1 of a scalar; a float32 scale a block: 3 a row of 300, else 1.
    a_moment = 16 * (150 + 3 * 4) + 3 * (3 + 4) + (1 + 4)
    assert optim.state_bytes(state) == 2 * a_moment + 2 * 4  # and two counts
    assert optim.state_bytes(state) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert optim.state_bytes({"packed": jax.ShapeDtypeStruct((3,), jnp.int4), "key": jax.random.key(0)}) == 2 + 8


@pytest.mark.parametrize(
    ("name", "most"), [("adam8", 2.04), ("adam4", 1.07), ("stable_adam4", 1.07), ("muon8", 1.02), ("adam", 8.01)]
)
def test_named_optimizers_keep_to_their_bytes(name, most):
    assert most - 0.05 < sized(optim.get(name)(1e-3)) <= most


def test_the_list_says_what_can_be_set():
    assert len(set(optim.names())) == len(optim.names()) >= 14
    for name in optim.names():
        entry = optim.get(name)
        assert entry.name == name and entry.about and entry.source
        assert all(value is None or isinstance(value, int | float | str | tuple) for value in entry.settings.values())
        assert isinstance(entry(1e-3), optax.GradientTransformation)
    assert optim.get("muon8").settings["mu_format"] == "cmp8@128" and optim.get("muon").settings["mu_format"] is None
    assert optim.get("muon8")(1e-3, mu_format="de4") is not None
    with pytest.raises(UsageError, match="unknown optimizer 'stable_adam'; did you mean stable_adam4"):
        optim.get("stable_adam")
    with pytest.raises(UsageError, match="unknown setting of adamw 'weight_deca'; did you mean weight_decay"):
        optim.get("adamw")(1e-3, weight_deca=0.1)


SHAPES = {"w": (8, 320), "norm": (8, 320), "bias": (7,)}


def tree(seed):
    draw = np.random.default_rng(seed)
    return {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def train(optimizer, carry, steps):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for number in steps:
        carry = step(*carry, tree(number))
    return carry


def save(directory, state):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
    (directory / "formats.json").write_text(json.dumps(optim.stored_formats(state)))


def restore(directory, like):
    import orbax.checkpoint as ocp

    optim.require_formats(like, json.loads((directory / "formats.json").read_text()))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / "state", like)


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.quantize_state(optax.adamw(1e-2), mu="de4", nu="log4(stochastic)", min_size=256),
        optim.get("stable_adam4")(1e-2, min_size=256),
        optim.q_galore(1e-2, rank=4, gap=2, min_size=256),
    ],
    ids=["quantize_state", "stable_adam4", "q_galore"],
)
def test_a_run_goes_on_bitwise_from_a_checkpoint(optimizer, tmp_path):
    params = tree(0)
    middle = train(optimizer, (params, optimizer.init(params)), (1, 2))
    save(tmp_path, middle)
    restored = restore(tmp_path, jax.eval_shape(lambda: (params, optimizer.init(params))))
    same(restored, middle)
    same(train(optimizer, restored, (3, 4)), train(optimizer, middle, (3, 4)))


def test_a_checkpoint_is_not_read_in_another_format(tmp_path):
    """de8 and log8 of v have codes and scales of the same shapes: without the names nothing would tell."""
    of = lambda nu: optim.quantize_state(optax.adam(1e-2), mu="de8", nu=nu, min_size=256)
    params = tree(0)
    state = train(of("de8"), (params, of("de8").init(params)), (1,))[1]
    save(tmp_path, state)
    wanted = jax.eval_shape(of("log8").init, params)
    with pytest.raises(UsageError, match=r"nu/w was saved as de8 and is to be restored as log8; .*convert_state"):
        restore(tmp_path, wanted)
    with pytest.raises(UsageError, match=r"nu/w was saved as de8 and is to be restored as an array"):
        restore(tmp_path, jax.eval_shape(of(None).init, params))
    converted = optim.convert_state(restore(tmp_path, jax.eval_shape(of("de8").init, params)), wanted)
    same(converted.inner[0].mu, state.inner[0].mu)  # has its format already: bit for bit
    same(converted.inner[0].nu["w"], store(load(state.inner[0].nu["w"]), state_format("log8", signed=False)))
    assert jax.tree.structure(converted) == jax.tree.structure(wanted)


def test_conversion_goes_to_fewer_bits_and_back_to_arrays():
    eight, exact = scale_by_adam(mu_format="de8", nu_format="log8", min_size=256), scale_by_adam()
    params = tree(0)
    _, state = exact.update(tree(1), exact.init(params))
    for converted in (
        optim.convert_state(state, jax.eval_shape(eight.init, params)),
        optim.convert_state(state, mu="de8", nu="log8", min_size=256, skip=None),
    ):
        assert jax.tree.structure(converted) == jax.tree.structure(jax.eval_shape(eight.init, params))
        error = jnp.max(jnp.abs(load(converted.mu["w"]) - state.mu["w"])) / jnp.max(jnp.abs(state.mu["w"]))
        assert 0 < float(error) < 0.02
        back = optim.convert_state(converted, jax.eval_shape(exact.init, params))
        same(back.mu["w"], load(converted.mu["w"]))
        same((back.mu["bias"], back.count), (state.mu["bias"], state.count))
        # v = f² of a log format: within half a step of 2^(1/16), where it is above the least code.
        ratio = np.asarray(back.nu["w"] / state.nu["w"])[np.asarray(state.nu["w"] > 1e-3 * jnp.max(state.nu["w"]))]
        assert np.max(np.abs(np.log2(ratio))) < 0.55 / 16
    kept = optim.convert_state(state, mu="de8", min_size=256)
    assert is_stored(kept.mu["w"]) and not is_stored(kept.mu["norm"]) and not is_stored(kept.nu["w"])


def test_a_conversion_into_another_optimizer_is_refused():
    params = tree(0)
    state = optax.adam(1.0).init(params)
    with pytest.raises(UsageError, match=r"mu/w is missing in the state|nu/bias is missing in the one|is missing"):
        optim.convert_state(state, optax.sgd(1.0, momentum=0.9).init(params))
    with pytest.raises(UsageError, match=r"mu/w has shape \(8, 320\) in the state, and has shape \(2, 2\)"):
        optim.convert_state(state, optax.adam(1.0).init(params | {"w": jnp.zeros((2, 2))}))
    with pytest.raises(UsageError, match="either the state that is wanted, or formats"):
        optim.convert_state(state)
