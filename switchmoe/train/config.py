"""What a training run is, as frozen dataclasses that check themselves, and the name it gets from them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from switchmoe.config import MoEConfig
from switchmoe.data import DataConfig
from switchmoe.models.config import LMConfig
from switchmoe.train.settings import OptimizerConfig, TrainSettings, TuneConfig

__all__ = [
    "ADDED_SETTINGS",
    "FREE_SETTINGS",
    "OptimizerConfig",
    "TrainConfig",
    "TrainSettings",
    "TuneConfig",
    "from_json",
    "identity",
    "model_identity",
    "run_folder",
    "run_hash",
    "to_json",
]

SECTIONS = ("model", "data", "optimizer", "train", "tune")

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
    "model.encoder_layers": 0.0,
    "model.encoder_moe_every": None,
    "model.positions": "rotary",
    "model.relative_buckets": 32.0,
    "model.relative_distance": 128.0,
    "model.qk_norm": "none",
    "model.window": None,
    "model.scale_scores": True,
    "model.scale_head": False,
    "model.param_dtype": "float32",
    "model.scan_layers": True,
    "data.tokenizer": "bytes",
    "data.end_token": None,
    "data.objective": "next_token",
    "data.noise_density": 0.15,
    "data.mean_span": 3.0,
    "tune.part": "all",
    "tune.lora_rank": 8.0,
    "tune.lora_alpha": 16.0,
    "tune.soft_share": 0.25,
    "tune.weights": None,
    "tune.teacher": None,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes: model, text, optimizer, schedule, and what it starts from.

    Raises:
      ValueError: one sentence, if the parts contradict each other.
    """

    name: str
    model: LMConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainSettings = TrainSettings()
    tune: TuneConfig = TuneConfig()

    def __post_init__(self):
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name is {self.name!r}, but it names a folder: no '/', no leading '.', not empty."
            )
        if self.data.vocab_size is not None and self.model.vocab_size < self.data.vocab_size:
            spans = "" if self.data.corruption is None else " and sentinels"
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, but the byte tokenizer has "
                f"{self.data.vocab_size} tokens{spans}; raise model.vocab_size to that."
            )
        if (self.model.encoder_layers > 0) != (self.data.corruption is not None):
            raise ValueError(
                f"model.encoder_layers is {self.model.encoder_layers}, but data.objective is "
                f'"{self.data.objective}"; "span_corruption" is for an encoder with a decoder, "next_token" '
                "for a decoder alone, so change one of them."
            )
        moe = self.model.moe
        if moe is not None and self.train.micro_batch_size % moe.sequences_per_group:
            raise ValueError(
                f"a micro-batch has {self.train.micro_batch_size} rows (batch_size / accumulate), which "
                f"model.moe.sequences_per_group={moe.sequences_per_group} does not divide; change one."
            )
        if moe is None and self.tune.part != "all":
            raise ValueError(
                f"tune.part is {self.tune.part!r}, but the model is dense and has no experts; set it to "
                '"all", or start from a sparse model.'
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
        tune=TuneConfig(**saved.get("tune", {})),  # which runs of the first versions lack
    )


def identity(saved: dict[str, Any]) -> dict[str, Any]:
    """Keep what decides the numbers of a run: `to_json`'s output, flat, without free settings and name.

    Nor are there `ADDED_SETTINGS` at the values they are listed with.
    """
    flat = {}
    for section in SECTIONS:
        for field, value in _flatten(saved.get(section, {})).items():
            if field not in FREE_SETTINGS.get(section, ()):
                flat[f"{section}.{field}"] = value
    return {name: value for name, value in flat.items() if (name, value) not in ADDED_SETTINGS.items()}


def model_identity(config: LMConfig) -> dict[str, Any]:
    """Keep what decides what a model computes with given weights, flat, as `identity` does for a run."""
    return identity({"model": dataclasses.asdict(config)})


def run_hash(config: TrainConfig) -> str:
    """Name what a run computes in 8 hexadecimal digits.

    Model, data, optimizer, train and tune settings count; not the name, the seed, the cadence of logs,
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
