"""Round the experts of a trained model to 8 and 4 bits, and say what that costs on held-out text.

Question: what do experts of 8 or 4 bits cost in validation loss, and how much memory do they save?
Command:  python experiments/quantize_study.py RUN [--json experiments/summaries/quantize.json]
Cost:     four evaluations of the run's model; for the quickstart's half a minute on two CPU cores.
Result:   a table, and in FILE the same, with the run's name and the commit.

RUN is the folder of a run of a sparse model (runs/NAME-HASH/SEED). Evaluated is all of its held-out text, at
the capacity it was trained for, and counted are the bytes of the experts alone.
"""

import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

import tyro
from flax import nnx

from switchmoe.data import evaluation_batches, load_packed
from switchmoe.infer import quantize
from switchmoe.models import TransformerLM
from switchmoe.train import RunError, TrainConfig, load_model
from switchmoe.train.command_line import fail
from switchmoe.train.evaluate import evaluate, make_eval_step
from switchmoe.train.model import PureModel, pure_model
from switchmoe.train.records import environment, prepare_folder, write_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Round a trained model's experts, and evaluate.

    Attributes:
      run: the folder of a run.
      json: file for the results.
      limit: batches to evaluate, spread over the text; all of them unless said.
    """

    run: tyro.conf.Positional[Path]
    json: Path | None = None
    limit: int | None = None


def measure(model: TransformerLM, config: TrainConfig, limit: int | None = None) -> list[dict[str, Any]]:
    """Evaluate a model as it is, and with experts of 8 and 4 bits; one row each."""
    corpus = load_packed(config.data)
    rows: list[dict[str, Any]] = []
    for bits in (None, 8, 4):
        rounded = model if bits is None else quantize(model, bits)
        graph, state = nnx.split(rounded)

        def apply(state, ids_BS, graph=graph, **inputs):
            return nnx.merge(graph, state)(ids_BS, **inputs)

        pure: PureModel = pure_model(config.model)._replace(apply=apply)
        batches = evaluation_batches(corpus.validation, config.train.batch_size, limit=limit)
        found = evaluate(make_eval_step(pure), state, batches, corpus.domains)
        loss, taken = float(found["val_loss"]), expert_bytes(rounded)
        first = rows[0] if rows else {"val_loss": loss, "expert_bytes": taken}
        rows.append(
            {
                "bits": bits,
                "val_loss": loss,
                "loss_change": loss / first["val_loss"] - 1,
                "expert_bytes": taken,
                "share_of_bytes": taken / first["expert_bytes"],
            }
        )
    return rows


def expert_bytes(model: TransformerLM) -> int:
    """Count the bytes of all experts, shared ones too, with their scales."""
    weights = [(str(path[-1]), leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return sum(
        a.nbytes for name, a in weights if name.removeprefix("shared_").startswith("w_") and "_E" in name
    )


def run(arguments: Arguments) -> int:
    """Evaluate, print the table, and keep it."""
    if arguments.json is not None:
        prepare_folder(arguments.json.absolute().parent)
    model, config = load_model(arguments.run)
    if config.model.moe is None:
        raise RunError(f"{arguments.run} is the run of a dense model, which has no experts to round.")
    rows = measure(model, config, arguments.limit)
    print(f"{'experts':12}{'bytes':>14}{'share':>8}{'loss':>9}{'change':>9}")
    for row in rows:
        name = "as trained" if row["bits"] is None else f"{row['bits']} bits"
        print(
            f"{name:12}{row['expert_bytes']:14,}{row['share_of_bytes']:8.3f}{row['val_loss']:9.4f}"
            f"{row['loss_change']:+9.3%}"
        )
    if arguments.json is not None:
        about = environment()
        record = {
            "study": "quantize",
            "date": datetime.date.today().isoformat(),
            "run": f"{config.name}, seed {config.train.seed}",
            "commit": about.get("commit"),
            "device": about.get("device"),
            "rows": rows,
        }
        write_json(arguments.json, record)
    return 0


def main() -> int:
    """Read the command line, and explain an expected failure in one line."""
    try:
        return run(tyro.cli(Arguments, description=__doc__))
    except (RunError, ValueError) as error:
        return fail(error if isinstance(error, RunError) else RunError(str(error)))


if __name__ == "__main__":
    sys.exit(main())
