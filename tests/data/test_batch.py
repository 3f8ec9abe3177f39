"""What a batch says of a packed row, worked by hand."""

import numpy as np

from switchmoe.data import make_batch


def test_documents_padding_and_weights_by_hand():
    # Row 0 holds the end of a document (50), a document without text, one (51 52 53) that goes on in the
    # next row. Row 1 holds the rest of it (54) and is padded. Row 2 is all padding, as evaluation fills up.
    tokens = np.array([[50, 1, 1, 51, 52, 53], [54, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.uint16)
    batch = make_batch(tokens, np.array([3, 3, 0], np.uint8))
    np.testing.assert_array_equal(batch.ids_BS, [[50, 1, 1, 51, 52], [54, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets_BS, [[1, 1, 51, 52, 53], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    # An end token belongs to what it ends.
    np.testing.assert_array_equal(batch.segments_BS, [[1, 1, 2, 3, 3], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions_BS, [[0, 1, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    # Predicting an end counts (50 -> 1). After an end the target is a next document's first token, even where
    # that is an end itself (1 -> 1), or padding: neither counts.
    np.testing.assert_array_equal(batch.weight_BS, [[1, 0, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask_BS, batch.segments_BS > 0)
    np.testing.assert_array_equal(batch.domain_B, [3, 3, 0])


def test_dtypes():
    batch = make_batch(np.full((2, 9), 70, np.uint16), np.zeros(2, np.uint8))
    assert batch.source_BP is None and batch.source_mask_BP is None
    dtypes = {name: getattr(batch, name).dtype.name for name in batch._fields[:-2]}
    assert dtypes == {
        "ids_BS": "int32",
        "targets_BS": "int32",
        "segments_BS": "int32",
        "positions_BS": "int32",
        "weight_BS": "float32",
        "mask_BS": "bool",
        "domain_B": "int32",
    }


def test_a_token_at_a_time_says_the_same():
    rng = np.random.default_rng(0)
    tokens = rng.choice([1, 60, 61, 62], size=(8, 33), p=[0.2, 0.4, 0.2, 0.2]).astype(np.uint16)
    for row, length in enumerate(rng.integers(1, 34, 8)):
        tokens[row, length:] = 0
    batch = make_batch(tokens, np.zeros(8, np.uint8))
    for row in range(8):
        segment, position = 1, 0
        for column in range(32):
            token, target = tokens[row, column], tokens[row, column + 1]
            expected = (segment, position) if token else (0, 0)
            assert (batch.segments_BS[row, column], batch.positions_BS[row, column]) == expected
            assert batch.weight_BS[row, column] == (target != 0 and token != 1)
            segment, position = (segment + 1, 0) if token == 1 else (segment, position + 1)
