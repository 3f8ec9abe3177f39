"""The layers that repeat through a model: some dense ones, and a last one that may be sparse."""

from typing import Any

from flax import nnx

from switchmoe.layer import Trace
from switchmoe.models.config import LMConfig
from switchmoe.nn import MLP, Attention, Block, KeysValues, LayerCache, MoE
from switchmoe.routing import MoEAux
from switchmoe.shapes import Array, Float, ScalarKey, named_key


class SuperBlock(nnx.Module):
    """`moe_every` layers of a model, `layer_0`, `layer_1`, ...; the last one's FFN may be sparse."""

    def __init__(self, config: LMConfig, *, cross: bool = False, rngs: nnx.Rngs) -> None:
        key = rngs.params()
        self.names = tuple(f"layer_{layer}" for layer in range(config.moe_every))
        for name in self.names:
            setattr(self, name, _make_layer(config, name == self.names[-1], cross, named_key(key, name)))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        key: ScalarKey | None,
        cache: dict[str, LayerCache] | None = None,
        source: Float[Array, "B P D"] | dict[str, KeysValues] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B S D"], MoEAux | None, Trace | None, dict[str, LayerCache] | None]:
        """Pass the tokens through the layers in turn; `options` are those of `Block`."""
        aux = where = None
        caches = {}
        for name in self.names:
            x_BSD, aux, where, caches[name] = getattr(self, name)(
                x_BSD,
                key=None if key is None else named_key(key, name),
                cache=None if cache is None else cache[name],
                source=source[name] if isinstance(source, dict) else source,
                **options,
            )
        return x_BSD, aux, where, None if cache is None else caches


def _make_layer(config: LMConfig, last: bool, cross: bool, key: ScalarKey) -> Block:
    """Build one layer; the last one of a super-block is sparse, or has the width of a twin's stand-in."""

    def rngs(name: str) -> nnx.Rngs:
        return nnx.Rngs(params=named_key(key, name))

    def attention(name: str, rope_theta: float | None) -> Attention:
        return Attention(
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            config.features_per_head,
            rope_theta=rope_theta,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            scale_scores=config.scale_scores,
            init_scale=config.init_scale,
            implementation=config.attention_implementation,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs(name),
        )

    if last and config.moe is not None:
        feed_forward = MoE(config.moe, param_dtype=config.param_dtype, rngs=rngs("feed_forward"))
    else:
        feed_forward = MLP(
            config.d_model,
            config.d_ff_sparse if last and config.d_ff_sparse is not None else config.d_ff,
            activation=config.activation,
            gated=config.gated,
            init_scale=config.init_scale,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs("feed_forward"),
        )
    return Block(
        config.d_model,
        attention("attention", config.rope_theta if config.positions == "rotary" else None),
        feed_forward,
        norm_eps=config.norm_eps,
        dropout=config.dropout,
        cross_attention=attention("cross_attention", None) if cross else None,
        param_dtype=config.param_dtype,
    )
