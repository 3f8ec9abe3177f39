"""What is looked at before a run compiles anything: its text, its rows, its groups, its mesh."""

from switchmoe.data import DataConfig, PackedCorpus, corpus_fingerprint
from switchmoe.dispatching import expected_drop
from switchmoe.dispatching.grouped_matmul import choose_backend
from switchmoe.models.layer_cost import competes_for_seats
from switchmoe.parallel import Layout, check_divides, check_layout
from switchmoe.seats import expert_seats
from switchmoe.train.config import TrainConfig
from switchmoe.train.errors import RunError

# Below so many tokens an expert and group, chance alone makes drops that no router can avoid.
ENOUGH_TOKENS = 8


def refuse_other_text(saved: str | None, now: str, config: DataConfig) -> None:
    """Compare the fingerprint of the text a run was trained on with that of the text in hand.

    A run from before there were fingerprints has none, and is accepted.

    Raises:
      RunError: they differ.
    """
    if saved is not None and saved != now:
        where = "that comes with switchmoe" if config.source == "bundled" else f"in {config.source}"
        raise RunError(
            f"the text {where} is not the one this run was trained on; use another --out or restore the text."
        )


def refuse_other_text_of_done(saved: str | None, config: DataConfig) -> None:
    """Do the same for a finished run, whose text may be gone by now: nothing is computed from it any more.

    Raises:
      RunError: the text is there, and is another one.
    """
    if saved is None:
        return
    try:
        now = corpus_fingerprint(config)
    except (OSError, ValueError):
        return
    refuse_other_text(saved, now, config)


def check_vocabulary(corpus: PackedCorpus, config: TrainConfig) -> None:
    """Look at every packed token once, since compiled code cannot complain about one it has no weights for.

    Raises:
      ValueError: one lies outside the model's vocabulary.
    """
    largest = max(rows.largest_id for rows in (corpus.train, corpus.validation))
    largest = max(largest, corpus.train.special.pad)
    cut = config.data.corruption
    if cut is not None:
        largest = max(largest, *corpus.train.special.sentinels[: cut.lengths(cut.raw_length).spans])
    if largest >= config.model.vocab_size:
        raise ValueError(
            f"the packed rows of {config.data.source} hold token {largest}, outside "
            f"model.vocab_size={config.model.vocab_size}; raise that, or remove "
            f"{config.data.cache_folder() / corpus.fingerprint}, so that the text is packed again."
        )


def check_matmul(config: TrainConfig) -> None:
    """Make sure that the backend the dropless experts ask for runs here.

    Raises:
      ValueError: it is not known, or not for this platform.
    """
    if config.model.moe is not None and config.model.moe.dispatch == "dropless":
        choose_backend(config.model.moe.matmul)


def check_mesh(config: TrainConfig, layout: Layout | None) -> None:
    """Make sure that the run can be split over its mesh.

    Raises:
      ValueError: the rows of a micro-batch (an evaluation's are as many), the experts, heads or features do
        not divide over the devices that share them, or tokens can't travel in the way that is asked for.
    """
    if layout is None:
        return
    model, moe, rules = config.model, config.model.moe, layout.rules
    group = 1 if moe is None else moe.sequences_per_group
    rows, devices = config.train.micro_batch_size, layout.size(rules.rows)
    if rows % (devices * group):
        sizes = " x ".join(f"{axis} {layout.mesh.shape[axis]}" for axis in rules.rows)
        raise ValueError(
            f"a micro-batch has {rows} rows (batch_size / accumulate), but the mesh shares them out over "
            f"{devices} devices ({sizes}) in groups of {group} (model.moe.sequences_per_group); make them a "
            f"multiple of {devices * group}, or the mesh smaller (--mesh.data)."
        )
    for field, axes in {
        "d_model": rules.model,
        "num_heads": rules.heads,
        "num_kv_heads": rules.heads,
        "d_ff": rules.hidden,
        "d_ff_sparse": rules.hidden,
        "vocab_size": rules.vocabulary,
    }.items():
        size = getattr(model, field)
        if size is not None:
            check_divides(f"model.{field}={size}", size, layout, axes)
    if moe is not None:
        check_layout(moe, layout, rows=rows)


def no_room_warning(config: TrainConfig, layout: Layout | None, dropped_fraction: float) -> str | None:
    """Say that dropless experts dropped something, which only too small a buffer makes them do; else None."""
    moe = config.model.moe
    if layout is None or moe is None or moe.dispatch != "dropless" or not dropped_fraction > 0:
        return None
    return (
        f"{dropped_fraction:.2%} of the choices found no room on their expert's device and were dropped, so "
        f"this run is not what it would be on another mesh; raise "
        f"mesh.ragged_buffer_factor={layout.ragged_buffer_factor}, or leave it at None."
    )


def small_groups_warning(config: TrainConfig) -> str | None:
    """Say what chance alone drops where an expert has few tokens a group; None for a dense model or enough.

    The number of tokens is that of an even load, k a token counted k times; with an encoder, in the shorter
    of its rows and the decoder's. None, too, where chance drops nothing: without seats, where experts choose,
    and where a full expert's token goes on to a free seat.
    """
    moe = config.model.moe
    if moe is None or not competes_for_seats(moe) or moe.overflow == "next":
        return None
    group = min(config.data.sequence_length, config.data.target_length) * moe.sequences_per_group
    choices = group * moe.top_k
    per_expert = choices / moe.num_experts
    if per_expert >= ENOUGH_TOKENS:
        return None
    seats = expert_seats(moe, tokens=group, train=True)
    floor = expected_drop(group, moe.num_experts, moe.top_k, seats) / choices
    return (
        f"an expert has {per_expert:g} tokens a group, so chance alone drops {floor:.1%} of the choices at "
        "the training capacity; raise model.moe.sequences_per_group or data.sequence_length, or take fewer "
        "experts."
    )
