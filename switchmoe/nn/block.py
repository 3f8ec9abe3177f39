"""One layer of a Transformer: attention, then a feed-forward layer, each with its norm and residual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.layer import Trace
from switchmoe.nn.attention import Attention
from switchmoe.nn.cache import KeysValues, LayerCache
from switchmoe.nn.mlp import MLP
from switchmoe.nn.moe import MoE
from switchmoe.nn.norm import RMSNorm
from switchmoe.parallel import Layout, constrain
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key


def drop_features(
    x: Float[Array, "*shape"], rate: float, *, train: bool, key: ScalarKey | None
) -> Float[Array, "*shape"]:
    """Set each feature of a token to 0 with probability `rate`, in training, and scale up the ones that stay.

    Raises:
      ValueError: if features are to be dropped and there is no key.
    """
    if not train or rate == 0.0:
        return x
    if key is None:
        raise ValueError(f"dropout is {rate}, so training needs a PRNG key; pass key=jax.random.key(...).")
    stays = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(stays, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


class BlockOutput(NamedTuple):
    """What a layer makes of its tokens.

    Attributes:
      x_BSD: the tokens.
      aux: a sparse layer's sums, None for a dense layer.
      trace: where a sparse layer's tokens went, None unless asked for.
      cache: the keys and values there were and the tokens' own; None unless some were given.
    """

    x_BSD: Float[Array, "B S D"]
    aux: MoEAux | None = None
    trace: Trace | None = None
    cache: LayerCache | None = None


class Block(nnx.Module):
    """Let a token look around, then think: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Pre-norm, as in Xiong et al. 2020, https://arxiv.org/abs/2002.04745. With `cross_attention`, a step
    between the two lets the token look at an encoder's tokens: x + cross_attention(norm(x)). The feed-forward
    layer is dense (`MLP`) or sparse (`MoE`), made by the caller. A token that a sparse layer drops goes on
    unchanged through the residual.
    """

    # Only in a decoder beside an encoder.
    cross_attention: Attention
    cross_attention_norm: RMSNorm

    def __init__(
        self,
        d_model: int,
        attention: Attention,
        feed_forward: MLP | MoE,
        *,
        norm_eps: float,
        dropout: float = 0.0,
        cross_attention: Attention | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ) -> None:
        self.dropout = dropout
        self.attention_norm = RMSNorm(d_model, eps=norm_eps, dtype=param_dtype)
        self.attention = attention
        if cross_attention is not None:
            self.cross_attention_norm = RMSNorm(d_model, eps=norm_eps, dtype=param_dtype)
            self.cross_attention = cross_attention
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps, dtype=param_dtype)
        self.feed_forward = feed_forward

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        seen_BSS: Bool[Array, "batch 1 queries places"] | None = None,
        bias_HSM: Float[Array, "1 heads S places"] | None = None,
        source: Float[Array, "B P D"] | KeysValues | None = None,
        source_seen_BSP: Bool[Array, "rows 1 1 sources"] | None = None,
        mask_BS: Bool[Array, "B S"] | None = None,
        ids_BS: Int[Array, "B S"] | None = None,
        replay_BSK: Int[Array, "B S K"] | None = None,
        train: bool = False,
        key: ScalarKey | None = None,
        trace: bool = False,
        cache: LayerCache | None = None,
        layout: Layout | None = None,
    ) -> BlockOutput:
        """Pass the tokens through the layer.

        `seen_BSS` comes from `causal_mask`, `bias_HSM` from `RelativePositions`; `source` is what an encoder
        made of its P tokens, or `cross_attention.keys_values` of that; `mask_BS` is False at padding,
        `ids_BS` are the tokens' ids, for a router that looks at them, `replay_BSK` the experts to use instead
        of the router's choice, `key` feeds dropout and the router's noise in training. With a `cache` the
        tokens see those in it too, `seen_BSS` being over all its places. `layout` splits rows and weights
        over a mesh.
        """

        def residual(y_BSD: Array, name: str) -> Array:
            noise_key = None if key is None else named_key(key, f"{name}_dropout")
            return x_BSD + drop_features(y_BSD, self.dropout, train=train, key=noise_key)

        h_BSD, offered = self.attention_norm(x_BSD), None
        if cache is not None:
            cache = cache.write(self.attention.keys_values(h_BSD, positions_BS, layout=layout))
            offered = cache.read()
        options: dict[str, Any] = dict(positions_BS=positions_BS, seen_BSS=seen_BSS, bias_HSM=bias_HSM)
        x_BSD = residual(self.attention(h_BSD, offered=offered, layout=layout, **options), "attention")

        if source is not None:
            if not isinstance(source, KeysValues):
                source = self.cross_attention.keys_values(source, layout=layout)
            h_BSD = self.cross_attention_norm(x_BSD)
            mixed_BSD = self.cross_attention(h_BSD, seen_BSS=source_seen_BSP, offered=source, layout=layout)
            x_BSD = residual(mixed_BSD, "cross_attention")

        options = dict(
            train=train,
            key=None if key is None else named_key(key, "moe"),
            mask=mask_BS,
            token_ids=ids_BS,
            replay=replay_BSK,
            layout=layout,
        )
        y_BSD, aux, where = self._think(self.feed_forward_norm(x_BSD), trace, options)
        x_BSD = residual(y_BSD, "feed_forward")
        return BlockOutput(constrain(layout, x_BSD, "BSD"), aux, where, cache)

    def _think(
        self, h_BSD: Float[Array, "B S D"], trace: bool, options: dict[str, Any]
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, Trace | None]:
        """Pass the tokens through the feed-forward layer, dense or sparse."""
        if isinstance(self.feed_forward, MLP):
            return self.feed_forward(h_BSD, layout=options["layout"]), None, None
        if trace:
            return self.feed_forward.trace(h_BSD, **options)
        return *self.feed_forward(h_BSD, **options), None
