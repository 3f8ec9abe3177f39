"""What the quickstart compares, and one short run of it as a newcomer would start it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import quickstart, quickstart_study
from switchmoe.models import flops_per_token
from switchmoe.parallel import MeshConfig
from switchmoe.train import RunResult
from switchmoe.train.config import identity, to_json

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
# summary.json's promise, for each arm.
PROMISED = [
    "steps",
    "tokens",
    "val_loss",
    "val_loss_by_domain",
    "flops_per_token",
    "flops_per_token_executed",
    "params_total",
    "params_active",
    "tokens_per_second",
    "seconds",
    "dropped_fraction",
    "max_vio",
]


def test_the_arms_cost_the_same_useful_flops():
    useful = {}
    for arm in ("dense", "switch"):
        config = quickstart.arm_config(arm)
        useful[arm], _ = flops_per_token(config.model, config.data.sequence_length)
    assert abs(useful["switch"] / useful["dense"] - 1) <= 0.05


def test_the_arms_differ_in_their_ffns_and_names_only():
    dense, switch = (to_json(quickstart.arm_config(arm, 5, 2e-3)) for arm in ("dense", "switch"))
    assert (dense.pop("name"), switch.pop("name")) == ("dense", "switch")
    assert dense["model"].pop("moe") is None and switch["model"].pop("moe")["num_experts"] == 8
    assert dense["model"].pop("d_ff_sparse") and switch["model"].pop("d_ff_sparse") is None
    assert dense == switch
    assert dense["train"]["seed"] == 5 and dense["optimizer"]["learning_rate"] == 2e-3


def test_each_arm_has_its_own_learning_rate_unless_one_is_given():
    for arm in ("dense", "switch"):
        config = quickstart.arm_config(arm)
        assert config.optimizer.learning_rate == quickstart.LEARNING_RATES[arm]
        assert config.train.steps == quickstart.Arguments().steps
        given = quickstart.arm_config(arm, learning_rate=1e-5)
        assert identity(to_json(given))["optimizer.learning_rate"] == 1e-5


def test_no_seat_depends_on_a_later_token():
    model = quickstart.arm_config("switch").model
    assert model.moe.drop_order == "token" and not model.allow_future_leak


@pytest.mark.parametrize("status, summary", [("stopped", None), ("done", {"val_loss": 1.0})])
def test_a_signal_in_the_first_arm_keeps_the_second_from_starting(
    monkeypatch, tmp_path, capsys, status, summary
):
    started = []

    def run_training(config, out, mesh):
        assert mesh == MeshConfig(data=1)  # one device, whatever there is
        started.append(config.name)
        return RunResult(tmp_path, status, 7, summary, stop_requested=True)

    monkeypatch.setattr(quickstart, "run_training", run_training)
    assert quickstart.main(quickstart.Arguments(out=tmp_path)) == 0
    assert started == ["dense"] and not list(tmp_path.iterdir())
    assert "stopped by a signal, and saved; the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_newcomers_run_from_start_to_page(tmp_path):
    out = tmp_path / "quickstart"
    command = [sys.executable, "experiments/quickstart.py", "--steps", str(STEPS), "--out", str(out)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "SWITCHMOE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["dense", "switch"]
    settings = quickstart.arm_config("dense", steps=STEPS)
    tokens = STEPS * settings.train.batch_size * settings.data.sequence_length
    for arm in summary.values():
        assert sorted(arm) == sorted(PROMISED)
        assert (arm["steps"], arm["tokens"]) == (STEPS, tokens)
        # 259 tokens drawn evenly cost ln 259 = 5.557 nats; three steps of warm-up have hardly begun.
        assert 3.0 < arm["val_loss"] < 6.5 and len(arm["val_loss_by_domain"]) == 5
        assert min(arm["val_loss_by_domain"].values()) <= arm["val_loss"]
        assert arm["tokens_per_second"] > 0 and arm["seconds"] > 0
    dense, switch = summary["dense"], summary["switch"]
    assert abs(switch["flops_per_token"] / dense["flops_per_token"] - 1) <= 0.05
    assert switch["flops_per_token_executed"] > switch["flops_per_token"]
    assert dense["flops_per_token_executed"] == dense["flops_per_token"]
    assert switch["params_total"] > switch["params_active"]
    assert dense["dropped_fraction"] == dense["max_vio"] == 0 <= switch["dropped_fraction"]

    page = (out / "report.html").read_text(encoding="utf-8")
    targets = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert all(target.startswith(("#", "data:")) for target in targets), targets
    assert "@import" not in page and not re.search(r"url\(\s*[\"']?https?:", page)
    assert "A Switch Transformer beside its dense twin" in page
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.endswith(str(out / "report.html"))
    assert "The Switch model goes on" in done.stdout

    # The study keeps these fields of a run's done.json, so a run must leave them.
    (left,) = out.glob("switch-*/0/done.json")
    assert set(quickstart_study.FIELDS) <= set(json.loads(left.read_text(encoding="utf-8")))
