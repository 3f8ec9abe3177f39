"""One start of a run: steps, evaluations and checkpoints, until it is done or asked to stop."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from switchmoe.data import Batch, PackedCorpus, batches, evaluation_batches
from switchmoe.parallel import Layout
from switchmoe.train.checkpoint import Checkpoints
from switchmoe.train.checks import no_room_warning, small_groups_warning
from switchmoe.train.config import TrainConfig
from switchmoe.train.display import number
from switchmoe.train.errors import EXIT_NOT_FINITE, RunError
from switchmoe.train.evaluate import evaluate, make_eval_step
from switchmoe.train.given import Given
from switchmoe.train.model import Params, PureModel, adapted_model, pure_model
from switchmoe.train.placement import (
    abstract_state,
    describe_mesh,
    draw_noise_key,
    draw_state,
    jit_step,
    place_batch,
    place_weights,
    placed_evaluation,
)
from switchmoe.train.preemption import StopRequest
from switchmoe.train.recorder import Recorder, Row
from switchmoe.train.rows import Clock, costs, make_row, summary
from switchmoe.train.start import surroundings
from switchmoe.train.step import TrainState, make_train_step


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


class Run:
    """One start of a run: what stays the same over its steps, and the clock and records with it."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        corpus: PackedCorpus,
        layout: Layout | None,
        stop: StopRequest,
        given: Given,
    ) -> None:
        settings = config.train
        self.config, self.folder, self.corpus = config, folder, corpus
        self.layout, self.stop, self.given = layout, stop, given
        self.cost = costs(config)
        order = zlib.crc32(f"{config.data.seed}/{settings.seed}".encode())
        cut = config.data.corruption
        self.batches = batches(corpus.train, settings.batch_size, seed=order, corruption=cut)
        held_out = functools.partial(
            evaluation_batches, corpus.validation, settings.micro_batch_size, corruption=cut
        )
        self.some_held_out, self.all_held_out = held_out(limit=settings.eval_batches or None), held_out()
        # Two CPU devices that run ahead of each other can starve in a collective, so there every step is
        # waited for.
        self.wait = jax.default_backend() == "cpu" and jax.device_count() > 1

    def go(self, checkpoints: Checkpoints, recorder: Callable[..., Recorder]) -> RunResult:
        """Train from the newest checkpoint to the end or to a signal."""
        config, steps = self.config, self.config.train.steps
        model = adapted_model(pure_model(config.model, self.layout), config.tune)
        start, self.clock = checkpoints.latest or 0, Clock()
        if checkpoints.latest is None:
            state = draw_state(config, model, self.given.start)
        else:
            state, clock = checkpoints.load(abstract_state(config, model))
            self.clock = Clock(**clock)
        where = surroundings(self.corpus, self.layout)
        self.recorder = recorder(where=where, start=start)
        try:
            self.recorder.say(
                f"{self.folder}: {self.cost.params_total:,} parameters, from step {start} to {steps}"
            )
            if state.frozen:
                moving = sum(weight.size for weight in jax.tree.leaves(state.params))
                self.recorder.say(f'tune.part="{config.tune.part}": {moving:,} parameters move')
            self.recorder.say(describe_mesh(self.layout))
            self.recorder.warn(small_groups_warning(config))
            reached = self._steps(model, state, start, checkpoints)
            if reached < steps:
                self.recorder.say(
                    f"{self.stop.requested}: saved step {reached}; the same command goes on from there."
                )
                return RunResult(self.folder, "stopped", reached, None)
            done = summary(config, self.cost, self.recorder.rows, self.clock, where)
            self.recorder.finish(done)
            self.recorder.say(f"{self.folder} is done: validation loss {number(done['val_loss'])}")
            return RunResult(self.folder, "done", steps, done)
        finally:
            self.recorder.close()

    def _steps(self, model: PureModel, state: TrainState, start: int, checkpoints: Checkpoints) -> int:
        """Take steps until the end or a signal; save the last of them, wait for that, and return it."""
        settings, beside = self.config.train, (draw_noise_key(self.config, model), *self._taught())
        eval_step, step_fn = make_eval_step(model), self._make_step(model)
        step, logged = start, start
        self.clock.skip()
        stopping = step >= settings.steps or self.stop.after(step)
        if not stopping:
            step_fn = step_fn.lower(state, self._batch(step), *beside).compile()
            self.clock.compile_seconds += self.clock.skip()
        while not stopping:
            state, metrics = step_fn(state, self._batch(step), *beside)
            if self.wait:
                jax.block_until_ready(state)
            step += 1
            self.recorder.advance(step)
            evaluated = step == settings.steps or (settings.eval_every and step % settings.eval_every == 0)
            if evaluated or step % settings.log_every == 0:
                metrics = jax.device_get(metrics)
                row = self._row(step, metrics, step - logged)
                if evaluated:
                    held_out = self.all_held_out if step == settings.steps else self.some_held_out
                    held_out = placed_evaluation(self.layout, held_out)
                    row |= evaluate(eval_step, state.everything(), held_out, self.corpus.domains)
                self.recorder.write(row)
                logged = step
                self._stop_if_not_finite(metrics, checkpoints)
                self.clock.skip()
            if settings.checkpoint_every and step % settings.checkpoint_every == 0 and step < settings.steps:
                checkpoints.save(state, step, self.clock.saved())
            stopping = step >= settings.steps or self.stop.after(step)
        checkpoints.save(state, step, self.clock.saved())
        checkpoints.close()
        return step

    def _make_step(self, model: PureModel) -> Any:
        teacher = self.given.teacher and pure_model(self.given.teacher.config, self.layout)
        step_fn = make_train_step(self.config, model, teacher)
        return jit_step(step_fn, self.config, model, taught=teacher is not None)

    def _taught(self) -> tuple[Params, ...]:
        """What a step is told beside its batch and key: the weights of a teacher, if there is one."""
        teacher = self.given.teacher
        if teacher is None:
            return ()
        return (place_weights(pure_model(teacher.config, self.layout), teacher.params),)

    def _batch(self, step: int) -> Batch:
        return place_batch(self.layout, self.batches, step, self.config.train.accumulate)

    def _row(self, step: int, metrics: dict[str, Any], steps_timed: int) -> Row:
        lap = self.clock.lap()
        row = make_row(
            self.config,
            self.cost,
            step,
            metrics,
            seconds=self.clock.seconds,
            steps_timed=steps_timed,
            lap=lap,
            devices=1 if self.layout is None else self.layout.mesh.size,
        )
        warning = no_room_warning(self.config, self.layout, row["dropped_fraction"])
        self.recorder.warn(warning, once="no room")
        return row

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
