"""ModelConfig: the `model.*` keys of a run's config."""

from dataclasses import dataclass

from lowprec.errors import UsageError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
      name: the architecture, one of `models.names()`.
      layers: blocks.
      width: D, of the residual stream.
      heads: query heads; D / heads is even.
      kv_heads: key and value heads, a divisor of heads; 0: as many as heads.
      mlp_width: of the gated layer; 0: 8/3 · D, up to a multiple of 256 (of 32 below D = 512).
      dtype: of activations and of unquantized products: float32 or bfloat16. Parameters are float32.
      remat: recompute the inside of each block in the backward pass.
      init_std: of kernels and embeddings (of unit_llama it is 1, whatever is said here).
      rotary_base: of the position frequencies.
      norm_epsilon: of the RMS norms.
    """

    name: str = "llama"
    layers: int = 2
    width: int = 64
    heads: int = 2
    kv_heads: int = 0
    mlp_width: int = 0
    dtype: str = "float32"
    remat: bool = False
    init_std: float = 0.02
    rotary_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for field in ("layers", "width", "heads"):
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field} is at least 1, not {getattr(self, field)}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UsageError(
                f"model.width {self.width} does not give {self.heads} heads of an even size; "
                f"the next width that does is {-(-self.width // (2 * self.heads)) * 2 * self.heads}"
            )
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise UsageError(
                f"model.kv_heads {self.kv_heads} does not divide {self.heads} heads; {', '.join(divisors)} do"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"model.dtype is float32 or bfloat16, not {self.dtype!r}")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def gate_width(self) -> int:
        multiple = 256 if self.width >= 512 else 32
        return self.mlp_width or -(-8 * self.width // (3 * multiple)) * multiple
