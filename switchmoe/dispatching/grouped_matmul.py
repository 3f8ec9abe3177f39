"""Many small matmuls as one: rows sorted by expert, each times its expert's matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from switchmoe.config import did_you_mean
from switchmoe.dispatching.grouped import BACKENDS, FASTEST, Backend
from switchmoe.dispatching.varying import vary_alike
from switchmoe.shapes import Array, Float, Int


def grouped_matmul(
    x_RI: Float[Array, "R I"],
    w_EIO: Float[Array, "E I O"],
    size_E: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """Multiply each token's row by the matrix of its expert.

    Rows come sorted by expert: the first size_E[0] meet w_EIO[0], the next size_E[1] meet w_EIO[1], and so
    on. Sizes may be 0 and need no alignment. Rows past their sum give exactly 0 and get gradient 0, whatever
    they hold; so do the weights of an expert without rows. Computed in the common dtype of `x_RI` and
    `w_EIO`, float32 or bfloat16, with sums in float32.

    The gradient is two more grouped products: with the transposed weights for the input, and over each
    expert's rows for the weights. No backend is differentiated by XLA, which would add up whole [E, I, O]
    arrays once an expert.

    Args:
      x_RI: the rows.
      w_EIO: one matrix an expert.
      size_E: rows of each expert; their sum is at most R.
      implementation: a name in `switchmoe.dispatching.grouped.BACKENDS`; None takes the fastest one that is
        right on the platform which the program is compiled for.

    Raises:
      ValueError: one sentence, if shapes or dtypes do not fit or the named implementation can't run here.

    Source: MegaBlocks, section 4, https://arxiv.org/abs/2211.15841 (dropless as a grouped product).
    """
    _check(x_RI, w_EIO, size_E)
    backend = choose_backend(implementation)
    return _grouped_matmul(backend, *vary_alike(x_RI, w_EIO, size_E))


def choose_backend(implementation: str | None = None) -> Backend:
    """Return the backend of that name, or for None one that looks at the platform when it is compiled."""
    if implementation is None:
        return _FASTEST_BACKEND
    if implementation not in BACKENDS:
        raise ValueError(f"matmul={implementation!r} is not known{did_you_mean(implementation, BACKENDS)}.")
    problem = BACKENDS[implementation].available(platform_name())
    if problem:
        raise ValueError(f"matmul={implementation!r} can't run here: {problem}")
    return BACKENDS[implementation]


def platform_name() -> str:
    """Name the platform of this process as `lax.platform_dependent` does: "cuda", where jax says "gpu"."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def _by_platform(primitive: str, *args: Array, **options) -> Array:
    """Call that function of a backend, of the fastest one on each platform that has its own."""
    default, branches = getattr(BACKENDS["blocks"], primitive), {}
    for platform, names in FASTEST.items():
        runs = [name for name in names if not BACKENDS[name].available(platform, *args)]
        if runs:
            branches[platform] = getattr(BACKENDS[runs[0]], primitive)
    if all(branch is default for branch in branches.values()):
        return default(*args, **options)
    branches = {platform: partial(branch, **options) for platform, branch in branches.items()}
    return lax.platform_dependent(*args, default=partial(default, **options), **branches)


_FASTEST_BACKEND = Backend(
    product=partial(_by_platform, "product"),
    weight_gradient=partial(_by_platform, "weight_gradient"),
    available=lambda platform, *arrays: "",
    clean=partial(_by_platform, "clean"),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend, x_RI, w_EIO, size_E):
    return backend.product(x_RI, w_EIO, size_E)


def _forward(backend, x_RI, w_EIO, size_E):
    # The product takes the same rows that are kept, or there would be two copies of them.
    x_RI = backend.clean(x_RI, w_EIO, size_E)
    return backend.product(x_RI, w_EIO, size_E), (x_RI, w_EIO, size_E)


def _backward(backend, inputs, g_RO):
    x_RI, w_EIO, size_E = inputs
    g_RO = backend.clean(g_RO, w_EIO, size_E)
    dx_RI = backend.product(g_RO, w_EIO, size_E, transpose_w=True)
    dw_EIO = backend.weight_gradient(x_RI, g_RO, size_E)
    return dx_RI, dw_EIO, np.zeros(size_E.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _check(x_RI, w_EIO, size_E) -> None:
    if x_RI.ndim != 2 or w_EIO.ndim != 3 or size_E.ndim != 1:
        raise ValueError(
            f"grouped_matmul needs x [R, I], w [E, I, O] and size [E], but their shapes are {x_RI.shape}, "
            f"{w_EIO.shape} and {size_E.shape}."
        )
    if x_RI.shape[1] != w_EIO.shape[1] or size_E.shape[0] != w_EIO.shape[0]:
        raise ValueError(
            f"x {x_RI.shape}, w {w_EIO.shape} and size {size_E.shape} do not fit: x's second dimension must "
            "be w's second, and size needs one entry for each of w's matrices."
        )
    if x_RI.dtype != w_EIO.dtype or x_RI.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"x is {x_RI.dtype} and w is {w_EIO.dtype}, but both must be float32 or both bfloat16; cast one."
        )
