"""Time a training step of a Switch Transformer against transformers' on the same weights, in one process.

Question: is a step (forward pass, gradient, AdamW) of an encoder-decoder Switch Transformer faster here than
          with transformers and torch, on a CPU?
Command:  python benchmarks/train_step.py [--rounds 5] [--json FILE]; needs torch and transformers beside it.
Cost:     some minutes on two CPU cores, and 8 GB of memory.
Result:   a table of medians, and in FILE the same with each round's times and losses.

The model has switch-base-8's widths (768 features, FFNs of 3,072, 12 heads, 8 experts, 32,128 ids) and two
layers in the encoder and two in the decoder, the second of each sparse. A step takes rows of 512 source and
114 target tokens, T5's proportions, of random ids. transformers' weights are written to a folder and read by
`switchmoe.interop.from_hf`; before anything is timed the losses of both must agree.

Rounds are interleaved: in each, every contender takes a step. Noted are elapsed seconds and the process's CPU
seconds of both; each process gets all cores. Of torch's AdamW both kinds are timed, the default and "fused".
transformers' experts have as many seats as a row has tokens, so that neither side drops one; "switchmoe,
1.25" drops what the published training capacity drops. Ours computes the router's losses and skips a step
that is not finite, which transformers does not.
"""

import copy
import dataclasses
import datetime
import importlib.metadata
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from switchmoe.data import Batch, DataConfig
from switchmoe.interop import from_hf
from switchmoe.models import LMConfig, param_count
from switchmoe.train import OptimizerConfig, RunError, TrainConfig, TrainSettings
from switchmoe.train.command_line import fail
from switchmoe.train.model import Params, pure_model
from switchmoe.train.placement import jit_step
from switchmoe.train.records import environment, prepare_folder, write_json
from switchmoe.train.step import init_state, make_train_step

Step = Callable[[], float]
OURS, THEIRS = "switchmoe", "transformers"
# Of both AdamWs. Nothing is clipped, since torch's does not.
RATE, BETAS, EPSILON, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time a training step of a small Switch Transformer against transformers'.

    Attributes:
      json: file for the results.
      rounds: interleaved rounds.
      rows: rows of a step.
      source_length: tokens of a row that the encoder reads.
      layers: of the encoder, and of the decoder, every second one sparse.
      num_experts: of a sparse layer.
      d_model: features of a token.
      d_ff: hidden features of an FFN and of an expert.
      num_heads: attention heads, of 64 features each.
      vocab_size: token ids.
    """

    json: Path | None = None
    rounds: int = 5
    rows: int = 4
    source_length: int = 512
    layers: int = 2
    num_experts: int = 8
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    vocab_size: int = 32128


def make_batch(settings: Settings) -> Batch:
    """Draw rows of random ids, whole ones, in T5's proportions."""
    data = DataConfig(sequence_length=settings.source_length, objective="span_corruption")
    rng = np.random.default_rng(0)
    rows, length = settings.rows, data.target_length
    targets_BS = rng.integers(2, settings.vocab_size, (rows, length)).astype(np.int32)
    source_BP = rng.integers(2, settings.vocab_size, (rows, settings.source_length)).astype(np.int32)
    return Batch(
        ids_BS=np.pad(targets_BS[:, :-1], ((0, 0), (1, 0))),
        targets_BS=targets_BS,
        segments_BS=np.ones((rows, length), np.int32),
        positions_BS=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        weight_BS=np.ones((rows, length), np.float32),
        mask_BS=np.ones((rows, length), bool),
        domain_B=np.zeros(rows, np.int32),
        source_BP=source_BP,
        source_mask_BP=np.ones(source_BP.shape, bool),
    )


def make_theirs(settings: Settings, folder: Path) -> Any:
    """Draw transformers' model, and leave its weights in the folder; its experts drop no token.

    Raises:
      RunError: torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
    except ImportError as error:
        raise RunError(
            f"{error.name} is not there to compare with; install torch and transformers."
        ) from error
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=settings.vocab_size,
        d_model=settings.d_model,
        d_kv=64,
        d_ff=settings.d_ff,
        num_layers=settings.layers,
        num_decoder_layers=settings.layers,
        num_sparse_encoder_layers=settings.layers // 2,
        num_sparse_decoder_layers=settings.layers // 2,
        num_heads=settings.num_heads,
        num_experts=settings.num_experts,
        expert_capacity=settings.source_length,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.train()


def their_step(model: Any, batch: Batch, *, fused: bool) -> Step:
    """A step of transformers' and torch's: forward pass with its loss, gradient, AdamW."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=fused or None
    )
    source, targets, mask = (
        torch.from_numpy(np.array(part, np.int64))
        for part in (batch.source_BP, batch.targets_BS, batch.source_mask_BP)
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=source, attention_mask=mask, labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def our_step(settings: Settings, model: LMConfig, params: Params, batch: Batch) -> Step:
    """A step as `run_training` takes it, compiled before it is timed."""
    config = TrainConfig(
        "benchmark",
        model,
        DataConfig(sequence_length=settings.source_length, objective="span_corruption"),
        OptimizerConfig(
            learning_rate=RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=DECAY,
            clip_norm=0,
            beta1=BETAS[0],
            beta2=BETAS[1],
            epsilon=EPSILON,
        ),
        TrainSettings(batch_size=settings.rows),
    )
    pure = pure_model(model)
    shapes = jax.eval_shape(lambda: init_state(config, pure))
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    state = state._replace(params=jax.tree.map(jnp.copy, params))
    key = jax.random.key(0)
    compiled = jit_step(make_train_step(config, pure), config, pure).lower(state, batch, key).compile()
    kept = [state]

    def step() -> float:
        state, metrics = compiled(kept.pop(), batch, key)
        kept.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return step


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Take a step of each contender a round, every second round backwards; each one's first is not timed.

    Returns each one's elapsed seconds, the process's CPU seconds (all threads) and losses.
    """
    names, taken = list(steps), {name: {"seconds": [], "cpu_seconds": [], "losses": []} for name in steps}
    for turn in range(-1, rounds):
        for name in names[::-1] if turn % 2 else names:
            wall, cpu = time.perf_counter(), time.process_time()
            loss = steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[name]["losses"].append(loss)
            if turn >= 0:
                taken[name]["seconds"].append(wall)
                taken[name]["cpu_seconds"].append(cpu)
    return taken


def check_losses(taken: dict[str, dict[str, list[float]]], exact: list[str]) -> None:
    """Make sure that all contenders that drop nothing computed one loss from the same weights.

    Raises:
      RunError: they did not, so their times say nothing.
    """
    first = [taken[name]["losses"][0] for name in exact]
    if max(first) - min(first) > 1e-4 * max(first):
        raise RunError(
            f"the contenders do not compute the same loss: {dict(zip(exact, first, strict=True))}."
        )


def run(settings: Settings) -> int:
    """Build both models from one set of weights, time their steps, and show and keep what came out."""
    if settings.layers % 2 or settings.rounds < 1:
        raise RunError(
            f"layers is {settings.layers} and rounds {settings.rounds}; make layers even, rounds 1."
        )
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    batch = make_batch(settings)
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_theirs(settings, Path(folder))
        read = from_hf(folder)
    config = read.config
    params = nnx.to_pure_dict(nnx.state(read, nnx.Param))
    assert config.moe is not None
    moes = {
        OURS: dataclasses.replace(config.moe, dispatch="dropless", expert_capacity=None),
        f"{OURS}, 1.25": dataclasses.replace(config.moe, expert_capacity=None, capacity_factor=1.25),
    }
    steps = {
        name: our_step(settings, dataclasses.replace(config, moe=moe), params, batch)
        for name, moe in moes.items()
    }
    steps[THEIRS] = their_step(theirs, batch, fused=False)
    steps[f"{THEIRS}, fused"] = their_step(copy.deepcopy(theirs), batch, fused=True)
    taken = time_rounds(steps, settings.rounds)
    check_losses(taken, [OURS, THEIRS, f"{THEIRS}, fused"])
    rows = [
        {
            "name": name,
            "median_seconds": statistics.median(times["seconds"]),
            "median_cpu_seconds": statistics.median(times["cpu_seconds"]),
            **times,
        }
        for name, times in taken.items()
    ]
    show(rows, settings)
    if settings.json is not None:
        write_json(settings.json, describe(settings, config) | {"rows": rows})
    return 0


def show(rows: list[dict[str, Any]], settings: Settings) -> None:
    """Print the medians, and how often transformers' step is as long."""
    table = Table(title=f"A training step of {settings.rows} rows, medians of {settings.rounds} rounds")
    for heading in ("", "seconds", "CPU seconds", f"{THEIRS}' to it", "in CPU seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    theirs = next(row for row in rows if row["name"] == THEIRS)
    for row in rows:
        medians = [row["median_seconds"], row["median_cpu_seconds"]]
        ratios = [theirs["median_seconds"] / medians[0], theirs["median_cpu_seconds"] / medians[1]]
        table.add_row(row["name"], *(f"{value:.2f}" for value in (*medians, *ratios)))
    Console().print(table)


def describe(settings: Settings, config: LMConfig) -> dict[str, Any]:
    """Say what is timed, with what, and where."""
    about = environment()
    for private in ("command", "platform"):  # places on this machine, and its kernel
        about.pop(private)
    about["versions"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
    return {
        "benchmark": "train_step",
        "date": datetime.date.today().isoformat(),
        **about,
        "parameters": param_count(config)[0],
        "settings": asked,
    }


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))


if __name__ == "__main__":
    sys.exit(main())
