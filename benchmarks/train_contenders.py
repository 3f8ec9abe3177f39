"""Both sides of the training-step benchmark: one batch, transformers' model and its step, and ours."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.data import Batch, DataConfig
from switchmoe.models import LMConfig
from switchmoe.train import OptimizerConfig, RunError, TrainConfig, TrainSettings
from switchmoe.train.model import Params, pure_model
from switchmoe.train.placement import jit_step
from switchmoe.train.step import init_state, make_train_step

Step = Callable[[], float]
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
