"""What `lowprec optimizers` prints: the named optimizers, what they store, where they come from."""

import functools
import inspect

import jax
import jax.numpy as jnp

from lowprec import models, optim
from lowprec.analysis.table import markdown_table
from lowprec.optim.labels import Chain
from lowprec.training import update_rules
from lowprec.training.config import OptimizerConfig

# A Llama with 25 million parameters and an alphabet of bytes: what is kept in float32 hardly counts.
MODEL = models.ModelConfig(layers=8, width=512, heads=8)
# The rules that are not in `lowprec.optim`'s registry.
_BESIDE = {
    "sgd": ("momentum in float32", "Optax"),
    "sparse_adamw": ("AdamW with the masked decay of 2:4 sparse weights", "Hu et al., arXiv 2404.01847"),
}


@functools.cache
def model_shapes():
    """The parameters of MODEL, as shapes."""
    model = models.build(MODEL, 256)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def bytes_per_parameter(optimizer) -> float:
    """Of an optimizer's state, measured on MODEL."""
    params = model_shapes()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return optim.state_bytes(jax.eval_shape(optimizer.init, params)) / count


def optimizer_rows() -> list[tuple[str, str, str, str]]:
    """(name, bytes of state a parameter, what it is, source) of everything that `optimizer.name` takes."""
    rows = []
    for name in update_rules.names():
        size = bytes_per_parameter(update_rules.update_rule(OptimizerConfig(name)))
        if name in optim.names():
            about, source = optim.get(name).about, optim.get(name).source
        else:
            about, source = _BESIDE[name]
        rows.append((name, f"{size:.2f}", about, source))
    return rows


def optimizers_table() -> str:
    return markdown_table(("optimizer", "bytes of state a parameter", "what it is", "source"), optimizer_rows(), left=1)


def optimizer_details(name: str) -> str:
    """Everything about one.

    Raises:
      UsageError: (a ValueError) if there is none; it names the nearest.
    """
    if name in _BESIDE:
        about, source = _BESIDE[name]
        return f"{name}: {about} ({source}); it has no settings but the keys of optimizer"
    entry = optim.get(name)
    optimizer = entry(1e-3)
    fused = "leaf by leaf, few moments in float32" if isinstance(optimizer, Chain) else "all parameters at once"
    width = max(map(len, entry.settings))
    return "\n".join(
        [
            f"{name}: {entry.about} ({entry.source})",
            f"state: {bytes_per_parameter(optimizer):.2f} bytes a parameter; fused_step updates {fused}",
            "",
            "settings:",
            *(f"  {setting.ljust(width)}  {default!r}" for setting, default in entry.settings.items()),
            "",
            inspect.getdoc(entry.factory) or "",
        ]
    )


# Formats of m and v, and who has them.
STATES = (
    (None, None, "optax.adam"),
    ("bf16", None, "optax.adam with mu_dtype"),
    ("de8", "de8", "bitsandbytes, torchao"),
    ("cmp8", "cmp8", "FlashOptim, with bfloat16 scales"),
    ("fp8", "fp8", "torchao, with the root of v"),
    ("coat8", "coat8", "COAT"),
    ("cmp8@128", "log8(stochastic)", "adam8"),
    ("de4", "lin4", "torchao"),
    ("de4", "lin4@rank1", "Li et al."),
    ("de4", "log4(stochastic)", "adam4; stable_adam4 but for what it skips"),
    ("de4", "log2(stochastic)", "solo"),
)


def states_table() -> str:
    """Bytes of both moments of a parameter, by their formats."""
    rows = []
    for mu, nu, used in STATES:
        size = bytes_per_parameter(optim.adamw(1e-3, mu_format=mu, nu_format=nu))
        rows.append((mu or "f32", nu or "f32", used, f"{size:.3f}"))
    return markdown_table(("m", "v", "as in", "bytes a parameter"), rows, left=3)
