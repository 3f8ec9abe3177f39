"""Which points a loss chart shows."""

import re

import numpy as np

from switchmoe.report import ArmRecord, figures
from tests.report.worlds import arm


def test_trailing_mean_by_hand():
    # Width 2: the first alone, then (1+3)/2, (3+5)/2, (5+1)/2.
    np.testing.assert_allclose(figures.trailing_mean(np.array([1.0, 3, 5, 1]), 2), [1, 2, 4, 3])
    np.testing.assert_allclose(figures.trailing_mean(np.array([1.0, 3]), 1), [1, 3])
    assert figures.trailing_mean(np.array([]), 3).shape == (0,)
    assert [figures.smoothing_width(n) for n in (0, 24, 50, 140)] == [1, 1, 2, 5]


def test_points_by_axis():
    record = arm()
    np.testing.assert_allclose(figures.curve(record, "steps").validation_x, [10, 20])
    np.testing.assert_allclose(figures.curve(record, "seconds").validation_x, [5, 10])
    np.testing.assert_allclose(figures.curve(record, "FLOPs").validation_x, [1e10, 2e10])
    np.testing.assert_allclose(figures.curve(record, "steps").loss[[0, -1]], [3.9, 2.0])


def test_flops_follow_from_the_step_where_rows_lack_them():
    # 1,024 tokens a step at 2 MFLOPs each: step 3 is at 6.144 GFLOPs.
    record = ArmRecord("a", [{"step": 3, "loss": 1.0}], arm().summary)
    np.testing.assert_allclose(figures.curve(record, "FLOPs").train_x, [3 * 1024 * 2e6])
    assert figures.loss_chart([ArmRecord("a", record.metrics)], "FLOPs") is None


def test_losses_that_are_not_finite_are_left_out():
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    np.testing.assert_array_equal(figures.curve(ArmRecord("a", rows), "steps").train_x, [2])


def test_the_frame_leaves_out_the_beginning_alone():
    rows = [{"step": step, "loss": 100.0 if step < 8 else 2.0 + step / 100} for step in range(1, 101)]
    low, high = figures.loss_frame([ArmRecord("a", rows)])
    # Smoothed over 4 steps, from step 12 on: 2.105 at first, the mean of 2.09 to 2.12, and 2.985 at last.
    # With 6% of that range on either side.
    np.testing.assert_allclose([low, high], [2.105 - 0.0528, 2.985 + 0.0528])
    assert figures.loss_frame([ArmRecord("a")]) is None


def test_figures_take_the_pages_colours_and_font():
    svg = figures.loss_chart([arm("a"), arm("b")], "steps")
    assert "var(--arm0)" in svg and "var(--arm1)" in svg and "var(--ink)" in svg
    assert "font-family" not in svg and "font:" not in svg
    # Every colour is a variable: one left in black would vanish on a dark page.
    assert re.findall(r"#[0-9a-f]{6}", svg) == []
