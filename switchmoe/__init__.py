"""Mixture-of-Experts Transformers in JAX: routers and layers as pure functions, models and training on top.

The core needs jax, einops and jaxtyping alone, and each name is loaded when it is first touched (PEP 562):

    config = switchmoe.MoEConfig(d_model=512, d_ff=2048, num_experts=8)
    params = switchmoe.init_moe(jax.random.key(0), config)
    y, aux = switchmoe.moe(params, x, config)
    switchmoe.summarize(aux)
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("switchmoe")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

_HOME = {
    "MoEConfig": "config",
    "ROUTERS": "routing",
    "ExpertChoice": "routing",
    "MoEAux": "routing",
    "Router": "routing",
    "Routing": "routing",
    "SoftMix": "routing",
    "add_aux": "routing",
    "aux_loss": "routing",
    "make_router": "routing",
    "route": "routing",
    "summarize": "routing",
    "update_bias": "routing",
    "capacity": "seats",
    "SlotPlan": "dispatching",
    "SortPlan": "dispatching",
    "assign_slots": "dispatching",
    "combine": "dispatching",
    "dispatch": "dispatching",
    "expected_drop": "dispatching",
    "grouped_matmul": "dispatching.grouped_matmul",
    "sort_choices": "dispatching",
    "take_next_choice": "dispatching",
    "RouterTrace": "trace",
    "load_trace": "trace",
    "save_trace": "trace",
    "ExpertParams": "experts",
    "MoEParams": "layer",
    "init_moe": "layer",
    "moe": "layer",
    "moe_with_trace": "layer",
}
_PACKAGES = (
    "config",
    "data",
    "dispatching",
    "experts",
    "infer",
    "interop",
    "layer",
    "models",
    "nn",
    "parallel",
    "report",
    "routing",
    "train",
    "transfer",
)

__all__ = sorted([*_HOME, *_PACKAGES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"switchmoe.{_HOME[name]}"), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"switchmoe.{name}")
    else:
        raise AttributeError(f"module 'switchmoe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
