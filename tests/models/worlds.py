"""Small models that several tests share, made once: compiling is what these tests spend their time on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.routing.metrics import aux_loss

# In training tokens are dropped, in evaluation none can be.
SPARSE = LMConfig(
    vocab_size=17,
    d_model=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    moe=MoEConfig(
        d_model=16, d_ff=24, num_experts=4, capacity_factor=1.0, eval_capacity_factor=4.0, drop_order="token"
    ),
    moe_every=2,
)
DENSE = dataclasses.replace(SPARSE, moe=None)


def abstract_params(config: LMConfig):
    """Split a model as the trainer does, (graphdef, params), with shapes in place of numbers."""
    graphdef, params, _ = nnx.split(
        nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    return graphdef, params


def params_of(config: LMConfig, seed: int = 0):
    """Split a model as the trainer does, (graphdef, params); models of the same shapes share their draw."""
    graphdef, shapes = abstract_params(config)
    layout = tuple((path, leaf.shape) for path, leaf in nnx.to_flat_state(shapes))
    if (layout, seed) not in _DRAWN:
        _DRAWN[layout, seed] = nnx.state(TransformerLM(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return graphdef, _DRAWN[layout, seed]


_DRAWN = {}


def model_of(config: LMConfig, seed: int = 0) -> TransformerLM:
    """Make a model with weights of its own."""
    graphdef, params = params_of(config, seed)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, params))


@functools.cache
def _forward(config: LMConfig, train: bool):
    graphdef, _ = abstract_params(config)
    return jax.jit(lambda params, ids, options: nnx.merge(graphdef, params)(ids, train=train, **options))


def run(config: LMConfig, ids, *, train: bool = False, params=None, **options):
    """Compute (logits, aux) with a model of `config`, compiled once for all options of the same shape."""
    everything = {
        "segments_BS": jnp.ones(ids.shape, jnp.int32),
        "positions_BS": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        "mask_BS": jnp.ones(ids.shape, bool),
        **options,
    }
    return _forward(config, train)(params_of(config)[1] if params is None else params, ids, everything)


def loss_of(graphdef, config: LMConfig, ids, **options):
    """The training loss as a function of the parameters."""

    def loss(params):
        logits, aux = nnx.merge(graphdef, params)(ids, train=True, **options)
        scores = jax.nn.log_softmax(logits[:, :-1])
        task = -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean()
        return task if aux is None else task + aux_loss(aux, config.moe)

    return loss


def some_ids(rows: int = 4, length: int = 24, seed: int = 1):
    """Random token ids of the small vocabulary."""
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, SPARSE.vocab_size)


def count_equations(jaxpr) -> int:
    """Count the equations of a program, those of inner programs too."""
    return sum(1 + sum(map(count_equations, _inner(equation))) for equation in jaxpr.eqns)


def count_flops(jaxpr) -> int:
    """Count two FLOPs a multiply-add of every matrix product, a scan's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * _product(out) * _product(left[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        # Of the branches of a choice, as between platforms, one runs; they all do the same products here.
        join = max if equation.primitive.name == "cond" else sum
        total += times * join([0, *map(count_flops, _inner(equation))])
    return total


def _inner(equation):
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "jaxpr"):
                part = part.jaxpr
            if hasattr(part, "eqns"):
                yield part


def _product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
