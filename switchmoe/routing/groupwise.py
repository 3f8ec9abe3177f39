"""What routers share that look at a whole group of tokens at once: the frame around their decision."""

import functools
from collections.abc import Callable

from switchmoe.config import MoEConfig
from switchmoe.routing.base import Decision, Router
from switchmoe.routing.linear import init_linear_router, score_tokens
from switchmoe.shapes import Array


def groupwise_router(
    config: MoEConfig,
    decide: Callable[..., Decision],
    weigh: Callable[..., Array] | None,
    *,
    leak: str,
) -> Router:
    """Build a router that scores each token with one matrix and lets `decide` see the scores of its group.

    `decide(logits_TE, *, train, mask)`: unlike a router that looks at one token at a time, such a one has to
    know whether it is training. It gets no bias, since what a bias would balance is balanced already. `leak`
    says how a later token changes what an earlier one gets.
    """
    init = functools.partial(
        init_linear_router,
        d_model=config.d_model,
        num_experts=config.num_experts,
        init_scale=config.init_scale,
    )

    def choose(logits_TE, *, mask=None, bias=None):
        return decide(logits_TE, train=False, mask=mask)

    def apply(params, x_GTD, *, key=None, mask=None, token_ids=None, bias=None, train=False):
        key = key if train else None
        logits_GTE = score_tokens(params, x_GTD, jitter=config.jitter, dropout=config.input_dropout, key=key)
        return decide(logits_GTE, train=train, mask=mask)

    return Router(init, apply, choose, weigh, leak)
