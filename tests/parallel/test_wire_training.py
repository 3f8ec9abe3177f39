"""What a whole training step sends between 8 devices, read in the program that XLA makes of it.

Two times a dense and a sparse layer, scanned. Every size is a number of its own, so that a shape says what it
is of: 16 rows of S=11 tokens of D=24 features, 4 heads of 18 (2 for keys), FFNs of 40 and E=8 experts of F=28
with C=3 seats in each row's group. A sum over at most 16 numbers is one of `MoEAux`, of the loss, or of the
gradient's norm: these are listed apart.
"""

import pytest

from tests.devices import run_on_devices

_SETUP = """
import math
from switchmoe.config import MoEConfig
from switchmoe.data import Batch, DataConfig
from switchmoe.models import LMConfig
from switchmoe.parallel import Layout, make_mesh
from switchmoe.parallel.wire import collectives
from switchmoe.train import OptimizerConfig, TrainConfig, TrainSettings
from switchmoe.train.model import pure_model
from switchmoe.train.placement import abstract_state, jit_step
from switchmoe.train.step import make_train_step

LAYERS, B, S, D, E, F, C = 2, 16, 11, 24, 8, 28, 3

def wire(sizes, remat):
    # (what is sent apart from small sums, the small sums, the weights, the axes that rows are split over)
    moe = MoEConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=C, drop_order="token")
    model = LMConfig(
        d_model=D, num_layers=2 * LAYERS, num_heads=4, num_kv_heads=2, head_dim=18, d_ff=40, moe=moe,
        remat=remat, tie_embeddings=False,
    )
    settings = TrainSettings(steps=4, batch_size=B)
    config = TrainConfig("test", model, DataConfig(sequence_length=S), OptimizerConfig(), settings)
    layout = Layout(make_mesh(**sizes))
    model = pure_model(config.model, layout)
    state = abstract_state(config, model)

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(layout.batch_spec()))

    ids, weights, mask = rows("int32", B, S), rows("float32", B, S), rows("bool", B, S)
    batch = Batch(ids, ids, ids, ids, weights, mask, rows("int32", B))
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jit_step(make_train_step(config, model), config, model).lower(state, batch, key)
    # Machine code of lower quality, made in half the time: what is sent does not depend on it.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    entries = collectives(lowered.compile(compiler_options=quick), layout.mesh)
    assert all(e.times_known for e in entries), entries
    small = [e for e in entries if e.kind == "all-reduce" and math.prod(e.shape) <= LAYERS * E]
    return [e for e in entries if e not in small], small, state.params, layout.row_axes

def travel(entries, groups, devices, count):
    # Each layer's seats, there and back, again where the forward pass is repeated, and their gradients.
    there = [e for e in entries if e.kind == "all-to-all"]
    assert sum(e.times for e in there) == count * LAYERS, there
    for e in there:
        assert e.axes == ("expert",) and e.devices == devices and e.times == LAYERS
        assert e.wire_bytes == groups * E * C * D * 4 * (devices - 1) // devices
    return [e for e in entries if e not in there]

def are_weights(entries):
    # No tokens: a dimension over positions, or over all positions of rows, would be a multiple of S.
    assert not [e for e in entries if any(dim % S == 0 for dim in e.shape)], entries
    experts = [e for e in entries if F in e.shape or F // 2 in e.shape]
    return experts, [e for e in entries if e not in experts]

def numbers(params, over=()):
    # Of the weights that are not experts: those outside the scan, and those inside. With axes (of 2 devices),
    # only of weights that are split over the first one, and in each of the parts that these axes make.
    found = {True: 0, False: 0}
    for path, weight in jax.tree.leaves_with_path(params):
        name, axes = jax.tree_util.keystr(path), [axis for axis in weight.sharding.spec if axis in over]
        if "_EDF" not in name and "_EFD" not in name and (not over or over[0] in axes):
            found["blocks" in name] += weight.size // 2 ** len(axes)
    return found[False], found[True]

def sent(entries):
    return sum(math.prod(e.shape) * e.times for e in entries)

def add_up(entries):
    return {axes: sent([e for e in entries if e.axes == axes]) for axes in {e.axes for e in entries}}
"""

_BY_DATA = """
rest, small, params, rows = wire({"data": 2, "expert": 4}, "full")
assert rows == ("data", "expert")
rest = travel(rest, groups=2, devices=4, count=6)
experts, others = are_weights(rest)
assert {(e.kind, e.shape, e.axes, e.times) for e in experts} == {
    ("all-reduce", (E // 4, D, F), ("data",), LAYERS),
    ("all-reduce", (E // 4, F, D), ("data",), LAYERS),
}, experts
assert len(experts) == 2
# Every other weight's gradient, once.
assert {(e.kind, e.axes) for e in others} == {("all-reduce", rows)}, others
assert sent(others) == sum(numbers(params)), others
assert {e.axes for e in small} <= {rows, ("expert",)}, small  # the norm of split gradients is summed by axis
"""

_IN_PARTS = """
rest, small, params, rows = wire({"data": 2, "fsdp": 2, "expert": 2}, "exchanged")
assert rows == ("data", "fsdp", "expert")
rest = travel(rest, groups=2, devices=2, count=4)
experts, others = are_weights(rest)
# An expert's matrix is gathered where it is used, forward and backward; of its gradient, a part is summed.
gathered = [
    ("all-gather", (E // 2, D // 2, F), ("fsdp",), LAYERS),
    ("all-gather", (E // 2, F, D // 2), ("fsdp",), LAYERS),
]
assert sorted((e.kind, e.shape, e.axes, e.times) for e in experts) == sorted([
    *gathered,
    *gathered,
    ("reduce-scatter", (E // 2, D, F), ("fsdp",), LAYERS),
    ("reduce-scatter", (E // 2, F, D), ("fsdp",), LAYERS),
    ("all-reduce", (E // 2, D // 2, F), ("data",), LAYERS),
    ("all-reduce", (E // 2, F, D // 2), ("data",), LAYERS),
]), experts
# So is every other matrix, embedding and head once; gradients are summed over everything that has rows.
gathers = [e for e in others if e.kind == "all-gather"]
assert {e.axes for e in gathers} == {("fsdp",)}, gathers
outside, inside = numbers(params, over=("fsdp",))
assert sent(gathers) == outside + 2 * inside, gathers
sums = [e for e in others if e not in gathers]
assert {e.kind for e in sums} == {"all-reduce"}, sums
# A layer's matrix over fsdp first, of which each device keeps a part, and that part over the rest.
assert add_up(sums) == {
    ("fsdp",): 2 * inside,
    ("data", "expert"): inside,
    rows: sum(numbers(params)) - 2 * inside,
}, sums
assert {e.axes for e in small} == {rows, ("expert",), ("fsdp",)}, small
"""

_BY_TENSOR = """
rest, small, params, rows = wire({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, "full")
assert rows == ("fsdp", "expert")
rest = travel(rest, groups=4, devices=2, count=6)
# Devices along tensor have the same tokens and other weights: they add up each other's outputs, of two
# attentions, a dense and a sparse FFN, and gradients; those of the seats' weights too.
tokens = [e for e in rest if "tensor" in e.axes]
seats = [e for e in tokens if math.prod(e.shape) == 4 * E * C]
found = {(e.kind, e.shape, e.axes) for e in tokens if e not in seats}
assert found == {("all-reduce", (4, S, D), ("tensor",))}, tokens
assert len([e for e in tokens if "transpose" not in e.op_name]) == 4, tokens
experts, others = are_weights([e for e in rest if e not in tokens])
assert {(e.kind, e.shape, e.axes, e.times) for e in experts} == {
    ("all-gather", (E // 2, D // 2, F // 2), ("fsdp",), LAYERS),
    ("all-gather", (E // 2, F // 2, D // 2), ("fsdp",), LAYERS),
    ("reduce-scatter", (E // 2, D, F // 2), ("fsdp",), LAYERS),
    ("reduce-scatter", (E // 2, F // 2, D), ("fsdp",), LAYERS),
}, experts
gathers = [e for e in others if e.kind == "all-gather"]
assert {e.axes for e in gathers} == {("fsdp",)}, gathers
outside, inside = numbers(params, over=("fsdp", "tensor"))
assert sent(gathers) == outside + 2 * inside, gathers
sums = [e for e in others if e not in gathers]
assert {e.kind for e in sums} == {"all-reduce"}, sums
assert set(add_up(sums)) == {("fsdp",), ("expert",), rows}, sums
assert add_up(sums)["fsdp",] == 2 * inside and add_up(sums)["expert",] == inside, sums
"""


@pytest.mark.parametrize("body", [_BY_DATA, _IN_PARTS, _BY_TENSOR], ids=["data", "fsdp", "tensor"])
def test_what_a_step_sends(body):
    run_on_devices(8, _SETUP + body)
