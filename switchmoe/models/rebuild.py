"""The same weights in another form: layers one by one, or sparse layers that route in another way."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from switchmoe.config import MoEConfig
from switchmoe.models.config import LMConfig
from switchmoe.models.stack import SeparateBlocks, Stack
from switchmoe.models.super_block import SuperBlock
from switchmoe.models.transformer import TransformerLM
from switchmoe.nn import MoE


def unroll(model: TransformerLM, *, free: bool = False) -> TransformerLM:
    """Take the layers out of their stack, so that a token passes through without anything being copied.

    A scan over stacked layers copies each layer's weights, all experts among them, out of the stack whenever
    it comes to it, which is what decoding one token at a time would spend its time on. The outputs are the
    same. With `free` each stacked array is deleted as soon as its layers are taken out, so that at no time
    there is more than one array twice, and `model` can't be used any more.
    """
    if not model.config.scan_layers:
        return model
    unrolled = copy_modules(model)
    for stack in _stacks(unrolled):
        assert isinstance(stack.blocks, SuperBlock)
        graphdef, stacked = nnx.split(stack.blocks)
        taken: list[dict[Any, Any]] = [{} for _ in range(stack.config.num_super_blocks)]
        for path, variable in nnx.to_flat_state(stacked):
            whole = variable[...]
            for index, own in enumerate(taken):
                own[path] = variable.replace(whole[index])
            if free:
                jax.block_until_ready([own[path][...] for own in taken])
                whole.delete()
        blocks: list[SuperBlock] = [nnx.merge(graphdef, nnx.from_flat_state(own)) for own in taken]
        stack.blocks = SeparateBlocks(blocks)
    _configure(unrolled, dataclasses.replace(model.config, scan_layers=False))
    return unrolled


def with_moe(model: TransformerLM, moe: MoEConfig) -> TransformerLM:
    """Let the sparse layers route by another configuration; the weights are shared, not copied.

    Raises:
      ValueError: one sentence, if the model is dense, or its weights do not fit the configuration.
    """
    before = model.config.moe
    if before is None:
        raise ValueError("This model is dense, so it has no sparse layers to configure.")
    same = (
        "d_model",
        "d_ff",
        "num_experts",
        "router",
        "gated",
        "shared_experts",
        "slots_per_expert",
        "bias_step",
    )
    for name in same:
        if getattr(moe, name) != getattr(before, name):
            raise ValueError(
                f"{name} is {getattr(moe, name)} here and {getattr(before, name)} in the model, whose "
                "weights are made for that; leave it as it is."
            )
    changed = copy_modules(model)
    _configure(changed, dataclasses.replace(model.config, moe=moe))
    return changed


def with_config(model: TransformerLM, config: LMConfig) -> TransformerLM:
    """Give the weights to a model of another configuration that has the same ones; they are not copied.

    Types of activations, capacities, noise, dropout, remat and the like may differ.

    Raises:
      ValueError: one sentence, naming a weight that one of the two has and the other has not, or in another
        shape.
    """
    wanted = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    have, want = ({path: v.shape for path, v in nnx.to_flat_state(s)} for s in (state, nnx.state(wanted)))
    different = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
    if different:
        path = different[0]
        raise ValueError(
            f"{'.'.join(map(str, path))} has shape {have.get(path)} in the model and {want.get(path)} in the "
            "configuration; use one that describes the same weights."
        )
    return nnx.merge(nnx.graphdef(wanted), state)


def copy_modules(model: TransformerLM) -> TransformerLM:
    """Make new modules around the same arrays."""
    return nnx.merge(*nnx.split(model))


def _configure(model: TransformerLM, config: LMConfig) -> None:
    model.config = config
    if config.encoder_layers:
        model.encoder.config = config.encoder
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MoE):
            assert config.moe is not None
            module.config = config.moe


def _stacks(model: TransformerLM) -> list[Stack]:
    return [model, model.encoder] if model.config.encoder_layers else [model]
