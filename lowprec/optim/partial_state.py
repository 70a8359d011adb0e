"""Labelled transformations, taken apart by parameters: what of a state belongs to each, and what to none."""

from typing import Any

import jax
import optax

from lowprec.optim.labels import Elementwise
from lowprec.optim.state_tensor import Rows
from lowprec.quantizers.qtensor import is_qtensor


class ParameterTree:
    """The structure of the parameters, in which a QTensor is a leaf.

    Attributes:
      paths, leaves: in order.
    """

    def __init__(self, params: Any):
        leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
        self.structure: Any = structure
        self.paths, self.leaves = [path for path, _ in leaves], [leaf for _, leaf in leaves]

    def split(self, tree: Any) -> list[Any]:
        """What a tree of this structure has in the places of the parameters, a list in their order."""
        return self.structure.flatten_up_to(tree)

    def join(self, leaves: list[Any]) -> Any:
        """The inverse of `split`."""
        return self.structure.unflatten(leaves)

    def is_like(self, tree: Any) -> bool:
        try:
            self.split(tree)
        except ValueError:
            return False
        return True

    def only(self, index: int, leaf: Any) -> Any:
        """A tree where all other parameters are masked: paths are what they were."""
        return self.join([leaf if place == index else optax.MaskedNode() for place in range(len(self.leaves))])


class Part:
    """A labelled transformation and its state.

    Attributes:
      moments: of each parameter, a list of what the state has for it.
      shared: what the state has for none, step counts among it.
    """

    def __init__(
        self, tree: ParameterTree, tx: optax.GradientTransformationExtraArgs, state: Any, extra: dict[str, Any]
    ):
        self.tree, self.tx, self.extra = tree, tx, extra
        nodes, structure = jax.tree.flatten(state, is_leaf=tree.is_like)
        self.structure: Any = structure
        self.like = [tree.is_like(node) for node in nodes]
        trees, self.shared = self._sorted(nodes)
        self.moments = [list(moments) for moments in zip(*map(tree.split, trees), strict=True)]
        if not trees:
            self.moments = [[] for _ in tree.leaves]

    @property
    def elementwise(self) -> bool:
        return isinstance(self.tx, Elementwise)

    def update(
        self, index: int, update: Any, moments: list[Any], w: Any, rows: Rows | None
    ) -> tuple[Any, list[Any], list[Any]]:
        """Of one parameter, or of rows of it: (update, moments, shared)."""
        tree = self.tree
        state = self.seen(index, moments)
        extra = self.extra | ({"rows": rows} if self.elementwise else {})
        new, state = self.tx.update(tree.only(index, update), state, tree.only(index, w), **extra)
        trees, shared = self._sorted(self.structure.flatten_up_to(state))
        return tree.split(new)[index], [tree.split(node)[index] for node in trees], shared

    def seen(self, index: int, moments: list[Any]) -> Any:
        """The state as an update of one parameter alone would see it."""
        return self._state([self.tree.only(index, moment) for moment in moments], self.shared)

    def shared_after(self) -> list[Any]:
        """What the state has for no parameter, after an update: of none."""
        none = self.tree.only(-1, None)
        state = self._state([none for like in self.like if like], self.shared)
        return self._sorted(self.structure.flatten_up_to(self.tx.update(none, state, none, **self.extra)[1]))[1]

    def state(self, moments: list[list[Any]], shared: list[Any]) -> Any:
        """The whole state, from the moments of all parameters."""
        return self._state([self.tree.join(list(of_all)) for of_all in zip(*moments, strict=True)], shared)

    def _sorted(self, nodes):
        pairs = list(zip(nodes, self.like, strict=True))
        return [node for node, like in pairs if like], [node for node, like in pairs if not like]

    def _state(self, trees, shared):
        of_all, of_none = iter(trees), iter(shared)
        return self.structure.unflatten([next(of_all if like else of_none) for like in self.like])
