"""GenerateConfig: how texts are continued, checked when it is made."""

import dataclasses
import math
from typing import Literal, get_args

from switchmoe.config import check_at_least, check_choice

ExpertSeats = Literal["dropless", "capacity"]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How each next token is chosen, and when a row ends.

    Attributes:
      max_new_tokens: tokens added to a row at most.
      temperature: 0 takes the most probable token; above it tokens are drawn from softmax(logits /
        temperature).
      top_k: draw from the so many best tokens only.
      top_p: draw from the smallest set of best tokens only whose probabilities add up to it.
      stop_tokens: a row ends with the first of these that it chooses.
      banned_tokens: never chosen.
      experts: "dropless" sends every token to the experts it chose, "capacity" gives experts the seats that
        the model's config says for evaluation and drops tokens of a prompt that find none; None is what the
        model's config says. A token that is generated never competes for a seat.
      log_probs: say how probable the model found each token, before temperature, top_k, top_p and bans.
      pad_token: what stands behind the end of a row.
      start_token: what a decoder begins with, in a model with an encoder (T5's is 0).

    Raises:
      ValueError: one sentence saying which field is wrong and what to change.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    experts: ExpertSeats | None = None
    log_probs: bool = False
    pad_token: int = 0
    start_token: int = 0

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}, but must be a finite number of at least 0; 0 takes the "
                f"most probable token, 1 draws by the model's own probabilities."
            )
        if self.top_k is not None:
            check_at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be above 0 and at most 1.")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} restricts what is drawn, but temperature=0 draws nothing; "
                    f"set temperature above 0, or leave {name} out."
                )
        if self.experts is not None:
            check_choice("experts", self.experts, get_args(ExpertSeats))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Make sure that the tokens named here exist, and that some token can be chosen.

        Raises:
          ValueError: one sentence.
        """
        for name in ("stop_tokens", "banned_tokens", "pad_token", "start_token"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name} has the token {token}, which lies outside the vocabulary of {vocab_size} "
                        f"(ids 0 to {vocab_size - 1}); use the ids of the model's own tokenizer."
                    )
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(f"top_k={self.top_k} is more than the vocabulary of {vocab_size}; lower it.")
        if len(set(self.banned_tokens)) >= vocab_size:
            raise ValueError("banned_tokens bans the whole vocabulary; leave at least one token.")
