"""What transfer_study.py would run: which arms are compared with which, at what cost; nothing is trained."""

import dataclasses
import json

import pytest

from experiments import quickstart, transfer_arms, transfer_study
from switchmoe.models import flops_per_token, param_count
from switchmoe.train import RunResult
from switchmoe.train.config import identity, to_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return transfer_arms.plan(quickstart.STEPS, tmp_path_factory.mktemp("small"))


def of(runs, part):
    return [run for run in runs if run.part == part]


def test_upcycled_models_get_the_flops_of_the_dense_one_that_goes_on(runs):
    spent = {}
    for run in of(runs, "upcycle"):
        config = run.config
        useful, _ = flops_per_token(config.model, config.data.sequence_length)
        spent.setdefault(run.arm, []).append(useful * config.train.steps)
        assert config.data.seed == (0 if "drawn anew" in run.arm else 1)
    (budget,) = set(spent.pop("dense goes on"))
    first = flops_per_token(quickstart.arm_config("dense").model, 128)[0] * quickstart.STEPS
    (anew,) = spent.pop("Switch, drawn anew, FLOPs of both")
    assert anew == pytest.approx(first + budget, rel=0.01)
    assert set(spent) == set(transfer_arms.UPCYCLED)
    for flops in spent.values():
        assert flops == pytest.approx([budget, budget], rel=0.01)


def test_arms_of_fine_tuning_differ_in_what_is_trained_alone(runs):
    arms = {
        run.arm: to_json(run.config)
        for run in of(runs, "finetune")
        if run.config.optimizer.learning_rate == 1e-3
    }
    plain = identity(arms["all"])
    for arm, differs in {
        "all, expert dropout": {"model.dropout", "model.moe.expert_dropout"},
        "rest": {"tune.part"},
        "experts": {"tune.part"},
    }.items():
        other = identity(arms[arm])
        assert {name for name in plain | other if plain.get(name) != other.get(name)} == differs
    assert arms["lora"]["tune"]["part"] == "lora"


def test_students_have_the_twins_shape_and_schedule(runs):
    twin = quickstart.arm_config("dense")
    for run in of(runs, "distil"):
        assert param_count(run.config.model) == param_count(twin.model)
        assert run.config.optimizer.learning_rate == twin.optimizer.learning_rate
        assert run.config.train.steps == twin.train.steps and run.config.data == twin.data


def test_all_names_are_different_and_first_rates_come_first(runs):
    assert len({str(run) for run in runs}) == len(runs) == 26
    assert len({run.config.name for run in runs}) == 26 - 11
    half = {(run.part, run.arm) for run in runs[:15]}
    assert len(half) == 15


def test_the_small_text_is_of_what_the_quickstart_holds_out(tmp_path):
    folder = transfer_arms.write_small(tmp_path / "small")
    small = (folder / "shakespeare.txt").read_bytes()
    whole = b"\f".join(transfer_arms.read_documents(transfer_arms.find_domains("bundled")["shakespeare"]))
    assert whole.endswith(small) and 30_000 < len(small) < 0.05 * len(whole)


def test_the_summary_keeps_what_is_planned_and_says_what_is_missing(tmp_path, runs):
    path = tmp_path / "transfer.json"
    first = runs[0]
    record = {"steps": first.config.train.steps, "val_loss": 1.0}
    transfer_study.update(path, runs, {str(first): record, "start": {"dense": 2.0}})
    saved = json.loads(path.read_text())
    assert saved["found"] == {str(first): record, "start": {"dense": 2.0}}
    assert saved["missing"] == [str(run) for run in runs[1:]]
    longer = dataclasses.replace(first.config, train=dataclasses.replace(first.config.train, steps=7))
    transfer_study.update(path, [first._replace(config=longer), *runs[1:]], {})
    assert str(first) not in json.loads(path.read_text())["found"]


def test_a_signal_in_the_quickstarts_runs_ends_the_study(tmp_path, monkeypatch, capsys):
    def stop(config, out, mesh, **_):
        return RunResult(out, "stopped", 3, None, stop_requested=True)

    monkeypatch.setattr(transfer_study, "run_training", stop)
    arguments = transfer_study.Arguments(out=tmp_path, base=tmp_path / "base", steps=4)
    assert transfer_study.main(arguments) == 0
    assert "the same command goes on from there" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "transfer.json").read_text())["missing"]) == 26
