"""What one layer sends between 8 devices, read in the program that XLA makes of it.

16 rows of S=6 tokens of D=12 features; E=8 experts of F=20, with C=3 seats in each row's group. A sum over at
most E numbers is one of `MoEAux` or a loss: these are listed apart.
"""

from tests.devices import run_on_devices

_SETUP = """
import math
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import switchmoe as sm
from switchmoe.experts import ExpertParams
from switchmoe.parallel import Layout, make_mesh, moe
from switchmoe.parallel.wire import collectives
from switchmoe.routing import aux_loss

B, S, D, E, F, C = 16, 6, 12, 8, 20, 3
config = sm.MoEConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=C)

def wire(sizes, *, gradient=True, **how):
    # What is sent, apart from small sums. Arguments and gradients are stored as the rules say.
    layout = Layout(make_mesh(**sizes), **how)

    def placed(array, spec):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout.sharding(spec))

    params = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config))
    specs = ExpertParams(layout.weight_spec("EDF", 0), layout.weight_spec("EFD", 0), None)
    params = params._replace(
        router=jax.tree.map(lambda a: placed(a, P()), params.router),
        experts=jax.tree.map(placed, params.experts, specs),
    )
    x = placed(jax.ShapeDtypeStruct((B, S, D), jnp.float32), layout.batch_spec())

    def forward(params, x):
        return moe(params, x, config, layout=layout, train=True)

    def loss(params, x):
        y, aux = forward(params, x)
        return (y ** 2).sum() + aux_loss(aux, config), aux

    run = jax.jit(forward)
    if gradient:
        stored = jax.tree.map(lambda a: a.sharding, (params, x))
        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), out_shardings=(stored, None))
    # Machine code of lower quality, made sooner: what is sent does not depend on it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    entries = collectives(run.lower(params, x).compile(compiler_options=quick), layout.mesh)
    assert all(e.times == 1 and e.times_known for e in entries), entries
    small = [e for e in entries if e.kind == "all-reduce" and math.prod(e.shape) <= E]
    used = tuple(name for name in ("data", "fsdp", "expert") if layout.mesh.shape[name] > 1)
    assert {e.axes for e in small} == {used}, small
    return [e for e in entries if e not in small]

def check(entries, *expected):
    found = sorted((e.kind, e.shape, e.axes) for e in entries)
    assert found == sorted(expected), f"{found} instead of {sorted(expected)}"

def travel(entries, groups, devices, count):
    # Seats of all experts, to their device and back: every device keeps its own part of them.
    there = [e for e in entries if e.kind == "all-to-all"]
    assert len(there) == count, there
    for e in there:
        assert e.axes == ("expert",) and e.devices == devices
        assert e.wire_bytes == groups * E * C * D * 4 * (devices - 1) // devices
    return [e for e in entries if e not in there]
"""

_ALL_TO_ALL = """
rest = travel(wire({"data": 1, "expert": 8}, gradient=False), groups=2, devices=8, count=2)
check(rest)
rest = travel(wire({"data": 1, "expert": 8}), groups=2, devices=8, count=4)
check(rest, ("all-reduce", (D, E), ("expert",)))  # the router's gradient

# In two parts, as many bytes.
rest = travel(wire({"data": 1, "expert": 8}, chunks=2), groups=1, devices=8, count=8)
check(rest, ("all-reduce", (D, E), ("expert",)))

# The experts' gradients are summed over those who have the same experts; the router's over all.
sums = [
    ("all-reduce", (E // 4, D, F), ("data",)),
    ("all-reduce", (E // 4, F, D), ("data",)),
    ("all-reduce", (D, E), ("data", "expert")),
]
check(travel(wire({"data": 2, "expert": 4}), groups=2, devices=4, count=4), *sums)
"""

_STORED_IN_PARTS = """
# A device stores half of its experts' model features, and half of the hidden ones are all it ever has.
rest = travel(wire({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}), groups=4, devices=2, count=4)
over_tensor = [e for e in rest if "tensor" in e.axes]
check(
    [e for e in rest if e not in over_tensor],
    ("all-gather", (E // 2, D // 2, F // 2), ("fsdp",)),
    ("all-gather", (E // 2, F // 2, D // 2), ("fsdp",)),
    ("reduce-scatter", (E // 2, D, F // 2), ("fsdp",)),
    ("reduce-scatter", (E // 2, F // 2, D), ("fsdp",)),
    ("all-reduce", (D, E), ("fsdp", "expert")),
)
# What the halves say is added up, token by token: outputs, and the gradients of inputs and of seats' weights.
tokens = ("all-reduce", (4, S, D), ("tensor",))
check(over_tensor, tokens, tokens, ("all-reduce", (4 * E * C,), ("tensor",)))

# Half of a gradient is kept, and only that half is summed over data.
check(
    travel(wire({"data": 2, "fsdp": 2, "expert": 2}), groups=2, devices=2, count=4),
    ("all-gather", (E // 2, D // 2, F), ("fsdp",)),
    ("all-gather", (E // 2, F, D // 2), ("fsdp",)),
    ("reduce-scatter", (E // 2, D, F), ("fsdp",)),
    ("reduce-scatter", (E // 2, F, D), ("fsdp",)),
    ("all-reduce", (E // 2, D // 2, F), ("data",)),
    ("all-reduce", (E // 2, F, D // 2), ("data",)),
    ("all-reduce", (D, E), ("data", "fsdp", "expert")),
)
"""

_ALL_GATHER = """
# The tokens of a device's 2 groups are shown to the 4 along the expert axis, and sums for 8 groups scattered
# back. The plan travels with them: a few numbers for each token or seat.
for gradient in (False, True):
    rest = wire({"data": 2, "expert": 4}, executor="all_gather", gradient=gradient)
    tokens = [e for e in rest if e.shape in ((2, S, D), (8, S, D))]
    shown, back = ("all-gather", (2, S, D), ("expert",)), ("reduce-scatter", (8, S, D), ("expert",))
    check(tokens, *[shown, back] * (1 + gradient))
    assert {e.wire_bytes for e in tokens} == {2 * S * D * 4 * 3}
    plan = [e for e in rest if e not in tokens and math.prod(e.shape) <= 2 * E * C]
    assert {(e.kind, *e.axes) for e in plan} == {("all-to-all", "expert"), ("all-gather", "expert")}, plan
    check([e for e in rest if e not in tokens + plan], *sums * gradient)
"""


def test_what_a_layer_sends():
    run_on_devices(8, _SETUP + _ALL_TO_ALL + _STORED_IN_PARTS + _ALL_GATHER)
