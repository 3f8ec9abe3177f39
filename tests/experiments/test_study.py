"""The study behind the quickstart: what it runs, and what it keeps of the runs, which are made up here."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import quickstart_study as study
from experiments import results
from switchmoe.train import RunError, RunResult, run_folder, run_hash
from tests.experiments.worlds import record

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Stands in for run_training: the loss grows with the distance from the arm's best learning rate."""

    def __init__(self, best):
        self.best, self.made, self.stop_at, self.fail_at = best, [], None, {}
        self.stop_after = None

    def __call__(self, config, out, mesh, *, display, on_row):
        arm, rate, seed = config.name, config.optimizer.learning_rate, config.train.seed
        if (arm, rate, seed) in self.fail_at:
            raise RunError("it went wrong.", self.fail_at[arm, rate, seed])
        folder, steps = run_folder(config, out), config.train.steps
        if len(self.made) == self.stop_at:
            return RunResult(folder, "stopped", 7, None, stop_requested=True)
        self.made.append((arm, rate, seed))
        loss = 1.5 + abs(rate - self.best[arm]) + seed / 1e4
        on_row({"step": steps, "val_loss": loss})
        about = {"name": arm, "compile_seconds": 9.0, "hash": run_hash(config), "steps": steps}
        done = record(arm, rate, seed, loss) | about
        return RunResult(folder, "done", steps, done, stop_requested=len(self.made) == self.stop_after)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "GRID", (0.001, 0.002, 0.003, 0.004, 0.005))
    monkeypatch.setattr(study.quickstart, "LEARNING_RATES", {"dense": 0.002, "switch": 0.003})
    monkeypatch.setattr(study, "SUMMARY", tmp_path / "summaries" / "quickstart.json")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody pulls a plug here, and busy disks are slow
    made_up = Runs({"dense": 0.002, "switch": 0.003})
    monkeypatch.setattr(study, "run_training", made_up)
    return made_up


def start(tmp_path, **changes):
    code = study.main(study.Arguments(out=tmp_path / "runs", **changes))
    return code, json.loads(study.SUMMARY.read_text()) if study.SUMMARY.exists() else None


def test_the_plan_gives_both_arms_the_same_five_rates_and_then_three_other_seeds():
    plan = study.plan()
    grid, seeds = plan[:10], plan[10:]
    assert len(study.GRID) == 5 == len(set(study.GRID)) and list(study.GRID) == sorted(study.GRID)
    for arm in ("dense", "switch"):
        assert [run.learning_rate for run in grid if run.arm == arm] == list(study.GRID)
        assert [run.seed for run in seeds if run.arm == arm] == [0, 1, 2]
        rate = study.quickstart.LEARNING_RATES[arm]
        assert rate in study.GRID and {run.learning_rate for run in seeds if run.arm == arm} == {rate}
    assert {run.seed for run in grid} == {100} and len(seeds) == 6
    assert len({run_folder(run.config(study.STEPS), "runs") for run in plan}) == 16


def test_every_run_is_the_quickstarts_own_arm():
    for run in study.plan():
        config = run.config(study.STEPS)
        assert config == study.quickstart.arm_config(run.arm, run.seed, run.learning_rate)
        assert (config.name, config.optimizer.learning_rate) == (run.arm, run.learning_rate)


def test_a_whole_study_leaves_a_complete_summary(runs, tmp_path, capsys):
    code, summary = start(tmp_path)
    assert code == 0 and summary["complete"] and not summary["missing"] and not summary["warnings"]
    assert runs.made == [(run.arm, run.learning_rate, run.seed) for run in study.plan()]
    assert summary["date"] == datetime.date.today().isoformat()
    assert summary["learning_rates"] == {"dense": 0.002, "switch": 0.003}
    assert len(summary["grid"]) == 10 and len(summary["seeds"]) == 6
    wanted = {"arm", "learning_rate", "seed", "steps", "tokens", "val_loss", "val_loss_by_domain"}
    wanted |= {"flops_per_token", "flops_per_token_executed", "params_total", "params_active"}
    wanted |= {"tokens_per_second", "seconds", "dropped_fraction", "dropped_floor", "max_vio"}
    wanted |= {"device", "device_count", "commit", "hash"}
    assert all(set(kept) == wanted for kept in summary["grid"] + summary["seeds"])
    kept = summary["seeds"][3]
    assert (kept["arm"], kept["seed"], kept["val_loss"]) == ("switch", 1, 1.5001)
    text = study.SUMMARY.read_text()
    assert str(tmp_path) not in text and len(text) < 20_000
    said = capsys.readouterr()
    assert "run 14 of 16: seeds, switch, learning rate 0.003, seed 1" in said.out
    assert f"step {study.STEPS} of {study.STEPS}: validation loss 1.5001" in said.out and not said.err
    # What the study writes, the generator of RESULTS.md can read.
    assert "lower than its dense twin's for 0 of 3 seeds" in results.render(study.SUMMARY.parent)


def test_a_stopped_study_is_marked_and_goes_on(runs, tmp_path, capsys):
    runs.stop_at = 12
    code, summary = start(tmp_path)
    assert code == 0 and not summary["complete"]
    assert summary["missing"] == [str(run) for run in study.plan()[12:]]
    assert len(summary["grid"]) == 10 and len(summary["seeds"]) == 2
    assert "stopped, and saved" in capsys.readouterr().out
    runs.stop_at = None
    assert start(tmp_path)[1]["complete"]


def test_a_signal_in_the_last_moments_of_a_run_ends_the_study_after_it(runs, tmp_path, capsys):
    runs.stop_after = 12
    code, summary = start(tmp_path)
    assert code == 0 and len(runs.made) == 12 and len(summary["seeds"]) == 2
    assert summary["missing"] == [str(run) for run in study.plan()[12:]]
    assert "stopped, and saved" in capsys.readouterr().out


def test_parts_add_up_to_the_whole_wherever_they_run(runs, tmp_path):
    _, half = start(tmp_path, part="seeds")
    assert len(runs.made) == 6 and len(half["missing"]) == 10 and not half["grid"]
    study.main(study.Arguments(part="grid", out=tmp_path / "elsewhere"))
    apart = json.loads(study.SUMMARY.read_text())
    study.SUMMARY.unlink()
    assert start(tmp_path)[1] == apart and apart["complete"]


def test_the_date_is_that_of_the_last_change(runs, tmp_path):
    _, summary = start(tmp_path)
    study.SUMMARY.write_text(json.dumps(summary | {"date": "2001-02-03"}))
    assert start(tmp_path)[1]["date"] == "2001-02-03"
    runs.best["dense"] += 0.0001
    assert start(tmp_path)[1]["date"] == datetime.date.today().isoformat()


def test_runs_of_another_configuration_do_not_stay(runs, tmp_path, monkeypatch):
    start(tmp_path)
    monkeypatch.setitem(study.quickstart.LEARNING_RATES, "switch", 0.004)
    code, summary = start(tmp_path, part="grid")
    assert code == 0 and [kept["arm"] for kept in summary["seeds"]] == ["dense"] * 3
    assert len(summary["missing"]) == 3 and all("switch" in run for run in summary["missing"])


@pytest.mark.parametrize(
    "arm, best, warnings",
    [
        ("switch", 0.003, []),
        ("switch", 0.004, ["for the switch arm is 0.004, but its runs over seeds use 0.003."]),
        ("dense", 0.001, ["for the dense arm is 0.001, but its", "the dense arm, 0.001, lies at the edge"]),
        (
            "switch",
            0.005,
            ["for the switch arm is 0.005, but its", "the switch arm, 0.005, lies at the edge"],
        ),
    ],
)
def test_a_grid_that_speaks_against_the_chosen_rate_is_a_warning(runs, tmp_path, capsys, arm, best, warnings):
    runs.best[arm] = best
    code, summary = start(tmp_path)
    said = capsys.readouterr().err
    assert code == 0 and summary["complete"] and len(summary["warnings"]) == len(warnings)
    for found, wanted in zip(summary["warnings"], warnings, strict=True):
        assert wanted in found and f"warning: {found}" in said


def test_a_run_that_diverges_is_a_result_and_any_other_error_ends_the_study(runs, tmp_path, capsys):
    runs.fail_at = {("switch", 0.005, 100): 3}
    code, summary = start(tmp_path)
    assert code == 0 and summary["complete"] and len(runs.made) == 15
    assert [kept["failed"] for kept in summary["grid"] if kept["val_loss"] is None] == ["it went wrong."]
    assert "not finite" in results.render(study.SUMMARY.parent)
    runs.fail_at = {("dense", 0.002, 0): 2}
    assert start(tmp_path)[0] == 2
    assert "error: it went wrong." in capsys.readouterr().err


def test_a_short_trial_leaves_the_evidence_alone(runs, tmp_path, capsys):
    _, summary = start(tmp_path)
    code, after = start(tmp_path, steps=3)
    assert code == 0 and after == summary
    trial = json.loads((tmp_path / "runs" / "quickstart.json").read_text())
    assert trial["complete"] and {kept["steps"] for kept in trial["seeds"]} == {3}
    assert start(tmp_path, steps=0)[0] == 2
    assert "train.steps" in capsys.readouterr().err


def test_it_starts_as_a_script():
    command = [sys.executable, "experiments/quickstart_study.py", "--help"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--part {all,grid,seeds}" in done.stdout
