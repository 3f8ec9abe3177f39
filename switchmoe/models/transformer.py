"""The Transformer language model: a decoder, alone or beside an encoder, sparse or dense."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switchmoe.models.checks import check_replay, check_source
from switchmoe.models.config import LMConfig
from switchmoe.models.decoder import Decoder, all_see
from switchmoe.models.stack import Stack, StackOutput
from switchmoe.nn import causal_mask
from switchmoe.parallel import Layout
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key
from switchmoe.trace import RouterTrace


class TransformerLM(Decoder):
    """Predict every position's next token from the tokens so far, some FFNs being mixtures of experts.

    Pre-norm layers, grouped key/value heads, no biases. With `config.encoder_layers` there is an `encoder`
    too, whose tokens see each other both ways and are seen by every layer of the decoder (Raffel et al. 2020,
    section 2.1, https://arxiv.org/abs/1910.10683).

    Parameters, all `nnx.Param`: those of `Stack` for the decoder (`blocks`, `final_norm`, `positions`), those
    of the encoder under `encoder`, `embedding_VD`, which both read, and `head_DV` unless the head is tied.
    The embedding starts with standard deviation d_model ** -0.5, so that a tied head gives logits of about
    unit variance behind the final norm; it is not scaled up on the way in, so the first loss is close to
    log(vocab_size). With `scale_head` it starts with 1 instead, to the same end. Attention and dense FFN
    matrices start with sqrt(init_scale / fan_in), the residual's writers among them, sparse layers with an
    init_scale of their own. Each weight's key comes from its name and layer. Sparse layers that are balanced
    by a bias have it as `BalanceBias` beside them.
    """

    # Only with encoder_layers.
    encoder: Stack

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs) -> None:
        key = rngs.params()
        super().__init__(config, key, cross=config.encoder_layers > 0)
        if config.encoder_layers:
            self.encoder = Stack(config.encoder, named_key(key, "encoder"), cross=False, causal=False)

    def __call__(
        self,
        ids_BS: Int[Array, "B S"],
        *,
        source_BP: Int[Array, "B P"] | None = None,
        source_mask_BP: Bool[Array, "B P"] | None = None,
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
          source_BP: token ids that the encoder reads; needed if and only if there is one.
          source_mask_BP: False at their padding.
          segments_BS: which document of a packed row a token belongs to; it sees its own document only.
          positions_BS: place of a token in its document; 0, 1, ... along the row if None. Relative positions
            count along the row all the same.
          mask_BS: False at padding, which nothing else looks at, takes no seat and counts in no sum.
          replay: the experts to use instead of the decoder's routers' choices, `RouterTrace.expert_LBSK` of
            an earlier pass over rows of the same shape; their weights are computed again.
          train: use the training capacity and noise.
          key: source of dropout and of the routers' and experts' noise; needed only in training and only if
            the config has any.
          layout: how rows, experts and weights are split over a mesh; None for one device.

        Returns:
          (logits_BSV in float32, aux): the sums of the sparse layers stacked along a leading L, the encoder's
          first, None for a dense model.

        Raises:
          ValueError: one sentence, if rows and groups, or rows and replay, do not fit, a key is missing, or a
            source where there is no encoder, or the other way round.
        """
        logits_BSV, aux, _ = self._score_rows(
            ids_BS,
            source_BP,
            source_mask_BP,
            segments_BS,
            positions_BS,
            mask_BS,
            replay,
            train=train,
            key=key,
            layout=layout,
        )
        return logits_BSV, aux

    def trace(
        self,
        ids_BS: Int[Array, "B S"],
        *,
        source_BP: Int[Array, "B P"] | None = None,
        source_mask_BP: Bool[Array, "B P"] | None = None,
        segments_BS: Int[Array, "B S"] | None = None,
        positions_BS: Int[Array, "B S"] | None = None,
        mask_BS: Bool[Array, "B S"] | None = None,
        replay: Int[Array, "L B S K"] | None = None,
        train: bool = False,
        key: ScalarKey | None = None,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S V"], MoEAux | None, RouterTrace | None]:
        """Do what a call does, and say where each token went in each of the decoder's sparse layers.

        The third result is None if there is none. The encoder's tokens are those of `trace_source`.
        """
        return self._score_rows(
            ids_BS,
            source_BP,
            source_mask_BP,
            segments_BS,
            positions_BS,
            mask_BS,
            replay,
            train=train,
            key=key,
            layout=layout,
            trace=True,
        )

    def encode(
        self,
        source_BP: Int[Array, "B P"],
        source_mask_BP: Bool[Array, "B P"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B P D"], MoEAux | None]:
        """Pass the source's tokens through the encoder; `options` are train, key and layout of a call."""
        output = self._encode(source_BP, source_mask_BP, **options)
        return output.x_BSD, output.aux

    def trace_source(
        self,
        source_BP: Int[Array, "B P"],
        source_mask_BP: Bool[Array, "B P"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B P D"], MoEAux | None, RouterTrace | None]:
        """Do what `encode` does, and say where each token went in each of the encoder's sparse layers."""
        output = self._encode(source_BP, source_mask_BP, trace=True, **options)
        return output.x_BSD, output.aux, _router_trace(output)

    def _score_rows(
        self,
        ids_BS,
        source_BP,
        source_mask_BP,
        segments_BS,
        positions_BS,
        mask_BS,
        replay,
        *,
        train,
        key,
        layout,
        trace=False,
    ):
        length = ids_BS.shape[1]
        if replay is not None:
            check_replay(self.config, replay.shape, ids_BS.shape)
        check_source(self.config, "source_BP", source_BP, ids_BS.shape[0])
        encoded = None
        if source_BP is not None:
            source_key = None if key is None else named_key(key, "encoder")
            encoded = self._encode(source_BP, source_mask_BP, train=train, key=source_key, layout=layout)
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(length), ids_BS.shape)
        output = self.run(
            self._embed(ids_BS, layout, train=train, key=key),
            places=(jnp.arange(length), jnp.arange(length)),
            positions_BS=positions_BS,
            seen_BSS=causal_mask(segments_BS, mask_BS, length, self.config.window),
            mask_BS=mask_BS,
            ids_BS=ids_BS,
            source=None if encoded is None else encoded.x_BSD,
            source_seen_BSP=all_see(source_mask_BP),
            replay=replay,
            train=train,
            key=key,
            trace=trace,
            layout=layout,
        )
        aux = output.aux
        if encoded is not None and encoded.aux is not None:
            aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), encoded.aux, aux)
        return self._score(output.x_BSD, layout), aux, _router_trace(output)

    def _encode(self, source_BP, source_mask_BP, *, train=False, key=None, layout=None, trace=False):
        if not self.config.encoder_layers:
            raise ValueError("This model has no encoder to read a source; set encoder_layers, or drop it.")
        length = source_BP.shape[1]
        return self.encoder.run(
            self._embed(source_BP, layout, train=train, key=key),
            places=(jnp.arange(length), jnp.arange(length)),
            positions_BS=jnp.broadcast_to(jnp.arange(length), source_BP.shape),
            seen_BSS=all_see(source_mask_BP, length),
            mask_BS=source_mask_BP,
            ids_BS=source_BP,
            train=train,
            key=key,
            trace=trace,
            layout=layout,
        )


def _router_trace(output: StackOutput) -> RouterTrace | None:
    return None if output.trace is None else RouterTrace(*output.trace)
