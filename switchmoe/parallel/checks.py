"""What does not divide over a mesh, and which executor does not suit a layer, in one sentence."""

from switchmoe.config import MoEConfig, did_you_mean
from switchmoe.layer import MoEParams
from switchmoe.parallel.executors import EXECUTORS
from switchmoe.parallel.layout import Layout
from switchmoe.served_experts import ServedExperts


def choose_executor(config: MoEConfig, layout: Layout) -> str:
    """Name the executor of a layer on a mesh: the layout's own, or the one that sends least.

    Raises:
      ValueError: one sentence, if there is none of that name or it does not suit the config.
    """
    name = layout.executor
    if name is None:
        return "ragged_all_to_all" if config.dispatch == "dropless" else "all_to_all"
    if name not in EXECUTORS:
        raise ValueError(f"executor={name!r} is not known{did_you_mean(name, EXECUTORS)}.")
    if name == "all_to_all" and config.dispatch == "dropless":
        raise ValueError(
            "executor='all_to_all' carries seats, and dispatch='dropless' has none; choose "
            "'ragged_all_to_all' or 'all_gather', or None."
        )
    if name == "ragged_all_to_all" and config.dispatch != "dropless":
        raise ValueError(
            f"executor='ragged_all_to_all' carries dropless rows, but dispatch={config.dispatch!r}; choose "
            "'all_to_all' or 'all_gather', or None, or dispatch='dropless'."
        )
    return name


def check_layout(config: MoEConfig, layout: Layout, *, rows: int) -> None:
    """Make sure that a layer with so many rows at once can be split over the mesh.

    Raises:
      ValueError: one sentence, if something does not divide or the executor does not suit the config.
    """
    rules = layout.rules
    if choose_executor(config, layout) != "ragged_all_to_all" and layout.ragged_buffer_factor is not None:
        raise ValueError(
            f"ragged_buffer_factor={layout.ragged_buffer_factor} is for executor='ragged_all_to_all', which "
            "carries dropless rows; leave it at None."
        )
    for field, axes in {"num_experts": rules.experts, "d_model": rules.model, "d_ff": rules.hidden}.items():
        check_divides(f"{field}={getattr(config, field)}", getattr(config, field), layout, axes)
    devices = layout.size(rules.rows)
    if rows % (devices * config.sequences_per_group):
        raise ValueError(
            f"{rows} rows do not divide over {devices} devices ({_said(layout, rules.rows)}) in groups of "
            f"sequences_per_group={config.sequences_per_group}; make them a multiple of "
            f"{devices * config.sequences_per_group}, or take a smaller mesh."
        )
    groups = rows // (devices * config.sequences_per_group)
    if groups % layout.chunks:
        raise ValueError(
            f"chunks={layout.chunks} does not divide the {groups} groups of a device; lower chunks, or give "
            "each device more rows."
        )
    if layout.chunks > 1 and config.dispatch == "dropless":
        raise ValueError(
            f"chunks={layout.chunks} cuts groups that have seats of their own, and dispatch='dropless' sorts "
            "all groups together; leave chunks at 1."
        )


def check_weights(params: MoEParams, layout: Layout) -> None:
    """Make sure that a layer's experts are in a form that can be split over the mesh.

    Raises:
      ValueError: one sentence, if they are not.
    """
    if layout.mesh.size == 1 or params.experts.trainable:
        return
    if isinstance(params.experts, ServedExperts):
        raise ValueError(
            "These experts are laid out one by one for a single device; take the model before that on a mesh."
        )
    if layout.used(layout.rules.model) or layout.used(layout.rules.hidden):
        raise ValueError(
            "Experts of 8 or 4 bits can be split over a mesh as wholes, but not their matrices; take a mesh "
            f"whose axes {layout.used(layout.rules.model) + layout.used(layout.rules.hidden)} have size 1."
        )


def check_divides(what: str, size: int, layout: Layout, axes: str | tuple[str, ...] | None) -> None:
    """Make sure that `what`, which is `size` long, can be split evenly over mesh axes.

    Raises:
      ValueError: one sentence, if it can't.
    """
    devices = layout.size(axes)
    if size % devices:
        raise ValueError(
            f"{what} does not divide over {devices} devices ({_said(layout, axes)}); change it, or the mesh."
        )


def _said(layout: Layout, axes: str | tuple[str, ...] | None) -> str:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return " x ".join(f"{axis} {layout.mesh.shape[axis]}" for axis in axes)
