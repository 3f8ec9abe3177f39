"""What a Mixture-of-Experts layer is, as one frozen dataclass that checks itself."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Literal, get_args

Dispatch = Literal["gather", "einsum", "dropless"]
DropOrder = Literal["choice", "token", "priority"]
Activation = Literal["relu", "gelu", "silu"]
Exploration = Literal["argmax", "sample"]
Overflow = Literal["drop", "next"]
BalanceOver = Literal["micro_batch", "batch"]


LOSS_COEFFICIENTS = ("balance_coef", "sequence_balance_coef", "importance_coef", "load_coef", "z_coef")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Say which of `choices` is nearest to a misspelt `word`, as the end of an error sentence."""
    known = sorted(choices)
    by_lower = {choice.lower(): choice for choice in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    guess = f"; did you mean {by_lower[near[0]]!r}?" if near else ""
    return f"{guess} (known: {', '.join(known)})"


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the nearest choice if `value` is none of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not known{did_you_mean(str(value), choices)}.")


def check_at_least(field: str, value: float, least: float) -> None:
    """Raise a ValueError that names the field if `value` is below `least`."""
    if not value >= least:
        raise ValueError(f"{field} is {value}, but must be at least {least}.")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A token's way through one MoE layer: who routes it, how many seats there are, what an expert is.

    In a group of T tokens an expert has ceil(factor * T * top_k / num_experts) seats. No biases anywhere.

    Attributes:
      d_model: features of a token.
      d_ff: hidden features of one expert.
      num_experts: experts in the layer.
      router: a name in `switchmoe.routing.ROUTERS`, checked by `make_router`. A router refuses a setting that
        it would not read.
      top_k: experts a token is sent to.
      renormalize: whether a token's k weights are divided by their sum.
      dispatch: how tokens are carried to experts: by index ("gather"), by the one-hot reference ("einsum"),
        or sorted by expert with nothing dropped ("dropless"), where capacities and drop order say nothing.
      matmul: the backend of dropless experts, a name in `switchmoe.dispatching.grouped_matmul.BACKENDS`; None
        chooses the fastest that is right on the platform.
      capacity_factor: seats over an even share, in training.
      eval_capacity_factor: the same outside training.
      expert_capacity: seats of an expert in a group, instead of the factors.
      sequences_per_group: consecutive rows that share their seats.
      drop_order: who is seated first: every token's first choice ("choice"), every choice of the first token
        ("token"), or first choices by falling probability ("priority", V-MoE's batch-prioritised routing,
        which looks at later tokens).
      overflow: what happens to a choice whose expert is full: it is dropped ("drop"), or the token takes its
        next best expert with a free seat ("next"), one token after the other.
      shared_experts: experts that every token passes through beside its routed ones (DeepSeekMoE, arXiv
        2401.06066, section 3.2), as one FFN of so many times d_ff.
      activation: of the experts.
      gated: whether experts are gated, act(x W_gate) * (x W_in), as in SwiGLU.
      expert_dropout: share of an expert's hidden features set to 0 in training (Switch Transformers, section
        2.4).
      jitter: eps of the uniform noise in [1 - eps, 1 + eps] that multiplies the router's input in training
        (Switch Transformers, section 2.4).
      balance_coef: weight of the load-balance loss in `aux_loss` (Switch Transformers, equation 4).
      balance_over: tokens whose load that loss is computed from: those of a micro-batch, or of all the
        micro-batches of a step, which costs training another forward pass over them (arXiv 2501.11873).
      sequence_balance_coef: weight of the load-balance loss of each sequence by itself (DeepSeek-V3, arXiv
        2412.19437, equations 17-20).
      importance_coef: weight of the importance loss (Shazeer et al. 2017, arXiv 1701.06538, equation 7).
      load_coef: weight of the load loss of "noisy_top_k" (the same, equation 11).
      z_coef: weight of the router z-loss in `aux_loss` (ST-MoE, arXiv 2202.08906, equation 5).
      bias_step: by how much an optimizer step moves each expert's balance bias, which is then part of the
        layer's state (see `update_bias`; 1e-3 in arXiv 2408.15664); 0 keeps no bias.
      init_scale: s in the initial deviation sqrt(s / fan_in) of router and experts.
      exploration: how "switch" and "top_k" pick experts in training: the most probable ("argmax"), or drawn
        by their probability ("sample").
      input_dropout: share of the router's input set to 0 in training.
      weight_scale: multiplies the weights of "sigmoid".
      expert_groups: equal groups of experts that "sigmoid" chooses within.
      groups_per_token: how many of these groups a token may choose from.
      slots_per_expert: mixtures of tokens that each expert of "soft_moe" reads in a group.

    Raises:
      ValueError: one sentence, if a value is out of range or two contradict each other.
    """

    d_model: int = 512
    d_ff: int = 2048
    num_experts: int = 8
    router: str = "switch"
    top_k: int = 1
    renormalize: bool = False
    dispatch: Dispatch = "gather"
    matmul: str | None = None
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    expert_capacity: int | None = None
    sequences_per_group: int = 1
    drop_order: DropOrder = "choice"
    overflow: Overflow = "drop"
    shared_experts: int = 0
    activation: Activation = "relu"
    gated: bool = False
    expert_dropout: float = 0.0
    jitter: float = 0.0
    balance_coef: float = 1e-2
    balance_over: BalanceOver = "micro_batch"
    sequence_balance_coef: float = 0.0
    importance_coef: float = 0.0
    load_coef: float = 0.0
    z_coef: float = 0.0
    bias_step: float = 0.0
    init_scale: float = 0.1
    exploration: Exploration = "argmax"
    input_dropout: float = 0.0
    weight_scale: float = 1.0
    expert_groups: int = 1
    groups_per_token: int = 1
    slots_per_expert: int = 1

    def __post_init__(self):
        check_choice("dispatch", self.dispatch, get_args(Dispatch))
        check_choice("drop_order", self.drop_order, get_args(DropOrder))
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("exploration", self.exploration, get_args(Exploration))
        check_choice("overflow", self.overflow, get_args(Overflow))
        check_choice("balance_over", self.balance_over, get_args(BalanceOver))
        for field in ("d_model", "d_ff", "num_experts", "top_k", "sequences_per_group", "expert_groups"):
            check_at_least(field, getattr(self, field), 1)
        for field in ("groups_per_token", "slots_per_expert"):
            check_at_least(field, getattr(self, field), 1)
        for field in (*LOSS_COEFFICIENTS, "bias_step", "shared_experts"):
            check_at_least(field, getattr(self, field), 0)
        self._check_experts()
        self._check_expert_groups()
        self._check_capacity()
        for field in ("expert_dropout", "jitter", "input_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, but must be in [0, 1).")
        for field in ("init_scale", "weight_scale"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}, but must be a finite number above 0.")

    def _check_experts(self) -> None:
        if self.num_experts < self.top_k:
            raise ValueError(
                f"num_experts={self.num_experts} is less than top_k={self.top_k}: "
                "a token can't go to more experts than there are; raise num_experts or lower top_k."
            )
        if self.renormalize and self.top_k == 1:
            raise ValueError(
                "renormalize=True with top_k=1 makes every weight 1, so the router gets no gradient; "
                "set renormalize=False or top_k to 2 or more."
            )

    def _check_expert_groups(self) -> None:
        if self.num_experts % self.expert_groups:
            raise ValueError(
                f"expert_groups={self.expert_groups} does not divide num_experts={self.num_experts}; "
                "groups must be equal, so change one of the two."
            )
        if self.groups_per_token > self.expert_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} is more than expert_groups={self.expert_groups}; "
                "lower it, or make more groups."
            )
        reach = self.groups_per_token * self.num_experts // self.expert_groups
        if reach < self.top_k:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} of expert_groups={self.expert_groups} hold "
                f"{reach} experts, fewer than top_k={self.top_k}; raise groups_per_token or lower top_k."
            )

    def _check_capacity(self) -> None:
        for field in ("capacity_factor", "eval_capacity_factor"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(
                    f"{field} is {getattr(self, field)}, but must be a finite number above 0; "
                    "1.25 gives each expert a quarter more seats than an even share."
                )
        if self.expert_capacity is not None:
            check_at_least("expert_capacity", self.expert_capacity, 1)
        if self.dispatch == "dropless" and self.overflow != "drop":
            raise ValueError(
                f"overflow={self.overflow!r} is for experts that fill up, and dispatch='dropless' has none; "
                "leave overflow at 'drop', or choose dispatch='gather'."
            )
        if self.dispatch != "dropless" and self.matmul is not None:
            raise ValueError(
                f"matmul={self.matmul!r} names a backend of dispatch='dropless', but "
                f"dispatch={self.dispatch!r}; leave matmul at None, or change dispatch."
            )
