"""Weights that are stored in parts along fsdp are put together layer by layer, and never kept."""

from tests.devices import run_on_devices

BODY = """
import jax.numpy as jnp
from switchmoe.config import MoEConfig
from switchmoe.models import LMConfig
from switchmoe.parallel import MeshConfig, make_layout, stored_as
from switchmoe.train.model import pure_model

LAYERS, D, F, E = 8, 32, 512, 8
layout = make_layout(MeshConfig(data=1, fsdp=4, expert=2))
# What a device would have of FFNs and experts, in bytes.
whole = LAYERS // 2 * (2 * D * F + E // 2 * 2 * D * F) * 4
for remat in ("none", "full", "dots", "exchanged"):
    moe = MoEConfig(d_model=D, d_ff=F, num_experts=E)
    config = LMConfig(vocab_size=16, d_model=D, num_layers=LAYERS, d_ff=F, moe=moe, remat=remat)
    model = pure_model(config, layout)
    params = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map_with_path(
        lambda path, a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=layout.sharding(stored_as(layout, path, a.ndim))
        ),
        params,
    )
    places = jax.tree.map(lambda a: a.sharding, params)
    loss = lambda params: model.apply(params, jnp.zeros((8, 4), jnp.int32), train=True)[0].sum()
    compiled = jax.jit(jax.grad(loss), out_shardings=places).lower(params).compile()
    share = compiled.memory_analysis().temp_size_in_bytes / whole
    print(remat, share)
    # A layer or two at a time, forward and backward, with their gradients.
    assert share < 0.75, (remat, share)
"""


def test_no_policy_keeps_weights_that_were_put_together():
    run_on_devices(8, BODY)
