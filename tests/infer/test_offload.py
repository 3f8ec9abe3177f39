"""Experts on the host: the same tokens as with all of them on the device, and a count of what came."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from switchmoe.experts import ExpertParams
from switchmoe.infer import OffloadedModel, generate
from switchmoe.infer.offload import OffloadedExperts
from switchmoe.models import unroll
from tests.infer.worlds import DENSE, DRAWN, DROPLESS, ENCODER, GREEDY, PROMPTS, model_of

KEY = jax.random.key(7)


@pytest.mark.parametrize(("name", "config", "resident"), [(DROPLESS, DRAWN, 3), (ENCODER, GREEDY, 1)])
def test_the_same_tokens_as_on_the_device(name, config, resident):
    # The encoder's experts, and its decoder's, have seats that run out.
    model = model_of(name)
    offloaded = OffloadedModel(model, resident)
    on_device = {path[-1]: leaf.size for path, leaf in _named(offloaded._state)}
    assert on_device["w_in_EDF"] == on_device["w_out_EFD"] == 0 < on_device["router_DE"]
    done = offloaded.generate(PROMPTS, config, key=KEY)
    expected = generate(model, PROMPTS, config, key=KEY)
    np.testing.assert_array_equal(done.tokens_BN, expected.tokens_BN)
    np.testing.assert_allclose(done.log_probs_BN, expected.log_probs_BN, atol=1e-5)
    stats = offloaded.stats
    assert stats.bytes_brought == (stats.asked - stats.found) * 2 * 16 * 24 * 4 > 0
    assert len(offloaded.experts._slots) == resident


def test_with_room_for_all_nothing_comes_twice():
    offloaded = OffloadedModel(model_of(DROPLESS), 1000)
    first = offloaded.generate(PROMPTS, DRAWN, key=KEY)
    before = dataclasses.replace(offloaded.stats)
    assert 0 < before.bytes_brought <= 8 * 2 * 16 * 24 * 4 and before.hit_rate < 1
    second = offloaded.generate(PROMPTS, DRAWN, key=KEY)
    np.testing.assert_array_equal(first.tokens_BN, second.tokens_BN)
    assert offloaded.stats.bytes_brought == before.bytes_brought
    assert offloaded.stats.asked == 2 * before.asked


def _named(state):
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(state))
    return [(tuple(key.key for key in path), leaf) for path, leaf in leaves]


class Served:
    """Two layers of four experts of one number, which tells who they are: 10 * layer + expert."""

    def __init__(self, resident):
        value = 10.0 * np.arange(2)[:, None] + np.arange(4)
        weights = jnp.asarray(value, jnp.float32)[..., None, None]
        self.experts = OffloadedExperts(
            [ExpertParams(jnp.ones_like(weights), weights)], resident, jax.devices()[0]
        )

    def turns(self, layer, wanted):
        """Which experts are served in which turn, by what lies in the places that are named."""
        turns = []
        for slot_E in self.experts._turns(0, layer, wanted):
            pool = np.asarray(self.experts._pool.w_out_EFD)[:, 0, 0]
            served = [expert for expert in range(4) if slot_E[expert] < self.experts.resident]
            assert [pool[slot_E[expert]] for expert in served] == [10 * layer + expert for expert in served]
            turns.append(served)
        return turns


@given(
    resident=st.integers(1, 8),
    calls=st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 3), min_size=1)), max_size=12),
)
@settings(max_examples=30)
def test_who_was_wanted_last_stays(resident, calls):
    served, there, found, asked = Served(resident), collections.deque(), 0, 0
    for layer, wanted in calls:
        turns = served.turns(layer, sorted(wanted))
        assert sorted(expert for turn in turns for expert in turn) == sorted(wanted)
        assert all(len(turn) <= resident for turn in turns)
        here = [expert for expert in sorted(wanted) if (layer, expert) in there]
        assert [expert for turn in turns for expert in turn] != [] and len(turns) == -(
            -len(wanted) // resident
        )
        found, asked = found + len(here), asked + len(wanted)
        # The oracle: a list of who was wanted, the latest last, cut to what there is room for.
        order = here + [expert for expert in sorted(wanted) if expert not in here]
        for first in range(0, len(order), resident):
            turn = order[first : first + resident]
            for expert in [e for e in turn if (layer, e) in there]:
                there.remove((layer, expert))
                there.append((layer, expert))
            for expert in turn:
                if (layer, expert) not in there:
                    there.append((layer, expert))
                    if len(there) > resident:
                        there.popleft()
        assert set(there) == {(one, expert) for _, one, expert in served.experts._slots}
    stats = served.experts.stats
    assert (stats.found, stats.asked) == (found, asked)
    assert stats.bytes_brought == (asked - found) * 8


def test_what_can_not_be_offloaded():
    with pytest.raises(ValueError, match="This model is dense"):
        OffloadedModel(model_of(DENSE), 2)
    with pytest.raises(ValueError, match="resident is 0, but there must be room for at least 1"):
        OffloadedModel(model_of(DROPLESS), 0)
    with pytest.raises(ValueError, match="give the model before"):
        OffloadedModel(unroll(model_of(DROPLESS)), 2)
    late = dataclasses.replace(GREEDY, experts="capacity")
    with pytest.raises(ValueError, match="experts='capacity' comes too late"):
        OffloadedModel(model_of(DROPLESS), 2).generate(PROMPTS, late)
    with pytest.raises(ValueError, match="draws tokens, which needs a key"):
        OffloadedModel(model_of(DROPLESS), 2).generate(PROMPTS, DRAWN)
