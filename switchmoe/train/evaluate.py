"""How well the model predicts text it was not trained on, domain by domain."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from switchmoe.data import Batch
from switchmoe.routing import summarize
from switchmoe.shapes import Array
from switchmoe.train.model import Params, PureModel
from switchmoe.train.step import forward


class EvalSums(NamedTuple):
    """Sums over evaluation batches.

    Attributes:
      nats_N: -log p of the targets, summed for each of N domains.
      weight_N: the targets' weights, summed for each domain.
      aux: the routers' sums, or None for a dense model.
    """

    nats_N: Array
    weight_N: Array
    aux: Any


def make_eval_step(model: PureModel, num_domains: int) -> Callable[[Params, Batch], EvalSums]:
    """Build the function that sums a batch's losses by domain, at evaluation capacity and without noise."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> EvalSums:
        logits_BSV, aux = forward(model, params, batch, train=False)
        nats_BS = optax.softmax_cross_entropy_with_integer_labels(
            logits_BSV.astype(jnp.float32), batch.targets_BS
        )
        nats_B = jnp.sum(jnp.where(batch.weight_BS == 0, 0.0, nats_BS * batch.weight_BS), axis=-1)
        of_domain_BN = jax.nn.one_hot(batch.domain_B, num_domains)
        return EvalSums(nats_B @ of_domain_BN, batch.weight_BS.sum(axis=-1) @ of_domain_BN, aux)

    return eval_step


def evaluate(
    eval_step: Callable[[Params, Batch], EvalSums],
    params: Params,
    batches: Iterable[Batch],
    domains: tuple[str, ...],
) -> dict[str, Any]:
    """Say how surprising held-out text is, in nats a token.

    Returns `val_loss` (over all tokens), `val_loss_by_domain` (for each domain that has a token),
    `val_dropped_fraction`, `val_dropped_floor`, `val_max_vio` and `val_load_fraction` ([L, E] lists; the
    aux sums are added over all batches before ratios are made). A dense model drops nothing and has an
    empty load.

    Raises:
      ValueError: there is no target to predict.
    """
    total = None
    for batch in batches:
        part = eval_step(params, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None or not float(jnp.sum(total.weight_N)) > 0:
        raise ValueError("the validation split holds no token to predict; raise data.validation_fraction.")
    nats, weight = np.asarray(total.nats_N, np.float64), np.asarray(total.weight_N, np.float64)
    row = {
        "val_loss": float(nats.sum() / weight.sum()),
        "val_loss_by_domain": {
            name: float(nats[i] / weight[i]) for i, name in enumerate(domains) if weight[i] > 0
        },
        "val_dropped_fraction": 0.0,
        "val_dropped_floor": 0.0,
        "val_max_vio": 0.0,
        "val_load_fraction": [],
    }
    if total.aux is not None:
        summary = jax.device_get(summarize(total.aux))
        for name in ("dropped_fraction", "dropped_floor", "max_vio"):
            row[f"val_{name}"] = float(summary[name])
        row["val_load_fraction"] = np.asarray(summary["load_fraction"], np.float64).round(6).tolist()
    return row
