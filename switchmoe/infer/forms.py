"""A model in the forms it generates in: experts in 8 or 4 bits, weights laid out for this machine."""

import jax
from flax import nnx

from switchmoe.models import TransformerLM, unroll
from switchmoe.models.rebuild import copy_modules
from switchmoe.nn import MoE

# Experts of all layers up to which a program that names each of them compiles in reasonable time.
MOST_EXPERTS = 1024


def quantize(model: TransformerLM, bits: int = 8) -> TransformerLM:
    """Round the experts' weights, shared ones too, to 8 or 4 bits; other weights, and tokens, stay as are.

    Experts are nearly all of a sparse model: in 8 bits they take a quarter of float32's memory, and in 4 bits
    an eighth, beside their scales (`switchmoe.experts.quantize_experts`). The model routes, generates and is
    called as before, but can't be trained. It shares its other weights with `model`, which stays as it is.

    Raises:
      ValueError: one sentence, if the model is dense, the bits are not 8 or 4, or its experts are rounded or
        laid out already.
    """
    if model.config.moe is None:
        raise ValueError("This model is dense, so it has no experts whose weights could be rounded.")
    rounded = copy_modules(model)
    for layer in _sparse_layers(rounded):
        layer.quantize(bits)
    return rounded


def prepare(model: TransformerLM, *, free: bool = False) -> TransformerLM:
    """Lay a model's weights out so that it generates fast on this machine; it says the same.

    Layers come out of their stack, and on a CPU so do experts (up to 1,024 in all layers), each an array of
    its own (`switchmoe.served_experts`): several times as fast as going through the stacks for each token. It
    takes the time to copy the weights once, and their memory twice; with `free` each stacked array is deleted
    as soon as its layers are taken out, and `model` can't be used any more. Quantize before, not after. A
    prepared model is for one device, and can't be trained.
    """
    prepared = unroll(model, free=free)
    layers = _sparse_layers(prepared)
    if prepared is model and any(hasattr(layer, "served") for layer in layers):
        return model
    if prepared is model:
        prepared = copy_modules(model)
        layers = _sparse_layers(prepared)
    if jax.default_backend() == "cpu" and sum(layer.config.num_experts for layer in layers) <= MOST_EXPERTS:
        for layer in layers:
            layer.serve()
    return prepared


def _sparse_layers(model: TransformerLM) -> list[MoE]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, MoE)]
