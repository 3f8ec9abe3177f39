"""A decoder-only language model with stacked layers, so that a deep one compiles as fast as a shallow one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.layer import Trace
from switchmoe.models.config import LMConfig
from switchmoe.nn import MLP, Attention, Block, MoE, RMSNorm, causal_mask, drop_features, rematerialize
from switchmoe.nn.weights import fan_in_normal
from switchmoe.parallel import Layout, constrain, gather_weight, gather_weights
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key
from switchmoe.trace import RouterTrace


class SuperBlock(nnx.Module):
    """`moe_every` layers of a model, `layer_0`, `layer_1`, ...; the last one's FFN may be sparse."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs) -> None:
        key = rngs.params()
        self.num_layers = config.moe_every
        for layer in range(config.moe_every):
            name = f"layer_{layer}"
            setattr(self, name, _make_layer(config, layer == config.moe_every - 1, named_key(key, name)))

    def __call__(
        self, x_BSD: Float[Array, "B S D"], *, key: ScalarKey | None, **options: Any
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, Trace | None]:
        """Pass the tokens through the layers in turn; `options` are those of `Block`."""
        aux = where = None
        for layer in range(self.num_layers):
            name = f"layer_{layer}"
            layer_key = None if key is None else named_key(key, name)
            x_BSD, aux, where = getattr(self, name)(x_BSD, key=layer_key, **options)
        return x_BSD, aux, where


class TransformerLM(nnx.Module):
    """Predict every position's next token from the tokens so far, some FFNs being mixtures of experts.

    Pre-norm layers, rotary positions, grouped key/value heads, no biases. The super-blocks are one
    `SuperBlock` whose parameters carry a leading dimension, one entry a super-block, and the forward pass
    scans over it.

    Parameters, all float32 and `nnx.Param`: `embedding_VD`, `blocks`, `final_norm`, and `head_DV` unless
    the head is tied. The embedding starts with standard deviation d_model ** -0.5, so that a tied head gives
    logits of about unit variance behind the final norm; it is not scaled up on the way in, so the first loss
    is close to log(vocab_size). Attention and dense FFN matrices start with sqrt(init_scale / fan_in), the
    residual's writers among them, sparse layers with an init_scale of their own. Each weight's key comes
    from its name and layer. Sparse layers that are balanced by a bias have it as `BalanceBias` beside them.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs) -> None:
        key = rngs.params()
        self.config = config
        table = (config.d_model, config.vocab_size)
        self.embedding_VD = nnx.Param(fan_in_normal(key, "embedding_VD", table).T)
        self.blocks = _stack_super_blocks(config, named_key(key, "blocks"))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head_DV = nnx.Param(fan_in_normal(key, "head_DV", table, scale=config.init_scale))

    def __call__(
        self,
        ids_BS: Int[Array, "B S"],
        *,
        segments_BS: Int[Array, "B S"] | None = None,
        positions_BS: Int[Array, "B S"] | None = None,
        mask_BS: Bool[Array, "B S"] | None = None,
        replay: Int[Array, "L B S K"] | None = None,
        train: bool = False,
        key: ScalarKey | None = None,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S V"], MoEAux | None]:
        """Score every possible next token at every position.

        Args:
          ids_BS: token ids. One outside the vocabulary gives NaN logits (`check_tokens` says it in words, on
            the host).
          segments_BS: which document of a packed row a token belongs to; it sees its own document only.
          positions_BS: place of a token in its document; 0, 1, ... along the row if None.
          mask_BS: False at padding, which nothing else looks at, takes no seat and counts in no sum.
          replay: the experts to use instead of the routers' choices, `RouterTrace.expert_LBSK` of an earlier
            pass over rows of the same shape; their weights are computed again.
          train: use the training capacity and noise.
          key: source of dropout and of the routers' and experts' noise; needed only in training and only if
            the config has any.
          layout: how rows, experts and weights are split over a mesh; None for one device.

        Returns:
          (logits_BSV in float32, aux): the sums of the sparse layers stacked along a leading L, None for a
          dense model.

        Raises:
          ValueError: one sentence, if rows and groups, or rows and replay, do not fit or a key is missing.
        """
        logits_BSV, aux, _ = self._run(
            ids_BS, segments_BS, positions_BS, mask_BS, replay, train, key, layout, trace=False
        )
        return logits_BSV, aux

    def trace(
        self,
        ids_BS: Int[Array, "B S"],
        *,
        segments_BS: Int[Array, "B S"] | None = None,
        positions_BS: Int[Array, "B S"] | None = None,
        mask_BS: Bool[Array, "B S"] | None = None,
        replay: Int[Array, "L B S K"] | None = None,
        train: bool = False,
        key: ScalarKey | None = None,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S V"], MoEAux | None, RouterTrace | None]:
        """Do what a call does, and say where each token went in each sparse layer (None if there is none)."""
        return self._run(ids_BS, segments_BS, positions_BS, mask_BS, replay, train, key, layout, trace=True)

    def _run(self, ids_BS, segments_BS, positions_BS, mask_BS, replay, train, key, layout, *, trace):
        config = self.config
        if replay is not None:
            self._check_replay(replay.shape, ids_BS.shape)
        # mode="fill" turns an id outside the vocabulary into NaN; plain indexing would clamp it in silence.
        x_BSD = jnp.take(self._whole("embedding_VD", layout), ids_BS, axis=0, mode="fill")
        x_BSD = constrain(layout, x_BSD.astype(config.compute_dtype), "BSD")
        embedding_key = None if key is None else named_key(key, "embedding_dropout")
        x_BSD = drop_features(x_BSD, config.dropout, train=train, key=embedding_key)
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
        seen_BSS = causal_mask(segments_BS, mask_BS, ids_BS.shape[1])
        graphdef, stacked = nnx.split(self.blocks)

        def step(x_BSD, block):
            params, index, replay_BSK = block
            if layout is not None:
                params = gather_weights(layout, params, config.compute_dtype)
            block_key = None if key is None else jax.random.fold_in(named_key(key, "blocks"), index)
            x_BSD, aux, where = nnx.merge(graphdef, params)(
                x_BSD,
                positions_BS=positions_BS,
                seen_BSS=seen_BSS,
                mask_BS=mask_BS,
                ids_BS=ids_BS,
                replay_BSK=replay_BSK,
                train=train,
                key=block_key,
                trace=trace,
                layout=layout,
            )
            return x_BSD, (aux, where)

        indices = jnp.arange(config.num_super_blocks)
        gathered_over = () if layout is None else layout.used(layout.rules.model)
        x_BSD, (aux, where) = jax.lax.scan(
            rematerialize(step, config.remat, gathered_over=gathered_over), x_BSD, (stacked, indices, replay)
        )
        logits_BSV = self._score(self.final_norm(x_BSD), layout)
        return logits_BSV, aux, None if where is None else RouterTrace(*where)

    def _check_replay(self, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
        moe = self.config.moe
        if moe is None:
            raise ValueError("This model is dense, so it has no routing to replay; leave replay=None.")
        wanted = (self.config.num_super_blocks, *rows, moe.top_k)
        if shape != wanted:
            raise ValueError(
                f"replay has shape {list(shape)}, but these rows and layers have [layers, rows, positions, "
                f"choices] = {list(wanted)}; replay a trace of this model over rows of the same shape."
            )

    def _whole(self, name: str, layout: Layout | None) -> Float[Array, "..."]:
        """Read a weight that is outside the layers, put together where it is stored in parts."""
        weight = getattr(self, name)[...]
        return weight if layout is None else gather_weight(layout, weight, name.rsplit("_")[-1])

    def _score(self, x_BSD: Float[Array, "B S D"], layout: Layout | None) -> Float[Array, "B S V"]:
        if self.config.tie_embeddings:
            head_DV = self._whole("embedding_VD", layout).T
        else:
            head_DV = self._whole("head_DV", layout)
        logits_BSV = jnp.matmul(x_BSD, head_DV.astype(x_BSD.dtype), preferred_element_type=jnp.float32)
        return constrain(layout, logits_BSV, "BSV")


def _make_layer(config: LMConfig, last: bool, key: ScalarKey) -> Block:
    """Build one layer; the last one of a super-block is sparse, or has the width of a twin's stand-in."""

    def rngs(name: str) -> nnx.Rngs:
        return nnx.Rngs(params=named_key(key, name))

    attention = Attention(
        config.d_model,
        config.num_heads,
        config.num_kv_heads,
        config.features_per_head,
        rope_theta=config.rope_theta,
        init_scale=config.init_scale,
        implementation=config.attention_implementation,
        dtype=config.dtype,
        rngs=rngs("attention"),
    )
    if last and config.moe is not None:
        feed_forward = MoE(config.moe, rngs=rngs("feed_forward"))
    else:
        feed_forward = MLP(
            config.d_model,
            config.d_ff_sparse if last and config.d_ff_sparse is not None else config.d_ff,
            activation=config.activation,
            gated=config.gated,
            init_scale=config.init_scale,
            dtype=config.dtype,
            rngs=rngs("feed_forward"),
        )
    return Block(config.d_model, attention, feed_forward, norm_eps=config.norm_eps, dropout=config.dropout)


def _stack_super_blocks(config: LMConfig, key: ScalarKey) -> SuperBlock:
    """Draw every super-block from the key of its index, and stack the parameters in a first dimension."""

    @nnx.vmap
    def draw(block_key):
        return SuperBlock(config, rngs=nnx.Rngs(params=block_key))

    return draw(jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(config.num_super_blocks)))
