"""The training loop: steps, rows of metrics, evaluations, checkpoints, and a clean end, however it comes."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from switchmoe.data import PackedCorpus, batches, evaluation_batches, load_packed
from switchmoe.shapes import named_key
from switchmoe.train.checkpoint import Checkpoints, refuse_other_config
from switchmoe.train.checks import (
    check_matmul,
    check_vocabulary,
    refuse_other_text_of_done,
    refuse_processes,
    small_groups_warning,
)
from switchmoe.train.collapse import CollapseAlarm
from switchmoe.train.config import TrainConfig, run_folder, to_json
from switchmoe.train.display import Display, DisplayMode, number
from switchmoe.train.errors import EXIT_NOT_FINITE, RunError, bad_input
from switchmoe.train.evaluate import evaluate, make_eval_step
from switchmoe.train.metrics import MetricsFile
from switchmoe.train.model import PureModel, pure_model
from switchmoe.train.preemption import StopRequest
from switchmoe.train.records import check_writable, environment, prepare_folder, read_json, write_json
from switchmoe.train.rows import Clock, costs, make_row, summary
from switchmoe.train.step import TrainState, init_state, make_train_step
from switchmoe.train.trackers import check_trackers, open_trackers

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    `status` is "done", "already done" (nothing was computed) or "stopped" (by a signal, after saving);
    `summary` is the content of done.json, None for a stopped run; `step` the steps taken so far;
    `stop_requested` says that a signal came, even if so late that the run got done: start nothing after it.
    """

    folder: Path
    status: Literal["done", "already done", "stopped"]
    step: int
    summary: dict[str, Any] | None
    stop_requested: bool = False


def run_training(
    config: TrainConfig,
    out: str | Path = "runs",
    *,
    display: DisplayMode = "auto",
    on_row: Callable[[Row], None] | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
) -> RunResult:
    """Train a run to its end, from its newest checkpoint if it has one; a finished run is only reported.

    Everything is left in OUT/NAME-HASH/SEED: config.json, env.json (of the last start), metrics.jsonl,
    checkpoints/STEP, done.json. Killed at any moment and called again with the same configuration, it ends
    with the same weights, bit for bit on a CPU, and the same rows, timings apart. SIGTERM and SIGINT save
    the current step and return with status "stopped".

    Args:
      config: what to train.
      out: the folder that holds the folders of runs.
      display: "auto" is a progress bar on a terminal and lines elsewhere; "quiet" shows warnings only.
      on_row: called with every row of metrics after it is written.
      tensorboard: write event files into the run's folder too (needs tensorboardX).
      wandb: send the rows to Weights & Biases too (needs wandb).

    Raises:
      RunError: one sentence and an exit code: 2, before anything is compiled, for a corpus, folder or
        checkpoint that doesn't fit, or for several processes; 3 when `train.max_bad_steps` steps in a row
        had a loss or gradient that isn't finite.
    """
    refuse_processes()
    folder = run_folder(config, out)
    saved = read_json(folder / "config.json")
    if saved is not None:
        refuse_other_config(saved, config, f"the run in {folder}")
    done = read_json(folder / "done.json")
    if done is not None:
        refuse_other_text_of_done(done.get("text_fingerprint"), config.data)
        if display != "quiet":
            loss = number(done["val_loss"])
            print(f"{folder} is already done: validation loss {loss} after {done['steps']} steps.")
        return RunResult(folder, "already done", done["steps"], done)
    with StopRequest() as stop:
        with bad_input():
            check_trackers(tensorboard=tensorboard, wandb=wandb)
            check_writable(folder)
            corpus = load_packed(config.data)
            check_vocabulary(corpus, config)
            check_matmul(config)
            run = _Run(config, folder, corpus, stop, on_row)
            prepare_folder(folder)
        with Checkpoints(folder, config, corpus.fingerprint) as checkpoints:
            checkpoints.check()
            result = run.go(checkpoints, display, tensorboard=tensorboard, wandb=wandb)
    return dataclasses.replace(result, stop_requested=stop.requested is not None)


class _Run:
    """One start of a run: what stays the same over its steps, and the clock, rows and screen with it."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        corpus: PackedCorpus,
        stop: StopRequest,
        on_row: Callable[[Row], None] | None,
    ) -> None:
        settings = config.train
        self.config, self.folder, self.corpus, self.stop = config, folder, corpus, stop
        self.on_row = on_row if on_row is not None else lambda row: None
        self.cost = costs(config)
        order = zlib.crc32(f"{config.data.seed}/{settings.seed}".encode())
        self.batches = batches(corpus.train, settings.batch_size, seed=order)
        held_out = functools.partial(evaluation_batches, corpus.validation, settings.micro_batch_size)
        self.some_held_out, self.all_held_out = held_out(limit=settings.eval_batches or None), held_out()
        # Two CPU devices that run ahead of each other can starve in a collective, so there every step is
        # waited for.
        self.wait = jax.default_backend() == "cpu" and jax.device_count() > 1

    def go(
        self, checkpoints: Checkpoints, display: DisplayMode, *, tensorboard: bool, wandb: bool
    ) -> RunResult:
        """Train from the newest checkpoint to the end or to a signal."""
        config, steps = self.config, self.config.train.steps
        model = pure_model(config.model)
        state = jax.jit(lambda: init_state(config, model))()
        start, self.clock = 0, Clock()
        if checkpoints.latest is not None:
            state, clock = checkpoints.load(state)
            start, self.clock = checkpoints.latest, Clock(**clock)
        where = environment() | {"text_fingerprint": self.corpus.fingerprint}
        write_json(self.folder / "config.json", to_json(config))
        write_json(self.folder / "env.json", where | {"start_step": start})
        trackers = open_trackers(
            self.folder, to_json(config), last_step=start, tensorboard=tensorboard, wandb=wandb
        )
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", last_step=start)
        self.alarm = CollapseAlarm(self.metrics.rows)
        self.display = Display(display, name=config.name, steps=steps, start=start)
        self.listeners = [self.metrics.write, *(tracker.write for tracker in trackers), self.on_row]
        try:
            self.display.say(
                f"{self.folder}: {self.cost.params_total:,} parameters, from step {start} to {steps}"
            )
            warning = small_groups_warning(config)
            if warning is not None:
                self.display.warn(warning)
            reached = self._steps(model, state, start, checkpoints)
            if reached < steps:
                self.display.say(
                    f"{self.stop.requested}: saved step {reached}; the same command goes on from there."
                )
                return RunResult(self.folder, "stopped", reached, None)
            done = summary(config, self.cost, self.metrics.rows, self.clock, where)
            write_json(self.folder / "done.json", done)
            self.display.say(f"{self.folder} is done: validation loss {number(done['val_loss'])}")
            return RunResult(self.folder, "done", steps, done)
        finally:
            self.display.close()
            for writer in (self.metrics, *trackers):
                writer.close()

    def _steps(self, model: PureModel, state: TrainState, start: int, checkpoints: Checkpoints) -> int:
        """Take steps until the end or a signal; save the last of them, wait for that, and return it."""
        settings, key = self.config.train, named_key(jax.random.key(self.config.train.seed), "noise")
        eval_step = make_eval_step(model)
        step_fn = jax.jit(make_train_step(self.config, model), donate_argnums=0)
        step, logged = start, start
        self.clock.skip()
        if start < settings.steps and not self.stop.requested:
            step_fn = step_fn.lower(state, self.batches[start], key).compile()
            self.clock.compile_seconds += self.clock.skip()
        while step < settings.steps and not self.stop.requested:
            state, metrics = step_fn(state, self.batches[step], key)
            if self.wait:
                jax.block_until_ready(state)
            step += 1
            self.display.advance(step)
            evaluated = step == settings.steps or (settings.eval_every and step % settings.eval_every == 0)
            if evaluated or step % settings.log_every == 0:
                metrics = jax.device_get(metrics)
                row = self._row(step, metrics, step - logged)
                if evaluated:
                    held_out = self.all_held_out if step == settings.steps else self.some_held_out
                    row |= evaluate(eval_step, state.everything(), held_out, self.corpus.domains)
                self._write(row)
                logged = step
                self._stop_if_not_finite(metrics, checkpoints)
                self.clock.skip()
            if settings.checkpoint_every and step % settings.checkpoint_every == 0 and step < settings.steps:
                checkpoints.save(state, step, self.clock.saved())
        checkpoints.save(state, step, self.clock.saved())
        checkpoints.close()
        return step

    def _row(self, step: int, metrics: dict[str, Any], steps_timed: int) -> Row:
        lap = self.clock.lap()
        seconds = self.clock.seconds
        return make_row(
            self.config, self.cost, step, metrics, seconds=seconds, steps_timed=steps_timed, lap=lap
        )

    def _write(self, row: Row) -> None:
        warning = self.alarm.hear(row.get("collapsed_layers", []))
        if warning is not None:
            row["collapse_warning"] = warning
            self.display.warn(f"step {row['step']}: {warning}")
        for listener in self.listeners:
            listener(row)
        self.display.show(row)

    def _stop_if_not_finite(self, metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
        limit = self.config.train.max_bad_steps
        if metrics["bad_in_a_row"] < limit:
            return
        kept = (
            f"the last checkpoint is of step {checkpoints.latest}"
            if checkpoints.latest is not None
            else "nothing is saved yet"
        )
        raise RunError(
            f"training stopped because the loss or the gradient was not finite in {limit} steps "
            f"in a row ({kept}); lower optimizer.learning_rate, warm up for longer, or look at the data.",
            EXIT_NOT_FINITE,
        )
