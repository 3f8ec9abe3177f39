"""A causal stack between two tables: token ids go in, scores of the next token come out."""

import jax.numpy as jnp
from flax import nnx

from switchmoe.models.cache import Cache, empty_cache
from switchmoe.models.checks import check_source
from switchmoe.models.config import LMConfig
from switchmoe.models.stack import Stack
from switchmoe.nn import drop_features
from switchmoe.nn.weights import fan_in_normal
from switchmoe.parallel import Layout, constrain, gather_weight
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey, named_key


class Decoder(Stack):
    """The layers of a decoder, with the table that its tokens, and an encoder's, are read from, and the head.

    Parameters beside those of `Stack`: `embedding_VD`, and `head_DV` unless the head is tied.
    """

    # Unless the head is tied.
    head_DV: nnx.Param

    def __init__(self, config: LMConfig, key: ScalarKey, *, cross: bool) -> None:
        super().__init__(config, key, cross=cross, causal=True)
        table, kept_in = (config.d_model, config.vocab_size), config.param_dtype
        spread = config.d_model if config.scale_head and config.tie_embeddings else 1.0
        embedding_DV = fan_in_normal(key, "embedding_VD", table, scale=spread, dtype=kept_in)
        self.embedding_VD = nnx.Param(embedding_DV.T)
        if not config.tie_embeddings:
            scale = config.init_scale
            self.head_DV = nnx.Param(fan_in_normal(key, "head_DV", table, scale=scale, dtype=kept_in))

    def start_cache(
        self,
        batch: int,
        length: int,
        *,
        encoded_BPD: Float[Array, "B P D"] | None = None,
        source_mask_BP: Bool[Array, "B P"] | None = None,
        layout: Layout | None = None,
    ) -> Cache:
        """Make room for `length` tokens in each of `batch` rows, and look at the encoder's tokens once.

        Raises:
          ValueError: one sentence, if there is an encoder and `encoded_BPD` is missing, or the other way
            round, or it has other rows.
        """
        check_source(self.config, "encoded_BPD", encoded_BPD, batch)
        cache = empty_cache(self.config, batch, length, layout)
        if encoded_BPD is None:
            return cache
        return cache._replace(source=self.offer(encoded_BPD, layout), source_mask_BP=source_mask_BP)

    def decode(
        self,
        ids_BS: Int[Array, "B S"],
        cache: Cache,
        *,
        mask_BS: Bool[Array, "B S"] | None = None,
        last: bool = True,
        layout: Layout | None = None,
    ) -> tuple[Float[Array, "B S1 V"], Cache]:
        """Go on with rows whose earlier tokens are in the cache, by one token or by many (a prompt).

        Rows that are shorter than the others are padded in front, where `mask_BS` is False. There must be
        room for S more tokens: the caller counts. Returns the scores of the next token behind the `last`
        position alone (an S of 1) or behind all, in float32, and the cache with these tokens in it.
        """
        length = ids_BS.shape[1]
        cache, positions_BS, places = cache.take(mask_BS, ids_BS)
        output = self.run(
            self._embed(ids_BS, layout, train=False, key=None),
            places=places,
            positions_BS=positions_BS,
            seen_BSS=cache.seen_by(length, self.config.window),
            mask_BS=mask_BS,
            ids_BS=ids_BS,
            cache=cache.layers,
            slot=cache.filled - length,
            source=cache.source,
            source_seen_BSP=all_see(cache.source_mask_BP),
            layout=layout,
        )
        x_BSD = output.x_BSD[:, -1:] if last else output.x_BSD
        return self._score(x_BSD, layout), cache._replace(layers=output.cache)

    def _embed(
        self, ids_BS: Int[Array, "B S"], layout: Layout | None, *, train: bool, key: ScalarKey | None
    ) -> Array:
        # mode="fill" turns an id outside the vocabulary into NaN; plain indexing would clamp it in silence.
        x_BSD = jnp.take(self._whole("embedding_VD", layout), ids_BS, axis=0, mode="fill")
        x_BSD = constrain(layout, x_BSD.astype(self.config.compute_dtype), "BSD")
        noise_key = None if key is None else named_key(key, "embedding_dropout")
        return drop_features(x_BSD, self.config.dropout, train=train, key=noise_key)

    def _whole(self, name: str, layout: Layout | None) -> Float[Array, "..."]:
        """Read a weight that is outside the layers, put together where it is stored in parts."""
        weight = getattr(self, name)[...]
        return weight if layout is None else gather_weight(layout, weight, name.rsplit("_")[-1])

    def _score(self, x_BSD: Float[Array, "B S D"], layout: Layout | None) -> Float[Array, "B S V"]:
        if self.config.scale_head:
            x_BSD = x_BSD * self.config.d_model**-0.5
        if self.config.tie_embeddings:
            head_DV = self._whole("embedding_VD", layout).T
        else:
            head_DV = self._whole("head_DV", layout)
        logits_BSV = jnp.matmul(x_BSD, head_DV.astype(x_BSD.dtype), preferred_element_type=jnp.float32)
        return constrain(layout, logits_BSV, "BSV")


def all_see(mask_BP: Bool[Array, "B P"] | None, length: int = 1) -> Bool[Array, "batch 1 1 P"]:
    """Let every token see all that is no padding; at `length` without a mask, all there is."""
    return jnp.ones((1, 1, 1, length), bool) if mask_BP is None else mask_BP[:, None, None, :]
