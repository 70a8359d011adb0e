"""ModelConfig: the `model.*` keys of a run's config."""

from dataclasses import dataclass

from lowprec.errors import UsageError, unknown
from lowprec.nn import attention_gate, attention_weights, folding
from lowprec.nn.attention_mask import DOCUMENTS

DTYPES = ("float32", "bfloat16")

_CHOICES = {
    "attention": attention_weights.names(),
    "gate": attention_gate.KINDS,
    "documents": DOCUMENTS,
    "batch_norm": folding.KINDS,
}
# Architectures that have no attention.
_WITHOUT_HEADS = ("resnet",)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
      name: the architecture, one of `models.names()`.
      layers: blocks.
      width: D, of the residual stream.
      heads: query heads; D / heads is even. (A resnet has none.)
      kv_heads: key and value heads, a divisor of heads; 0: as many as heads.
      mlp_width: of the gated layer; 0: 8/3 · D, up to a multiple of 256 (of 32 below D = 512).
      dtype: of activations and of unquantized products: float32 or bfloat16. Parameters are float32.
      remat: recompute the inside of each block in the backward pass.
      init_std: of kernels and embeddings (of unit_llama it is 1, whatever is said here).
      rotary_base: of the position frequencies.
      norm_epsilon: of the RMS norms.
      attention: how weights come from scores: softmax, clipped or softpick (`nn.attention_weights`).
      attention_clip: α of clipped softmax.
      gate: of the context of each head: "", none, or linear or mlp (`nn.attention_gate`).
      rotary_dtype: of cosines, sines and the rotation; bfloat16 is a fault to be studied (`nn.rotary`).
      documents: what tokens see of a window of documents: packed, all of it, separate, their own document, or
        anchor, their own document and the first token of the window (`nn.attention_mask`).
      separator: the token that begins a document; -1: there is none.
      batch_norm: of a resnet: plain, folding (into the kernels, while training) or none (`nn.folding`). Its `layers`
        are the residual blocks of each of three stages, `width` is that of the first; its depth is 6 · layers + 2.
      patch: of a vit: pixels along each side of what becomes a token. Its mlp_width 0 is 4 · D.
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
    attention: str = "softmax"
    attention_clip: float = 12.0
    gate: str = ""
    rotary_dtype: str = "float32"
    documents: str = "packed"
    separator: int = -1
    batch_norm: str = "plain"
    patch: int = 4

    def __post_init__(self):
        for field in ("layers", "width", "heads", "patch"):
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field} is at least 1, not {getattr(self, field)}")
        if self.name not in _WITHOUT_HEADS and self.width % (2 * self.heads):
            raise UsageError(
                f"model.width {self.width} does not give {self.heads} heads of an even size; "
                f"the next width that does is {-(-self.width // (2 * self.heads)) * 2 * self.heads}"
            )
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            divisors = [str(n) for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise UsageError(
                f"model.kv_heads {self.kv_heads} does not divide {self.heads} heads; {', '.join(divisors)} do"
            )
        for field in ("dtype", "rotary_dtype"):
            if getattr(self, field) not in DTYPES:
                raise UsageError(f"model.{field} is {' or '.join(DTYPES)}, not {getattr(self, field)!r}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise unknown(f"model.{field}", getattr(self, field), choices)
        for field in ("attention", "gate", "rotary_dtype", "documents"):
            if self.name != "llama" and getattr(self, field) != getattr(ModelConfig, field):
                raise UsageError(f"model.{field}={getattr(self, field)!r} is for llama, not for {self.name}")
        if self.attention_clip < 0:
            raise UsageError(f"model.attention_clip is at least 0, not {self.attention_clip}")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def gate_width(self) -> int:
        multiple = 256 if self.width >= 512 else 32
        return self.mlp_width or -(-8 * self.width // (3 * multiple)) * multiple
