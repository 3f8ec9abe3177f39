"""The two sides of the benchmark of generation, transformers and ours, built from one set of weights."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.infer import GenerateConfig, generate, prepare, quantize
from switchmoe.interop import from_hf
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.train import RunError

THEIRS, OURS = "transformers", "switchmoe"
# (ids_BS, new tokens) -> the new tokens of each row.
Generate = Callable[[np.ndarray, int], np.ndarray]
# By name: the prompts, the new tokens a row, and the tokens that count.
Tasks = dict[str, tuple[np.ndarray, int, int]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time greedy generation against transformers'.

    Attributes:
      json: file for the results.
      rounds: interleaved rounds.
      new_tokens: generated a row.
      prompt: tokens of a prompt that is continued.
      prefill: tokens of the prompt that is only read.
      batches: rows that are continued at a time.
      layers: of the model.
      d_model: features of a token, in heads of 64.
      d_ff: hidden features of an expert.
      num_experts: of a layer.
      vocab_size: token ids.
      bits: of rounded experts to time as well; none of them on a GPU.
    """

    json: Path | None = None
    rounds: int = 5
    new_tokens: int = 64
    prompt: int = 32
    prefill: int = 512
    batches: tuple[int, ...] = (1, 8)
    layers: int = 8
    d_model: int = 512
    d_ff: int = 1536
    num_experts: int = 8
    vocab_size: int = 8192
    bits: tuple[int, ...] = (8,)

    def tasks(self) -> Tasks:
        """Draw the prompts of each task."""
        rng = np.random.default_rng(0)
        tasks = {}
        for batch in self.batches:
            ids_BS = rng.integers(1, self.vocab_size, (batch, self.prompt))
            tasks[f"batch {batch}"] = (ids_BS, self.new_tokens, batch * self.new_tokens)
        tasks["prefill"] = (rng.integers(1, self.vocab_size, (1, self.prefill)), 1, self.prefill)
        return tasks


def make_theirs(settings: Settings, folder: Path) -> Any:
    """Draw transformers' model, and leave its weights in the folder; returns its class.

    Raises:
      RunError: torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise RunError(
            f"{error.name} is not there to compare with; install torch and transformers."
        ) from error
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.d_model // 64,
        num_key_value_heads=settings.d_model // 128,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return MixtralForCausalLM


def their_generate(model: Any, dtype: str, device: str) -> tuple[Generate, Callable[[np.ndarray], Any]]:
    """Their greedy generation, and their scores of a whole row."""
    import torch

    model = model.to(device, getattr(torch, dtype))

    def run(ids_BS: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = torch.from_numpy(ids_BS).to(device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    def score(ids_BS: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids_BS).to(device)).logits.float().cpu().numpy()

    return run, score


def our_generate(model: TransformerLM) -> Generate:
    """Our greedy generation."""
    return lambda ids_BS, new_tokens: generate(model, ids_BS, GenerateConfig(new_tokens)).tokens_BN


def check_scores(model: TransformerLM, theirs: Callable[[np.ndarray], Any], ids_BS: np.ndarray) -> None:
    """Make sure that both sides are one model.

    Raises:
      RunError: they are not, so their times say nothing.
    """
    ours_BSV, theirs_BSV = np.asarray(jax.jit(lambda ids: model(ids)[0])(jnp.asarray(ids_BS))), theirs(ids_BS)
    off = np.abs(ours_BSV - theirs_BSV).max() / np.abs(theirs_BSV).max()
    if not off < 1e-3:
        raise RunError(f"both sides are to score alike, but their scores are {off:.1e} apart.")


def make_contenders(settings: Settings, device: str) -> tuple[dict[str, Generate], LMConfig]:
    """Build both sides' models from one set of weights."""
    contenders: dict[str, Generate] = {}
    with tempfile.TemporaryDirectory() as folder:
        kind = make_theirs(settings, Path(folder))
        for dtype in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
            theirs = kind.from_pretrained(folder).eval()
            contenders[f"{THEIRS} {dtype}"], score = their_generate(theirs, dtype, device)
            model = from_hf(folder, dtype=dtype)
            if dtype == "float32":
                config = model.config
                check_scores(model, score, settings.tasks()["prefill"][0][:, :64])
            if device == "cpu":
                for bits in settings.bits:
                    contenders[f"{OURS} {dtype} int{bits}"] = our_generate(prepare(quantize(model, bits)))
            contenders[f"{OURS} {dtype}"] = our_generate(prepare(model, free=True))
    return contenders, config
