"""One CPU device, and shape annotations checked: `jaxtyping` with beartype on the packages that carry them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
