"""What a token of the language model may see, and what must not change its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.models import TransformerLM, check_tokens
from tests.models.worlds import DENSE, SPARSE, model_of, params_of, run, some_ids


@pytest.mark.parametrize("train", [False, True])
def test_the_future_changes_nothing(train):
    ids = some_ids()
    changed = ids.at[:, 15:].set((ids[:, 15:] + 5) % SPARSE.vocab_size)
    logits, aux = run(SPARSE, ids, train=train)
    other, _ = run(SPARSE, changed, train=train)
    if train:
        assert float(aux.dropped.sum()) > 0  # else the test would not see seats being taken
    np.testing.assert_array_equal(logits[:, :15], other[:, :15])
    assert not np.allclose(logits[:, 15], other[:, 15])


def test_the_past_is_seen():
    ids = some_ids()
    logits, _ = run(SPARSE, ids)
    other, _ = run(SPARSE, ids.at[:, 0].set((ids[:, 0] + 1) % SPARSE.vocab_size))
    assert (np.abs(np.asarray(logits - other)).max(axis=(0, 2)) > 1e-6).all()


def test_two_documents_in_a_row_are_two_documents_alone():
    ids = some_ids(rows=2, length=24)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(24) < 12, 1, 2), (2, 24))
    positions = jnp.broadcast_to(jnp.arange(24) % 12, (2, 24))
    packed, aux = run(SPARSE, ids, segments_BS=segments, positions_BS=positions)
    assert float(aux.dropped.sum()) == 0
    np.testing.assert_allclose(packed[:, :12], run(SPARSE, ids[:, :12])[0], atol=2e-6)
    np.testing.assert_allclose(packed[:, 12:], run(SPARSE, ids[:, 12:])[0], atol=2e-6)
    mixed, _ = run(SPARSE, ids)
    assert np.abs(np.asarray(mixed[:, 12:] - packed[:, 12:])).max() > 1e-3


@pytest.mark.parametrize("train", [False, True])
def test_what_stands_in_padding_changes_nothing(train):
    ids = some_ids()
    # Padding at the end, in front, in between, everywhere: nobody looks at it from either side.
    mask = np.ones((4, 24), bool)
    mask[0, 17:], mask[1, :5], mask[2, 8:12], mask[3] = False, False, False, False
    changed = jnp.where(mask, ids, (ids + 3) % SPARSE.vocab_size)
    logits, aux = run(SPARSE, ids, train=train, mask_BS=jnp.asarray(mask))
    other, other_aux = run(SPARSE, changed, train=train, mask_BS=jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(logits)[mask], np.asarray(other)[mask])
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)
    np.testing.assert_array_equal(aux.tokens, mask.sum())
    assert np.isfinite(logits).all()


def test_aux_and_trace_are_stacked_over_sparse_layers():
    ids = some_ids()
    graphdef, params = params_of(SPARSE)
    mask = jnp.arange(24) < jnp.array([24, 20, 9, 0])[:, None]
    logits, aux, trace = jax.jit(
        lambda params: nnx.merge(graphdef, params).trace(ids, mask_BS=mask, train=True)
    )(params)
    assert logits.shape == (4, 24, 17) and logits.dtype == jnp.float32
    assert aux.load_E.shape == (2, 4) and aux.tokens.shape == (2,)
    assert trace.expert_LBSK.shape == trace.weight_LBSK.shape == trace.kept_LBSK.shape == (2, 4, 24, 1)
    np.testing.assert_allclose(logits, run(SPARSE, ids, mask_BS=mask, train=True)[0], atol=1e-6)
    assert not np.asarray(trace.kept_LBSK)[:, ~np.asarray(mask)].any()
    for layer in range(2):
        chosen = np.asarray(trace.expert_LBSK)[layer, np.asarray(mask), 0]
        np.testing.assert_array_equal(np.bincount(chosen, minlength=4), aux.load_E[layer])
        assert int(np.asarray(trace.kept_LBSK)[layer].sum()) == int(aux.kept_E[layer].sum())
    assert not np.array_equal(aux.load_E[0], aux.load_E[1])
    dense = jax.eval_shape(
        lambda params: nnx.merge(params_of(DENSE)[0], params).trace(ids), params_of(DENSE)[1]
    )
    assert dense[1:] == (None, None)


def test_the_layers_run_in_order():
    """The scan over super-blocks equals calling their layers by hand, one after the other."""
    ids = some_ids()
    graphdef, params = params_of(SPARSE)

    @jax.jit
    def by_hand(params):
        model = nnx.merge(graphdef, params)
        block_graphdef, stacked = nnx.split(model.blocks)
        x = model.embedding_VD[...][ids]
        for index in range(2):
            block = nnx.merge(block_graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], stacked))
            output = block.layer_0(x)
            assert output.aux is None
            output = block.layer_1(output.x_BSD)
            assert output.aux is not None
            x = output.x_BSD
        return model.final_norm(x) @ model.embedding_VD[...].T

    np.testing.assert_allclose(run(SPARSE, ids)[0], by_hand(params), atol=2e-6)


def test_noise_follows_the_key_and_the_layer():
    noisy = dataclasses.replace(
        SPARSE, dropout=0.3, moe=dataclasses.replace(SPARSE.moe, jitter=0.3, expert_dropout=0.3)
    )
    ids = some_ids()
    first, again, other = (run(noisy, ids, train=True, key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    with pytest.raises(ValueError, match="key"):
        run(noisy, ids, train=True)
    np.testing.assert_array_equal(run(noisy, ids)[0], run(SPARSE, ids)[0])

    # Two equal super-blocks that add nothing to the residual route every token alike, until there is noise,
    # which must be each super-block's own.
    twins = model_of(noisy)
    flat = {
        path: jnp.zeros_like(leaf[...])
        if path[-1].startswith(("w_o_", "w_out_"))
        else leaf[...][:1].repeat(2, 0)
        for path, leaf in nnx.to_flat_state(nnx.state(twins.blocks))
    }
    nnx.update(twins.blocks, nnx.from_flat_state(flat))
    _, aux = run(noisy, ids, params=nnx.state(twins))
    np.testing.assert_array_equal(aux.prob_sum_E[0], aux.prob_sum_E[1])
    _, aux = run(noisy, ids, train=True, params=nnx.state(twins), key=jax.random.key(1))
    assert np.abs(aux.prob_sum_E[0] - aux.prob_sum_E[1]).max() > 1e-3


def test_a_token_outside_the_vocabulary_is_loud():
    ids = some_ids()
    assert np.isnan(run(DENSE, ids.at[0, 3].set(17))[0][0, 3:]).all()
    check_tokens(np.asarray(ids), 17)
    check_tokens(np.zeros((0,), np.int32), 17)
    with pytest.raises(ValueError, match="Token id 17 lies outside the vocabulary of 17"):
        check_tokens(np.array([[0, 17]]), 17)
    with pytest.raises(ValueError, match="Token id -1"):
        check_tokens(np.array([-1]), 17)
    with pytest.raises(ValueError, match="integers"):
        check_tokens(np.array([0.5]), 17)


def test_one_sentence_when_rows_do_not_fit_the_groups():
    config = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, sequences_per_group=3))
    with pytest.raises(ValueError, match="sequences_per_group"):
        run(config, some_ids(rows=4))


def test_bfloat16_is_close_and_selective():
    ids = some_ids()
    half = dataclasses.replace(DENSE, dtype="bfloat16")
    want, got = run(DENSE, ids)[0], run(half, ids)[0]
    assert got.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params_of(half)[1]))
    assert 1e-4 < np.abs(np.asarray(want - got)).max() < 0.1
    sparse, aux = run(dataclasses.replace(SPARSE, dtype="bfloat16"), ids)
    assert sparse.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in aux)
    # A token close to a tie may go elsewhere; most must not.
    error = np.abs(np.asarray(sparse - run(SPARSE, ids)[0])).max(-1)
    assert np.median(error) < 0.05


def test_first_loss_is_that_of_a_uniform_guess():
    ids = some_ids(rows=8, length=32)
    logits = run(SPARSE, ids)[0]
    scores = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1).mean()
    assert float(loss) == pytest.approx(np.log(17), abs=0.7)


def test_making_a_model_directly():
    model = TransformerLM(SPARSE, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(some_ids())[0], run(SPARSE, some_ids())[0], atol=2e-6)
