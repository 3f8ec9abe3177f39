"""RESULTS.md against summaries small enough to work out by hand, and the committed one against its own."""

import copy
import json
from pathlib import Path

import pytest

from experiments import results
from tests.experiments.worlds import record

ROOT = Path(__file__).resolve().parents[2]

# Three seeds, worked by hand:
#   seed   dense  switch  switch - dense
#   0      2.0    1.5     -0.5
#   1      2.2    1.9     -0.3
#   2      1.8    2.0     +0.2             so the Switch model is lower for 2 of 3
#   mean   2.0    1.8     -0.2
# Sample standard deviations (the sum of squared deviations over 3 - 1, rooted):
#   dense  ((0)^2 + (0.2)^2 + (-0.2)^2) / 2 = 0.04,      root 0.2
#   switch ((-0.3)^2 + (0.1)^2 + (0.2)^2) / 2 = 0.07,    root 0.26458
#   gap    ((-0.3)^2 + (-0.1)^2 + (0.4)^2) / 2 = 0.13,   root 0.36056
SUMMARY = {
    "date": "2001-02-03",
    "command": "python experiments/quickstart_study.py",
    "complete": True,
    "learning_rates": {"dense": 0.002, "switch": 0.004},
    "warnings": [],
    "grid": [
        record("dense", 0.004, 100, 2.4),
        record("dense", 0.001, 100, 2.5),
        record("dense", 0.002, 100, 2.3),
        record("switch", 0.001, 100, 2.4),
        record("switch", 0.002, 100, None),
        record("switch", 0.004, 100, 2.1),
    ],
    "seeds": [
        record("dense", 0.002, 0, 2.0),
        record("switch", 0.004, 0, 1.5, dropped_fraction=0.01),
        record("dense", 0.002, 1, 2.2),
        record("switch", 0.004, 1, 1.9, dropped_fraction=0.02),
        record("dense", 0.002, 2, 1.8),
        record("switch", 0.004, 2, 2.0, dropped_fraction=0.06),
    ],
    "missing": [],
}


@pytest.fixture
def summary():
    return copy.deepcopy(SUMMARY)


def rows(text):
    """The rows of all tables by their first cell, the other cells as a list."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in lines}


def test_seeds_means_and_spreads(summary):
    text = results.quickstart(summary)
    found = rows(text)
    assert found["0"] == ["2.0000", "1.5000", "-0.5000"]
    assert found["1"] == ["2.2000", "1.9000", "-0.3000"]
    assert found["2"] == ["1.8000", "2.0000", "+0.2000"]
    assert found["mean"] == ["2.0000", "1.8000", "-0.2000"]
    assert found["sample standard deviation"] == ["0.2000", "0.2646", "0.3606"]
    assert "lower than its dense twin's for 2 of 3 seeds" in text


def test_domains(summary):
    # Half a nat below and above the means 2.0 and 1.8.
    found = rows(results.quickstart(summary))
    assert found["prose"] == ["1.5000", "1.3000", "-0.2000"]
    assert found["code"] == ["2.5000", "2.3000", "-0.2000"]


def test_costs(summary):
    found = rows(results.quickstart(summary))
    assert found["FLOPs per token, useful (router counted)"] == ["1,000,000", "1,040,000", "1.040"]
    assert found["FLOPs per token, executed (empty seats counted)"] == ["1,000,000", "1,200,000", "1.200"]
    assert found["parameters"] == ["600,000", "3,000,000", "5.000"]
    assert found["parameters a token meets"] == ["600,000", "620,000", "1.033"]
    # (1 + 2 + 6) / 3 = 3%; a dense model drops nothing, so there is no ratio.
    assert found["dropped in training"] == ["0.00%", "3.00%", "–"]
    assert found["dropped if experts were drawn evenly at random (floor)"] == ["0.00%", "0.50%", "–"]
    assert found["tokens per second, cpu"] == ["40,000", "20,000", "0.500"]
    assert found["seconds, cpu"] == ["61.4", "122.9", "2.000"]


def test_speeds_are_kept_apart_by_device(summary):
    summary["seeds"][5] |= {"device": "Big GPU", "tokens_per_second": 900_000.0}
    text = results.quickstart(summary)
    assert rows(text)["tokens per second, cpu"] == ["40,000", "20,000", "0.500"]
    assert rows(text)["tokens per second, Big GPU"] == ["–", "900,000", "–"]
    assert "Device: 1 x cpu, 1 x Big GPU." in text


@pytest.mark.parametrize(
    "flops, said", [(1_049_000.0, "1.0490 times the twin's, within 5%"), (940_000.0, "**not within** 5%")]
)
def test_the_worst_seed_says_whether_flops_are_equal(summary, flops, said):
    summary["seeds"][3]["flops_per_token"] = flops
    assert said in results.quickstart(summary)


def test_the_best_learning_rate_of_each_arm_is_marked_in_the_grid(summary):
    text = results.quickstart(summary)
    found = rows(text)
    assert found["0.001"] == ["2.5000", "2.4000"]
    assert found["0.002"] == ["**2.3000** (best)", "not finite"]
    assert found["0.004"] == ["2.4000", "**2.1000** (best)"]
    assert text.count("(best)") == 2
    assert "The seeds use: dense 0.002, switch 0.004." in text


def test_a_seed_that_diverged_counts_but_not_as_lower(summary):
    summary["seeds"][1]["val_loss"] = None  # the Switch model of seed 0, one of the two that were lower
    text = results.quickstart(summary)
    assert "for 1 of 3 seeds" in text and "0" not in rows(text)


def test_an_incomplete_summary_says_so(summary):
    del summary["seeds"][1:], summary["grid"][1:]
    summary["missing"] = [f"run {number}" for number in range(14)]
    summary["warnings"] = ["the best learning rate lies at the edge."]
    text = results.quickstart(summary)
    assert "**Incomplete**: of 16 runs, these are missing: run 0; run 1;" in text
    assert "**Warning**: the best learning rate lies at the edge." in text
    assert "No seed has a loss from both arms." in text
    assert rows(text)["0.004"] == ["**2.4000** (best)", "not run"]


def test_device_date_and_commits_are_named(summary):
    summary["grid"][0]["commit"] = "fedcba+changes"
    summary["grid"][1]["commit"] = None
    text = results.quickstart(summary)
    assert "Made by `python experiments/quickstart_study.py`, last on 2001-02-03." in text
    assert "Commit: fedcba+changes, unknown (run outside a clone), 0123456789abcdef." in text


def test_check_notices_a_number_that_was_typed(tmp_path, summary, capsys):
    (tmp_path / "summaries").mkdir()
    (tmp_path / "summaries" / "quickstart.json").write_text(json.dumps(summary))
    page = tmp_path / "RESULTS.md"
    assert results.main(["--check"], tmp_path) == 1 and not page.exists()
    assert results.main([], tmp_path) == 0
    assert results.main(["--check"], tmp_path) == 0
    page.write_text(page.read_text().replace("2 of 3 seeds", "3 of 3 seeds"))
    capsys.readouterr()
    assert results.main(["--check"], tmp_path) == 1
    assert "is not what the summaries give; run make results." in capsys.readouterr().err
    assert "3 of 3" in page.read_text()  # checking changes nothing


def test_a_summary_without_a_section_gets_a_sentence(tmp_path):
    (tmp_path / "upcycling.json").write_text("{}")
    text = results.render(tmp_path)
    assert "upcycling.json is not shown: SECTIONS in experiments/results.py has no 'upcycling'." in text


def test_the_committed_page_is_what_the_committed_summaries_give():
    assert results.main(["--check"]) == 0
    text = (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    assert text.startswith("# Results\n\nGenerated by `make results`")
    summaries = list((ROOT / "experiments" / "summaries").glob("*.json"))
    assert ("There is no summary yet" in text) == (not summaries)
