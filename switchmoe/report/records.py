"""The plain data behind a report: what a training arm did, and where a set of tokens was sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from switchmoe.data import ByteTokenizer

PAD_ID = ByteTokenizer.pad  # The default mask leaves these positions out of every count.


@dataclass(frozen=True)
class ArmRecord:
    """One training run.

    `metrics` are the rows of metrics.jsonl: any of `step`, `loss`, `val_loss`, `seconds` of training and
    useful `flops` (both since the start; compiling and evaluating take no seconds). `summary` has `steps`,
    `tokens`, `val_loss`, `val_loss_by_domain`, `flops_per_token` (useful), `flops_per_token_executed`,
    `params_total`, `params_active`, `tokens_per_second`, `seconds`, `dropped_fraction`, `max_vio`. What is
    missing is shown as a dash.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] | None = None

    def value(self, key: str) -> Any:
        """The summary's value of that name, or None."""
        return (self.summary or {}).get(key)


@dataclass(frozen=True, eq=False)
class Snippet:
    """One stretch of validation text, with the experts each token chose in each MoE layer.

    The experts stand by falling weight, and a choice that was not used is -1, behind the used ones.
    """

    domain: str
    token_ids_S: Integer[np.ndarray, " S"]
    expert_LSK: Integer[np.ndarray, "L S K"]
    weight_LSK: Float[np.ndarray, "L S K"]
    kept_LSK: Bool[np.ndarray, "L S K"]


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """Where a set of tokens was sent, counted in choices (a token makes up to K of them in each MoE layer).

    `load` counts choices before anything is dropped, `kept` those that found a seat. `dropped_floor_L` is the
    share that random, perfectly balanced routing would drop too (NaN where it was not recorded).
    `dropped_by_position_LP` cuts the rows into P equal stretches.
    """

    load_LE: Real[np.ndarray, "L E"]
    kept_LE: Real[np.ndarray, "L E"]
    load_by_domain_NLE: Real[np.ndarray, "N L E"]
    dropped_fraction_L: Float[np.ndarray, " L"]
    dropped_floor_L: Float[np.ndarray, " L"]
    dropped_by_position_LP: Float[np.ndarray, "L P"]
    domains: tuple[str, ...]
    snippets: tuple[Snippet, ...] = ()

    def __post_init__(self) -> None:
        if len(self.domains) != len(self.load_by_domain_NLE):
            raise ValueError(
                f"load_by_domain_NLE counts {len(self.load_by_domain_NLE)} domains, but {len(self.domains)} "
                "are named: pass one name for each."
            )

    @property
    def num_layers(self) -> int:
        return self.load_LE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.load_LE.shape[1]

    @property
    def utilisation_LE(self) -> Float[np.ndarray, "L E"]:
        """Load over the ideal: 1 where an expert was chosen by exactly 1/E of the choices."""
        return self.load_LE / np.maximum(self.load_LE.mean(axis=1, keepdims=True), 1e-9)

    @property
    def max_vio_L(self) -> Float[np.ndarray, " L"]:
        """Highest load over the mean load, less 1, over the whole set of tokens (not a mean over batches)."""
        return self.utilisation_LE.max(axis=1) - 1

    @property
    def dead_L(self) -> Integer[np.ndarray, " L"]:
        """How many experts no token of the set chose."""
        return (self.load_LE == 0).sum(axis=1)

    @property
    def domain_share_NLE(self) -> Float[np.ndarray, "N L E"]:
        """Of the choices of a domain's tokens, the share that went to each expert (0 for an empty domain)."""
        return self.load_by_domain_NLE / np.maximum(self.load_by_domain_NLE.sum(axis=2, keepdims=True), 1)

    @property
    def domain_bits_L(self) -> Float[np.ndarray, " L"]:
        """Bits that a token's expert tells about its domain: the mutual information, domains weighed equally.

        0 when every domain uses the experts alike, log2(min(N, E)) when the two determine each other.
        """
        present = self.load_by_domain_NLE.sum(axis=(1, 2)) > 0
        joint_NLE = self.domain_share_NLE[present] / max(int(present.sum()), 1)
        independent_NLE = joint_NLE.sum(axis=0, keepdims=True) * joint_NLE.sum(axis=2, keepdims=True)
        ratio_NLE = np.divide(joint_NLE, independent_NLE, out=np.ones_like(joint_NLE), where=joint_NLE > 0)
        return (joint_NLE * np.log2(ratio_NLE)).sum(axis=(0, 2))


def build_routing(
    ids_BS: Integer[Any, "B S"],
    domain_B: Integer[Any, " B"],
    expert_LBSK: Integer[Any, "L B S K"],
    weight_LBSK: Float[Any, "L B S K"],
    kept_LBSK: Bool[Any, "L B S K"],
    *,
    domains: Sequence[str],
    num_experts: int,
    mask_BS: Bool[Any, "B S"] | None = None,
    dropped_floor_L: Float[Any, " L"] | None = None,
    snippet_tokens: int = 512,
    position_bins: int = 16,
) -> RoutingRecord:
    """Counts every token's choices by layer, expert, domain and position, and keeps one row of text a domain.

    The row kept is the first of its domain with the most text in it, from its beginning, so nobody picked it
    for its looks. Positions where `mask_BS` is False (by default: padding, id 0) count nowhere. The floor is
    the expected number of dropped choices over the choices, a layer. Raises ValueError when a domain has no
    name or an expert is out of range.
    """
    ids_BS, domain_B = np.asarray(ids_BS), np.asarray(domain_B)
    expert_LBSK, weight_LBSK, kept_LBSK = (np.asarray(a) for a in (expert_LBSK, weight_LBSK, kept_LBSK))
    mask_BS = np.asarray(ids_BS != PAD_ID if mask_BS is None else mask_BS)
    layers, _, length, _ = expert_LBSK.shape
    _check_ranges(expert_LBSK[:, mask_BS], domain_B[mask_BS.any(axis=1)], num_experts, len(domains))

    def count(where_LBSK: Bool[np.ndarray, "L B S K"]) -> Integer[np.ndarray, "L E"]:
        by_layer = zip(expert_LBSK, where_LBSK, strict=True)
        return np.stack([np.bincount(expert[where], minlength=num_experts) for expert, where in by_layer])

    chosen_LBSK = mask_BS[None, :, :, None] & (expert_LBSK < num_experts)
    load_LE, kept_LE = count(chosen_LBSK), count(chosen_LBSK & kept_LBSK)
    of_domain_NB = [domain_B == n for n in range(len(domains))]
    by_domain_NLE = np.stack([count(chosen_LBSK & is_n[None, :, None, None]) for is_n in of_domain_NB])

    # The bin of a position: floor(position * P / S), so that bins differ by one position at most.
    bin_S = np.arange(length) * min(position_bins, length) // length
    starts_P = np.unique(bin_S, return_index=True)[1]
    made_LP = np.add.reduceat(chosen_LBSK.sum(axis=(1, 3)), starts_P, axis=1)
    lost_LP = np.add.reduceat((chosen_LBSK & ~kept_LBSK).sum(axis=(1, 3)), starts_P, axis=1)

    def snippet(n: int) -> Snippet:
        row = int(np.argmax(np.where(domain_B == n, mask_BS.sum(axis=1), -1)))
        at = np.flatnonzero(mask_BS[row])[:snippet_tokens]
        expert_LSK = np.where(chosen_LBSK, expert_LBSK, -1)[:, row, at]
        weight_LSK = weight_LBSK[:, row, at].astype(np.float32)
        best_first = np.lexsort((-weight_LSK, expert_LSK < 0))
        return Snippet(
            domains[n],
            ids_BS[row, at],
            *(
                np.take_along_axis(part, best_first, axis=-1)
                for part in (expert_LSK, weight_LSK, kept_LBSK[:, row, at])
            ),
        )

    return RoutingRecord(
        load_LE=load_LE,
        kept_LE=kept_LE,
        load_by_domain_NLE=by_domain_NLE,
        dropped_fraction_L=1 - kept_LE.sum(axis=1) / np.maximum(load_LE.sum(axis=1), 1),
        dropped_floor_L=np.full(layers, np.nan) if dropped_floor_L is None else np.asarray(dropped_floor_L),
        dropped_by_position_LP=lost_LP / np.maximum(made_LP, 1),
        domains=tuple(domains),
        snippets=tuple(snippet(n) for n in range(len(domains)) if mask_BS[domain_B == n].any()),
    )


def _check_ranges(
    expert_LTK: Integer[np.ndarray, "L T K"],
    domain_B: Integer[np.ndarray, " B"],
    num_experts: int,
    num_domains: int,
) -> None:
    if expert_LTK.size and not 0 <= expert_LTK.min() <= expert_LTK.max() <= num_experts:
        raise ValueError(
            f"The routing names experts {expert_LTK.min()} to {expert_LTK.max()}, but num_experts is "
            f"{num_experts}, which as an expert is a choice not used: pass the model's own number of experts."
        )
    if domain_B.size and not 0 <= domain_B.min() <= domain_B.max() < num_domains:
        raise ValueError(
            f"Rows are of domains {domain_B.min()} to {domain_B.max()}, but {num_domains} names were given: "
            "pass one name for each domain."
        )
