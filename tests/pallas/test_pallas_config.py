"""Configs of kernels: what fits into a multiprocessor, what the model prefers, what a table of measurements says."""

import copy
import re
from dataclasses import replace
from importlib import resources

import jax.numpy as jnp
import pytest

from lowprec.errors import UsageError
from lowprec.pallas import block_matmul, channel_matmul, config
from lowprec.pallas.config import CONFIGS, SHARED_MEMORY, BlockMatmulConfig, ChannelMatmulConfig, shared_memory
from lowprec.pallas.target import KNOWN

H200 = KNOWN["NVIDIA H200"]
BLOCK = [settings for group in config.GROUPS for settings in config.shipped("block_matmul", group)]
ALL = [*BLOCK, *config.shipped("channel_matmul")]
SHAPES = [(8192, 8192), (4096, 28672), (1, 4096), (64, 7168), (100, 100), (129, 4097)]


def beyond(settings):
    """The same config with more stages than fit, as its constructor would refuse it."""
    deep = copy.copy(settings)
    object.__setattr__(deep, "stages", 12)
    return deep


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_shared_memory_is_what_mosaic_counts(settings, lowers):
    """Mosaic says how much it would need when that is too much. Ours may be more, by the alignment of buffers."""
    deep, k = beyond(settings), 12 * 128
    a, b = jnp.zeros((512, k), jnp.float8_e4m3fn), jnp.zeros((512, k), jnp.float8_e4m3fn)
    if isinstance(settings, BlockMatmulConfig):
        scale = jnp.ones((512, k // settings.group))
        run = lambda a, b: block_matmul(a, scale, b, scale, impl="mosaic_gpu", config=deep)
    else:
        run = lambda a, b: channel_matmul(a, b, bias=jnp.ones(512), impl="mosaic_gpu", config=deep)
    with pytest.raises(ValueError, match="exceeds available shared memory") as raised:
        lowers(run, a, b)
    counted, allowed = map(int, re.findall(r"smem_bytes=(\d+)", str(raised.value)))
    assert allowed == SHARED_MEMORY
    assert counted <= shared_memory(deep) <= counted + 6 * 1024


def test_what_does_not_fit_cannot_be_made():
    # 5 · 384 · 128 of elements, 8 KiB of scales (7.5), 2 · 2 · 64 · 32 · 4 of results, 1 KiB of barriers.
    with pytest.raises(UsageError, match=r"stages=5.*needs 287744 bytes of shared memory; there are 232448"):
        BlockMatmulConfig(256, 128, 5)
    with pytest.raises(UsageError, match="shared memory"):
        replace(ChannelMatmulConfig(128, 128, 5), stages=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 192}, "rows is 64, 128 or 256, not 192"),
        ({"columns": 256}, "columns is 64 or 128 with 128 rows, not 256"),
        ({"rows": 64, "columns": 64}, "columns is 128 or 256 with 64 rows, not 64"),
        ({"stages": 1}, "stages is at least 2, not 1"),
        ({"cluster": "both"}, "cluster is None, 'rows' or 'columns', not 'both'"),
        ({"epilogue": 48}, "epilogue is 16, 32 or 64, not 48"),
        ({"group": 64}, "group is 32 or 128, not 64"),
    ],
)
def test_sizes_no_kernel_has_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        BlockMatmulConfig(**changes)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_configs_are_static(settings):
    assert hash(settings) == hash(copy.deepcopy(settings))
    assert replace(settings) == settings


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", config.GROUPS)
def test_the_model_chooses_among_what_is_shipped(shape, group):
    chosen = config.block_matmul_config(*shape, 4096, group, H200)
    assert chosen in config.shipped("block_matmul", group)
    assert chosen.group == group
    assert config.channel_matmul_config(*shape, 4096, H200) in config.shipped("channel_matmul")


@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_add_no_padding(shape):
    """Half of a cluster that has nothing to do would cost what the other half saves."""
    chosen = config.block_matmul_config(*shape, 4096, 128, H200)
    alone = replace(chosen, cluster=None)
    assert chosen.padded(*shape, 4096) == alone.padded(*shape, 4096)


def test_few_rows_get_small_tiles_and_large_products_large_ones():
    """Of 64 rows the half of a tile of 128 would be padding."""
    assert config.block_matmul_config(64, 7168, 7168, 128, H200).rows == 64
    large = config.block_matmul_config(8192, 8192, 8192, 128, H200)
    assert (large.rows, large.columns) == (256, 128)


def test_what_was_measured_goes_before_the_model(monkeypatch):
    key = config.shape_key(5000, 8192, 8000, group=128)
    assert key == config.shape_key(8192, 4097, 4097, group=128) == "8192x8192x8192 group=128"
    table = {"nvidia-h200": {"block_matmul": {key: {"rows": 128, "columns": 64, "stages": 3}}}}
    monkeypatch.setattr(config, "_tables", lambda: table)
    wanted = BlockMatmulConfig(128, 64, 3)
    assert config.block_matmul_config(8192, 8192, 8192, 128, H200) == wanted
    assert wanted in config.shipped("block_matmul", 128)
    others = [(KNOWN["NVIDIA H100 80GB HBM3"], (8192, 8192, 8192), 128), (H200, (8192, 8192, 4096), 128)]
    for device, shape, group in [*others, (H200, (8192, 8192, 8192), 32)]:
        assert config.block_matmul_config(*shape, group, device) != wanted


def test_a_table_that_does_not_fit_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(config, "_tables", lambda: {"nvidia-h200": {"channel_matmul": {"64x64x64": {"stages": 40}}}})
    with pytest.raises(UsageError, match="shared memory"):
        config.channel_matmul_config(64, 64, 64, H200)


def test_tables_ship_with_the_package():
    names = {file.name for file in (resources.files("lowprec.pallas") / "tuning").iterdir()}
    assert f"{config.slug('NVIDIA H200')}.json" in names
    assert {name.removesuffix(".json") for name in names} == set(config._tables())


def test_every_table_is_of_a_known_device_and_its_configs_can_be_made():
    for device, table in config._tables().items():
        assert device in {config.slug(kind) for kind in KNOWN}
        for operation, entries in table.items():
            for fields in entries.values():
                assert CONFIGS[operation](**fields)
