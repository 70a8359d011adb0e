"""Checkpoints: whole or not there, and never a spoilt one taken for good."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec.errors import UsageError
from lowprec.training.checkpoints import Checkpoints, state_sha256
from lowprec.training.state import TrainState

# Where only Orbax finds the damage, the futures that it gives up complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step):
    draw = np.random.default_rng(step)
    params = {
        "a": {"kernel": jnp.asarray(draw.normal(size=(64, 48)), jnp.float32)},
        "b": jnp.arange(5, dtype=jnp.bfloat16),
    }
    return TrainState(jnp.int32(step), params, optax.adam(0.1).init(params))


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0)
)


@pytest.fixture
def saved(tmp_path):
    """Steps 10, 20 and 30."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step), {"next_index": step}, {"seconds": step / 3, "best": None})
    yield checkpoints
    gc.collect()


def test_gives_back_bit_for_bit_what_was_saved(saved):
    checkpoint, damaged = saved.restore(ABSTRACT)
    assert (checkpoint.step, checkpoint.data, damaged) == (30, {"next_index": 30}, [])
    assert checkpoint.progress["seconds"] == 10.0 and checkpoint.progress["best"] is None
    jax.tree.map(np.testing.assert_array_equal, checkpoint.state, make_state(30))
    assert checkpoint.progress["state_sha256"] == state_sha256(make_state(30))
    assert jax.tree.structure(checkpoint.state) == jax.tree.structure(make_state(0))


def test_any_step_can_be_asked_for(saved):
    assert saved.restore(ABSTRACT, 20)[0].step == 20
    with pytest.raises(UsageError, match="no checkpoint of step 25; there are: 10, 20, 30"):
        saved.restore(ABSTRACT, 25)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step), {}, {})
    assert checkpoints.steps() == [3, 4]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["3", "4"]


def test_none_at_all_is_no_error(tmp_path):
    assert Checkpoints(tmp_path / "checkpoints").restore(ABSTRACT) is None
    assert not (tmp_path / "checkpoints").exists()


def truncate_all(checkpoint):
    for path in filter(lambda path: path.is_file(), checkpoint.rglob("*")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits_of_the_values(checkpoint):
    """In the largest file, where the numbers are."""
    path = max((checkpoint / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    path.write_bytes(bytes(content))


def other_values(checkpoint):
    """A whole state, but not the one that was saved: without the list of files its own sum tells."""
    (checkpoint / "sha256.json").unlink()
    source = Checkpoints(checkpoint.parent / "other")
    source.save(1, make_state(99), {}, {})
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(source.directory / "1" / "state", checkpoint / "state")
    shutil.rmtree(source.directory)


def no_data(checkpoint):
    shutil.rmtree(checkpoint / "data")


def no_progress(checkpoint):
    shutil.rmtree(checkpoint / "progress")


def no_manifest(checkpoint):
    (checkpoint / "state" / "manifest.ocdbt").unlink()


def nothing(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def no_sums(checkpoint):
    """Half a checkpoint without the list of its files."""
    shutil.rmtree(checkpoint / "progress")
    (checkpoint / "sha256.json").unlink()


def half_a_list(checkpoint):
    path = checkpoint / "sha256.json"
    path.write_text(path.read_text()[:40])


def other_shapes(checkpoint):
    """As of another model."""
    state = make_state(0)._replace(params={"a": {"kernel": jnp.ones((3, 3))}, "b": jnp.ones(5, jnp.bfloat16)})
    source = Checkpoints(checkpoint.parent / "other")
    source.save(30, state, {}, {})
    shutil.rmtree(checkpoint)
    shutil.copytree(source.directory / "30", checkpoint)
    shutil.rmtree(source.directory)


DAMAGES = (
    truncate_all, flip_bits_of_the_values, other_values, no_data, no_progress, no_manifest, nothing, other_shapes,
    no_sums, half_a_list,
)  # fmt: skip


def listing(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_newest_good_one_is_found_and_nothing_is_changed(saved, damage):
    damage(saved.directory / "30")
    before = listing(saved.directory)
    checkpoint, damaged = saved.restore(ABSTRACT)
    assert checkpoint.step == 20
    jax.tree.map(np.testing.assert_array_equal, checkpoint.state, make_state(20))
    assert [each.path for each in damaged] == [saved.directory / "30"]
    assert damaged[0].reason and "\n" not in damaged[0].reason
    assert listing(saved.directory) == before


def test_without_a_good_one_all_are_named_and_nothing_is_changed(saved):
    for step in (10, 20, 30):
        truncate_all(saved.directory / str(step))
    before = listing(saved.directory)
    with pytest.raises(UsageError) as refusal:
        saved.restore(ABSTRACT)
    text = str(refusal.value)
    assert text.startswith(f"no checkpoint in {saved.directory} can be read; nothing was changed")
    assert all(f"\n  {step}: " in text for step in (10, 20, 30))
    assert listing(saved.directory) == before


def test_what_was_set_aside_is_kept_and_its_step_can_be_saved_again(saved):
    for again in (30, 30):
        truncate_all(saved.directory / "30")
        saved.set_aside(saved.restore(ABSTRACT)[1])
        assert saved.restore(ABSTRACT)[0].step == 20
        saved.save(again, make_state(again), {}, {})
    assert saved.restore(ABSTRACT)[0].step == 30
    assert {"30", "30.damaged", "30.damaged1"} <= {path.name for path in saved.directory.iterdir()}


def test_a_checkpoint_that_was_killed_before_its_list_was_written_is_good(saved):
    (saved.directory / "30" / "sha256.json").unlink()
    assert saved.restore(ABSTRACT)[0].step == 30


def test_equal_states_have_equal_sums_and_others_do_not():
    assert state_sha256(make_state(3)) == state_sha256(make_state(3)) != state_sha256(make_state(4))
