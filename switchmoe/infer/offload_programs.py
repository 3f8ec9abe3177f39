"""The compiled parts of a pass whose experts come from the host: all that needs no expert."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.infer.request import Request, Shape
from switchmoe.infer.steps import Progress, choose_tokens
from switchmoe.models.cache import Cache
from switchmoe.nn import LayerCache


@functools.lru_cache(maxsize=16)
def make_programs(graphdef: nnx.GraphDef, graphs: tuple[nnx.GraphDef, ...]) -> "Programs":
    """Make the programs of a model; the same ones for models that differ in their weights alone."""
    return Programs(graphdef, graphs)


class Programs:
    """The parts of a pass that need no expert, compiled; `ask` is one for each stack.

    They are made in one long function, since all of them close over the model's graph, which jax must not
    look at as an argument with each call.
    """

    def __init__(self, graphdef: nnx.GraphDef, graphs: tuple[nnx.GraphDef, ...]) -> None:
        def begin(state, ids_BS, cache: Cache, mask_BS):
            model, length = nnx.merge(graphdef, state), ids_BS.shape[1]
            cache, positions_BS, places = cache.take(mask_BS, ids_BS)
            options = dict(
                positions_BS=positions_BS,
                seen_BSS=cache.seen_by(length, model.config.window),
                mask_BS=mask_BS,
                ids_BS=ids_BS,
                slot=cache.filled - length,
            )
            if cache.source_mask_BP is not None:
                options["source_seen_BSP"] = cache.source_mask_BP[:, None, None, :]
            if model.config.positions == "relative":
                options["bias_HSM"] = model.positions(*places)
            return model._embed(ids_BS, None, train=False, key=None), options, cache

        def begin_source(state, ids_BP, mask_BP):
            model, place_P = nnx.merge(graphdef, state), jnp.arange(ids_BP.shape[1])
            options = dict(
                positions_BS=jnp.broadcast_to(place_P, ids_BP.shape),
                seen_BSS=mask_BP[:, None, None, :],
                mask_BS=mask_BP,
                ids_BS=ids_BP,
            )
            if model.config.positions == "relative":
                options["bias_HSM"] = model.encoder.positions(place_P, place_P)
            return model._embed(ids_BP, None, train=False, key=None), options

        def end(state, x_BSD):
            model = nnx.merge(graphdef, state)
            return model._score(model.final_norm(x_BSD[:, -1:]), None)[:, -1]

        def start_cache(state, encoded_BPD, source_mask_BP, *, batch, length):
            model = nnx.merge(graphdef, state)
            options = {}
            if encoded_BPD is not None:
                options = dict(encoded_BPD=encoded_BPD, source_mask_BP=source_mask_BP)
            return model.start_cache(batch, length, **options)

        def choose(shape: Shape, request: Request, logits_BV, ended_B, step) -> Progress:
            return choose_tokens(shape, request, logits_BV, None, ended_B, step, None)

        def ask(graph, stacked, index, x_BSD, layers, source, options):
            block = nnx.merge(graph, jax.tree.map(lambda a: a[index], stacked))
            options = dict(options)
            slot, inside = options.pop("slot", None), None
            if layers is not None:
                inside = {name: LayerCache(pair, slot, index) for name, pair in layers.items()}
            own = None if source is None else jax.tree.map(lambda a: a[index], source)
            x_BSD, _, _, inside = block(x_BSD, key=None, cache=inside, source=own, **options)
            asked = getattr(block, block.names[-1]).feed_forward.asked
            if inside is not None:
                layers = {name: layer.kept for name, layer in inside.items()}
            return x_BSD, asked, layers

        self.begin = jax.jit(begin)
        self.begin_source = jax.jit(begin_source)
        self.end = jax.jit(end)
        self.end_source = jax.jit(lambda state, x_BSD: nnx.merge(graphdef, state).encoder.final_norm(x_BSD))
        self.start_cache = jax.jit(start_cache, static_argnames=("batch", "length"))
        self.choose = jax.jit(choose, static_argnums=0)
        self.ask = [
            jax.jit(lambda *arguments, graph=graph: ask(graph, *arguments), donate_argnums=3)
            for graph in graphs
        ]
