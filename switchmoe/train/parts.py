"""Which weights of a model a run trains, told by their names, and which only lie beside them."""

from switchmoe.models.adapters import is_adapter
from switchmoe.train.model import BIAS, Params
from switchmoe.train.settings import Part

# Every sparse layer has it, and nothing else.
_EXPERTS = "w_in_EDF"


def split_weights(params: Params, part: Part) -> tuple[Params, Params, Params]:
    """Part a model's tree into what the optimizer changes, what stays, and the balance biases that move.

    Returns (trained, frozen, biases), trees without what is in the others; {} for none. Biases move along
    with their routers, and are frozen with them.
    """
    trained: Params = {}
    frozen: Params = {}
    biases: Params = {}
    sparse = _EXPERTS in params
    for name, value in params.items():
        if isinstance(value, dict):
            for whole, inner in zip((trained, frozen, biases), split_weights(value, part), strict=True):
                if inner:
                    whole[name] = inner
            continue
        moves = {"all": True, "experts": sparse, "rest": not sparse, "lora": is_adapter(name)}[part]
        (frozen if not moves else biases if name == BIAS else trained)[name] = value
    return trained, frozen, biases
