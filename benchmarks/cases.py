"""What the layer benchmark times: one size of layer, and the programs that are run at that size."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

import switchmoe as sm
from switchmoe.config import Activation, Dispatch
from switchmoe.execution import make_plan
from switchmoe.experts import ACTIVATIONS, ExpertParams
from switchmoe.layer import MoEParams
from switchmoe.models.layer_cost import executed_products, useful_products
from switchmoe.routing import Routing, make_router
from switchmoe.shapes import Array, Float

Mode = Literal["forward", "gradient"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)
EXACT = 1.0  # the capacity factor whose seats are as many as the choices, if the load is even
# A one-hot table [T, E, C] larger than this is not built: the einsum dispatch is left out there.
LARGEST_TABLE_BYTES = 2**28


class Contender(NamedTuple):
    """A program to time, and all that an outside implementation has to hand over (see `benchmarks/layer.py`).

    Attributes:
      name: what the table calls it.
      fn: does all the work of one call. If it is a jitted function, its temporary memory is read too.
      args: what `fn` is called with.
      dense: name of another contender of the same list that "to dense" divides by, as an implementation in
        another framework needs; the benchmark's own dense FFN unless given.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple = ()
    dense: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of layer, its input and its weights.

    Attributes:
      tokens: T, all in one group.
      mode: "forward", or "gradient": forward and the gradients for all weights and x.
      capacity_factor: seats over an even share.
      params: the router's and the experts' weights (`switchmoe.layer.MoEParams`).
      x_TD: the tokens.
      g_TD: the gradient that reaches the layer's output.
    """

    tokens: int
    num_experts: int
    d_model: int
    d_ff: int
    top_k: int
    activation: Activation
    mode: Mode
    capacity_factor: float
    params: MoEParams
    x_TD: Float[Array, "T D"]
    g_TD: Float[Array, "T D"]

    @property
    def seats(self) -> int:
        """Count an expert's seats."""
        return sm.capacity(self.tokens, self.num_experts, self.top_k, self.capacity_factor)

    def config(self, **changes: Any) -> sm.MoEConfig:
        """Describe switchmoe's layer of this size."""
        names = ("num_experts", "d_model", "d_ff", "top_k", "activation", "capacity_factor")
        return layer_config(**{name: getattr(self, name) for name in names}, **changes)


def layer_config(*, top_k: int, **sizes: Any) -> sm.MoEConfig:
    """Describe a layer of these sizes, both of its losses with a weight, so that no sum is dead code."""
    router = "switch" if top_k == 1 else "top_k"
    return sm.MoEConfig(router=router, top_k=top_k, z_coef=1e-3, **sizes)


class Facts(NamedTuple):
    """What the table says of a contender beside its time.

    Attributes:
      contender: the program.
      capacity_factor: None where there are no seats.
      bare: name of the bare experts that "to bare" divides by.
      routing: name of the program that is this one's routing.
      useful: FLOPs that k experts and the router need.
      executed: FLOPs with empty seats and one-hot products; a dropless backend's padding is not counted.
      reads_aux: whether the second thing that the program returns is a `MoEAux`.
    """

    contender: Contender
    capacity_factor: float | None = None
    bare: str = ""
    routing: str = ""
    useful: float | None = None
    executed: float | None = None
    reads_aux: bool = False


def draw_case(
    tokens: int,
    num_experts: int,
    mode: Mode,
    *,
    d_model: int,
    d_ff: int,
    top_k: int,
    activation: Activation,
    dtype: str,
    capacity_factor: float = EXACT,
) -> Case:
    """Draw input and weights of one size, always the same."""
    config = sm.MoEConfig(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
    params = jax.jit(sm.init_moe, static_argnums=(1, 2))(jax.random.key(0), config, jnp.dtype(dtype))
    x_TD, g_TD = (jax.random.normal(jax.random.key(n), (tokens, d_model), dtype) for n in (1, 2))
    return Case(
        tokens, num_experts, d_model, d_ff, top_k, activation, mode, capacity_factor, params, x_TD, g_TD
    )


def with_gradient(fn: Callable[..., Array], mode: Mode) -> Callable[..., Any]:
    """Jit `fn(weights, x) -> y` as a function of (weights, x, gradient of y)."""

    def run(weights, x, g):
        if mode == "forward":
            return fn(weights, x)
        y, pull = jax.vjp(fn, weights, x)
        return y, pull(g)

    return jax.jit(run)


def dense(case: Case) -> Facts:
    """Send every token through one FFN of the width of its k experts together."""
    width = case.top_k * case.d_ff
    weights = tuple(
        jax.random.normal(jax.random.key(n), shape, case.x_TD.dtype) / shape[0] ** 0.5
        for n, shape in ((3, (case.d_model, width)), (4, (width, case.d_model)))
    )
    act = ACTIVATIONS[case.activation]
    fn = with_gradient(lambda w, x: act(x @ w[0]) @ w[1], case.mode)
    flops = _flops(case, case.tokens * sum(w.size for w in weights))
    return Facts(Contender("dense", fn, (weights, case.x_TD, case.g_TD)), useful=flops, executed=flops)


def bare_experts(case: Case) -> Facts:
    """Send ready-made seats through the experts: what is left of the layer without routing and moving.

    Two batched products with an activation between, and nothing else; this is what ratios are made to.
    """
    act = ACTIVATIONS[case.activation]

    def experts(params: ExpertParams, x_ECD):
        h_ECF = act(jnp.einsum("ECD,EDF->ECF", x_ECD, params.w_in_EDF))
        return jnp.einsum("ECF,EFD->ECD", h_ECF, params.w_out_EFD)

    shape = (case.num_experts, case.seats, case.d_model)
    x_ECD, g_ECD = (jax.random.normal(jax.random.key(n), shape, case.x_TD.dtype) for n in (5, 6))
    fn = with_gradient(experts, case.mode)
    flops = _flops(case, 2 * x_ECD.size * case.d_ff)
    contender = Contender("bare experts", fn, (case.params.experts, x_ECD, g_ECD))
    return Facts(contender, capacity_factor=case.capacity_factor, executed=flops)


def layer(case: Case, dispatch: Dispatch, matmul: str | None = None) -> Facts:
    """Send every token through switchmoe's layer; all sums of `MoEAux` are part of it."""
    config = case.config(dispatch=dispatch, matmul=matmul)

    def run(params, x_TD, g_TD):
        def fn(params, x_TD):
            y_TD, aux = sm.moe(params, x_TD, config, train=True)
            return (y_TD, sm.aux_loss(aux, config)), aux

        if case.mode == "forward":
            return fn(params, x_TD)
        (y_TD, loss), pull, aux = jax.vjp(fn, params, x_TD, has_aux=True)
        return (y_TD, loss), aux, pull((g_TD, jnp.ones_like(loss)))

    name = f"dropless {matmul}" if matmul else dispatch
    has_seats = dispatch != "dropless"
    return Facts(
        Contender(name, jax.jit(run), (case.params, case.x_TD, case.g_TD)),
        capacity_factor=case.capacity_factor if has_seats else None,
        bare="bare experts",
        routing=f"routing, {'slots' if has_seats else 'sorted'}",
        useful=_flops(case, case.tokens * useful_products(config, case.tokens)),
        executed=_flops(case, case.tokens * executed_products(config, case.tokens)),
        reads_aux=True,
    )


def routing(case: Case, dispatch: Dispatch) -> Facts:
    """Decide from ready-made logits where each token goes, and plan how it gets there."""
    config = case.config(dispatch=dispatch)
    router = make_router(config)

    def decide(logits_GTE):
        decision, plan = make_plan(sm.route(logits_GTE, config), router, config, train=True)
        assert isinstance(decision, Routing)  # these routers let tokens choose
        floats = [leaf for leaf in jax.tree.leaves(plan) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return (decision.weight_GTK, decision.probs_GTE, floats), plan

    def run(logits_GTE):
        if case.mode == "forward":
            return decide(logits_GTE)
        values, pull, plan = jax.vjp(decide, logits_GTE, has_aux=True)
        return values, plan, pull(values)

    has_seats = dispatch != "dropless"
    logits_GTE = jnp.einsum("TD,DE->TE", case.x_TD.astype(jnp.float32), case.params.router)[None]
    name = f"routing, {'slots' if has_seats else 'sorted'}"
    return Facts(Contender(name, jax.jit(run), (logits_GTE,)), case.capacity_factor if has_seats else None)


def table_bytes(case: Case) -> int:
    """Size of the one-hot table that the einsum dispatch builds."""
    return 4 * case.tokens * case.num_experts * case.seats


def _flops(case: Case, products: float) -> float:
    """FLOPs of so many multiply-adds, counted as two; a gradient takes each product twice more."""
    return 2.0 * products * (1 if case.mode == "forward" else 3)
