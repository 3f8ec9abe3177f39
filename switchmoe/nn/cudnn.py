"""NVIDIA's fused attention, which jax calls "cudnn": where it is taken unasked, and why it can't run."""

from typing import Any

import jax
import jax.numpy as jnp

from switchmoe.dispatching.grouped_matmul import platform_name

# H100 and H200, where it was measured; others are left to who asks for it by name.
_HOPPER = "9.0"
_MAX_HEAD_DIM, _MIN_LENGTH = 128, 128
# As far as jax lets it go, on some cards.
_MAX_HEAD_DIM_IF_ASKED = 256


def raise_problem(dtype: Any, head_dim: int, lengths: tuple[int, int] | None = None) -> None:
    """Raise a ValueError of one sentence if the kernel surely can't run with these.

    With the `lengths` of queries and keys, which are known when it is called, the platform is looked at too.
    An odd one is refused where there is more than one query, since no gradient could be taken.
    """
    problem = ""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        problem = f"its kernel multiplies bfloat16, not {jnp.dtype(dtype)}; set dtype='bfloat16'"
    elif head_dim % 8 or head_dim > _MAX_HEAD_DIM_IF_ASKED:
        most = _MAX_HEAD_DIM_IF_ASKED
        problem = f"its kernel wants heads of a multiple of 8 features up to {most}, not {head_dim}"
    elif lengths is not None and platform_name() != "cuda":
        problem = f"its kernel is for NVIDIA GPUs, and this process runs on {platform_name()}"
    elif lengths is not None and lengths[0] > 1 and any(length % 2 for length in lengths):
        problem = f"its kernel wants even lengths, not {lengths[0]} tokens that see {lengths[1]}"
    if problem:
        raise ValueError(f"attention implementation 'cudnn' can't run here: {problem}, or take None.")


def is_taken_unasked(dtype: Any, head_dim: int, length: int) -> bool:
    """Say whether `length` tokens that see each other, without a bias, surely can be given to the kernel.

    Its conditions are jax's: 16-bit numbers, heads of a multiple of 8 features, an even length (short ones
    gain nothing). And it has to be a Hopper GPU that this process works on unless told otherwise.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or head_dim % 8 or head_dim > _MAX_HEAD_DIM:
        return False
    if length % 2 or length < _MIN_LENGTH:
        return False
    settings: Any = jax.config
    if platform_name() != "cuda" or settings.jax_default_device is not None:
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == _HOPPER
