"""What a model needs in memory while it generates: all experts against those a token meets, and its cache."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from switchmoe.models import LMConfig, TransformerLM
from switchmoe.models.cache import empty_cache
from switchmoe.models.layer_cost import decide_shapes
from switchmoe.quantized import quantize_weight
from switchmoe.routing import SoftMix

_EXPERTS = ("w_in_EDF", "w_out_EFD", "w_gate_EDF")
# What weights are kept in: the type of all but the experts, and the experts' bits where they are rounded.
_KEPT_IN = {
    "float32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "int8 experts": (jnp.bfloat16, 8),
    "int4 experts": (jnp.bfloat16, 4),
}


class WeightBytes(NamedTuple):
    """The weights of a model, kept in one way, in bytes.

    Attributes:
      kept_in: "float32" or "bfloat16", or "int8 experts" or "int4 experts" with the rest in bfloat16; routers
        are float32 in each of them.
      all_experts: with every expert, which is what has to be in memory.
      active: with only the experts that one token meets, which is what it has to read.
      experts: of `all_experts`, those of experts, shared ones not among them.
    """

    kept_in: str
    all_experts: int
    active: int
    experts: int


class CacheBytes(NamedTuple):
    """The keys and values of rows of one length, in bytes, in the type that the model computes in."""

    length: int
    batch: int
    bytes: int


class MemoryTable(NamedTuple):
    """What `memory_table` found; printed, it is a table.

    Attributes:
      weights: one row for each way to keep the weights; experts of an odd size can't be kept in 4 bits.
      cache: one row for each length.
    """

    weights: tuple[WeightBytes, ...]
    cache: tuple[CacheBytes, ...]

    def __rich__(self) -> Table:
        table = Table(title="Memory to generate", title_justify="left")
        for name in ("", "all experts", "active", "experts alone"):
            table.add_column(name, justify="right" if name else "left")
        for row in self.weights:
            table.add_row(row.kept_in, *map(readable, (row.all_experts, row.active, row.experts)))
        table.add_section()
        for row in self.cache:
            rows = f"{row.batch} row{'s' if row.batch > 1 else ''}"
            table.add_row(f"cache of {rows} of {row.length:,} tokens", readable(row.bytes))
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def memory_table(
    config: LMConfig, *, lengths: Sequence[int] = (1024, 8192, 32768), batch: int = 1
) -> MemoryTable:
    """Say how much memory a model needs to generate, and how much of it one token makes use of.

    A sparse model has all its experts in memory, though a token meets few of them: k of E in each sparse
    layer (all of them with Soft MoE). Counted by the shapes of the model's own arrays; nothing is computed.
    An encoder's weights count as well, and its tokens' keys and values, which depend on the source, do not.

    Args:
      config: the model.
      lengths: of rows, prompt and new tokens together, that a cache is counted for.
      batch: rows at a time.
    """
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    weights = nnx.to_flat_state(nnx.state(model))
    arrays = [(path[-1], variable.get_value()) for path, variable in weights]
    rows = []
    for name in _KEPT_IN:
        with contextlib.suppress(ValueError):  # sizes that can't be rounded so, as an odd one in 4 bits
            rows.append(_count(config, name, arrays))
    cache = tuple(CacheBytes(length, batch, _cache_bytes(config, batch, length)) for length in lengths)
    return MemoryTable(tuple(rows), cache)


def _count(config: LMConfig, kept_in: str, arrays: list[tuple[Any, Any]]) -> WeightBytes:
    dtype, bits = _KEPT_IN[kept_in]
    rest = experts = 0
    for name, array in arrays:
        own = name.removeprefix("shared_")
        if own not in _EXPERTS:
            # Only routers and what belongs to them is float32 whatever the rest is: it is about experts too.
            rest += array.size * (4 if _is_router(name) else jnp.dtype(dtype).itemsize)
            continue
        if bits is None:
            size = array.size * jnp.dtype(dtype).itemsize
        else:
            size = sum(map(_bytes, jax.eval_shape(lambda w, bits=bits: quantize_weight(w, bits), array)))
        if own == name:
            experts += size
        else:
            rest += size
    met = experts
    if config.moe is not None and not isinstance(decide_shapes(config.moe, 1), SoftMix):
        met = experts * config.moe.top_k // config.moe.num_experts
    return WeightBytes(kept_in, rest + experts, rest + met, experts)


def _is_router(name: str) -> bool:
    return "E" in name.rsplit("_", 1)[-1]


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _cache_bytes(config: LMConfig, batch: int, length: int) -> int:
    cache = jax.eval_shape(lambda: empty_cache(config, batch, length))
    return sum(map(_bytes, jax.tree.leaves(cache.layers)))


def readable(size: int) -> str:
    """Write bytes in the largest decimal unit that they fill: 93.4 GB."""
    unit = min(max(0, (len(str(int(size))) - 1) // 3), 4)
    return f"{size / 1000**unit:.{0 if unit == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
