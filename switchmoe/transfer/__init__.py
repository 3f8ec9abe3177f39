"""One model from another: sparse from dense, dense from sparse, with fewer experts, with adapters.

    params, config = upcycle(params, config, num_experts=8, key=jax.random.key(0))
    params, config = student_of(params, config, key=jax.random.key(0))
    params, config = prune_experts(params, config, busiest(expert_load(model, batches), keep=4))

All are functions of a model's tree of weights and its LMConfig, and give a tree and a config that fit each
other; `params_of` and `with_params` go from a model to its tree and back. Training goes on from there with
`train.run_training(config, start=params)`.
"""

from switchmoe.models.adapters import draw_adapters, merge_adapters
from switchmoe.transfer.prune import busiest, expert_load, prune_experts
from switchmoe.transfer.student import student_config, student_of
from switchmoe.transfer.trees import Params, draw_params, params_of, with_params
from switchmoe.transfer.upcycle import sparse_config, upcycle

__all__ = [
    "Params",
    "busiest",
    "draw_adapters",
    "draw_params",
    "expert_load",
    "merge_adapters",
    "params_of",
    "prune_experts",
    "sparse_config",
    "student_config",
    "student_of",
    "upcycle",
    "with_params",
]
