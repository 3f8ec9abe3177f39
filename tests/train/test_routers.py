"""`pretrain.py tiny --model.moe.router NAME` with every router that a causal model allows: steps and rows."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from switchmoe.config import MoEConfig
from switchmoe.data import make_batch
from switchmoe.routing import ROUTERS, make_router
from switchmoe.train import RunError
from switchmoe.train.command_line import parse
from switchmoe.train.model import pure_model
from switchmoe.train.records import plain
from switchmoe.train.rows import costs, make_row
from switchmoe.train.step import make_train_step

from .worlds import made_up_state

# One layer, so that a step compiles quickly; two groups of 32 tokens.
SMALL = {
    "model.d-model": 16, "model.d-ff": 16, "model.num-heads": 2, "model.num-kv-heads": 1,
    "model.num-layers": 1, "model.moe-every": 1, "model.moe.d-model": 16, "model.moe.d-ff": 16,
    "model.moe.num-experts": 4, "train.batch-size": 2, "data.sequence-length": 32,
}  # fmt: skip
DROPLESS = {"dispatch": "dropless"}
# The settings that a router needs, and what else it is tried with.
TRAINED = {
    "switch": {"shared-experts": 1},
    "top_k": {"top-k": 2, "overflow": "next"},
    "top_k_then_softmax": {"top-k": 2},
    "gshard": {"top-k": 2},
    "sigmoid": {"top-k": 2, "bias-step": 0.01, "sequence-balance-coef": 0.01} | DROPLESS,
    "noisy_top_k": {"top-k": 2, "importance-coef": 0.1, "load-coef": 0.1},
    "soft": {"top-k": 4},
    "hash": {},
    "random": {},
    "balanced": {},
}
# Those whose seats are enough for whatever they decide.
DROPS_NOTHING = ("top_k", "sigmoid", "soft", "balanced")
BATCH = make_batch(np.random.default_rng(0).integers(3, 259, (2, 33), np.uint16), np.zeros(2, np.uint8))


def arguments(router, settings):
    flags = SMALL | {f"model.moe.{name}": value for name, value in settings.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["tiny", "--model.moe.router", router, *words]


def leaks():
    configs = (
        MoEConfig(router=name, top_k=TRAINED.get(name, {}).get("top-k", 1), num_experts=4) for name in ROUTERS
    )
    return {config.router: make_router(config).leak for config in configs}


def test_every_router_is_trained_here_or_refused():
    assert set(TRAINED) == {name for name, leak in leaks().items() if not leak}
    assert {"expert_choice", "soft_moe", "sinkhorn"} <= set(ROUTERS) - set(TRAINED)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - set(TRAINED)))
def test_a_router_that_leaks_is_refused_by_the_command_line(router):
    with pytest.raises(RunError) as caught:
        parse(arguments(router, {}), "pretrain.py")
    said = str(caught.value)
    assert f"router='{router}' does not suit a causal model, since {leaks()[router]}; choose" in said


@pytest.mark.parametrize("router", TRAINED)
def test_two_steps_and_their_row(router):
    config = parse(arguments(router, TRAINED[router]), "pretrain.py").config
    moe, model = config.model.moe, pure_model(config.model)
    state = made_up_state(config)
    step, key = jax.jit(make_train_step(config, model)), jax.random.key(1)
    first = state
    for _ in range(2):
        state, metrics = step(state, BATCH, key)
    assert (int(state.step), int(state.skipped)) == (2, 0)
    load_LE, tokens = np.asarray(metrics["load_fraction"]) * np.asarray(metrics["choices"])[:, None], 64
    row = plain(make_row(config, costs(config), 2, metrics, seconds=1.0, steps_timed=2, lap=1.0))

    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert 4 < row["loss"] < 8 and row["tokens"] == 2 * tokens
    # Only GShard leaves choices unused, some of its second ones.
    least = tokens if router == "gshard" else tokens * moe.top_k
    assert least <= float(metrics["choices"][0]) <= tokens * moe.top_k
    np.testing.assert_allclose(load_LE, np.rint(load_LE), atol=1e-4)
    assert load_LE.shape == (1, 4) and load_LE.sum() == pytest.approx(float(metrics["choices"][0]))
    assert row["max_vio"] == pytest.approx(load_LE.max() / load_LE.mean() - 1, abs=1e-5)
    assert row["dead_experts"] == (load_LE == 0).sum()
    if router in DROPS_NOTHING:
        assert row["dropped_fraction"] == row["unserved_fraction"] == 0
    else:
        assert 0 <= row["dropped_fraction"] < 0.5 and row["dropped_floor"] > 0
    assert row["collapsed_layers"] == ([0] if 64 * 0.8 < load_LE.max() and router != "soft" else [])
    assert row["flops_executed"] >= row["flops"]
    assert (row["flops_executed"] == row["flops"]) == (moe.dispatch == "dropless" or router == "soft")

    moved = [name for name, (old, new) in by_name(first, state).items() if not np.array_equal(old, new)]
    trained = [name for name in by_name(first, state) if "router" in name or "noise" in name]
    # The router of "random" and "balanced" moves by weight decay alone, and "hash" has none.
    assert set(trained) <= set(moved) and (trained == []) == (router == "hash")
    check_bias(router, state)


def by_name(first, state):
    """(before, after) of the feed-forward layer's weights."""
    parts = [s.params["blocks"]["layer_0"]["feed_forward"] for s in (first, state)]
    return {name: (parts[0][name], parts[1][name]) for name in parts[0]}


def check_bias(router, state):
    if router != "sigmoid":
        assert state.biases == {}
        return
    bias_LE = np.asarray(state.biases["blocks"]["layer_0"]["feed_forward"]["bias_E"])
    # Two steps of 0.01, each up, down, or (at exactly the mean load) none.
    np.testing.assert_allclose(bias_LE * 100, np.rint(bias_LE * 100), atol=1e-5)
    assert 0 < np.abs(bias_LE).max() < 0.0201


def test_dropless_makes_choice_order_no_leak():
    config = parse(arguments("top_k", {"top-k": 2, "drop-order": "choice"} | DROPLESS), "pretrain.py").config
    assert config.model.moe.drop_order == "choice"
    gather = dataclasses.replace(config.model.moe, dispatch="gather")
    with pytest.raises(ValueError, match="drop_order='choice' with top_k=2"):
        dataclasses.replace(config.model, moe=gather)
