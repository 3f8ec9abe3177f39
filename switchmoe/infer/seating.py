"""How a model's sparse layers treat tokens while it generates."""

import dataclasses
from typing import Any

from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.models import TransformerLM, with_moe
from switchmoe.parallel import Layout


def choose_seating(model: TransformerLM, experts: str | None, layout: Layout | None = None) -> TransformerLM:
    """Make every row a group of its own, and its experts limited or not, as `GenerateConfig.experts` says.

    Returns a model that shares the weights of `model`, which stays as it is.

    Raises:
      ValueError: one sentence, if a router, or the layout, would let rows see each other.
    """
    if model.config.moe is None:
        return model
    moe = _seated(model.config.moe, experts)
    if moe.router == "random":
        raise ValueError(
            "router='random' draws by a row's place in the batch, so a text would depend on the rows beside "
            "it; generate with another router."
        )
    if moe.router == "expert_choice":
        raise ValueError(
            "router='expert_choice' gives experts seats by the length of the padded rows, so a text would "
            "depend on the rows beside it; generate with another router."
        )
    if layout is not None and layout.ragged_buffer_factor is not None:
        raise ValueError(
            f"ragged_buffer_factor={layout.ragged_buffer_factor} drops tokens when other rows crowd an "
            "expert, so a text would depend on the rows beside it; generate with a layout without it."
        )
    laid_out = any(hasattr(part, "served") for _, part in nnx.iter_modules(model))
    if layout is not None and laid_out:
        raise ValueError(
            "The experts are laid out for one device (infer.prepare), so they can't be split over a mesh; "
            "generate with the model before that, or without a layout."
        )
    return model if moe == model.config.moe else with_moe(model, moe)


def _seated(moe: MoEConfig, experts: str | None) -> MoEConfig:
    changes: dict[str, Any] = dict(sequences_per_group=1)
    if experts == "dropless" and moe.dispatch != "dropless":
        changes |= dict(dispatch="dropless", overflow="drop")
    if experts == "capacity" and moe.dispatch == "dropless":
        changes |= dict(dispatch="gather", matmul=None)
        if moe.drop_order == "choice":  # who comes first is seated first: no later token decides about it
            changes["drop_order"] = "token"
    return dataclasses.replace(moe, **changes)
