"""What a model costs: parameters, FLOPs a token, and the dense twin that costs as much."""

import dataclasses

from switchmoe.config import MoEConfig
from switchmoe.layer import expert_seats
from switchmoe.models.config import LMConfig

# A width is rounded to this many features where that moves it by less than 1%: matrix units work in tiles.
_TILE = 8


def dense_twin(config: LMConfig) -> LMConfig:
    """Give every token a dense FFN that costs what the router and its k experts cost it in `config`.

    The twin has the same layers, with an FFN of width `d_ff_sparse` in place of each sparse one. That width
    makes the useful FLOPs equal, rounded to a whole number of features, and from 400 features on to a
    multiple of 8, which moves the layer's FLOPs by 1% at most. A dense config is its own twin.
    """
    if config.moe is None:
        return config
    moe = config.moe
    exact = (_router_weights(moe) + moe.top_k * _expert_weights(moe)) / _ffn_weights(config, 1)
    step = _TILE if exact >= 50 * _TILE else 1
    return dataclasses.replace(config, moe=None, d_ff_sparse=max(1, round(exact / step)) * step)


def param_count(config: LMConfig) -> tuple[int, int]:
    """Count the parameters of a model: all of them, and those that one token meets.

    Returns (total, active). Active leaves out the experts a token was not sent to: k of E count in every
    sparse layer. Embedding, head and norms are in both.
    """
    norms = config.d_model * (2 * config.num_layers + 1)
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    shared = norms + tables + _shared_weights(config)
    if config.moe is None:
        total = shared + config.num_super_blocks * _ffn_weights(config, config.d_ff_sparse or config.d_ff)
        return total, total
    moe = config.moe
    total, active = (
        shared + config.num_super_blocks * (_router_weights(moe) + experts * _expert_weights(moe))
        for experts in (moe.num_experts, moe.top_k)
    )
    return total, active


def flops_per_token(config: LMConfig, sequence_length: int) -> tuple[float, float]:
    """Count the floating-point operations that training spends on a token, in rows of `sequence_length`.

    Returns (useful, executed), both FLOPs per token of a whole training step: three times those of the
    forward pass, a multiply-add counted as two. Counted are matrix products: attention projections and scores
    (the full square, its masked half too), dense FFNs, router, experts and output head. Useful counts k
    experts; executed counts every seat the experts compute at the training capacity, empty ones too, and the
    one-hot products where `dispatch` is "einsum". Work done twice because of rematerialisation is in neither.
    """
    scores = 2 * config.num_layers * sequence_length * config.num_heads * config.features_per_head
    shared = _shared_weights(config) + config.vocab_size * config.d_model + scores
    if config.moe is None:
        useful = executed = _ffn_weights(config, config.d_ff_sparse or config.d_ff)
    else:
        moe = config.moe
        group = sequence_length * moe.sequences_per_group
        seats = expert_seats(moe, tokens=group, train=True) * moe.num_experts / group
        useful = _router_weights(moe) + moe.top_k * _expert_weights(moe)
        executed = _router_weights(moe) + seats * _expert_weights(moe)
        if moe.dispatch == "einsum":
            executed += 2 * seats * group * moe.d_model
    return (
        6.0 * (shared + config.num_super_blocks * useful),
        6.0 * (shared + config.num_super_blocks * executed),
    )


def _shared_weights(config: LMConfig) -> int:
    """Weights of the matrices every token meets: attention, and the dense FFNs between the sparse ones."""
    heads = config.num_heads + config.num_kv_heads
    attention = 2 * config.d_model * config.features_per_head * heads
    dense = config.num_super_blocks * (config.moe_every - 1) * _ffn_weights(config, config.d_ff)
    return config.num_layers * attention + dense


def _ffn_weights(config: LMConfig, width: int) -> int:
    return (3 if config.gated else 2) * config.d_model * width


def _expert_weights(moe: MoEConfig) -> int:
    return (3 if moe.gated else 2) * moe.d_model * moe.d_ff


def _router_weights(moe: MoEConfig) -> int:
    return moe.d_model * moe.num_experts
