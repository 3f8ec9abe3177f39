"""What `collectives` reads in small programs that XLA compiles for 8 simulated devices."""

from tests.devices import run_on_devices

_SETUP = """
import numpy as np
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from switchmoe.parallel.wire import collectives

mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
both = P(("data", "expert"))

def array(shape, spec=P(), dtype=jnp.float32, mesh=mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def compiled(function, *arguments, mesh=mesh, **shard):
    # A device sees (4, 8) of each argument that is split over both axes.
    inside = jax.shard_map(function, mesh=mesh, in_specs=both, out_specs=both, **shard)
    return collectives(jax.jit(inside).lower(*arguments).compile(), mesh)

def short(entries):
    return sorted((e.kind, e.shape, e.axes, e.devices, e.times, e.wire_bytes) for e in entries)

rows = array((32, 8), both)
"""


def test_programs_of_eight_devices():
    run_on_devices(8, _SETUP + _EACH_KIND + _SCAN + _FUSED + _ORDER)


_EACH_KIND = """
def each_kind(x):
    return (
        lax.all_gather(x, "expert", tiled=True).sum(keepdims=True),
        lax.psum_scatter(jnp.tile(x, (2, 1)), "data", tiled=True),
        lax.psum(x, ("data", "expert")),
        lax.pmax(x, "data"),
        lax.ppermute(x, "expert", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        lax.all_to_all(x, "expert", 0, 0, tiled=True),
    )

# 4 * 8 * 4 = 128 bytes on a device.
assert short(compiled(each_kind, rows, check_vma=False)) == [
    ("all-gather", (4, 8), ("expert",), 4, 1, 3 * 128),
    ("all-reduce", (4, 8), ("data",), 2, 1, 128),
    ("all-reduce", (4, 8), ("data", "expert"), 8, 1, 2 * 128 * 7 // 8),
    ("all-to-all", (4, 1, 8), ("expert",), 4, 1, 96),
    ("collective-permute", (4, 8), ("expert",), 4, 1, 128),
    ("reduce-scatter", (8, 8), ("data",), 2, 1, 128),
]
"""

_SCAN = """
def layers(x):
    def body(x, scale):
        with jax.named_scope("moe"):
            return lax.all_to_all(jnp.tanh(x * scale), "expert", 0, 0, tiled=True), None
    return lax.scan(body, x, jnp.arange(3.0))[0]

def gradient(x):
    return jax.grad(lambda x: (layers(x) ** 2).sum())(x)

# One forward and one back, each three times.
entries = compiled(gradient, rows)
assert short(entries) == [("all-to-all", (4, 1, 8), ("expert",), 4, 3, 96)] * 2, entries
assert all(e.times_known and "/moe/" in e.op_name for e in entries)
assert sorted("transpose" in e.op_name for e in entries) == [False, True]
"""

_FUSED = """
# Replicated weights, split rows: XLA adds up every gradient over all devices, in one all-reduce of its own.
def loss(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w) @ w.T
    return (x ** 2).sum()

weights = [array((8, 16)) for _ in range(3)]
program = jax.jit(jax.value_and_grad(loss)).lower(weights, rows).compile()
entries = collectives(program, mesh)
assert collectives(program.as_text(), mesh) == entries
assert {(e.kind, e.axes) for e in entries} == {("all-reduce", ("data", "expert"))}
shapes = sorted(e.shape for e in entries)
assert shapes == [()] + [(8, 16)] * 3 + [(16, 8)] * 3, shapes
assert len({e.name for e in entries}) < len(entries), "XLA merged nothing, so this shows nothing"
assert {e.op_name.rsplit("/", 1)[1] for e in entries} == {"reduce_sum", "dot_general"}
"""

_ORDER = """
# The program counts devices by their place in the mesh, not by their id.
mixed = Mesh(np.array(jax.devices())[[3, 6, 0, 5, 1, 7, 2, 4]].reshape(2, 4), ("data", "expert"))
x = array((32, 8), both, mesh=mixed)
entries = compiled(lambda x: lax.psum(x, "data") + lax.pmax(x, "expert"), x, mesh=mixed, check_vma=False)
assert short(entries) == [
    ("all-reduce", (4, 8), ("data",), 2, 1, 128),
    ("all-reduce", (4, 8), ("expert",), 4, 1, 192),
]
"""
