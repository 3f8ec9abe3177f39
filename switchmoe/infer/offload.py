"""Experts that stay in the host's memory, and come to the device when a router asks for them."""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Int32

from switchmoe.dispatching.dropless import sort_choices
from switchmoe.dispatching.slots import SlotPlan
from switchmoe.execution import execute_local, make_plan
from switchmoe.experts import ExpertParams, apply_experts
from switchmoe.nn import MoE
from switchmoe.routing import Routing, make_router
from switchmoe.seats import seats_by_tokens
from switchmoe.shapes import Array, Bool, Float, Int
from switchmoe.sorted_experts import apply_experts_sorted


class Asked(NamedTuple):
    """What a router wants for the tokens of a sparse layer.

    Attributes:
      x_BSD: what the experts are to read; 0 at padding.
      expert_BSK: the experts that each token has a seat at; E where a choice has none, or is not used.
      weight_BSK: their weights.
    """

    x_BSD: Float[Array, "B S D"]
    expert_BSK: Int[Array, "B S K"]
    weight_BSK: Float[Array, "B S K"]


class AskRouter(nnx.Module):
    """Stands in the place of a sparse layer: a token asks its router, and passes the shared experts alone.

    `asked` is what the last call's tokens want.
    """

    asked: Asked

    def __init__(self, moe: MoE) -> None:
        self.moe = moe

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        mask: Bool[Array, "B S"],
        token_ids: Int[Array, "B S"],
        **_: Any,
    ) -> tuple[Float[Array, "B S D"], None]:
        """Give what the shared experts say, or 0, and no sums."""
        config, params = self.moe.config, self.moe.params()
        x_BSD = jnp.where(mask[..., None], x_BSD, 0)
        router = make_router(config)
        bias = self.moe.bias_E[...] if config.bias_step > 0 else None
        wanted = router.apply(
            params.router, x_BSD, key=None, mask=mask, token_ids=token_ids, bias=bias, train=False
        )
        seats_N = seats_by_tokens(config, tokens=x_BSD.shape[1], train=False)
        decision, plan = make_plan(wanted, router, config, train=False, seats_N=seats_N)
        assert isinstance(decision, Routing)  # see `OffloadedExperts`
        kept_BSK = plan.kept_GTK if isinstance(plan, SlotPlan) else mask[..., None]
        expert_BSK = jnp.where(kept_BSK, decision.expert_GTK, config.num_experts)
        y_BSD = jnp.zeros_like(x_BSD)
        if params.shared is not None:
            y_BSD = apply_experts(params.shared, x_BSD[None], activation=config.activation)[0]
        self.asked = nnx.data(Asked(x_BSD, expert_BSK, decision.weight_GTK))
        return y_BSD, None


@dataclasses.dataclass
class OffloadStats:
    """What was asked for, and what had to be brought.

    Attributes:
      asked: experts that layers wanted, each counted once a layer and step.
      found: those that were on the device.
      bytes_brought: of the others.
    """

    asked: int = 0
    found: int = 0
    bytes_brought: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of experts that were there when they were wanted; 1 if none was wanted."""
        return self.found / self.asked if self.asked else 1.0


class OffloadedExperts:
    """All experts of all sparse layers on the host, and room for some of them on a device.

    Those that were wanted last stay; the one that was not wanted for longest makes room for the next. A layer
    that wants more than there is room for is served in turns. `stats` counts.
    """

    def __init__(self, stacks: list[ExpertParams], resident: int, device: Any) -> None:
        self._host = [jax.tree.map(np.asarray, stack) for stack in stacks]
        first = self._host[0]
        self.num_experts = first.w_in_EDF.shape[1]
        self.total = sum(stack.w_in_EDF.shape[0] for stack in self._host) * self.num_experts
        self.resident = min(resident, self.total)
        self.bytes_each = sum(a[0, 0].nbytes for a in jax.tree.leaves(first))
        shapes = jax.tree.map(lambda a: np.zeros((self.resident, *a.shape[2:]), a.dtype), first)
        self._device, self._pool = device, jax.device_put(shapes, device)
        self._slots: collections.OrderedDict[tuple[int, int, int], int] = collections.OrderedDict()
        self.stats = OffloadStats()

    def serve(
        self, stack: int, layer: int, asked: Asked, x_BSD: Float[Array, "B S D"], activation: str
    ) -> Float[Array, "B S D"]:
        """Add to each token what its experts say, bringing those that are not there."""
        wanted = np.unique(np.asarray(asked.expert_BSK))
        for slot_E in self._turns(stack, layer, wanted[wanted < self.num_experts].tolist()):
            x_BSD = _serve(self._pool, slot_E, asked, x_BSD, activation=activation)
        return x_BSD

    def _turns(self, stack: int, layer: int, wanted: list[int]) -> Iterator[Int32[np.ndarray, " E"]]:
        """Say where the wanted experts are, as many at a time as there is room for, those here first."""
        here = [expert for expert in wanted if (stack, layer, expert) in self._slots]
        self.stats.asked += len(wanted)
        self.stats.found += len(here)
        order = here + [expert for expert in wanted if expert not in set(here)]
        for first in range(0, len(order), self.resident):
            turn = order[first : first + self.resident]
            for expert in turn:  # so that nobody of this turn makes room for another
                if (stack, layer, expert) in self._slots:
                    self._slots.move_to_end((stack, layer, expert))
            slot_E = np.full(self.num_experts, self.resident, np.int32)
            for expert in turn:
                slot_E[expert] = self._slot_of(stack, layer, expert)
            yield slot_E

    def _slot_of(self, stack: int, layer: int, expert: int) -> int:
        key = (stack, layer, expert)
        if key not in self._slots:
            full = len(self._slots) == self.resident
            slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
            one = jax.tree.map(lambda a: a[layer, expert], self._host[stack])
            self._pool = _put(self._pool, np.int32(slot), jax.device_put(one, self._device))
            self._slots[key] = slot
            self.stats.bytes_brought += self.bytes_each
        return self._slots[key]


def take_experts(moe: MoE) -> ExpertParams:
    """Take the routed experts' weights out of a stacked layer, and leave it empty ones and its router."""
    names = [name for name in ExpertParams._fields if hasattr(moe, name)]
    taken = ExpertParams(**{name: getattr(moe, name)[...] for name in names})
    for name in names:
        setattr(moe, name, nnx.Param(getattr(moe, name)[...][..., :0, :0]))
    return taken


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: ExpertParams, slot: Int[Array, ""], one: ExpertParams) -> ExpertParams:
    """Lay one expert's weights into a place of the pool."""
    return jax.tree.map(lambda all_, a: lax.dynamic_update_index_in_dim(all_, a, slot, 0), pool, one)


@functools.partial(jax.jit, static_argnames="activation")
def _serve(
    pool: ExpertParams,
    slot_E: Int[Array, " E"],
    asked: Asked,
    x_BSD: Float[Array, "B S D"],
    *,
    activation: Any,
) -> Float[Array, "B S D"]:
    """Send each token to those of its experts that are in the pool, as a dropless layer does."""
    slots = len(pool.w_in_EDF)
    slot_BSK = jnp.append(slot_E, slots)[asked.expert_BSK]
    nothing_BSE = jnp.zeros((*x_BSD.shape[:2], slots), jnp.float32)
    here = Routing(
        expert_GTK=slot_BSK,
        weight_GTK=jnp.where(slot_BSK < slots, asked.weight_BSK, 0),
        logits_GTE=nothing_BSE,
        probs_GTE=nothing_BSE,
        mask_GT=jnp.ones(x_BSD.shape[:2], bool),
    )

    def experts(params, x_RD, plan):
        return apply_experts_sorted(params, x_RD, plan, activation=activation)

    return x_BSD + execute_local(asked.x_BSD, sort_choices(here), experts, pool)
