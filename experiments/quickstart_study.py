"""Find out whether the quickstart's answer holds: a grid of learning rates, and three seeds.

Question: at equal useful FLOPs per token and equal steps, is the Switch model's validation loss lower than
          its dense twin's on every seed, when both have tried the same five learning rates?
Command:  python experiments/quickstart_study.py [--part grid|seeds] [--out runs/quickstart_study]
Cost:     16 runs, so eight times what the quickstart costs: under an hour on two CPU cores. The same command
          goes on with a study that was stopped, and skips what is done.
Result:   experiments/summaries/quickstart.json, from which `make results` writes RESULTS.md, and the run
          folders in OUT.

The grid runs both arms at the same five rates on a seed that is none of the three. The runs over the seeds
take each arm's LEARNING_RATES of quickstart.py; a warning says so where that is not the best of the grid.
"""

import dataclasses
import datetime
import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from switchmoe.train import RunError, TrainConfig, run_hash, run_training
from switchmoe.train.command_line import fail
from switchmoe.train.display import number
from switchmoe.train.errors import EXIT_NOT_FINITE, bad_input
from switchmoe.train.records import commit, read_json, write_json

if __package__:  # imported as experiments.quickstart_study
    from experiments import quickstart
else:  # run as a script, which finds its neighbours by their own names
    import quickstart

ARMS = ("dense", "switch")
PARTS = ("grid", "seeds")
GRID = (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)
GRID_SEED = 100
SEEDS = (0, 1, 2)
STEPS = quickstart.STEPS
SUMMARY = Path(__file__).with_name("summaries") / "quickstart.json"
# What the summary keeps of a run's done.json; none of it names a place on the machine.
FIELDS = ("seed", "hash", *quickstart.KEYS, "dropped_floor", "device", "device_count", "commit")


class Run(NamedTuple):
    """One run of the study."""

    part: str
    arm: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.part}, {self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"

    def config(self, steps: int) -> TrainConfig:
        """The configuration that the quickstart's arm has here."""
        return quickstart.arm_config(self.arm, self.seed, self.learning_rate, steps)


@functools.cache
def hash_of(run: Run, steps: int) -> str:
    """What the run's folder is named by."""
    return run_hash(run.config(steps))


def plan() -> list[Run]:
    """List all runs in the order in which they are made: the seeds last, the arms in turn."""
    grid = [Run("grid", arm, rate, GRID_SEED) for rate in GRID for arm in ARMS]
    seeds = [Run("seeds", arm, quickstart.LEARNING_RATES[arm], seed) for seed in SEEDS for arm in ARMS]
    return grid + seeds


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run the evidence behind the quickstart; the same command goes on where it was stopped.

    Attributes:
      part: of the study to run; the summary keeps what it has of the other.
      out: folder of the runs.
      steps: of each run; fewer only shows that everything works.
      summary: where the summary goes; by default experiments/summaries/quickstart.json, or a file in OUT
        where `steps` is not the quickstart's.
    """

    part: Literal["all", "grid", "seeds"] = "all"
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/quickstart_study")
    steps: int = STEPS
    summary: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


def main(arguments: Arguments) -> int:
    """Make the runs that are wanted and not done, and keep the summary up to date; returns the exit code."""
    steps = arguments.steps
    path = arguments.summary or (SUMMARY if steps == STEPS else arguments.out / SUMMARY.name)
    runs = [run for run in plan() if arguments.part in ("all", run.part)]
    try:
        with bad_input():  # before the first run, so that it costs nothing to learn of a wrong value or file
            summary = update_summary(path, steps)
        for place, run in enumerate(runs, 1):
            print(f"run {place} of {len(runs)}: {run}", flush=True)
            record, stopped = make_run(run, arguments.out, steps)
            if record is not None:
                summary = update_summary(path, steps, record)
                print(f"  {record.get('failed') or describe(record)}", flush=True)
            if stopped:
                print("stopped, and saved; the same command goes on from there.")
                return 0
    except RunError as error:
        return fail(error)
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{path}: {len(summary['missing'])} of {len(plan())} runs are missing.")
    if path == SUMMARY:
        print("make results writes it into experiments/RESULTS.md.")
    return 0


def make_run(run: Run, out: Path, steps: int) -> tuple[dict[str, Any] | None, bool]:
    """Train one run, or read it where it is done.

    Returns what the summary keeps, None if the run was stopped, and whether a signal asks to start no other,
    which it also may where the run got done. A run whose losses stop being finite is a result too: its
    record has no loss, and says why.
    """
    about = {"arm": run.arm, "learning_rate": run.learning_rate}

    def show(row: dict[str, Any]) -> None:
        if "val_loss" in row:
            print(f"  step {row['step']} of {steps}: validation loss {number(row['val_loss'])}", flush=True)

    try:
        result = run_training(run.config(steps), out, quickstart.ONE_DEVICE, display="quiet", on_row=show)
    except RunError as error:
        if error.code != EXIT_NOT_FINITE:
            raise
        failed = {"steps": steps, "val_loss": None, "failed": str(error), "commit": commit()}
        return about | {"seed": run.seed, "hash": hash_of(run, steps)} | failed, False
    if result.summary is None:
        return None, True
    return about | {field: result.summary[field] for field in FIELDS}, result.stop_requested


def describe(record: dict[str, Any]) -> str:
    """Say in a line how a run ended."""
    return (
        f"validation loss {number(record['val_loss'])}, "
        f"{record['seconds']:.0f} s of training on {record['device']}"
    )


def update_summary(path: Path, steps: int, *records: dict[str, Any]) -> dict[str, Any]:
    """Write the summary of all planned runs: these records, and what the file on the disk has of the others.

    A record on the disk counts if it is of the very configuration that is planned now. What is not there is
    listed as missing. The date is that of the last change.

    Raises:
      OSError: the file can't be written.
      RunError: there is a file, but it is not JSON.
    """
    old = read_json(path) or {}
    earlier = [record for part in PARTS for record in old.get(part, [])]
    known = {(record["hash"], record["seed"]): record for record in [*earlier, *records]}
    new: dict[str, Any] = {"grid": [], "seeds": [], "missing": []}
    for run in plan():
        record = known.get((hash_of(run, steps), run.seed))
        if record is None:
            new["missing"].append(str(run))
        else:
            new[run.part].append(record)
    rates = dict(quickstart.LEARNING_RATES)
    new = {
        "command": "python experiments/quickstart_study.py",
        "complete": not new["missing"],
        "learning_rates": rates,
        "warnings": doubts(new["grid"], rates),
    } | new
    if any(old.get(name) != value for name, value in new.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"date": datetime.date.today().isoformat()} | new)
    return new


def doubts(grid: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    """Say where the grid speaks against the learning rates that the seeds use."""
    said = []
    for arm in ARMS:
        losses = {
            record["learning_rate"]: record["val_loss"]
            for record in grid
            if record["arm"] == arm and record["val_loss"] is not None
        }
        if not losses:
            continue
        best = min(losses, key=losses.__getitem__)
        if best != rates[arm]:
            said.append(
                f"the best learning rate of the grid for the {arm} arm is {best:g}, "
                f"but its runs over seeds use {rates[arm]:g}."
            )
        if best in (min(GRID), max(GRID)):
            said.append(
                f"the best learning rate of the grid for the {arm} arm, {best:g}, lies at the edge of the "
                "grid; a better one may lie beyond."
            )
    return said


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
