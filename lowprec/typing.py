"""Shape annotations: jaxtyping's where it is installed (tests check them), else names that mean nothing.

The core imports with jax, flax, optax and numpy alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt, UInt8, UInt32
else:
    try:
        from jaxtyping import Array, Bool, Float, Int, UInt, UInt8, UInt32
    except ImportError:
        from jax import Array

        class _Unchecked:
            def __class_getitem__(cls, item):
                return Any

        Bool = Float = Int = UInt = UInt8 = UInt32 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "UInt", "UInt8", "UInt32"]
