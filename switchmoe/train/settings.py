"""The parts of a training run's configuration that are training's own, each checking itself."""

import dataclasses
from typing import Literal, get_args

from switchmoe.config import check_at_least, check_choice

OptimizerName = Literal["adamw", "adafactor"]
Schedule = Literal["cosine", "constant", "inverse_sqrt"]
Part = Literal["all", "experts", "rest", "lora"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How a gradient becomes an update.

    Attributes:
      name: AdamW, or Adafactor, one for each layer and expert.
      learning_rate: the peak, reached by linear warm-up.
      schedule: after the warm-up, half a cosine down to the last step, the peak, or 1 / sqrt(updates).
      warmup_steps: updates until the peak.
      final_fraction: where the cosine ends, as a share of the peak.
      weight_decay: decoupled, multiplied by the learning rate; for matrices, not for the scales of norms.
      clip_norm: a gradient of a larger global norm is scaled down to this; 0 turns that off.
      beta1: AdamW's memory of gradients.
      beta2: AdamW's memory of squared gradients.
      epsilon: AdamW's, added to the root of the mean square.
      factor_at_least: Adafactor factors a matrix whose smaller dimension is at least this.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    factor_at_least: int = 128

    def __post_init__(self):
        check_choice("optimizer.name", self.name, get_args(OptimizerName))
        check_choice("optimizer.schedule", self.schedule, get_args(Schedule))
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}, but must be a finite number above 0."
            )
        for field in ("warmup_steps", "weight_decay", "clip_norm"):
            check_at_least(f"optimizer.{field}", getattr(self, field), 0)
        check_at_least("optimizer.factor_at_least", self.factor_at_least, 2)
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer.{field} is {getattr(self, field)}, but must be in [0, 1).")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"optimizer.final_fraction is {self.final_fraction}, but must be in [0, 1].")
        if not self.epsilon > 0:
            raise ValueError(f"optimizer.epsilon is {self.epsilon}, but must be above 0.")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long to train, on how many rows a step, and what to leave on disk.

    Attributes:
      steps: updates, skipped ones included.
      batch_size: rows of a step.
      accumulate: micro-batches that a step's rows are taken in, one after the other.
      seed: draws the first weights, the order of the rows and all noise.
      log_every: steps from one row of metrics to the next; there is one after an evaluation too.
      eval_every: steps between evaluations; 0 means only after the last step, where there always is one.
      eval_batches: micro-batches of held-out rows in an evaluation; 0 means all. The last one takes all.
      checkpoint_every: steps between checkpoints; 0 means only after the last step.
      keep_checkpoints: the newest so many are kept.
      max_bad_steps: stop after so many steps in a row whose loss or gradient is not finite; each is skipped.
    """

    steps: int = 200
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    max_bad_steps: int = 10

    def __post_init__(self):
        for field in ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints", "max_bad_steps"):
            check_at_least(f"train.{field}", getattr(self, field), 1)
        for field in ("seed", "eval_every", "eval_batches", "checkpoint_every"):
            check_at_least(f"train.{field}", getattr(self, field), 0)
        if self.seed >= 2**32:
            raise ValueError(f"train.seed is {self.seed}, but must be below 2**32.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size={self.batch_size} does not split into train.accumulate={self.accumulate} "
                "equal micro-batches; change one of them."
            )

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once."""
        return self.batch_size // self.accumulate


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What a run starts from, which of its weights move, and who teaches it.

    Attributes:
      part: "all" weights are trained; or only the sparse layers ("experts": experts, shared experts, router
        and balance bias, since experts that move want a router that can follow); or everything but them
        ("rest", about as good in fine-tuning as all: ST-MoE, section 4, https://arxiv.org/abs/2202.08906); or
        low-rank adapters of the routed experts alone ("lora", see `models.adapters`). What is not trained has
        no optimizer state, does not decay, and keeps every bit.
      lora_rank: rank of an adapter's two matrices.
      lora_alpha: an adapter's product counts lora_alpha / lora_rank.
      soft_share: share of the loss against the teacher's probabilities, where there is one.
      weights: fingerprint of the weights the run starts from, None where they are drawn; set by
        `run_training(start=...)`.
      teacher: fingerprint of the teacher's weights and shape; set by `run_training(teacher=...)`.
    """

    part: Part = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    soft_share: float = 0.25
    weights: str | None = None
    teacher: str | None = None

    def __post_init__(self):
        check_choice("tune.part", self.part, get_args(Part))
        check_at_least("tune.lora_rank", self.lora_rank, 1)
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"tune.lora_alpha is {self.lora_alpha}, but must be a finite number above 0.")
        if not 0 <= self.soft_share <= 1:
            raise ValueError(f"tune.soft_share is {self.soft_share}, but must be in [0, 1].")
        if self.part != "lora" and (self.lora_rank, self.lora_alpha) != (8, 16.0):
            raise ValueError(
                f"tune.lora_rank and tune.lora_alpha are of adapters, but tune.part is {self.part!r}; leave "
                'them alone, or set tune.part to "lora".'
            )
