"""How the quantizer kernels cut up their work."""

from dataclasses import dataclass

from lowprec.errors import require
from lowprec.pallas.target import Target


@dataclass(frozen=True)
class QuantizeConfig:
    """Of `rotate_quantize` and `quantize_rows_and_columns` on sm_90; nothing of it was measured.

    Args:
      warpgroups: of a block of threads, 64 rows each.
      stages: tiles a warpgroup has in flight.
      resident: blocks of threads that are to share a multiprocessor.
    """

    warpgroups: int = 2
    stages: int = 2
    resident: int = 2

    def __post_init__(self):
        require(self.warpgroups in (1, 2, 4), "warpgroups", "1, 2 or 4", self.warpgroups)
        require(self.stages >= 2, "stages", "at least 2", self.stages)
        require(self.resident >= 1, "resident", "at least 1", self.resident)

    def walkers(self, stripes: int, tiles: int, device: Target) -> int:
        """Blocks of threads that divide a stripe of columns among them: such that the last wave is as full as can be.

        Args:
          stripes: of columns.
          tiles: of rows, one a warpgroup.
        """
        at_once = device.cores * self.resident
        most = min(max(at_once // max(stripes, 1), 1) + _MORE, max(-(-tiles // self.warpgroups), 1))
        idle = lambda walkers: -(-walkers * stripes // at_once) * at_once / (walkers * max(stripes, 1))
        return min(range(1, most + 1), key=idle)


_MORE = 4  # walkers beyond those that fill the device once: each loads a rotation of its own

# One loaded rotation serves four warpgroups, which fill a multiprocessor; without it, two blocks of two do, and of
# float32 one.
ROTATED = QuantizeConfig(warpgroups=4, stages=2, resident=1)
PLAIN = QuantizeConfig(warpgroups=2, stages=2, resident=2)
WIDE = QuantizeConfig(warpgroups=2, stages=2, resident=1)

# Of both sides, two warpgroups share a tile; beside a whole matrix of 128 there is no room for four.
BOTH_SIDES = QuantizeConfig(warpgroups=2, stages=2, resident=2)
ROTATED_COLUMNS = QuantizeConfig(warpgroups=4, stages=2, resident=1)
ROTATED_COLUMNS_128 = QuantizeConfig(warpgroups=2, stages=3, resident=1)
