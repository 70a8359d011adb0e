"""How the product with 4-bit weights cuts up its work on sm_90. Nothing of it was measured."""

from dataclasses import dataclass

from lowprec.errors import require
from lowprec.pallas.config import SHARED_MEMORY

COLUMNS = 128  # of the output, a block's: rows of weights, 64 a warpgroup
DEPTH = 128  # elements of K in a step
ROWS = (8, 16, 32, 64, 128)
_SPARE = 4096  # bytes: barriers, alignment


@dataclass(frozen=True)
class W4Config:
    """Of `w4_matmul`.

    Args:
      rows: of x that share what is dequantized: the other side of a wgmma.
      stages: steps of K in flight.
      splits: parts of K whose sums are added at the end, so that few rows and columns still fill a device.
      operand: where wgmma finds the weights: "shared" memory, or "registers", which spares a round trip; no
        interpreter runs that one.
    """

    rows: int = 64
    stages: int = 4
    splits: int = 1
    operand: str = "shared"

    def __post_init__(self):
        require(self.rows in ROWS, "rows", "8, 16, 32, 64 or 128", self.rows)
        require(2 <= self.stages <= 4, "stages", "2, 3 or 4", self.stages)
        require(self.splits >= 1, "splits", "at least 1", self.splits)
        require(self.operand in ("shared", "registers"), "operand", "'shared' or 'registers'", self.operand)


def w4_config(m: int, n: int, k: int, cores: int, out_bytes: int = 4) -> W4Config:
    """Few rows read as little as they can, on all multiprocessors; many reuse what they dequantize.

    Args:
      out_bytes: of a number of the result.
    """
    rows = next((rows for rows in ROWS if m <= rows), ROWS[-1])
    blocks = -(-m // rows) * -(-n // COLUMNS)
    steps = -(-k // DEPTH)
    splits = 1
    while 2 * splits * blocks <= cores and steps % (2 * splits) == 0 and steps // (2 * splits) >= 4:
        splits *= 2
    return W4Config(rows, _stages(rows, 4 if splits > 1 else out_bytes), splits)


def _stages(rows, out_bytes, most=4):
    # In shared memory a stage has codes, scales and x; beside them lie dequantized weights and the result.
    stage = COLUMNS * DEPTH // 2 + COLUMNS * DEPTH // 32 * 4 + rows * DEPTH * 2
    beside = 2 * COLUMNS * DEPTH * 2 + COLUMNS * rows * out_bytes + _SPARE
    return min(most, (SHARED_MEMORY - beside) // stage)


def shipped() -> tuple[W4Config, ...]:
    """Every kind of config that `w4_config` may return."""
    return tuple(W4Config(rows, _stages(rows, 4), splits) for rows in ROWS for splits in (1, 2))
