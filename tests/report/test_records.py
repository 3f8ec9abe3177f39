"""Counting decisions: loads, drops and domains against cases worked by hand."""

import numpy as np
import pytest

from switchmoe.report import RoutingRecord, build_routing, text

# One layer, two rows of three tokens, two experts, one choice. Row 0 is of domain 0 and ends in padding,
# whose choice (expert 9, dropped) must count nowhere; row 1 is of domain 1.
IDS = np.array([[5, 6, 0], [7, 8, 9]])
DOMAIN = np.array([0, 1])
EXPERT = np.array([[[0, 1, 9], [1, 1, 1]]])[..., None]
WEIGHT = np.full(EXPERT.shape, 0.5, np.float32)
KEPT = np.array([[[True, True, False], [True, False, True]]])[..., None]


def build(**changes):
    arguments = dict(domains=["a", "b"], num_experts=2) | changes
    return build_routing(IDS, DOMAIN, EXPERT, WEIGHT, KEPT, **arguments)


def test_loads_and_drops_are_counted_without_the_padding():
    record = build(dropped_floor_L=np.array([0.03]))
    # Expert 0 has one token; expert 1 one of row 0 and three of row 1, of which the middle one is dropped.
    np.testing.assert_array_equal(record.load_LE, [[1, 4]])
    np.testing.assert_array_equal(record.kept_LE, [[1, 3]])
    np.testing.assert_allclose(record.dropped_fraction_L, [1 / 5])
    np.testing.assert_array_equal(record.dropped_floor_L, [0.03])
    # Mean load 2.5: 1 / 2.5 and 4 / 2.5, so MaxVio is 0.6.
    np.testing.assert_allclose(record.utilisation_LE, [[0.4, 1.6]])
    np.testing.assert_allclose(record.max_vio_L, [0.6])
    np.testing.assert_array_equal(record.dead_L, [0])


def test_loads_by_domain():
    record = build()
    np.testing.assert_array_equal(record.load_by_domain_NLE, [[[1, 1]], [[0, 3]]])
    np.testing.assert_array_equal(record.domain_share_NLE, [[[0.5, 0.5]], [[0, 1]]])
    # Joint probabilities (1/4, 1/4; 0, 1/2), experts (1/4, 3/4), domains 1/2 each:
    # 1/4 log2(2) + 1/4 log2(2/3) + 1/2 log2(4/3).
    bits = 0.25 + 0.25 * np.log2(2 / 3) + 0.5 * np.log2(4 / 3)
    np.testing.assert_allclose(record.domain_bits_L, [bits], rtol=1e-12)


@pytest.mark.parametrize("loads, bits", [([[[5, 5]], [[90, 90]]], 0.0), ([[[7, 0]], [[0, 3]]], 1.0)])
def test_domain_bits_at_their_ends(loads, bits):
    # Domains that use the experts alike say nothing, whatever their sizes; an expert a domain says it all.
    loads = np.array(loads)
    one = np.zeros(1)
    record = RoutingRecord(loads.sum(0), loads.sum(0), loads, one, one, one[None], ("a", "b"))
    np.testing.assert_allclose(record.domain_bits_L, [bits], atol=1e-12)


def test_a_domain_without_text_has_no_share_and_no_snippet():
    record = build(domains=["a", "b", "empty"])
    np.testing.assert_array_equal(record.domain_share_NLE[2], [[0, 0]])
    assert [snippet.domain for snippet in record.snippets] == ["a", "b"]
    np.testing.assert_allclose(record.domain_bits_L, build().domain_bits_L)


def test_drops_by_position():
    # Position 0: two choices, none lost. Position 1: two, one lost. Position 2: one (the other is padding).
    np.testing.assert_allclose(build(position_bins=3).dropped_by_position_LP, [[0, 0.5, 0]])
    # Two bins of three positions: 0 and 1 together, then 2.
    np.testing.assert_allclose(build(position_bins=2).dropped_by_position_LP, [[0.25, 0]])
    assert build(position_bins=16).dropped_by_position_LP.shape == (1, 3)


def test_every_choice_counts():
    expert = np.array([[[[0, 1], [2, 1]]]])
    kept = np.array([[[[True, False], [True, True]]]])
    record = build_routing(
        np.array([[5, 6]]), np.array([0]), expert, np.ones(expert.shape, np.float32), kept,
        domains=["a"], num_experts=4,
    )  # fmt: skip
    np.testing.assert_array_equal(record.load_LE, [[1, 2, 1, 0]])
    np.testing.assert_array_equal(record.kept_LE, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(record.dead_L, [1])
    assert np.isnan(record.dropped_floor_L).all()


def test_a_choice_that_is_not_used_counts_nowhere():
    # Three experts; expert 3 is a choice not used. Token 0 goes to expert 1 alone, token 1 to nobody, token 2
    # to experts 0 and 2, the heavier one, whose choice is dropped.
    expert = np.array([[[[3, 1], [3, 3], [0, 2]]]])
    weight = np.array([[[[0.0, 0.75], [0.0, 0.0], [0.25, 0.5]]]], np.float32)
    kept = np.array([[[[False, True], [False, False], [True, False]]]])
    record = build_routing(
        np.array([[5, 6, 7]]), np.array([0]), expert, weight, kept, domains=["a"], num_experts=3,
        position_bins=3,
    )  # fmt: skip
    np.testing.assert_array_equal(record.load_LE, [[1, 1, 1]])
    np.testing.assert_array_equal(record.kept_LE, [[1, 1, 0]])
    np.testing.assert_allclose(record.dropped_fraction_L, [1 / 3])
    np.testing.assert_allclose(record.dropped_by_position_LP, [[0, 0, 0.5]])
    (snippet,) = record.snippets
    np.testing.assert_array_equal(snippet.expert_LSK, [[[1, -1], [-1, -1], [2, 0]]])
    np.testing.assert_array_equal(snippet.weight_LSK, [[[0.75, 0], [0, 0], [0.5, 0.25]]])
    shown = [(entry["css"], entry["title"]) for entry in text.coloured(snippet, 0)]
    assert shown == [
        ("e1", "expert 1, weight 0.75"),
        ("x", "no expert"),
        ("e2", "expert 2, weight 0.50 (dropped); expert 0, weight 0.25"),
    ]


def test_the_snippet_is_the_first_row_with_the_most_text():
    ids = np.array([[5, 0, 0], [6, 7, 8], [9, 9, 9]])
    shape = (1, 3, 3, 1)
    record = build_routing(
        ids, np.zeros(3, int), np.zeros(shape, int), np.ones(shape, np.float32), np.ones(shape, bool),
        domains=["a"], num_experts=1, snippet_tokens=2,
    )  # fmt: skip
    np.testing.assert_array_equal(record.snippets[0].token_ids_S, [6, 7])
    assert record.snippets[0].expert_LSK.shape == (1, 2, 1)


def test_a_wrong_number_of_experts_or_domains_is_one_sentence():
    two = np.array([[[0, 2, 0], [0, 0, 0]]])[..., None]
    with pytest.raises(ValueError, match=r"experts 0 to 2, but num_experts is 1, .*: pass the model"):
        build_routing(IDS, DOMAIN, two, WEIGHT, KEPT, domains=["a", "b"], num_experts=1)
    with pytest.raises(ValueError, match="domains 0 to 1, but 1 names were given: pass one name"):
        build(domains=["a"])
