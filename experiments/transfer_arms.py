"""The runs of transfer_study.py: what each starts from, who teaches it, and how it is trained."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from switchmoe.data.corpora import find_domains, read_documents
from switchmoe.models import LMConfig, flops_per_token
from switchmoe.train import OptimizerConfig, Teacher, TrainConfig, TuneConfig, load_params, run_folder
from switchmoe.train.model import Params
from switchmoe.transfer import sparse_config, student_of, upcycle

if __package__:  # imported as experiments.transfer_arms
    from experiments import quickstart
else:  # imported by a script, which finds its neighbours by their own names
    import quickstart

# Steps that the dense model goes on for, and what the others may cost in FLOPs; those of fine-tuning.
MORE, TUNED = 600, 200
RATES = {"upcycle": (1e-3, 2e-3), "finetune": (3e-4, 1e-3), "lora": (1e-3, 3e-3), "distil": (4e-3,)}
# The domain to fine-tune on, and the share of its end that is taken: less than the quickstart holds out, so
# that no model has read any of it.
SMALL, SHARE = "shakespeare", 0.045
# How the upcycled models begin, beside the dense one that goes on.
UPCYCLED = {
    "copy": dict(num_experts=8),
    "noise": dict(num_experts=8, how="noise"),
    "partial": dict(num_experts=8, how="partial"),
    "copy, top-1": dict(num_experts=8, top_k=1),
}
DROPOUT = dict(dropout=0.1, expert_dropout=0.4)  # Switch Transformers, table 4
TUNED_PARTS = {
    "all": ({}, {}),
    "all, expert dropout": (DROPOUT, {}),
    "rest": ({}, dict(part="rest")),
    "experts": ({}, dict(part="experts")),
    "lora": ({}, dict(part="lora")),
}


class Base(NamedTuple):
    """A model of the quickstart, read once."""

    params: Params
    config: TrainConfig


class Run(NamedTuple):
    """A run of the study: its place in the plan, its settings, and what it is given, as `(bases) -> ...`."""

    part: str
    arm: str
    config: TrainConfig
    start: Callable[[dict[str, Base]], Params | None]
    teacher: Callable[[dict[str, Base]], Teacher | None] = lambda _: None

    def __str__(self) -> str:
        return f"{self.part}, {self.arm}, learning rate {self.config.optimizer.learning_rate:g}"


def read_bases(out: Path, steps: int) -> dict[str, Base]:
    """Read both arms of the quickstart from its folder."""
    configs = {arm: quickstart.arm_config(arm, steps=steps) for arm in ("dense", "switch")}
    return {arm: Base(load_params(run_folder(config, out))[0], config) for arm, config in configs.items()}


def plan(steps: int, small: Path) -> list[Run]:
    """List all runs behind the quickstart's two, which are `steps` long; others shrink with these.

    Each arm's first learning rate comes before any second one.
    """
    share = steps / quickstart.STEPS
    dense, switch = (quickstart.arm_config(arm, steps=steps) for arm in ("dense", "switch"))
    more, tuned = (max(2, round(count * share)) for count in (MORE, TUNED))
    upcycling = _upcycling(dense, switch, more)
    runs = [*upcycling, *_finetuning(dense, switch, tuned, small), *_distilling(dense, switch)]
    times: dict[tuple[str, str], int] = {}
    order = []
    for run in runs:
        times[run.part, run.arm] = times.get((run.part, run.arm), -1) + 1
        order.append((times[run.part, run.arm], run))
    return [run for _, run in sorted(order, key=lambda pair: pair[0])]


def write_small(folder: Path) -> Path:
    """Write the end of a domain's text, which the quickstart holds out, as a corpus of its own."""
    text = b"\f".join(read_documents(find_domains("bundled")[SMALL]))
    end = text[-int(SHARE * len(text)) :]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SMALL}.txt").write_bytes(end[end.index(b"\n") + 1 :])
    return folder


def _settings(
    config: TrainConfig, name: str, rate: float, steps: int, model: LMConfig, **others
) -> TrainConfig:
    return dataclasses.replace(
        config,
        name=name,
        model=model,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=min(50, steps // 4)),
        train=dataclasses.replace(config.train, steps=steps, eval_every=max(1, steps // 8)),
        **others,
    )


def _upcycling(dense: TrainConfig, switch: TrainConfig, more: int) -> list[Run]:
    """The dense model goes on; sparse ones made of it get as many FLOPs, and one drawn anew those of both."""
    text = dataclasses.replace(dense.data, seed=1)  # in another order than before
    cost = functools.partial(flops_per_token, sequence_length=dense.data.sequence_length)
    budget = more * cost(dense.model)[0]
    runs = []
    for rate in RATES["upcycle"]:
        config = _settings(dense, "dense-on", rate, more, dense.model, data=text)
        runs.append(Run("upcycle", "dense goes on", config, lambda bases: bases["dense"].params))
        for arm, how in UPCYCLED.items():
            layers = {name: value for name, value in how.items() if name != "how"}
            model = sparse_config(dense.model, **layers)
            steps = max(2, round(budget / cost(model)[0]))
            config = _settings(dense, f"upcycled-{arm.replace(', ', '-')}", rate, steps, model, data=text)
            runs.append(Run("upcycle", arm, config, functools.partial(_upcycled, how)))
    total = dense.train.steps * cost(dense.model)[0] + budget
    steps = max(2, round(total / cost(switch.model)[0]))
    anew = dataclasses.replace(switch, name="anew", train=dataclasses.replace(switch.train, steps=steps))
    return [*runs, Run("upcycle", "Switch, drawn anew, FLOPs of both", anew, lambda _: None)]


def _upcycled(how: dict, bases: dict[str, Base]) -> Params:
    base = bases["dense"]
    return upcycle(base.params, base.config.model, key=jax.random.key(0), **how)[0]


def _finetuning(dense: TrainConfig, switch: TrainConfig, steps: int, small: Path) -> list[Run]:
    """Both models read the small domain again and again."""
    assert switch.model.moe is not None
    runs = []
    text = dataclasses.replace(dense.data, source=str(small), validation_fraction=0.3)
    for place, rate in enumerate(RATES["finetune"]):
        config = _settings(dense, "tuned-dense", rate, steps, dense.model, data=text)
        runs.append(Run("finetune", "dense, all", config, lambda bases: bases["dense"].params))
        for arm, (dropouts, tune) in TUNED_PARTS.items():
            moe = dataclasses.replace(switch.model.moe, expert_dropout=dropouts.get("expert_dropout", 0.0))
            model = dataclasses.replace(switch.model, moe=moe, dropout=dropouts.get("dropout", 0.0))
            name = f"tuned-{arm.replace(', ', '-').replace(' ', '-')}"
            own_rate = RATES["lora"][place] if arm == "lora" else rate  # adapters want a higher one
            config = _settings(switch, name, own_rate, steps, model, data=text, tune=TuneConfig(**tune))
            runs.append(Run("finetune", arm, config, lambda bases: bases["switch"].params))
    return runs


def _distilling(dense: TrainConfig, switch: TrainConfig) -> list[Run]:
    """Students of the dense twin's shape, trained like that one, which nobody taught."""
    width = dense.model.d_ff_sparse

    def copied(bases: dict[str, Base]) -> Params:
        base = bases["switch"]
        return student_of(base.params, base.config.model, d_ff_sparse=width, key=jax.random.key(0))[0]

    def taught(bases: dict[str, Base]) -> Teacher:
        return Teacher(bases["switch"].params, bases["switch"].config.model)

    (rate,) = RATES["distil"]
    made = functools.partial(_settings, dense, rate=rate, steps=dense.train.steps, model=dense.model)
    return [
        Run("distil", "copied", made(name="copied"), copied),
        Run("distil", "taught", made(name="taught"), lambda _: None, taught),
        Run("distil", "copied and taught", made(name="copied-taught"), copied, taught),
    ]
