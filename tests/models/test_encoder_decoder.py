"""An encoder beside the decoder, layers one by one, caches, and the families' own ways of attending."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchmoe.models import TransformerLM, unroll, with_config, with_moe
from tests.checks import unchecked
from tests.models.worlds import SPARSE

BOTH = dataclasses.replace(
    SPARSE,
    encoder_layers=2,
    encoder_moe_every=1,
    positions="relative",
    relative_buckets=8,
    relative_distance=16,
    scale_scores=False,
    scale_head=True,
)
ROWS = {
    "ids_BS": jax.random.randint(jax.random.key(1), (3, 9), 0, 17),
    "source_BP": jax.random.randint(jax.random.key(2), (3, 7), 0, 17),
    "source_mask_BP": jnp.arange(7) < jnp.array([7, 5, 3])[:, None],
}


@pytest.fixture(scope="module")
def model():
    return TransformerLM(BOTH, rngs=nnx.Rngs(0))


@nnx.jit
def scores(model, ids_BS, **options):
    return model(ids_BS, **options)


def test_aux_counts_the_encoder_before_the_decoder(model):
    _, aux = scores(model, **ROWS)
    # Two encoder layers of 15 real tokens, both sparse; four decoder layers of 27, every other one sparse.
    assert aux.tokens.tolist() == [15, 15, 27, 27]


def test_the_decoder_sees_no_future_and_all_of_the_source(model):
    before, _ = scores(model, **ROWS)
    ids_BS = ROWS["ids_BS"].at[:, 5].add(1) % 17
    after, _ = scores(model, **ROWS | {"ids_BS": ids_BS})
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])
    # The last source token of row 0 changes that row's first scores; padding of the others changes nothing.
    source_BP = ROWS["source_BP"].at[:, 6].add(1) % 17
    after, _ = scores(model, **ROWS | {"source_BP": source_BP})
    assert not np.allclose(before[0, 0], after[0, 0])
    np.testing.assert_array_equal(before[1:], after[1:])


def test_gradients_reach_every_weight(model):
    graphdef, params = nnx.split(model)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params)(**ROWS)[0]).mean())(params)

    flat = dict(nnx.to_flat_state(gradient(params)))
    assert {path[0] for path in flat} == {"embedding_VD", "blocks", "final_norm", "positions", "encoder"}
    for path, leaf in flat.items():
        assert np.isfinite(leaf[...]).all() and np.abs(leaf[...]).max() > 0, path


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SPARSE, qk_norm="head", window=3),
        dataclasses.replace(BOTH, qk_norm="full", scan_layers=False, remat="full"),
        BOTH,
    ],
    ids=["head norm, window", "full norm, layers one by one", "encoder"],
)
def test_tokens_one_by_one_equal_the_whole_row(config):
    rows = ROWS if config.encoder_layers else {"ids_BS": ROWS["ids_BS"]}
    ids_BS = rows["ids_BS"]

    @nnx.jit
    def both(model):
        offered = {}
        if config.encoder_layers:
            encoded_BPD, _ = model.encode(ROWS["source_BP"], ROWS["source_mask_BP"])
            offered = {"encoded_BPD": encoded_BPD, "source_mask_BP": ROWS["source_mask_BP"]}
        cache = model.start_cache(3, 11, **offered)
        logits, cache = model.decode(ids_BS[:, :6], cache, last=False)
        parts = [logits]
        for place in range(6, 9):
            logits, cache = model.decode(ids_BS[:, place : place + 1], cache)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1), model(**rows)[0]

    one_by_one, whole = both(TransformerLM(config, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(one_by_one, whole, atol=5e-6)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_scores_are_kept_for_the_backward_pass(implementation):
    config = dataclasses.replace(BOTH, remat="dots", attention_implementation=implementation)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))))

    def backward(params):
        return jax.vjp(lambda params: nnx.merge(graphdef, params)(**ROWS)[0], params)[1]

    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, params))]
    seven_or_nine = [shape for shape in kept if shape[-2:] in {(9, 9), (9, 7), (7, 7)}]
    assert len(kept) > 20 and all(len(shape) <= 4 for shape in seven_or_nine), seven_or_nine


def test_layers_one_by_one_are_the_stacked_ones(model):
    separate = unroll(model)
    assert nnx.to_pure_dict(nnx.state(separate))["encoder"]["blocks"].keys() == {"block_0", "block_1"}
    drawn = TransformerLM(separate.config, rngs=nnx.Rngs(0))
    for name in ("block_0", "block_1"):
        jax.tree.map(
            np.testing.assert_array_equal,
            nnx.to_pure_dict(nnx.state(getattr(separate.blocks, name))),
            nnx.to_pure_dict(nnx.state(getattr(drawn.blocks, name))),
        )
    (stacked, aux), (one_by_one, aux_too) = scores(model, **ROWS), scores(separate, **ROWS)
    np.testing.assert_allclose(stacked, one_by_one, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), aux, aux_too)


def test_unrolling_can_free_the_stacks():
    stacked = TransformerLM(SPARSE, rngs=nnx.Rngs(0))
    arrays = jax.tree.leaves(nnx.state(stacked.blocks))
    separate = unroll(stacked, free=True)
    assert all(array.is_deleted() for array in arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(separate)))


def test_sparse_layers_can_route_another_way(model):
    dropless = with_moe(model, dataclasses.replace(SPARSE.moe, dispatch="dropless"))
    assert dropless.encoder.blocks.layer_0.feed_forward.config.dispatch == "dropless"
    assert model.config.moe.dispatch == "gather"
    # Evaluation capacity here has room for all, so nothing changes but the way there.
    np.testing.assert_allclose(scores(dropless, **ROWS)[0], scores(model, **ROWS)[0], atol=2e-6)
    with pytest.raises(ValueError, match="num_experts is 8 here and 4 in the model"):
        with_moe(model, dataclasses.replace(SPARSE.moe, num_experts=8))


def test_another_configuration_of_the_same_weights(model):
    windowed = with_config(model, dataclasses.replace(BOTH, window=2, dtype="bfloat16"))
    assert windowed.embedding_VD[...] is model.embedding_VD[...]
    assert windowed.blocks.layer_0.attention.dtype == jnp.bfloat16 and windowed.config.window == 2
    with pytest.raises(ValueError, match="has shape .* in the model and None in the configuration"):
        with_config(model, dataclasses.replace(BOTH, encoder_layers=0, encoder_moe_every=None))


def test_weights_can_be_kept_in_bfloat16():
    narrow = TransformerLM(dataclasses.replace(BOTH, param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    types = {path[-1]: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(narrow))}
    assert types.pop("router_DE") == jnp.float32
    assert set(types.values()) == {jnp.dtype("bfloat16")}
    wide = TransformerLM(BOTH, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(narrow.embedding_VD[...], wide.embedding_VD[...].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ({"ids_BS": ROWS["ids_BS"]}, "give it source_BP"),
        (ROWS | {"source_BP": ROWS["source_BP"][:2]}, "source_BP has 2 rows, but the decoder has 3"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(model, rows, sentence):
    with unchecked(), pytest.raises(ValueError, match=sentence):
        model(**rows)


def test_a_decoder_alone_refuses_a_source(model):
    alone = nnx.eval_shape(lambda: TransformerLM(SPARSE, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no encoder"):
        alone(**ROWS)
    with pytest.raises(ValueError, match="no encoder, so nothing looks at encoded_BPD"):
        alone.start_cache(3, 9, encoded_BPD=jnp.zeros((3, 7, 16)))
    with pytest.raises(ValueError, match="give it encoded_BPD"):
        model.start_cache(3, 9)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"encoder_layers": 3}, "encoder_layers=3 is not a multiple of 2"),
        ({"encoder_moe_every": 2}, "there is no encoder"),
        ({"positions": "relative", "relative_distance": 16}, "leaves no room for relative_buckets=32"),
        ({"positions": "absolute"}, "did you mean|is not known"),
        ({"qk_norm": "heads"}, "did you mean 'head'"),
        ({"window": 0}, "window is 0, but must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with unchecked(), pytest.raises(ValueError, match=sentence):
        dataclasses.replace(SPARSE, **changes)
