"""What every router decides, over all of ROUTERS; a new router is covered by its line in that dict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switchmoe as sm
from switchmoe.routing import ExpertChoice, Routing, SoftMix, make_router
from switchmoe.seats import expert_seats

from . import oracle, routers
from .routers import D_MODEL, EXPERTS, GROUPS, MASK, TOKENS, apply, build, make_cases, params_of, traits_of
from .worlds import assert_trees_close, make_config, make_x

RULED = make_cases(lambda traits: traits.scores)  # those whose tokens take their best experts in evaluation
every_router = pytest.mark.parametrize("case", make_cases(), ids=str)
ruled_router = pytest.mark.parametrize("case", RULED, ids=str)
in_training = pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])


def decide(config, seed, *, mask=None, train=False):
    x = make_x(seed, GROUPS, TOKENS, D_MODEL)
    return apply(params_of(config), x, config, mask=mask, train=train)


def form_of(decision, config):
    """The fields of a decision with their shapes and types, as the docstrings state them."""
    tokens, k, experts = (GROUPS, TOKENS), config.top_k, EXPERTS
    own = {
        Routing: {"expert_GTK": ((*tokens, k), jnp.int32), "weight_GTK": ((*tokens, k), jnp.float32)},
        ExpertChoice: {
            "token_GEC": ((GROUPS, experts, expert_seats(config, tokens=TOKENS, train=False)), jnp.int32),
            "weight_GEC": ((GROUPS, experts, expert_seats(config, tokens=TOKENS, train=False)), jnp.float32),
        },
        SoftMix: {
            "dispatch_GTEC": ((*tokens, experts, config.slots_per_expert), jnp.float32),
            "combine_GTEC": ((*tokens, experts, config.slots_per_expert), jnp.float32),
        },
    }[type(decision)]
    common = dict.fromkeys(("logits_GTE", "probs_GTE"), ((*tokens, experts), jnp.float32))
    return own | common | {"mask_GT": (tokens, jnp.bool_)}


@every_router
def test_fields_have_their_shapes_and_types(case):
    # A NamedTuple's annotations are not checked by the import hook, so here they are.
    config = build(case)
    router = make_router(config)
    for dtype in (jnp.float32, jnp.bfloat16):
        for given in (True, False):

            def call(x, given=given):
                mask, ids = (jnp.asarray(MASK) if given else None), routers.ids_of(x)
                return router.apply(params_of(config), x, mask=mask, token_ids=ids)

            decision = jax.eval_shape(call, jnp.zeros((GROUPS, TOKENS, D_MODEL), dtype))
            found = {name: (f.shape, f.dtype) for name, f in decision._asdict().items() if f is not None}
            smooth = found.pop("smooth_load_GTE", None)
            assert smooth == (found["probs_GTE"] if case[0] == "noisy_top_k" else None)
            assert found == form_of(decision, config)
    assert isinstance(decision, Routing) == (router.weigh is not None)


@every_router
@in_training
def test_decisions_are_legal(case, train):
    config = build(case)
    decision = decide(config, 2, mask=MASK, train=train)
    np.testing.assert_array_equal(decision.mask_GT, MASK)
    np.testing.assert_allclose(np.asarray(decision.probs_GTE)[MASK].sum(-1), 1, rtol=1e-5)
    check = {Routing: check_routing, ExpertChoice: check_expert_choice, SoftMix: check_mix}[type(decision)]
    check(decision, config, train)


def check_routing(routing, config, train):
    expert, weight = np.asarray(routing.expert_GTK)[MASK], np.asarray(routing.weight_GTK)[MASK]
    assert ((0 <= expert) & (expert <= EXPERTS)).all()
    used = expert < EXPERTS
    assert used[:, 0].all() and (used.all() or (train and config.router == "gshard"))
    assert (weight[~used] == 0).all() and (weight[used] > 0).all()
    for row in expert:  # no expert twice
        chosen = row[row < EXPERTS]
        assert len(set(chosen)) == len(chosen)
    assert (weight <= config.weight_scale * (1 + 1e-6)).all()
    if not train:
        assert (np.diff(weight, axis=-1) <= 0).all()  # best first
    if routers.adds_to_one(config) and used.all():
        np.testing.assert_allclose(weight.sum(-1), config.weight_scale, rtol=1e-5)
    # The case is not degenerate: several experts are chosen, with several weights.
    assert len(np.unique(expert[:, 0])) > 1
    assert (weight.std() > 1e-3) != traits_of(config).blind


def check_expert_choice(choice, config, train):
    # Each expert holds its best real tokens by probability, the earlier first among equals, then nobody.
    token, weight = np.asarray(choice.token_GEC), np.asarray(choice.weight_GEC)
    seats = token.shape[-1]
    for g, e in np.ndindex(GROUPS, EXPERTS):
        prob_T = np.asarray(choice.probs_GTE[g, :, e], np.float64)
        real = [t for t in oracle.best(prob_T, TOKENS) if MASK[g, t]][:seats]
        assert list(token[g, e]) == real + [TOKENS] * (seats - len(real))
        np.testing.assert_allclose(weight[g, e, : len(real)], prob_T[real], rtol=1e-6)
        assert (weight[g, e, len(real) :] == 0).all()


def check_mix(mix, config, train):
    # Both tables are softmaxes of one score l: dispatch = exp(l) / s(seat), combine = exp(l) / t(token). So
    # their quotient is a product of something of the token's and something of the seat's.
    dispatch, combine = (np.asarray(a, np.float64) for a in (mix.dispatch_GTEC, mix.combine_GTEC))
    assert (dispatch[~MASK] == 0).all() and (combine[~MASK] == 0).all()
    np.testing.assert_allclose(dispatch.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(combine[MASK].sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(mix.probs_GTE, combine.sum(-1), rtol=1e-5)
    np.testing.assert_allclose(mix.probs_GTE[MASK], jax.nn.softmax(mix.logits_GTE, -1)[MASK], rtol=1e-5)
    for g in range(GROUPS):
        quotient = np.log(dispatch[g, MASK[g]] / combine[g, MASK[g]]).reshape(MASK[g].sum(), -1)
        rows, columns = quotient.mean(1, keepdims=True), quotient.mean(0, keepdims=True)
        np.testing.assert_allclose(quotient, rows + columns - quotient.mean(), atol=1e-4)
    assert dispatch.std() > 1e-3 and combine.std() > 1e-3


@ruled_router
def test_tokens_choose_and_weigh_as_the_oracle(case):
    config, traits = build(case), traits_of(build(case))
    routing = decide(config, 3)
    for at in np.ndindex(GROUPS, TOKENS):
        logits, scores = routing.logits_GTE[at], routers.oracle_scores(config, routing.logits_GTE[at])
        chosen = oracle.best_within_groups(
            scores, config.top_k, config.expert_groups, config.groups_per_token
        )
        weights = routers.oracle_weights(config, logits, chosen)
        probs = scores / scores.sum()
        if traits.sparse:
            probs = np.zeros(EXPERTS)
            probs[chosen] = weights
        assert list(routing.expert_GTK[at]) == chosen
        np.testing.assert_allclose(routing.probs_GTE[at], probs, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(routing.weight_GTK[at], weights, rtol=1e-5)


def test_later_choices_follow_logits_too_small_for_a_probability():
    # exp(-150) and exp(-200) are both 0 in float32; expert 2 is the better second choice all the same.
    config = make_config(router="top_k", top_k=2)
    assert sm.route(jnp.array([[0.0, -200.0, -150.0]]), config).expert_GTK.tolist() == [[0, 2]]


@ruled_router
def test_ties_go_to_the_lowest_index(case):
    # Logits (5, 5, 5), (1, 5, 5), (5, 1, 5): the first k of 0 1 2, of 1 2 0 and of 0 2 1.
    config = build(case)
    logits = jnp.array([[5.0, 5.0, 5.0], [1.0, 5.0, 5.0], [5.0, 1.0, 5.0]])
    routing = jax.jit(lambda logits: sm.route(logits, config))(logits)
    order = np.array([[0, 1, 2], [1, 2, 0], [0, 2, 1]])
    np.testing.assert_array_equal(routing.expert_GTK, order[:, : config.top_k])


@every_router
def test_choosing_from_scores_is_the_part_after_the_scores(case):
    config = build(case)
    decision, router = decide(config, 7), make_router(config)
    if traits_of(config).scoreless:
        with pytest.raises(ValueError, match=f"router='{case[0]}'.*logits") as caught:
            sm.route(jnp.zeros((TOKENS, EXPERTS)), config)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
        return
    if getattr(decision, "smooth_load_GTE", None) is not None:  # needs more than scores
        decision = decision._replace(smooth_load_GTE=None)

    @jax.jit
    def from_scores(logits):
        return router.choose(logits), sm.route(logits, config), sm.route(logits[0], config)

    chosen, routed, single = from_scores(decision.logits_GTE)  # the last without a group dimension
    assert_trees_close(chosen, routed, 0)
    if case[0] != "random":  # without a key it draws from a fixed one
        assert_trees_close(chosen, decision, 1e-6)
        assert_trees_close(single, jax.tree.map(lambda leaf: leaf[0], decision), 1e-6)


@every_router
def test_a_bias_moves_the_choice_and_not_the_weight(case):
    # A router either moves with a bias or refuses a config that keeps one, and then is deaf to it.
    config, x = build(case), make_x(8, GROUPS, TOKENS, D_MODEL)
    params = params_of(config)
    plain = apply(params, x, config)
    pushed = apply(params, x, config, bias=jnp.array([0.0, 0.0, 2.0]))  # more than any probability
    try:
        make_router(build((case[0], case[1] | dict(bias_step=1e-3))))
    except ValueError as refusal:
        assert "does not read bias_step" in str(refusal)
        assert_trees_close(pushed, plain, 0)
        return
    assert (np.asarray(pushed.expert_GTK[..., 0]) == 2).all()
    assert bool((plain.expert_GTK[..., 0] != 2).any())
    for at in np.ndindex(GROUPS, TOKENS):
        expected = routers.oracle_weights(config, plain.logits_GTE[at], pushed.expert_GTK[at])
        np.testing.assert_allclose(pushed.weight_GTK[at], expected, rtol=1e-5)
    if not traits_of(config).sparse:
        np.testing.assert_array_equal(pushed.probs_GTE, plain.probs_GTE)
    assert_trees_close(apply(params, x, config, bias=jnp.zeros(EXPERTS)), plain, 1e-6)


@every_router
def test_weigh_gives_the_decisions_weights(case):
    config = build(case)
    weigh = make_router(config).weigh
    if weigh is None:
        return  # tokens don't choose
    weigh = jax.jit(weigh)
    for train in (False, True):  # also where gshard leaves a choice unused, or a plan takes another expert
        routing = decide(config, 9, train=train)
        weight = weigh(routing.logits_GTE, routing.expert_GTK)
        np.testing.assert_allclose(weight, routing.weight_GTK, rtol=1e-5, atol=1e-7)
    # Experts that something else chose, the last of them not used in half of the tokens.
    logits = routing.logits_GTE
    other = jnp.argsort(logits, axis=-1)[..., : config.top_k]  # the worst first
    weight = weigh(logits, other)
    unused = other.at[:, ::2, -1].set(EXPERTS)
    less = weigh(logits, unused)
    assert weight.dtype == less.dtype == jnp.float32
    assert (np.asarray(less)[:, ::2, -1] == 0).all() and bool((weight > 0).all())
    np.testing.assert_array_equal(less[:, 1::2], weight[:, 1::2])
    if traits_of(config).scores:
        for at in np.ndindex(GROUPS, TOKENS):
            expected = routers.oracle_weights(config, logits[at], other[at])
            np.testing.assert_allclose(weight[at], expected, rtol=1e-5)
