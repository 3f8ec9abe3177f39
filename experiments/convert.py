"""Convert weights of a run or of Hugging Face to Hugging Face's form, to T5X's, or to one of our own.

Question: none of its own; it is the tool that brings published weights here, and trained ones to others.
Command:  python experiments/convert.py FROM OUT --to hf|t5x|switchmoe [--flags], for instance
              python experiments/convert.py runs/tiny-switch-1a2b3c4d/0 tiny-hf --to hf --expert-capacity 64
              python experiments/convert.py Mixtral-8x7B-v0.1 mixtral --to switchmoe --dtype bfloat16
          FROM is the folder of a run (OUT/NAME-HASH/SEED), of Hugging Face's Switch, Mixtral, OLMoE,
          Qwen3-MoE or Llama weights (config.json and safetensors), or one that this command wrote.
Cost:     as long as reading and writing the weights takes; memory for the model and a tensor.
Result:   OUT, which has its name only when all is in it. hf: what transformers' from_pretrained reads; t5x:
          arrays.npz with T5X's names, in float32, and our configuration; switchmoe: safetensors with our own
          names, which every command here reads in place of a run.

A model that Hugging Face has no family for, such as the decoder-only Switch Transformer of the quickstart, is
refused with the settings in which it differs.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from switchmoe.interop import WeightsError, save_weights, to_hf
from switchmoe.models import TransformerLM, with_moe
from switchmoe.models.config import ComputeType
from switchmoe.train import RunError

if __package__:  # imported as experiments.convert
    from experiments import weights
else:
    import weights

# What config.json says about tokens and is no part of a model of ours.
_ABOUT_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_position_embeddings",
)
_TOKEN_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """Convert a model's weights into a form that others read, or the other way round.

    For instance: convert.py runs/tiny-switch-1a2b3c4d/0 tiny-hf --to hf --expert-capacity 64

    Attributes:
      source: folder of a run, of Hugging Face's weights, or of weights that this command wrote.
      out: folder to write.
      to: Hugging Face's form, T5X's, or our own.
      dtype: of the numbers; what they are if None.
      expert_capacity: seats of an expert in each row. Hugging Face's Switch has that number, where a run has
        a factor and groups of rows.
      stacked: write all experts of a layer as one tensor (hf: Mixtral, OLMoE, Qwen3-MoE).
      max_shard_gb: from this size on the weights go into several files.
      tokens_from: folder of Hugging Face's whose tokenizer and token ids go along; the source if None.
      overwrite: replace OUT if there is something in it, once all is written.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    to: Literal["hf", "t5x", "switchmoe"]
    dtype: ComputeType | None = None
    expert_capacity: int | None = None
    stacked: bool = False
    max_shard_gb: float = 5.0
    tokens_from: Path | None = None
    overwrite: bool = False


def main(arguments: list[str]) -> int:
    """Convert what the command line says; returns the exit code, 2 for input that has to be changed."""
    line = tyro.cli(CommandLine, args=arguments, prog="convert.py")
    try:
        convert(line)
    except (WeightsError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {line.out}")
    return 0


def convert(line: CommandLine) -> None:
    """Read a model in one form and write it in another.

    Raises:
      WeightsError, RunError: one sentence; then nothing was written.
    """
    if line.out.resolve() == line.source.resolve():
        raise WeightsError(f"{line.out} is what is read; write into another folder.")
    tokens = line.tokens_from or line.source
    if line.tokens_from is not None and not tokens.is_dir():
        raise WeightsError(f"{tokens} is no folder; give one of Hugging Face's with --tokens-from.")
    about = _about_tokens(tokens)
    found = {file for pattern in _TOKEN_FILES for file in tokens.glob(pattern) if file.is_file()}
    files = sorted(found)
    model = weights.read_model(line.source, dtype=line.dtype)
    model = _with_capacity(model, line.expert_capacity)
    shard = max(int(line.max_shard_gb * 10**9), 1)
    if line.to == "hf":
        to_hf(
            model,
            line.out,
            dtype=line.dtype,
            stacked=line.stacked,
            max_shard_bytes=shard,
            extra=about,
            files=files,
            overwrite=line.overwrite,
        )
    elif line.to == "t5x":
        weights.write_t5x(model, line.out, files=files, overwrite=line.overwrite)
    else:
        save_weights(model, line.out, max_shard_bytes=shard, files=files, overwrite=line.overwrite)


def _about_tokens(folder: Path) -> dict[str, Any]:
    """Read which ids begin, end and pad a text, from config.json or generation_config.json of a folder."""
    found = {}
    for name in ("generation_config.json", "config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= {key: settings[key] for key in _ABOUT_TOKENS if settings.get(key) is not None}
    return found


def _with_capacity(model: TransformerLM, seats: int | None) -> TransformerLM:
    if seats is None:
        return model
    if model.config.moe is None:
        raise WeightsError("--expert-capacity is for sparse models, and this one is dense; drop it.")
    moe = dataclasses.replace(model.config.moe, expert_capacity=seats, sequences_per_group=1)
    return with_moe(model, moe)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
