"""Go on from the quickstart's two models: upcycle, fine-tune, distil, prune, generate.

Question: does upcycling the dense twin beat training it on, at equal FLOPs? On a text of 50 KB, what do
          expert dropout, freezing and adapters do against over-fitting? Is a distilled student better than
          a dense twin of its size? What does leaving out experts cost, on one domain and on all?
Command:  python experiments/transfer_study.py [--part upcycle|finetune|distil|prune] [--out runs/transfer]
Cost:     the quickstart, where it has not been run, and 26 more runs: about 50 minutes on two free CPU cores.
          The same command goes on with a study that was stopped, and skips what is done.
Result:   experiments/summaries/transfer.json, from which `make results` writes RESULTS.md, and run folders.

Seed 0 alone. Each arm of "upcycle" and "finetune" tries two learning rates; RESULTS.md shows both. FLOPs are
useful ones, the teacher's forward passes not counted. Training losses of arms with dropout are with it.
"""

import dataclasses
import datetime
import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from switchmoe.data import batches, evaluation_batches, load_packed
from switchmoe.models import LMConfig, param_count
from switchmoe.train import RunError, TrainConfig, load_params, read_rows, run_training
from switchmoe.train.command_line import fail
from switchmoe.train.display import number
from switchmoe.train.errors import bad_input
from switchmoe.train.evaluate import EvalStep, evaluate, make_eval_step
from switchmoe.train.model import Params, pure_model
from switchmoe.train.records import read_json, write_json
from switchmoe.transfer import busiest, expert_load, prune_experts, with_params

if __package__:  # imported as experiments.transfer_study
    from experiments import quickstart, transfer_arms
    from experiments.transfer_arms import Base, Run
else:  # run as a script, which finds its neighbours by their own names
    import quickstart
    import transfer_arms
    from transfer_arms import Base, Run

PARTS = ("upcycle", "finetune", "distil", "prune")
SUMMARY = Path(__file__).with_name("summaries") / "transfer.json"
# What the summary keeps of a run's done.json; none of it names a place on the machine.
FIELDS = ("hash", "steps", "tokens", "loss", "val_loss", "flops_per_token", "params_total", "params_active",
          "seconds", "dropped_fraction", "max_vio", "device", "device_count", "commit")  # fmt: skip
# Experts that each layer of the Switch model keeps, of 8.
KEPT = (6, 4, 2, 1)
PROMPT = "**HAMLET**  \n"
# Rows over which the use of experts is counted.
COUNTED = 64


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run what goes on from the quickstart; the same command goes on where it was stopped.

    Attributes:
      part: of the study to run; the summary keeps what it has of the others.
      out: folder of the runs.
      base: folder of the quickstart's two runs, which are made if they are not there.
      steps: of the quickstart's runs; fewer make all others shorter too, and only show that it works.
      summary: where the summary goes; by default experiments/summaries/transfer.json, or a file in OUT where
        `steps` is not the quickstart's.
    """

    part: Literal["all", "upcycle", "finetune", "distil", "prune"] = "all"
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/transfer")
    base: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/quickstart")
    steps: int = quickstart.STEPS
    summary: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def main(arguments: Arguments) -> int:
    """Make the runs that are wanted and not done, and keep the summary up to date; returns the exit code."""
    steps, usual = arguments.steps, arguments.steps == quickstart.STEPS
    path = arguments.summary or (SUMMARY if usual else arguments.out / SUMMARY.name)
    try:
        with bad_input():
            small = transfer_arms.write_small(arguments.out / "small")
            runs = transfer_arms.plan(steps, small)
            update(path, runs, {})
        for arm in ("dense", "switch"):
            print(f"quickstart, {arm}", flush=True)
            config = quickstart.arm_config(arm, steps=steps)
            result = run_training(config, arguments.base, quickstart.ONE_DEVICE, display="quiet")
            if result.summary is None or result.stop_requested:
                print("stopped, and saved; the same command goes on from there.")
                return 0
            update(path, runs, {f"base, {arm}": {field: result.summary[field] for field in FIELDS}})
        bases = transfer_arms.read_bases(arguments.base, steps)
        if arguments.part in ("all", "finetune"):
            update(path, runs, {"start": starts(bases, small)})
        if arguments.part in ("all", "prune"):
            update(path, runs, {"prune": prune(bases["switch"])})
        wanted = [run for run in runs if arguments.part in ("all", run.part)]
        for place, run in enumerate(wanted, 1):
            print(f"run {place} of {len(wanted)}: {run}", flush=True)
            record, stopped = make_run(run, bases, arguments.out)
            if record is not None:
                update(path, runs, {str(run): record})
                print(f"  validation loss {number(record['val_loss'])}", flush=True)
            if stopped:
                print("stopped, and saved; the same command goes on from there.")
                return 0
    except RunError as error:
        return fail(error)
    missing = read_json(path)["missing"]
    print(f"{path}: {len(missing)} of {len(runs)} runs are missing.")
    return 0


def make_run(run: Run, bases: dict[str, Base], out: Path) -> tuple[dict[str, Any] | None, bool]:
    """Train one run, or read it where it is done; returns its record, and whether to start no other.

    There is no record of a run that was stopped. It has both losses of every evaluation, since fine-tuning
    is best before its end, and what the model writes after PROMPT.
    """
    start, teacher = run.start(bases), run.teacher(bases)
    result = run_training(
        run.config, out, quickstart.ONE_DEVICE, start=start, teacher=teacher, display="quiet"
    )
    if result.summary is None:
        return None, True
    rows = [row for row in read_rows(result.folder / "metrics.jsonl") if "val_loss" in row]
    about = {"part": run.part, "arm": run.arm, "learning_rate": run.config.optimizer.learning_rate}
    curve = [[row["step"], row["val_loss"], row["loss"]] for row in rows]
    params, config = load_params(result.folder)
    (text,) = quickstart.continue_texts(params, config, [PROMPT])
    about |= {"curve": curve, "text": text}
    return about | {field: result.summary[field] for field in FIELDS}, result.stop_requested


def starts(bases: dict[str, Base], small: Path) -> dict[str, float]:
    """The loss of both models on the small text's held-out share, before they are fine-tuned on it."""
    found = {}
    for arm, base in bases.items():
        data = dataclasses.replace(base.config.data, source=str(small), validation_fraction=0.3)
        config = dataclasses.replace(base.config, data=data)
        found[arm] = evaluated(base.params, config)["val_loss"]
    return found


def prune(base: Base) -> list[dict[str, Any]]:
    """Keep each domain's busiest experts, or as many of the first, and see what that costs everywhere.

    The first record is of the whole model; "first" stands where a domain would.
    """
    params, config = base
    corpus, moe = load_packed(config.data), config.model.moe
    assert moe is not None
    model = with_params(config.model, params)
    uses = {"first": np.arange(moe.num_experts, 0, -1.0)[None].repeat(config.model.num_super_blocks, axis=0)}
    for place, domain in enumerate(corpus.domains):
        own = corpus.train.domain == place
        rows = corpus.train._replace(tokens=corpus.train.tokens[own], domain=corpus.train.domain[own])
        seen = batches(rows, config.train.batch_size, seed=0)
        uses[domain] = expert_load(model, [seen[step] for step in range(COUNTED // config.train.batch_size)])

    def record(domain: str | None, params: Params, shape: LMConfig) -> dict[str, Any]:
        row = evaluated(params, dataclasses.replace(config, model=shape))
        keep = moe.num_experts if domain is None else shape.moe and shape.moe.num_experts
        losses = {name: row[name] for name in ("val_loss", "val_loss_by_domain")}
        print(f"  pruned for {domain}, {keep} experts: {number(row['val_loss'])}", flush=True)
        return {"domain": domain, "keep": keep, "params_total": param_count(shape)[0]} | losses

    records = [record(None, params, config.model)]
    for domain, load_LE in uses.items():
        for keep in KEPT:
            records.append(record(domain, *prune_experts(params, config.model, busiest(load_LE, keep=keep))))
    return records


def evaluated(params: Params, config: TrainConfig) -> dict[str, Any]:
    """Evaluate weights on all of a text's held-out share."""
    corpus = load_packed(config.data)
    held_out = evaluation_batches(corpus.validation, config.train.batch_size)
    return evaluate(eval_step_of(config.model), params, held_out, corpus.domains)


@functools.cache
def eval_step_of(model: LMConfig) -> EvalStep:
    """The compiled evaluation of a model of this shape."""
    return make_eval_step(pure_model(model))


def update(path: Path, runs: list[Run], found: dict[str, Any]) -> None:
    """Put what was found into the summary, beside what it has; only what is planned now stays in it."""
    old = read_json(path) or {}
    names = {str(run): run for run in runs}
    kept = {}
    for name, value in (old.get("found", {}) | found).items():
        planned = names.get(name)
        if planned is None or value["steps"] == planned.config.train.steps:
            kept[name] = value
    new = {"missing": [name for name in names if name not in kept], "found": kept}
    if old.get("found") != kept or old.get("missing") != new["missing"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"date": datetime.date.today().isoformat(), "command": "python experiments/transfer_study.py"}
        write_json(path, about | new)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
