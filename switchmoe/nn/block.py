"""One layer of a Transformer: attention, then a feed-forward layer, each with its norm and residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.layer import Trace
from switchmoe.nn.attention import Attention
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


class Block(nnx.Module):
    """Let a token look around, then think: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Pre-norm, as in Xiong et al. 2020, https://arxiv.org/abs/2002.04745. The feed-forward layer is dense
    (`MLP`) or sparse (`MoE`), made by the caller. A token that a sparse layer drops goes on unchanged through
    the residual.
    """

    def __init__(
        self,
        d_model: int,
        attention: Attention,
        feed_forward: MLP | MoE,
        *,
        norm_eps: float,
        dropout: float = 0.0,
    ) -> None:
        self.dropout = dropout
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps)
        self.feed_forward = feed_forward

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        positions_BS: Int[Array, "B S"] | None = None,
        seen_BSS: Bool[Array, "batch 1 S S"] | None = None,
        mask_BS: Bool[Array, "B S"] | None = None,
        ids_BS: Int[Array, "B S"] | None = None,
        replay_BSK: Int[Array, "B S K"] | None = None,
        train: bool = False,
        key: ScalarKey | None = None,
        trace: bool = False,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, Trace | None]:
        """Pass the tokens through the layer.

        `seen_BSS` comes from `causal_mask`, `mask_BS` is False at padding, `ids_BS` are the tokens' ids, for
        a router that looks at them, `replay_BSK` the experts to use instead of the router's choice, `key`
        feeds dropout and the router's noise in training, `layout` splits rows and weights over a mesh.
        Returns (x, aux, trace): aux is None for a dense layer, trace is too unless asked for.
        """

        def key_for(name: str) -> ScalarKey | None:
            return None if key is None else named_key(key, name)

        mixed_BSD = self.attention(
            self.attention_norm(x_BSD), positions_BS=positions_BS, seen_BSS=seen_BSS, layout=layout
        )
        x_BSD = x_BSD + drop_features(mixed_BSD, self.dropout, train=train, key=key_for("attention_dropout"))

        h_BSD, aux, where = self.feed_forward_norm(x_BSD), None, None
        options: dict[str, Any] = dict(
            train=train,
            key=key_for("moe"),
            mask=mask_BS,
            token_ids=ids_BS,
            replay=replay_BSK,
            layout=layout,
        )
        if isinstance(self.feed_forward, MLP):
            y_BSD = self.feed_forward(h_BSD, layout=layout)
        elif trace:
            y_BSD, aux, where = self.feed_forward.trace(h_BSD, **options)
        else:
            y_BSD, aux = self.feed_forward(h_BSD, **options)
        x_BSD = x_BSD + drop_features(y_BSD, self.dropout, train=train, key=key_for("feed_forward_dropout"))
        return constrain(layout, x_BSD, "BSD"), aux, where
