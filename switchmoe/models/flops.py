"""What a model costs: parameters, FLOPs a token, and the dense twin that costs as much."""

import dataclasses

from switchmoe.models.config import LMConfig
from switchmoe.models.layer_cost import executed_products, layer_weights, useful_products

# A width is rounded to this many features where that moves it by less than 1%: matrix units work in tiles.
_TILE = 8


def dense_twin(
    config: LMConfig, sequence_length: int | None = None, source_length: int | None = None
) -> LMConfig:
    """Give every token a dense FFN that costs what the router and its experts cost it in `config`.

    The twin has the same layers, with an FFN of width `d_ff_sparse` in place of each sparse one. That width
    makes the useful FLOPs equal, rounded to a whole number of features, and from 400 features on to a
    multiple of 8, which moves the layer's FLOPs by 1% at most. A dense config is its own twin. With expert
    choice and Soft MoE the cost depends on `sequence_length`, which then has to be given, and with an encoder
    on `source_length` too.
    """
    if config.moe is None:
        return config
    rows = [(config, sequence_length)]
    if config.encoder_layers:
        rows.append((config.encoder, source_length))
    # Of the sparse layers of both stacks, each as often as there are tokens in its rows.
    weighted = [
        (stack.num_super_blocks * (length or 1), useful_products(config.moe, _group(config, length)))
        for stack, length in rows
    ]
    mean = sum(count * products for count, products in weighted) / sum(count for count, _ in weighted)
    exact = mean / _ffn_weights(config, 1)
    step = _TILE if exact >= 50 * _TILE else 1
    return dataclasses.replace(config, moe=None, d_ff_sparse=max(1, round(exact / step)) * step)


def param_count(config: LMConfig) -> tuple[int, int]:
    """Count the parameters of a model: all of them, and those that one token meets.

    Returns (total, active). Active leaves out the experts a token was not sent to: k of E count in every
    sparse layer (all of them with Soft MoE). Embedding, head, norms, router and shared experts are in both.
    With an encoder both stacks are in both, although each token passes through one of them.
    """
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    stacks = [_stack_weights(config, cross=config.encoder_layers > 0)]
    if config.encoder_layers:
        stacks.append(_stack_weights(config.encoder, cross=False))
    total, active = (tables + sum(part) for part in zip(*stacks, strict=True))
    return total, active


def flops_per_token(
    config: LMConfig, sequence_length: int, source_length: int | None = None
) -> tuple[float, float]:
    """Count the floating-point operations that training spends on a token, in rows of `sequence_length`.

    Returns (useful, executed), both FLOPs per token of a whole training step: three times those of the
    forward pass, a multiply-add counted as two. Counted are matrix products: attention projections and scores
    (the full square, its masked half too), dense FFNs, router, experts and output head. Useful counts the
    experts a token is sent to; executed counts every seat the experts compute at the training capacity, empty
    ones too, and the one-hot products where `dispatch` is "einsum". Work done twice because of
    rematerialisation is in neither, nor is the second forward pass of `balance_over="batch"`.

    With an encoder, which reads rows of `source_length`, the tokens are those of both, and the numbers the
    mean over them: a row costs them times source_length + sequence_length.

    Raises:
      ValueError: if there is an encoder and no source_length, or the other way round.
    """
    if (source_length is not None) != (config.encoder_layers > 0):
        raise ValueError(
            f"encoder_layers is {config.encoder_layers}, but source_length is {source_length}; give the "
            "length of an encoder's rows, and None where there is none."
        )
    head = config.vocab_size * config.d_model
    useful, executed = (6.0 * (own + head) for own in _stack_products(config, sequence_length))
    if source_length is None:
        return useful, executed
    # Queries, outputs and scores are a target token's, keys and values a source token's.
    features = config.d_model * config.features_per_head
    scores = 2 * source_length * config.num_heads * config.features_per_head
    reads = 6.0 * config.num_layers * (2 * features * config.num_heads + scores)
    offers = 6.0 * config.num_layers * 2 * features * config.num_kv_heads
    source = [6.0 * own + offers for own in _stack_products(config.encoder, source_length)]
    share = source_length / (source_length + sequence_length)
    return (
        share * source[0] + (1 - share) * (useful + reads),
        share * source[1] + (1 - share) * (executed + reads),
    )


def _stack_products(config: LMConfig, length: int) -> tuple[float, float]:
    """Count the multiply-adds a token in the layers of one stack, useful and executed, without a head."""
    scores = 2 * config.num_layers * length * config.num_heads * config.features_per_head
    shared = config.num_layers * _attention_weights(config) + _dense_weights(config) + scores
    if config.moe is None:
        useful = executed = _ffn_weights(config, config.d_ff_sparse or config.d_ff)
    else:
        group = length * config.moe.sequences_per_group
        useful, executed = useful_products(config.moe, group), executed_products(config.moe, group)
    return shared + config.num_super_blocks * useful, shared + config.num_super_blocks * executed


def _stack_weights(config: LMConfig, *, cross: bool) -> tuple[int, int]:
    """Count the parameters of one stack: all, and those that one token meets."""
    attentions = config.num_layers * (2 if cross else 1)
    norms = config.d_model * (attentions + config.num_layers + 1)
    head, heads = config.features_per_head, config.num_heads + config.num_kv_heads
    of_heads = {"none": 0, "head": 2 * head, "full": heads * head}[config.qk_norm]
    positions = config.relative_buckets * config.num_heads if config.positions == "relative" else 0
    shared = norms + attentions * (_attention_weights(config) + of_heads) + positions + _dense_weights(config)
    if config.moe is None:
        total = active = _ffn_weights(config, config.d_ff_sparse or config.d_ff)
    else:
        total, active = layer_weights(config.moe)
    return shared + config.num_super_blocks * total, shared + config.num_super_blocks * active


def _attention_weights(config: LMConfig) -> int:
    """Count the weights of the four matrices of one attention layer."""
    return 2 * config.d_model * config.features_per_head * (config.num_heads + config.num_kv_heads)


def _dense_weights(config: LMConfig) -> int:
    """Count the weights of the dense FFNs between the sparse ones of a stack."""
    return config.num_super_blocks * (config.moe_every - 1) * _ffn_weights(config, config.d_ff)


def _ffn_weights(config: LMConfig, width: int) -> int:
    return (3 if config.gated else 2) * config.d_model * width


def _group(config: LMConfig, length: int | None) -> int | None:
    """Say how many tokens are routed together in rows of a length."""
    return None if length is None or config.moe is None else length * config.moe.sequences_per_group
