"""What has to fit together in a language model's configuration, said in a sentence where it does not."""

from typing import TYPE_CHECKING, Any

from switchmoe.config import MoEConfig
from switchmoe.routing import make_router

if TYPE_CHECKING:
    from switchmoe.models.config import LMConfig


def check_layers(config: "LMConfig") -> None:
    """Raise a ValueError if the layers do not form super-blocks, or there is nothing to attend to."""
    if config.d_ff_sparse is not None and config.moe is not None:
        raise ValueError(
            "d_ff_sparse replaces the sparse layers of a dense twin; drop it, or set moe to None."
        )
    if config.num_layers % config.moe_every:
        raise ValueError(
            f"num_layers={config.num_layers} is not a multiple of moe_every={config.moe_every}, the layers "
            f"of a super-block; set num_layers to a multiple, or change moe_every."
        )
    if config.encoder_layers == 0 and config.encoder_moe_every is not None:
        raise ValueError(
            f"encoder_moe_every={config.encoder_moe_every}, but there is no encoder; set encoder_layers, or "
            "leave it at None."
        )
    every = config.moe_every if config.encoder_moe_every is None else config.encoder_moe_every
    if config.encoder_layers % every:
        raise ValueError(
            f"encoder_layers={config.encoder_layers} is not a multiple of {every}, the layers of a "
            "super-block of the encoder; set it to a multiple, or change encoder_moe_every."
        )


def check_heads(config: "LMConfig") -> None:
    """Raise a ValueError if the attention heads do not divide, or can't be turned by their positions."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}; every "
            f"key/value head must serve the same number of query heads, so change one of the two."
        )
    if config.head_dim is None and config.d_model % config.num_heads:
        raise ValueError(
            f"d_model={config.d_model} is not a multiple of num_heads={config.num_heads}; change one of the "
            f"two, or set head_dim."
        )
    if config.positions == "rotary" and config.features_per_head % 2:
        raise ValueError(
            f"A head has {config.features_per_head} features, but rotary positions turn pairs of them; "
            f"choose an even head_dim (or d_model / num_heads)."
        )
    if config.positions == "relative" and config.relative_distance <= config.relative_buckets // 2:
        raise ValueError(
            f"relative_distance={config.relative_distance} leaves no room for relative_buckets="
            f"{config.relative_buckets}, half of which hold a distance each; raise it above "
            f"{config.relative_buckets // 2}."
        )


def check_moe(config: "LMConfig", moe: MoEConfig) -> None:
    """Raise a ValueError if the sparse layers do not fit the model, or would show it the future."""
    router = make_router(moe)  # says what is wrong with the router's name or settings
    if moe.d_model != config.d_model:
        raise ValueError(
            f"moe.d_model={moe.d_model} differs from d_model={config.d_model}; the sparse layers read the "
            f"model's own features, so set both to the same number."
        )
    if config.allow_future_leak:
        return
    if router.leak:
        raise ValueError(
            f"router={moe.router!r} does not suit a causal model, since {router.leak}; choose another "
            f"moe.router, or allow_future_leak=True to force it."
        )
    if moe.dispatch == "dropless":
        return  # nobody competes for seats, so their order says nothing
    leak = "it would let later tokens of a row decide whether an earlier one keeps its seat"
    if moe.drop_order == "priority":
        raise ValueError(
            f"drop_order='priority' does not suit a causal model, since {leak}; "
            f"set moe.drop_order='token', or allow_future_leak=True to force it."
        )
    if moe.drop_order == "choice" and moe.top_k > 1:
        raise ValueError(
            f"drop_order='choice' with top_k={moe.top_k} does not suit a causal model, since {leak}; set "
            f"moe.drop_order='token' or moe.dispatch='dropless', or allow_future_leak=True to force it."
        )


def check_source(config: "LMConfig", name: str, source: Any, rows: int) -> None:
    """Raise a ValueError unless there is a source for each row where there is an encoder, and only there."""
    if (source is not None) != (config.encoder_layers > 0):
        raise ValueError(
            f"This model has no encoder, so nothing looks at {name}; drop it, or set encoder_layers."
            if source is not None
            else f"This model has an encoder, whose side of the matter is missing; give it {name}."
        )
    if source is not None and source.shape[0] != rows:
        raise ValueError(
            f"{name} has {source.shape[0]} rows, but the decoder has {rows}, each of which needs one of "
            "them; make them equal."
        )


def check_replay(config: "LMConfig", shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Raise a ValueError unless a recorded routing is one of the decoder's layers and of these rows."""
    if config.moe is None:
        raise ValueError("This model is dense, so it has no routing to replay; leave replay=None.")
    wanted = (config.num_super_blocks, *rows, config.moe.top_k)
    if shape != wanted:
        raise ValueError(
            f"replay has shape {list(shape)}, but these rows and layers have [layers, rows, positions, "
            f"choices] = {list(wanted)}; replay a trace of this model over rows of the same shape."
        )
