"""What the quantizers of a stage take over from the stage before, where a ramp begins and where it ends.

On a ramp (`quantizers.blend.Blend`) an operand has the variables of two quantizers. Where it begins, those of the
recipe before go on, with the moments of their optimizer; where it ends, those of the recipe after. The runs into which
layers are cut may be others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowprec.nn.stack import is_run, run_layers, run_start
from lowprec.ops.saved import SAVED_X, is_slot_name
from lowprec.quantizers import OPERANDS
from lowprec.quantizers.blend import BEFORE, part_of
from lowprec.training.state import Quantizers

# (Name of an operand, its first variables, those which it had in the stage before) -> those with which it goes on.
Take = Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
# The operands of a ramp that have the variables of the recipe after; what it saves, it saves as that one.
_FORWARD = ("fwd.x", "fwd.w")


def onto_ramp(new: Quantizers, old: Quantizers, reset: bool = False) -> Quantizers:
    """The variables with which a ramp begins.

    Args:
      new: as they would be without a stage before.
      old: of the recipe before.
      reset: whether the optimizer of what is learned starts anew too.
    """
    opt_state = new.opt_state if reset else _through_optimizer(_onto_ramp, new.opt_state, old.opt_state)
    return new._replace(
        params=_carried(_onto_ramp, new.params, old.params),
        opt_state=opt_state,
        state=_carried(_onto_ramp, new.state, old.state),
    )


def off_ramp(new: Quantizers, old: Quantizers) -> Quantizers:
    """The variables with which the recipe after goes on, alone; old: of the ramp."""
    return new._replace(
        params=_carried(_off_ramp, new.params, old.params),
        opt_state=_through_optimizer(_off_ramp, new.opt_state, old.opt_state),
        state=_carried(_off_ramp, new.state, old.state),
    )


def _onto_ramp(name, new, old):
    if any(key.startswith(BEFORE) for key in new):
        return {key: old[key.removeprefix(BEFORE)] if key.startswith(BEFORE) else leaf for key, leaf in new.items()}
    # An operand that both recipes quantize alike, or a gradient, which the ramp quantizes as the recipe before.
    return dict(old) if set(new) == set(old) else new


def _off_ramp(name, new, old):
    kept = part_of(old, "")
    return kept if (name in _FORWARD or is_slot_name(name)) and set(new) == set(kept) else new


def _carried(take: Take, new: Any, old: Any) -> Any:
    """A collection of quantizers' variables, each operand's taken from what the stage before has of it."""
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        return new
    if set(new) & {*OPERANDS, SAVED_X} or any(map(is_slot_name, new)):
        return {name: take(name, tree, old[name]) if name in old else tree for name, tree in new.items()}
    if any(map(is_run, new)):
        return {run: _carried(take, tree, _rows(old, run_layers(run))) for run, tree in new.items()}
    return {name: _carried(take, tree, old.get(name)) for name, tree in new.items()}


def _rows(runs: Mapping[str, Any], layers: slice) -> Any:
    """Some layers of a stack, whatever the runs that it is cut into; None where a layer has no variables."""
    parts = []
    for name in sorted(filter(is_run, runs), key=run_start):
        run = run_layers(name)
        start, stop = max(run.start, layers.start), min(run.stop, layers.stop)
        if start < stop:
            cut = slice(start - run.start, stop - run.start)
            parts.append((stop - start, jax.tree.map(lambda leaf, cut=cut: leaf[cut], runs[name])))
    if sum(count for count, _ in parts) < layers.stop - layers.start:
        return None
    return _joined([part for _, part in parts])


def _joined(parts: list[Any]) -> Any:
    """The layers of several runs together, with the variables that all of them have."""
    if not isinstance(parts[0], Mapping):
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    common = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: _joined([part[name] for part in parts]) for name in common}


def _through_optimizer(take: Take, new: Any, old: Any) -> Any:
    """The state of an optimizer: its moments as the parameters, its counts go on; anew where there was none."""
    if isinstance(new, Mapping):
        return _carried(take, new, old)
    if isinstance(new, tuple):
        if len(new) != len(old):
            return new
        parts = [_through_optimizer(take, *pair) for pair in zip(new, old, strict=True)]
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    return old
