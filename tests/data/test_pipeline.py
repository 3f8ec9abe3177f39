"""Batches by step: exact addressing, whole epochs, process slices, evaluation in a fixed order."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.data import Rows, batches, evaluation_batches


def numbered_rows(count, domains=2, length=9):
    """Make rows whose tokens are all their number + 3, the domains one after the other."""
    tokens = np.repeat(np.arange(count, dtype=np.uint16)[:, None] + 3, length, axis=1)
    return Rows(tokens, np.sort(np.arange(count) % domains).astype(np.uint8))


def numbers(batch):
    return batch.ids_BS[:, 0] - 3


def fields(batch):
    """The arrays of a decoder's batch, which has no source."""
    assert batch.source_BP is None and batch.source_mask_BP is None
    return batch[:-2]


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_a_step_has_one_batch(seed, step):
    rows = numbered_rows(23)
    dealt = batches(rows, 4, seed=seed)
    dealt[0], dealt[step + 1]  # what was asked for before makes no difference
    assert_equal(dealt[step], batches(rows, 4, seed=seed)[step])


@pytest.mark.parametrize(("count", "batch_size"), [(20, 4), (10, 4), (7, 7), (300, 13)])
def test_each_row_once_an_epoch_and_each_epoch_in_another_order(count, batch_size):
    dealt = batches(numbered_rows(count), batch_size, seed=0)
    order = np.concatenate([numbers(dealt[step]) for step in range(-(-4 * count // batch_size))])
    epochs = order[: 4 * count].reshape(4, count)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(count))


def test_no_epoch_of_a_seed_is_an_epoch_of_its_neighbour():
    orders = set()
    for seed in range(4):
        dealt = batches(numbered_rows(50), 50, seed=seed)
        orders |= {tuple(numbers(dealt[epoch])) for epoch in range(4)}
    assert len(orders) == 16


def test_a_row_keeps_its_domain():
    rows = numbered_rows(40, domains=5)
    batch = batches(rows, 40, seed=3)[0]
    np.testing.assert_array_equal(batch.domain_B, rows.domain[numbers(batch)])


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
def test_the_processes_parts_join_to_the_global_batch(process_count):
    rows = numbered_rows(21)
    processes = range(process_count)
    parts = [batches(rows, 8, seed=5, process_index=i, process_count=process_count) for i in processes]
    whole = batches(rows, 8, seed=5)
    for step in (0, 1, 2, 3, 1000):  # step 2 runs over the end of the first epoch
        joined = map(np.concatenate, zip(*(fields(part[step]) for part in parts), strict=True))
        assert_equal(fields(whole[step]), joined)
    parts = [evaluation_batches(rows, 8, process_index=i, process_count=process_count) for i in processes]
    whole = evaluation_batches(rows, 8)
    for index in range(len(whole)):
        joined = map(np.concatenate, zip(*(fields(part[index]) for part in parts), strict=True))
        assert_equal(fields(whole[index]), joined)


def test_any_rows_of_a_batch_can_be_had_whichever_process_asks():
    rows = numbered_rows(26, domains=3)
    for dealt, step in [
        (batches(rows, 8, seed=5, process_index=1, process_count=2), 4),
        (evaluation_batches(rows, 8, process_index=1, process_count=2), 3),  # 2 rows and 6 empty ones
    ]:
        whole = dealt.rows(step, 0, 8)
        for start, stop in [(0, 8), (0, 1), (3, 7), (7, 8)]:
            assert_equal(fields(dealt.rows(step, start, stop)), [part[start:stop] for part in fields(whole)])
        assert_equal(fields(dealt[step]), [part[4:] for part in fields(whole)])
        for start, stop in [(-1, 2), (6, 9), (3, 3)]:
            with pytest.raises(IndexError, match=r"has the rows \[0, 8\); there are no rows"):
                dealt.rows(step, start, stop)
    np.testing.assert_array_equal(dealt.domains(step), whole.domain_B)


def test_iterating_starts_at_step_0():
    dealt = batches(numbered_rows(9), 3, seed=1)
    for step, batch in zip(range(5), dealt, strict=False):
        assert_equal(batch, dealt[step])


def test_evaluation_deals_every_row_once_and_fills_up():
    # Rows 0-3 are of domain 0 and 4-6 of domain 1. Places inside their domains are 1/8, 3/8, 5/8, 7/8 and
    # 1/6, 3/6, 5/6: sorted by place, the domains take turns.
    rows = Rows(numbered_rows(7).tokens, np.array([0] * 4 + [1] * 3, np.uint8))
    dealt = evaluation_batches(rows, 3)
    assert len(dealt) == 3
    assert [list(numbers(batch)) for batch in dealt] == [[0, 4, 1], [5, 2, 6], [3, -3, -3]]
    last = dealt[2]
    np.testing.assert_array_equal(last.weight_BS.sum(axis=1), [8, 0, 0])
    np.testing.assert_array_equal(last.mask_BS.any(axis=1), [True, False, False])
    with pytest.raises(IndexError, match="There are 3 evaluation batches; there is none at 3"):
        dealt[3]


def test_a_limited_evaluation_by_hand():
    # 12 rows of domain 0 and 4 of domain 1; 2 batches of 4 take half: 6 and 2. The middles of six equal parts
    # of 0..12 are 1, 3, 5, 7, 9, 11; of two parts of 12..16 they are 13 and 15. Places in the domain:
    # 1/12, 3/12, ... 11/12, and 1/4, 3/4, so 13 follows 3 and 15 follows 9.
    tokens = numbered_rows(16).tokens
    rows = Rows(tokens, np.array([0] * 12 + [1] * 4, np.uint8))
    dealt = evaluation_batches(rows, 4, limit=2)
    assert [list(numbers(batch)) for batch in dealt] == [[1, 3, 13, 5], [7, 9, 15, 11]]
    assert len(evaluation_batches(rows, 4, limit=100)) == 4  # more than there are


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 5))
def test_a_limited_evaluation_is_fair(sizes, batch_size, limit):
    domain = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint8)
    dealt = evaluation_batches(Rows(numbered_rows(len(domain)).tokens, domain), batch_size, limit=limit)
    chosen = np.concatenate([numbers(batch)[batch.mask_BS[:, 0]] for batch in dealt])
    wanted = min(limit * batch_size, len(domain))
    assert len(chosen) == wanted == len(set(chosen)) and len(dealt) == -(-wanted // batch_size)
    assert all((np.diff(chosen[domain[chosen] == n]) > 0).all() for n in range(len(sizes)))
    if wanted >= len(sizes):
        taken = np.bincount(domain[chosen], minlength=len(sizes))
        assert (taken >= 1).all() and (taken <= sizes).all()
        # Within one row of its share, but for the rows that domains too small for one have been given.
        spare = sum(max(0.0, 1 - wanted * size / len(domain)) for size in sizes)
        assert (np.abs(taken - wanted * np.array(sizes) / len(domain)) <= 1 + spare).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0; give at least 1"),
        ({"batch_size": 24}, "has 20 rows to train on, fewer than a batch of 24; lower batch_size"),
        ({"process_count": 3}, "batch_size 8 cannot be split over 3 processes; make it a multiple"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2; count processes"),
        ({"process_index": -1}, "process_index is -1 of process_count 1"),
        ({"process_count": 0}, "process_index is 0 of process_count 0"),
        ({"seed": -1}, "The data seed is -1; give a whole number from 0"),
    ],
)
def test_what_cannot_be_dealt(arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        batches(numbered_rows(20), **{"batch_size": 8, "seed": 0, **arguments})
    assert str(caught.value).endswith(".")
    if "seed" not in arguments and arguments.get("batch_size") != 24:
        with pytest.raises(ValueError, match=sentence):
            evaluation_batches(numbered_rows(20), **{"batch_size": 8, **arguments})


def test_other_numbers_that_cannot_be():
    with pytest.raises(ValueError, match="The limit of evaluation batches is 0; give at least 1, or None"):
        evaluation_batches(numbered_rows(20), 8, limit=0)
    with pytest.raises(IndexError, match="counted from step 0; there is none at step -1"):
        batches(numbered_rows(20), 8, seed=0)[-1]


def test_data_never_holds_a_step_up():
    dealt = batches(numbered_rows(1000, length=257), 16, seed=0)
    dealt[0]

    def seconds():
        start = time.perf_counter()
        for step in range(40):
            dealt[step]
        return time.perf_counter() - start

    assert 40 / min(seconds() for _ in range(5)) > 200  # batches a second; some thousands are usual


def test_grain_is_imported_only_for_batches():
    program = (
        "import sys, switchmoe.data as data\n"
        "packages = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not packages & {'grain', 'flax', 'optax', 'orbax', 'jax'}, packages\n"
        "data.batches\n"
        "assert 'grain' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=120)
