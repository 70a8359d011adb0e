"""Which tokens a token may attend to, where a window of tokens holds several documents.

A separator token begins a document: the number of separators up to a token says which document it belongs to.
"""

import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.typing import Array, Bool, Int

DOCUMENTS = ("packed", "separate", "anchor")


def causal_mask(length: int) -> Bool[Array, "T S"]:
    """Every token attends to itself and to those before it."""
    return jnp.tril(jnp.ones((length, length), bool))


def document_mask(tokens_BT: Int[Array, "B T"], separator: int, *, anchor: bool = False) -> Bool[Array, "B T S"]:
    """Every token attends to those of its own document up to itself: causal blocks on the diagonal.

    Args:
      separator: the token that begins a document.
      anchor: whether the first token of the window is seen by all others, too. Positions go on from document to
        document; the anchor alone keeps its position from being something else in each of them (AnchorAttention,
        arXiv 2411.13476).
    """
    document_BT = jnp.cumsum(tokens_BT == separator, axis=-1)
    mask_BTS = (document_BT[:, :, None] == document_BT[:, None, :]) & causal_mask(tokens_BT.shape[-1])
    return mask_BTS.at[:, :, 0].set(True) if anchor else mask_BTS


def mask_of_tokens(
    tokens_BT: Int[Array, "B T"], documents: str, separator: int, vocab_size: int
) -> Bool[Array, "B T S"] | None:
    """The mask that a model asks for; None where it is causal and nothing else.

    Args:
      documents: one of `DOCUMENTS`: "packed", tokens see all documents before; "separate", their own; "anchor",
        their own and the first token of the window.
      separator: see `document_mask`.
      vocab_size: of the model.
    Raises:
      UsageError: (a ValueError) a separator that is no token.
    """
    if documents == "packed":
        return None
    if not 0 <= separator < vocab_size:
        raise UsageError(
            f"model.documents={documents!r} needs the token that separates documents, model.separator in "
            f"0 … {vocab_size - 1}, not {separator}; that of the byte tokenizer is 0"
        )
    return document_mask(tokens_BT, separator, anchor=documents == "anchor")
