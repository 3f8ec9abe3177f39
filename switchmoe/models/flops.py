"""What a model costs: parameters, FLOPs a token, and the dense twin that costs as much."""

import dataclasses

from switchmoe.models.config import LMConfig
from switchmoe.models.layer_cost import executed_products, layer_weights, useful_products

# A width is rounded to this many features where that moves it by less than 1%: matrix units work in tiles.
_TILE = 8


def dense_twin(config: LMConfig, sequence_length: int | None = None) -> LMConfig:
    """Give every token a dense FFN that costs what the router and its experts cost it in `config`.

    The twin has the same layers, with an FFN of width `d_ff_sparse` in place of each sparse one. That width
    makes the useful FLOPs equal, rounded to a whole number of features, and from 400 features on to a
    multiple of 8, which moves the layer's FLOPs by 1% at most. A dense config is its own twin. With expert
    choice and Soft MoE the cost depends on `sequence_length`, which then has to be given.
    """
    if config.moe is None:
        return config
    group = None if sequence_length is None else sequence_length * config.moe.sequences_per_group
    exact = useful_products(config.moe, group) / _ffn_weights(config, 1)
    step = _TILE if exact >= 50 * _TILE else 1
    return dataclasses.replace(config, moe=None, d_ff_sparse=max(1, round(exact / step)) * step)


def param_count(config: LMConfig) -> tuple[int, int]:
    """Count the parameters of a model: all of them, and those that one token meets.

    Returns (total, active). Active leaves out the experts a token was not sent to: k of E count in every
    sparse layer (all of them with Soft MoE). Embedding, head, norms, router and shared experts are in both.
    """
    norms = config.d_model * (2 * config.num_layers + 1)
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    shared = norms + tables + _shared_weights(config)
    if config.moe is None:
        total = shared + config.num_super_blocks * _ffn_weights(config, config.d_ff_sparse or config.d_ff)
        return total, total
    total, active = (shared + config.num_super_blocks * weights for weights in layer_weights(config.moe))
    return total, active


def flops_per_token(config: LMConfig, sequence_length: int) -> tuple[float, float]:
    """Count the floating-point operations that training spends on a token, in rows of `sequence_length`.

    Returns (useful, executed), both FLOPs per token of a whole training step: three times those of the
    forward pass, a multiply-add counted as two. Counted are matrix products: attention projections and scores
    (the full square, its masked half too), dense FFNs, router, experts and output head. Useful counts the
    experts a token is sent to; executed counts every seat the experts compute at the training capacity, empty
    ones too, and the one-hot products where `dispatch` is "einsum". Work done twice because of
    rematerialisation is in neither, nor is the second forward pass of `balance_over="batch"`.
    """
    scores = 2 * config.num_layers * sequence_length * config.num_heads * config.features_per_head
    shared = _shared_weights(config) + config.vocab_size * config.d_model + scores
    if config.moe is None:
        useful = executed = _ffn_weights(config, config.d_ff_sparse or config.d_ff)
    else:
        group = sequence_length * config.moe.sequences_per_group
        useful, executed = useful_products(config.moe, group), executed_products(config.moe, group)
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
