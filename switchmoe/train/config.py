"""What a training run is, as frozen dataclasses that check themselves, and the name it gets from them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from switchmoe.config import MoEConfig, check_at_least, check_choice
from switchmoe.data import ByteTokenizer, DataConfig
from switchmoe.models.config import LMConfig

OptimizerName = Literal["adamw", "adafactor"]
Schedule = Literal["cosine", "constant", "inverse_sqrt"]


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


# What may change between two starts of one run. Everything else makes another run with another folder.
FREE_SETTINGS = {
    "train": {
        "seed",  # names the folder below the hash
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep_checkpoints",
        "max_bad_steps",
    },
    "data": {"cache_dir"},
}

# Settings younger than the first runs. At these values a run computes what it did before they were there, so
# they leave its name, and its right to be resumed, alone.
ADDED_SETTINGS = {
    "model.moe.exploration": "argmax",
    "model.moe.input_dropout": 0.0,
    "model.moe.weight_scale": 1.0,
    "model.moe.expert_groups": 1.0,
    "model.moe.groups_per_token": 1.0,
    "model.moe.matmul": None,
    "model.moe.overflow": "drop",
    "model.moe.shared_experts": 0.0,
    "model.moe.balance_over": "micro_batch",
    "model.moe.sequence_balance_coef": 0.0,
    "model.moe.importance_coef": 0.0,
    "model.moe.load_coef": 0.0,
    "model.moe.bias_step": 0.0,
    "model.moe.slots_per_expert": 1.0,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes: the model, its text, its optimizer and its schedule.

    Raises:
      ValueError: one sentence, if the parts contradict each other.
    """

    name: str
    model: LMConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainSettings = TrainSettings()

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name is {self.name!r}, but it names a folder: no '/', no leading '.', not empty."
            )
        if self.model.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, but the byte tokenizer has "
                f"{ByteTokenizer.vocab_size} tokens; raise model.vocab_size to that."
            )
        moe = self.model.moe
        if moe is not None and self.train.micro_batch_size % moe.sequences_per_group:
            raise ValueError(
                f"a micro-batch has {self.train.micro_batch_size} rows (batch_size / accumulate), which "
                f"model.moe.sequences_per_group={moe.sequences_per_group} does not divide; change one."
            )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Turn a configuration into plain dictionaries, numbers and strings."""
    return dataclasses.asdict(config)


def from_json(saved: dict[str, Any]) -> TrainConfig:
    """Build the configuration that `to_json` wrote, checking it again."""
    model = dict(saved["model"])
    if model["moe"] is not None:
        model["moe"] = MoEConfig(**model["moe"])
    return TrainConfig(
        name=saved["name"],
        model=LMConfig(**model),
        data=DataConfig(**saved["data"]),
        optimizer=OptimizerConfig(**saved["optimizer"]),
        train=TrainSettings(**saved["train"]),
    )


def identity(saved: dict[str, Any]) -> dict[str, Any]:
    """Keep what decides the numbers of a run: `to_json`'s output, flat, without free settings and name.

    Nor are there `ADDED_SETTINGS` at the values they are listed with.
    """
    flat = {}
    for section in ("model", "data", "optimizer", "train"):
        for field, value in _flatten(saved[section]).items():
            if field not in FREE_SETTINGS.get(section, ()):
                flat[f"{section}.{field}"] = value
    return {name: value for name, value in flat.items() if (name, value) not in ADDED_SETTINGS.items()}


def run_hash(config: TrainConfig) -> str:
    """Name what a run computes in 8 hexadecimal digits.

    Model, data, optimizer and train settings count; not the name, the seed, the cadence of logs,
    evaluations and checkpoints, the limit of bad steps, or the folder of the data cache.
    """
    text = json.dumps(identity(to_json(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_folder(config: TrainConfig, out: str | Path) -> Path:
    """The folder of a run: OUT/NAME-HASH/SEED."""
    return Path(out) / f"{config.name}-{run_hash(config)}" / str(config.train.seed)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for field, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{field}.")
        else:
            # 1 and 1.0 are the same setting, whoever wrote it.
            whole = isinstance(value, int) and not isinstance(value, bool)
            flat[prefix + field] = float(value) if whole else value
    return flat
