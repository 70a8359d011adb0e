"""Which config of block_matmul is the fastest on a device, measured; and the table that the package ships of it."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from lowprec.analysis.bench.case import shape_name
from lowprec.analysis.bench.kernel_case import KernelCase
from lowprec.analysis.bench.products import block_product
from lowprec.analysis.bench.runner import Results
from lowprec.analysis.bench.xla_products import SHAPES, SMALL, peer
from lowprec.errors import UsageError
from lowprec.pallas.config import BlockMatmulConfig, choices, shape_key
from lowprec.training.run_directory import read_json, write_json

GROUP = 128
VARIANTS = ("tiles", "lines")


def configs() -> list[BlockMatmulConfig]:
    """What is tried: every tile the model knows, then other orders, epilogues and depths of each."""
    tiles = list(choices("block_matmul", GROUP))
    others = [_other(tile, **change) for change in ({"snake": 16}, {"epilogue": 64}, {"stages": 3}) for tile in tiles]
    return list(dict.fromkeys([*tiles, *(config for config in others if config)]))


def tuning_cases() -> Iterator[KernelCase]:
    """Each config at each shape and kind of scales; all shapes with the first configs, before any with the next."""
    for config in configs():
        for shape in SHAPES:
            for variant in VARIANTS:
                build = partial(block_product, variant, config=config)
                peers = (peer("bf16", shape),)
                yield KernelCase(_name(config, shape, variant), build, shape, SMALL, True, peers=peers)


def fastest(results: Results) -> dict[str, BlockMatmulConfig]:
    """Of the configs measured for both kinds of scales: the one of the least product of both times.

    Returns:
      By the keys of `shape_key`, as a table has one config for both.
    """
    found: dict[str, tuple[float, BlockMatmulConfig]] = {}
    for shape in SHAPES:
        key = shape_key(*shape, group=GROUP)
        for config in configs():
            times = [results.measured(_name(config, shape, variant), "us") for variant in VARIANTS]
            if None not in times and (time := math.prod(times)) < found.get(key, (math.inf,))[0]:
                found[key] = time, config
    return {key: config for key, (_, config) in found.items()}


def write_tuning(results: Results, path: Path) -> int:
    """Writes the fastest configs into a device's table; what it has of other operations and shapes stays.

    Returns:
      The entries written; where nothing was measured there is no file.
    """
    found = fastest(results)
    if found:
        table = read_json(path) or {}
        entries = {**table.get("block_matmul", {}), **{key: asdict(config) for key, config in found.items()}}
        write_json(path, {**table, "block_matmul": dict(sorted(entries.items()))})
    return len(found)


def _name(config, shape, variant):
    fields = f"{config.rows}x{config.columns}_{config.cluster or 'alone'}_{config.stages}stages"
    return f"tune/{variant}/{shape_name(shape)}/{fields}_snake{config.snake}_epilogue{config.epilogue}"


def _other(config, **change):
    """The config with something else; None if there is no such config, or it is the same."""
    try:
        other = replace(config, **change)
    except UsageError:  # it does not fit
        return None
    return None if other == config else other
