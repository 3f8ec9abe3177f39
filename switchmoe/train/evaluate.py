"""How well the model predicts text it was not trained on, domain by domain."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from switchmoe.data import Batch
from switchmoe.routing import MoEAux, summarize
from switchmoe.shapes import Array, Float
from switchmoe.train.gradient import forward
from switchmoe.train.model import Params, PureModel


class EvalSums(NamedTuple):
    """Sums over the tokens of one batch.

    Attributes:
      nats_B: -log p of a row's targets, each times its weight.
      weight_B: the weights of a row's targets.
      aux: the routers' sums, None for a dense model.
    """

    nats_B: Float[Array, " B"]
    weight_B: Float[Array, " B"]
    aux: MoEAux | None


EvalStep = Callable[[Params, Batch], EvalSums]


def make_eval_step(model: PureModel) -> EvalStep:
    """Build the compiled function that sums a batch's losses, at evaluation capacity and without noise.

    On a mesh every device, and so every process, gets the sums of all rows.
    """

    def eval_step(params: Params, batch: Batch) -> EvalSums:
        logits_BSV, aux = forward(model, params, batch, train=False)
        nats_BS = optax.softmax_cross_entropy_with_integer_labels(
            logits_BSV.astype(jnp.float32), batch.targets_BS
        )
        nats_B = jnp.sum(jnp.where(batch.weight_BS == 0, 0.0, nats_BS * batch.weight_BS), axis=-1)
        return EvalSums(nats_B, batch.weight_BS.sum(axis=-1), aux)

    if model.layout is None:
        return jax.jit(eval_step)
    compiled = jax.jit(eval_step, out_shardings=model.layout.sharding())
    # The domains stay on the host, which sums by them.
    return lambda params, batch: compiled(params, batch._replace(domain_B=None))


def evaluate(
    eval_step: EvalStep, params: Params, batches: Iterable[Batch], domains: tuple[str, ...]
) -> dict[str, Any]:
    """Say how surprising held-out text is, in nats a token.

    Sums over batches are taken on the host in float64, where float32 would stop counting at 2**24 tokens.

    Returns `val_loss` (over all tokens), `val_loss_by_domain` (for each domain that has a token),
    `val_dropped_fraction`, `val_dropped_floor`, `val_max_vio` and `val_load_fraction` ([L, E] lists; aux
    sums are added over all batches before ratios are made). A dense model drops nothing and has an empty
    load.

    Raises:
      ValueError: there is no target to predict.
    """
    nats_N, weight_N, aux = np.zeros(len(domains)), np.zeros(len(domains)), None
    for batch in batches:
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), eval_step(params, batch))
        np.add.at(nats_N, batch.domain_B, part.nats_B)
        np.add.at(weight_N, batch.domain_B, part.weight_B)
        aux = part.aux if aux is None else jax.tree.map(np.add, aux, part.aux)
    if not weight_N.sum() > 0:
        raise ValueError("the validation split holds no token to predict; raise data.validation_fraction.")
    row = {
        "val_loss": nats_N.sum() / weight_N.sum(),
        "val_loss_by_domain": {
            name: nats_N[i] / weight_N[i] for i, name in enumerate(domains) if weight_N[i] > 0
        },
        "val_dropped_fraction": 0.0,
        "val_dropped_floor": 0.0,
        "val_max_vio": 0.0,
        "val_load_fraction": [],
    }
    if aux is not None:
        summary = jax.device_get(summarize(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), aux)))
        for name in ("dropped_fraction", "dropped_floor", "max_vio"):
            row[f"val_{name}"] = float(summary[name])
        row["val_load_fraction"] = np.asarray(summary["load_fraction"], np.float64).round(6).tolist()
    return row
