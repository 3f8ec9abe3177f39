"""Time generation with experts on the host against all of them on the device, and count how many are found.

Question: with room on the device for a part of the experts only, how often is a wanted one there, and what
          does bringing the others cost?
Command:  python benchmarks/offload.py [MODEL] [--resident 0.25 0.5 0.75 1] [--json FILE]
          MODEL is a run or a model as experiments/generate.py takes it, and is best a trained one: a trained
          router has habits. Without it, random weights of Mixtral's shape (166M parameters), whose router
          spreads its tokens evenly: the worst case. JAX_PLATFORMS=cpu,cuda on a GPU, so that there is a host.
Cost:     a minute or two on two CPU cores.
Result:   a table, and in FILE the same with each round's seconds. "found" is the share of experts that were
          on the device when a layer wanted them, prompts included, in the timed rounds; one round before
          them only warms up. Seconds are those between a round's first new token and its last.

On a CPU host and device are the same memory, so that what is brought is copied but not sent; the time that
layers cost when the host calls them one by one is real.
"""

import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from switchmoe.config import MoEConfig
from switchmoe.infer import GenerateConfig, NewTokens, OffloadedModel, stream
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.train import RunError
from switchmoe.train.command_line import fail
from switchmoe.train.records import environment, prepare_folder, write_json

if __package__:  # imported as benchmarks.offload
    from benchmarks.show import show
else:  # beside a script, which finds its neighbours by their own names
    from show import show

COLUMNS = (
    ("name", "experts on the device", "{}"),
    ("hit_rate", "found", "{:.1%}"),
    ("megabytes_per_token", "MB/token", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:.1f}"),
    ("to_all", "of all on device", "{:.2f}"),
)
# The words that a trained model goes on from, one row each.
PROMPTS = ("And it came to pass ", "Y dijo Jehová ", "    def __init__(self", "**HAMLET**  \n", "    n 1: a ")
Steps = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time generation with experts on the host.

    Attributes:
      model: a run folder, or a folder with config.json and safetensors; random weights if there is none.
      resident: shares of all experts that there is room for on the device, each timed.
      batch: rows generated together.
      new_tokens: of each row.
      rounds: interleaved, after one that warms up.
      json: file for the results.
      d_model, d_ff, num_layers, num_experts: of the random model.
    """

    model: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="MODEL")] = None
    resident: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    batch: int = 1
    new_tokens: int = 64
    rounds: int = 3
    json: Path | None = None
    d_model: int = 512
    d_ff: int = 1536
    num_layers: int = 8
    num_experts: int = 8


def random_model(settings: Settings) -> TransformerLM:
    """Draw a model of Mixtral's shape in the host's memory."""
    moe = MoEConfig(
        d_model=settings.d_model,
        d_ff=settings.d_ff,
        num_experts=settings.num_experts,
        router="top_k",
        top_k=2,
        renormalize=True,
        dispatch="dropless",
        gated=True,
        activation="silu",
        init_scale=1.0,
    )
    config = LMConfig(
        vocab_size=8192,
        d_model=settings.d_model,
        num_layers=settings.num_layers,
        num_heads=8,
        num_kv_heads=4,
        d_ff=settings.d_ff,
        moe=moe,
        moe_every=1,
        tie_embeddings=False,
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return TransformerLM(config, rngs=nnx.Rngs(0))


def read(settings: Settings) -> tuple[TransformerLM, Any, Any]:
    """Give the model, its prompts and its tokenizer."""
    if settings.model is None:
        rows = np.random.default_rng(0).integers(0, 8192, (settings.batch, 16))
        return random_model(settings), rows, None
    if __package__:
        from experiments import generate
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from experiments import generate
    speaker = generate.load(settings.model)
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(settings.batch)]
    return speaker.model, prompts, speaker.tokenizer


def run(settings: Settings) -> int:
    """Time all contenders in interleaved rounds, and show and keep what came out."""
    if settings.rounds < 1 or not all(0 < share <= 1 for share in settings.resident):
        raise RunError("rounds must be at least 1, and the shares of resident above 0 and at most 1.")
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    model, prompts, tokenizer = read(settings)
    moe = model.config.moe
    if moe is None:
        raise RunError("this model is dense, so it has no experts to keep on the host; give a sparse one.")
    total = (model.config.num_super_blocks + _encoder_blocks(model.config)) * moe.num_experts
    config = GenerateConfig(max_new_tokens=settings.new_tokens, temperature=1.0, experts="dropless")
    options: dict[str, Any] = dict(tokenizer=tokenizer, key=jax.random.key(0))
    offloaded = {
        f"{max(1, round(share * total))} of {total}": OffloadedModel(
            model, max(1, round(share * total)), experts="dropless"
        )
        for share in settings.resident
    }
    device = jax.local_devices()[0]
    graphdef, state = nnx.split(model)
    whole = nnx.merge(graphdef, jax.device_put(state, device))
    contenders: dict[str, Steps] = {"all": lambda: stream(whole, prompts, config, **options)}
    for name, one in offloaded.items():
        contenders[name] = lambda one=one: one.stream(prompts, config, **options)

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    said: dict[str, list[list[int]]] = {}
    for turn in range(settings.rounds + 1):
        names = list(contenders)[:: -1 if turn % 2 else 1]
        for name in names:
            if turn == 1 and name in offloaded:  # what came first came from nothing
                stats = offloaded[name].stats
                stats.asked = stats.found = stats.bytes_brought = 0
            taken, tokens = _time(contenders[name]())
            if turn:
                seconds[name].append(taken)
            said[name] = tokens
    if any(tokens != said["all"] for tokens in said.values()):
        print("note: some rows differ, where two tokens were equally probable but for rounding.")
    rows = [_row(name, seconds, offloaded.get(name), settings) for name in contenders]
    on = f"{settings.batch} rows, {settings.new_tokens} tokens each, {device.device_kind}"
    show(f"{on}, medians of {settings.rounds} rounds", rows, Console(), COLUMNS)
    if settings.json is not None:
        about = environment()
        for private in ("command", "platform"):  # places on this machine, and its kernel
            about.pop(private)
        asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
        asked["model"] = None if settings.model is None else settings.model.name
        record = {"benchmark": "offload", "date": datetime.date.today().isoformat(), **about}
        write_json(settings.json, record | {"settings": asked, "rows": rows})
    return 0


def _encoder_blocks(config: LMConfig) -> int:
    return config.encoder.num_super_blocks if config.encoder_layers else 0


def _time(pieces: Any) -> tuple[float, list[list[int]]]:
    """Seconds between the first new token and the last, and all tokens: the prompts' pass is left out."""
    first: NewTokens = next(pieces)
    start, tokens = time.perf_counter(), [first.tokens_B.tolist()]
    tokens += [piece.tokens_B.tolist() for piece in pieces]
    return time.perf_counter() - start, tokens


def _row(name: str, seconds: dict[str, list[float]], one: OffloadedModel | None, settings: Settings) -> dict:
    tokens = settings.batch * (settings.new_tokens - 1)
    speed = tokens / statistics.median(seconds[name])
    brought = 0 if one is None else one.stats.bytes_brought / (tokens * settings.rounds)
    return {
        "name": name,
        "hit_rate": None if one is None else one.stats.hit_rate,
        "megabytes_per_token": brought / 1e6,
        "tokens_per_second": speed,
        "to_all": speed / (tokens / statistics.median(seconds["all"])),
        "seconds": seconds[name],
    }


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))


if __name__ == "__main__":
    sys.exit(main())
