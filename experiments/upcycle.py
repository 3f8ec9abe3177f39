"""Turn a dense model into a sparse one that computes the same, and train that on.

Question: none of its own; it is the tool that upcycles (Komatsuzaki et al. 2022, arXiv 2212.05055).
Command:  python experiments/upcycle.py --from DENSE [--experts 8] [--how copy] [--flags], for instance
              python experiments/upcycle.py --from runs/tiny-dense-1a2b3c4d/0 --train.steps 400
              python experiments/upcycle.py --from Llama-3.2-1B --moe-every 2 --how partial --write llama-moe
          DENSE is a folder of weights as finetune.py takes them: a dense run's, Hugging Face's Llama, or what
          convert.py wrote. The last FFN of every --moe-every layers becomes --experts experts; --how copy,
          noise or partial says how these begin. With copy the model computes at first what the dense one did.
          --from DENSE --help lists all flags.
Cost:     that of training a sparse model for as many steps; making the weights takes seconds.
Result:   OUT/NAME-upcycle-HASH/SEED, a run like those of pretrain.py; the same command goes on with it. With
          --write FOLDER no run, but a folder of the new weights alone, which every command here reads.

Settings that are not said are those of the dense run; --data.seed 1 reads its text in another order. The
--model.moe flags change the sparse layers (capacity, losses, balance), but not what their weights are for.

Exit codes: those of pretrain.py.
"""

import dataclasses
import sys
from typing import Any

import jax

from switchmoe.config import MoEConfig
from switchmoe.interop import save_weights
from switchmoe.parallel.processes import process_count
from switchmoe.train import TrainConfig
from switchmoe.train.given import check_weights
from switchmoe.transfer import Params, sparse_config, upcycle, with_params
from switchmoe.transfer.upcycle import How

if __package__:  # imported as experiments.upcycle
    from experiments import tuning
else:
    import tuning


# Settings of a sparse layer that its weights depend on.
MADE_FOR = (
    "num_experts",
    "router",
    "top_k",
    "renormalize",
    "weight_scale",
    "shared_experts",
    "activation",
    "gated",
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """What becomes of which dense model.

    Attributes:
      dense: folder of the dense model's weights.
      experts: that each FFN becomes.
      top_k: experts that a token is sent to; with 1 the weights are a Switch router's, see `upcycle`.
      how: every expert is the FFN ("copy"), the same and some noise ("noise"), or partly anew ("partial").
      moe_every: layers of which the last becomes sparse; None for the dense model's own super-blocks.
      encoder_moe_every: the same of an encoder.
      noise: of "noise", over the deviation of each matrix.
      fraction: of "partial", of each expert's hidden features.
      router: another one than "top_k" (or "switch").
      write: folder to write the weights to, instead of training them on.
    """

    dense: tuning.From
    experts: int = 8
    top_k: int = 2
    how: How = "copy"
    moe_every: int | None = None
    encoder_moe_every: int | None = None
    noise: float = 0.05
    fraction: float = 0.5
    router: str | None = None
    write: tuning.Folder | None = None

    def layers(self) -> dict[str, Any]:
        """What decides the shape of the sparse model."""
        router = {} if self.router is None else {"router": self.router}
        places = {"moe_every": self.moe_every, "encoder_moe_every": self.encoder_moe_every}
        return {"num_experts": self.experts, "top_k": self.top_k, **places, **router}


def plan(flags: Flags) -> tuning.Job:
    """Find the sparse model's shape, and say how its weights are made."""
    if flags.write is not None and flags.write.exists():
        raise ValueError(f"{flags.write} is there already; write to another folder, or remove it.")
    config = tuning.settings_after(flags.dense, "upcycle")
    shape = sparse_config(config.model, **flags.layers())

    def weights(chosen: TrainConfig) -> tuple[Params, None]:
        refuse_other_layers(shape.moe, chosen.model.moe)
        params, own = tuning.read_weights(flags.dense)
        made, _ = upcycle(
            params,
            own,
            how=flags.how,
            noise=flags.noise,
            fraction=flags.fraction,
            key=jax.random.key(chosen.train.seed),
            bias_step=0.0 if chosen.model.moe is None else chosen.model.moe.bias_step,
            **flags.layers(),
        )
        return made, None

    return tuning.Job(dataclasses.replace(config, model=shape), weights)


def refuse_other_layers(made: MoEConfig | None, chosen: MoEConfig | None) -> None:
    """Raise a ValueError if flags of the run ask for other sparse layers than the weights are made for."""
    for field in MADE_FOR:
        there, here = getattr(made, field), getattr(chosen, field, None)
        if there != here:
            raise ValueError(
                f"model.moe.{field} is {here}, but the weights are made for {there}, so the model would not "
                "be its parent; leave it alone (--experts, --top-k and --router are upcycle.py's own)."
            )


def write(flags: Flags, config: TrainConfig, params: Params | None) -> bool:
    """Write the new weights where that is all that is wanted."""
    if flags.write is None or params is None:
        return False
    if process_count() > 1:
        raise ValueError("--write is done by one process; leave the launch flags out.")
    check_weights(params, config.model, "the upcycled weights")
    model = dataclasses.replace(config.model, param_dtype=str(params["embedding_VD"].dtype))
    save_weights(with_params(model, params), flags.write)
    print(f"wrote {flags.write}")
    return True


def main(arguments: list[str]) -> int:
    """Upcycle what the command line says; returns the exit code."""
    return tuning.main(arguments, "upcycle.py", __doc__ or "", Flags, plan, write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
