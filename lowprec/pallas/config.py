"""How a kernel cuts up its work: frozen configs, a choice for each shape, and what was measured on a device.

What a table in `tuning/` holds for a device, operation and class of shapes goes first; else a model of the machine
decides, which was not measured. A table is `tuning/<device>.json`: {operation: {key: {field: value}}}; keys are those
of `shape_key`. A config that does not fit into a multiprocessor cannot be made.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from lowprec.errors import UsageError, lookup, require
from lowprec.pallas.target import Target

SHARED_MEMORY = 232_448  # bytes a block may have on sm_90
K_TILE = 128  # elements of 8 bits: the 128 bytes of the widest swizzle
GROUPS = (32, 128)
_WARPGROUPS = 2  # that multiply; a third one copies
_SLAB = 64  # rows of one wgmma
_SLOTS = 2  # of the epilogue, a warpgroup's
_ALIGNMENT = 1024  # of a buffer in shared memory


@dataclass(frozen=True)
class ProductConfig:
    """The tiles of a matrix product on sm_90: (rows, columns) of the output a block, two warpgroups that share them.

    Args:
      rows: 64: the warpgroups divide the columns; 128 or 256: each takes one or two slabs of 64 rows.
      columns: 64 or 128; 128 or 256 where rows is 64.
      stages: tiles of K in flight.
      cluster: two blocks that share what they load: "rows", one below the other, share the tile of b; "columns", side
        by side, that of a; None: each loads its own.
      snake: columns of tiles in one band of the order in which tiles are visited.
      epilogue: columns that leave at once.
    Raises:
      UsageError: (a ValueError) for other sizes, or if the buffers do not fit into shared memory.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 4
    cluster: str | None = None
    snake: int = 8
    epilogue: int = 32

    def __post_init__(self):
        require(self.rows in (64, 128, 256), "rows", "64, 128 or 256", self.rows)
        choices = (128, 256) if self.rows == 64 else (64, 128)
        need = f"{choices[0]} or {choices[1]} with {self.rows} rows"
        require(self.columns in choices, "columns", need, self.columns)
        require(self.stages >= 2, "stages", "at least 2", self.stages)
        require(self.cluster in (None, "rows", "columns"), "cluster", "None, 'rows' or 'columns'", self.cluster)
        require(self.snake >= 1, "snake", "at least 1", self.snake)
        require(self.epilogue in (16, 32, 64), "epilogue", "16, 32 or 64", self.epilogue)
        if shared_memory(self) > SHARED_MEMORY:
            raise UsageError(f"{self} needs {shared_memory(self)} bytes of shared memory; there are {SHARED_MEMORY}")

    @property
    def clusters(self) -> tuple[int, int]:
        """Blocks of a cluster, along rows and columns."""
        return 1 + (self.cluster == "rows"), 1 + (self.cluster == "columns")

    @property
    def warpgroup(self) -> tuple[int, int]:
        """Rows and columns of a warpgroup's share."""
        if self.rows == _SLAB:
            return self.rows, self.columns // _WARPGROUPS
        return self.rows // _WARPGROUPS, self.columns

    def padded(self, m: int, n: int, k: int) -> tuple[int, int, int]:
        """The sizes of a product in whole tiles."""
        steps = (self.rows * self.clusters[0], self.columns * self.clusters[1], K_TILE)
        return tuple(-(-size // step) * step for size, step in zip((m, n, k), steps, strict=True))  # type: ignore[return-value]

    def buffers(self) -> list[int]:
        """Bytes of each buffer in shared memory; barriers apart."""
        tiles = [self.stages * size * K_TILE for size in (self.rows, self.columns)]
        return [*tiles, _WARPGROUPS * _SLOTS * _SLAB * self.epilogue * 4]

    def barriers(self) -> int:
        return 2 * self.stages


@dataclass(frozen=True)
class BlockMatmulConfig(ProductConfig):
    """Of `block_matmul`.

    Args:
      group: elements of K that share a scale: 32 or 128. So often a partial sum is scaled and added.
    """

    group: int = 128

    def __post_init__(self):
        require(self.group in GROUPS, "group", "32 or 128", self.group)
        super().__post_init__()

    def buffers(self):
        scales = [self.stages * K_TILE // self.group * size * 4 for size in (self.rows, self.columns)]
        return super().buffers() + scales


@dataclass(frozen=True)
class ChannelMatmulConfig(ProductConfig):
    """Of `channel_matmul`."""

    def buffers(self):
        rows, columns = self.warpgroup
        return super().buffers() + [_WARPGROUPS * size * 4 for size in (rows, columns, columns)]

    def barriers(self):
        return super().barriers() + _WARPGROUPS


CONFIGS: dict[str, type] = {"block_matmul": BlockMatmulConfig, "channel_matmul": ChannelMatmulConfig}

# (rows, columns, cluster), the best first where the model sees no difference.
_TILES = (
    (256, 128, "rows"),
    (256, 128, "columns"),
    (128, 128, "rows"),
    (128, 128, "columns"),
    (256, 128, None),
    (128, 128, None),
    (64, 256, None),
    (64, 128, None),
)


def shared_memory(config: ProductConfig) -> int:
    """Bytes of shared memory that a block needs, whatever it is to write: float32 is the widest."""
    align = lambda size: -(-size // _ALIGNMENT) * _ALIGNMENT
    return sum(map(align, config.buffers())) + align(8 * config.barriers())


def block_matmul_config(m: int, n: int, k: int, group: int, device: Target) -> BlockMatmulConfig:
    """What was measured best for a product (m, k)·(n, k)ᵀ on a device, else what the model says."""
    measured = tuned("block_matmul", device, shape_key(m, n, k, group=group))
    return measured or _least_cycles(choices("block_matmul", group), m, n, device.cores)


def channel_matmul_config(m: int, n: int, k: int, device: Target) -> ChannelMatmulConfig:
    """What was measured best for a product (m, k)·(n, k)ᵀ on a device, else what the model says."""
    measured = tuned("channel_matmul", device, shape_key(m, n, k))
    return measured or _least_cycles(choices("channel_matmul"), m, n, device.cores)


@cache
def choices(operation: str, group: int = 128) -> tuple[Any, ...]:
    """The configs of a product that the model chooses from."""
    kind = lookup("product", CONFIGS, operation)
    groups = {"group": group} if kind is BlockMatmulConfig else {}
    return tuple(
        _deepest(kind(rows=rows, columns=columns, stages=2, cluster=cluster, **groups))
        for rows, columns, cluster in _TILES
    )


def shipped(operation: str, group: int = 128) -> tuple[Any, ...]:
    """Every config that `block_matmul_config` or `channel_matmul_config` may return, on any device."""
    tables = [table.get(operation, {}) for table in _tables().values()]
    measured = [_read(operation, fields) for table in tables for fields in table.values()]
    return (*choices(operation, group), *(c for c in measured if getattr(c, "group", group) == group))


def tuned(operation: str, device: Target, key: str) -> Any | None:
    """The config that was measured best on a kind of device, or None.

    Args:
      operation: of `CONFIGS`.
      key: of `shape_key`.
    """
    fields = _tables().get(slug(device.kind), {}).get(operation, {}).get(key)
    return None if fields is None else _read(operation, fields)


def shape_key(*sizes: int, **static: object) -> str:
    """The class of shapes a table has one config for: sizes rounded up to powers of two, then what else matters."""
    rounded = "x".join(str(1 << max(size - 1, 0).bit_length()) for size in sizes)
    return " ".join([rounded, *(f"{name}={static[name]}" for name in sorted(static))])


def slug(kind: str) -> str:
    """The name of a device in file names: "NVIDIA H200" is nvidia-h200."""
    return "-".join(kind.lower().split())


@cache
def _tables() -> dict[str, dict]:
    files = (resources.files("lowprec.pallas") / "tuning").iterdir()
    return {file.name[:-5]: json.loads(file.read_text()) for file in files if file.name.endswith(".json")}


def _read(operation, fields):
    return lookup("operation", CONFIGS, operation)(**fields)


def _deepest(config, most=6):
    """The config with as many stages as fit."""
    for stages in range(config.stages + 1, most + 1):
        try:
            config = replace(config, stages=stages)
        except UsageError:
            break
    return config


def _least_cycles(configs, m, n, cores):
    return min((c for c in configs if _fills_clusters(c, m, n)), key=lambda config: _cycles(config, m, n, cores))


def _fills_clusters(config, m, n):
    down, across = config.clusters
    return -(-m // config.rows) % down == 0 and -(-n // config.columns) % across == 0


def _cycles(config, m, n, cores):
    # A step of K on one multiprocessor: 4096 products of 8 bits a cycle; some 48 bytes a cycle arrive from L2, and a
    # quarter of the lesser is not hidden. Not measured: these rank configs and predict nothing.
    down, across = config.clusters
    tiles = -(-m // config.rows) * -(-n // config.columns)
    waves = -(-tiles // max(cores // (down * across) * down * across, 1))
    products = config.rows * config.columns * K_TILE / 4096
    loads = (config.rows / across + config.columns / down) * K_TILE / 48
    return waves * (max(products, loads) + min(products, loads) / 4)
