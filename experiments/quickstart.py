"""Train a Switch Transformer beside its dense twin, and show what routing did.

Question: at equal useful FLOPs per token and equal steps, does a Switch Transformer learn real text better
          than a dense model?
Command:  make quickstart, or python experiments/quickstart.py [--seed 0] [--out runs/quickstart]
Cost:     about five minutes on two CPU cores, installation included; the same command goes on with a run
          that was stopped, and costs nothing when it is done.
Result:   OUT/summary.json with both arms, OUT/report.html, and a run folder an arm. Three seeds: RESULTS.md.

Both arms see the same batches of five domains (English and Spanish prose, verse, a dictionary, source code),
each with the learning rate that suited it best on a seed of its own (experiments/quickstart_study.py).
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from switchmoe.config import MoEConfig
from switchmoe.data import Batch, ByteTokenizer, DataConfig, evaluation_batches, load_packed
from switchmoe.infer import GenerateConfig, generate
from switchmoe.models import LMConfig, TransformerLM
from switchmoe.parallel import MeshConfig
from switchmoe.report import ArmRecord, build_routing, read_metrics, save_routing, write_report
from switchmoe.train import (
    OptimizerConfig,
    RunError,
    RunResult,
    TrainConfig,
    TrainSettings,
    load_params,
    run_training,
)
from switchmoe.train.command_line import fail
from switchmoe.train.display import number
from switchmoe.train.model import Params, pure_model
from switchmoe.train.presets import dense

# The best of the same five for each arm, on a seed of their own: experiments/quickstart_study.py.
LEARNING_RATES = {"dense": 4e-3, "switch": 3e-3}
STEPS = 1000
# However many there are: the batch is too small to be worth sharing out.
ONE_DEVICE = MeshConfig(data=1)
# What summary.json says of each arm.
KEYS = (
    "steps",
    "tokens",
    "val_loss",
    "val_loss_by_domain",
    "flops_per_token",
    "flops_per_token_executed",
    "params_total",
    "params_active",
    "tokens_per_second",
    "seconds",
    "dropped_fraction",
    "max_vio",
)
PROMPTS = {
    "bible_english": "And it came to pass ",
    "bible_spanish": "Y dijo Jehová ",
    "python_stdlib": "    def __init__(self",
    "shakespeare": "**HAMLET**  \n",
    "wordnet_glosses": "    n 1: a ",
}


def switch_config(
    seed: int = 0, learning_rate: float = LEARNING_RATES["switch"], steps: int = STEPS
) -> TrainConfig:
    """The Switch arm: four layers of 128 features, two of them with 8 experts.

    Eight rows are a group, so that it has several domains in it and 128 tokens an expert. The experts start
    like the dense FFNs (init_scale 1): the paper's 0.1 is for longer runs (experiments/LOG.md).
    """
    moe = MoEConfig(
        d_model=128, d_ff=512, num_experts=8, drop_order="token", sequences_per_group=8, init_scale=1.0
    )
    return TrainConfig(
        name="switch",
        model=LMConfig(d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, d_ff=512, moe=moe),
        data=DataConfig(sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=50),
        train=TrainSettings(
            steps=steps, batch_size=16, seed=seed, eval_every=100, eval_batches=16, checkpoint_every=250
        ),
    )


def arm_config(
    arm: str, seed: int = 0, learning_rate: float | None = None, steps: int = STEPS
) -> TrainConfig:
    """The arm called "switch" or "dense": the same but for the FFNs, of equal useful FLOPs per token."""
    config = switch_config(seed, learning_rate or LEARNING_RATES[arm], steps)
    return dataclasses.replace(dense(config), name="dense") if arm == "dense" else config


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a small Switch Transformer and its dense twin on the bundled text, and compare them.

    Attributes:
      out: folder for summary.json, report.html and the two runs.
      seed: of weights, order of the text and noise.
      steps: of each arm; fewer only shows that everything works.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/quickstart")
    seed: int = 0
    steps: int = STEPS


def main(arguments: Arguments) -> int:
    """Train both arms, compare them, and print what came out; returns the exit code."""
    console = Console()
    results: dict[str, RunResult] = {}
    try:
        for arm in ("dense", "switch"):
            config = arm_config(arm, arguments.seed, steps=arguments.steps)
            result = run_training(config, arguments.out, ONE_DEVICE)
            if result.stop_requested or result.summary is None:
                print("stopped by a signal, and saved; the same command goes on from there.")
                return 0
            results[arm] = result
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))
    summary = {arm: {key: result.summary[key] for key in KEYS} for arm, result in results.items()}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    params, config = load_params(results["switch"].folder)
    page = write_page(arguments.out, results, params, config)
    console.print(compare(summary))
    console.print("\nThe Switch model goes on, a line for each kind of text it read:")
    for prompt, text in zip(
        PROMPTS.values(), continue_texts(params, config, list(PROMPTS.values())), strict=True
    ):
        console.print(f"  [bold]{escape(repr(prompt)[1:-1])}[/]{escape(repr(text)[1:-1])}", soft_wrap=True)
    console.print(f"\nLoss curves, expert load and text coloured by expert: {page}", soft_wrap=True)
    return 0


def compare(summary: dict[str, dict]) -> Table:
    """Lay the two arms side by side."""
    table = Table(title="The same batches, equal useful FLOPs per token")
    table.add_column("")
    rows = {
        "validation loss (nats per byte)": lambda arm: number(arm["val_loss"]),
        "FLOPs per token, useful": lambda arm: f"{arm['flops_per_token'] / 1e6:.2f} M",
        "FLOPs per token, executed": lambda arm: f"{arm['flops_per_token_executed'] / 1e6:.2f} M",
        "parameters": lambda arm: f"{arm['params_total']:,}",
        "parameters a token meets": lambda arm: f"{arm['params_active']:,}",
        "steps": lambda arm: f"{arm['steps']:,}",
        "tokens per second": lambda arm: f"{arm['tokens_per_second']:,.0f}",
        "seconds of training": lambda arm: f"{arm['seconds']:.0f}",
        "dropped tokens": lambda arm: number(arm["dropped_fraction"], ".2%"),
    }
    for arm in summary:
        table.add_column(arm, justify="right")
    for name, show in rows.items():
        table.add_row(name, *(show(arm) for arm in summary.values()))
    return table


def write_page(out: Path, results: dict[str, RunResult], params: Params, config: TrainConfig) -> Path:
    """Trace held-out text through the Switch model, keep where it went, and write the report."""
    corpus = load_packed(config.data)
    apply = jax.jit(lambda params, batch: trace(pure_model(config.model).bind(params), batch))
    batches = list(evaluation_batches(corpus.validation, config.train.batch_size, limit=16))
    traced = jax.device_get([apply(params, batch) for batch in batches])
    aux = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *(aux for aux, _ in traced))
    where = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(where for _, where in traced))
    routing = build_routing(
        np.concatenate([batch.ids_BS for batch in batches]),
        np.concatenate([batch.domain_B for batch in batches]),
        where.expert_LBSK,
        where.weight_LBSK,
        where.kept_LBSK,
        domains=corpus.domains,
        num_experts=config.model.moe.num_experts,
        mask_BS=np.concatenate([batch.mask_BS for batch in batches]),
        dropped_floor_L=aux.expected_dropped / np.maximum(aux.choices, 1),
    )
    save_routing(results["switch"].folder / "routing.npz", routing)
    done = results["switch"].summary
    return write_report(
        out / "report.html",
        title="A Switch Transformer beside its dense twin",
        arms=[
            ArmRecord(arm, read_metrics(result.folder / "metrics.jsonl"), result.summary)
            for arm, result in results.items()
        ],
        routing=routing,
        notes=["Both models read the same batches in the same order."],
        command=f"python experiments/quickstart.py --seed {config.train.seed} --steps {config.train.steps}",
        device=done["device"],
        commit=done["commit"] or "",
    )


def trace(model: TransformerLM, batch: Batch):
    """Say where a batch's tokens go, and the sums over them."""
    _, aux, where = model.trace(
        batch.ids_BS, segments_BS=batch.segments_BS, positions_BS=batch.positions_BS, mask_BS=batch.mask_BS
    )
    return aux, where


def continue_texts(
    params: Params, config: TrainConfig, prompts: list[str], new_tokens: int = 72, temperature: float = 0.7
) -> tuple[str, ...]:
    """Sample the next bytes of each prompt."""
    tokenizer = ByteTokenizer()
    wanted = GenerateConfig(
        max_new_tokens=new_tokens,
        temperature=temperature,
        banned_tokens=tuple(range(tokenizer.offset)),  # bytes only
    )
    key = jax.random.key(config.train.seed)
    texts = generate(
        pure_model(config.model).bind(params), prompts, wanted, tokenizer=tokenizer, key=key
    ).texts
    assert texts is not None
    return texts


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
