"""Learning rates worked by hand."""

import math

import numpy as np
import pytest

from switchmoe.train import OptimizerConfig
from switchmoe.train.schedule import learning_rate


def rates(steps, **config):
    schedule = learning_rate(OptimizerConfig(**config), steps)
    return [float(schedule(count)) for count in range(steps)]


def test_cosine_warms_up_to_its_peak_and_ends_at_its_final_fraction():
    # Peak 8 after 4 updates: 8/4, 16/4, 24/4, 32/4. Then 4 more to 8 * 0.25 = 2, half a cosine around the
    # mean of 8 and 2, which is 5, with amplitude 3: 5 + 3 cos(pi n / 4) for n = 1, 2, 3, 4.
    half = math.sqrt(0.5)
    expected = [2, 4, 6, 8, 5 + 3 * half, 5, 5 - 3 * half, 2]
    got = rates(8, learning_rate=8, warmup_steps=4, final_fraction=0.25)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_constant_stays_at_its_peak():
    np.testing.assert_allclose(
        rates(5, learning_rate=3, warmup_steps=3, schedule="constant"), [1, 2, 3, 3, 3]
    )


def test_inverse_square_root_halves_when_updates_are_four_times_the_warm_up():
    # Warm-up of 2: 1/2, 1 at update 2; then sqrt(2 / n) at update n: n = 8 gives 1/2.
    got = rates(8, learning_rate=1, warmup_steps=2, schedule="inverse_sqrt")
    np.testing.assert_allclose(got, [0.5] + [math.sqrt(2 / n) for n in range(2, 9)], rtol=1e-6)
    assert got[7] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_update_has_the_peak(schedule, warmup):
    got = rates(4, learning_rate=2, warmup_steps=warmup, schedule=schedule)
    assert got[0] == pytest.approx(2) and all(np.diff(got) <= 0)


def test_a_run_shorter_than_its_warm_up_only_rises():
    np.testing.assert_allclose(rates(3, learning_rate=10, warmup_steps=10), [1, 2, 3], rtol=1e-6)
