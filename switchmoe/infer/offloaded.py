"""A model whose experts stay in the host's memory: layer by layer from the host, the same tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from switchmoe.infer.config import ExpertSeats, GenerateConfig
from switchmoe.infer.generate import walk
from switchmoe.infer.offload import AskRouter, OffloadedExperts, OffloadStats, take_experts
from switchmoe.infer.offload_programs import make_programs
from switchmoe.infer.prompts import Prompts, Tokenizer
from switchmoe.infer.request import Request, Shape, make_request
from switchmoe.infer.results import Generated, NewTokens, collect
from switchmoe.infer.seating import choose_seating
from switchmoe.infer.steps import Progress
from switchmoe.models import SuperBlock, TransformerLM
from switchmoe.models.cache import Cache
from switchmoe.shapes import Array, Bool, Float, Int, ScalarKey

_DECODER, _ENCODER = 0, 1


class OffloadedModel:
    """A language model with all experts on the host and some of them on the device.

    A token passes attention and router of a layer; the host reads which experts it wants, brings those that
    are not on the device, and sends it through them. So a device has to hold what all tokens use, and
    `resident` experts, of all layers together. Layers are called one by one from the host, which costs time
    beside what bringing costs: see `stats` and `benchmarks/offload.py`.

    To read a model that does not fit on the device, lay it on the host first, `interop.from_hf(folder,
    layout=Layout(make_mesh(data=1, devices=jax.devices("cpu"))))`. On a CPU this is a simulation: host and
    device are the same memory.

    Raises:
      ValueError: one sentence, if there are no experts, tokens do not choose them, or there is no room.
    """

    def __init__(
        self,
        model: TransformerLM,
        resident: int,
        *,
        experts: ExpertSeats | None = None,
        device: Any = None,
    ) -> None:
        config = model.config
        if config.moe is None:
            raise ValueError(
                "This model is dense, so it has no experts to keep on the host; generate with it."
            )
        if config.moe.router in ("expert_choice", "soft_moe"):
            raise ValueError(
                f"router={config.moe.router!r} lets no token choose its experts, so all of them are wanted "
                "always; generate with all of them on the device."
            )
        if not config.scan_layers:
            raise ValueError(
                "The layers are taken apart, but are sent one by one anyhow; give the model before."
            )
        if resident < 1:
            raise ValueError(f"resident is {resident}, but there must be room for at least 1 expert.")
        self.config, self._seats = config, experts
        device = device or jax.local_devices()[0]
        model = nnx.merge(*nnx.split(choose_seating(model, experts)))
        self._moe = model.config.moe
        stacks, taken = [model, model.encoder] if config.encoder_layers else [model], []
        for stack in stacks:
            assert isinstance(stack.blocks, SuperBlock)
            last = getattr(stack.blocks, stack.blocks.names[-1])
            if hasattr(last.feed_forward, "served"):
                raise ValueError("The experts are laid out for a CPU already; give the model before that.")
            taken.append(take_experts(last.feed_forward))
            last.feed_forward = AskRouter(last.feed_forward)
        self.experts = OffloadedExperts(taken, resident, device)
        graphdef, state = nnx.split(model)
        self._state = jax.device_put(state, device)
        model = nnx.merge(graphdef, self._state)
        stacks = [model, model.encoder] if config.encoder_layers else [model]
        self._blocks = [nnx.state(stack.blocks) for stack in stacks]
        self._programs = make_programs(graphdef, tuple(nnx.graphdef(stack.blocks) for stack in stacks))

    @property
    def stats(self) -> OffloadStats:
        """How often an expert that was wanted was on the device, and what was brought."""
        return self.experts.stats

    def generate(
        self,
        prompts: Prompts,
        config: GenerateConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> Generated:
        """Continue each prompt; see `switchmoe.infer.generate` for arguments and errors."""
        config = config or GenerateConfig()
        pieces = list(self.stream(prompts, config, tokenizer=tokenizer, **options))
        tokens_BN = np.stack([piece.tokens_B for piece in pieces], axis=1)
        log_probs_BN = np.zeros(tokens_BN.shape, np.float32)
        if config.log_probs:
            log_probs_BN = np.stack([np.asarray(piece.log_probs_B) for piece in pieces], axis=1)
        return collect(tokens_BN, log_probs_BN, config, tokenizer)

    def stream(
        self,
        prompts: Prompts,
        config: GenerateConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        key: ScalarKey | None = None,
        row_ids: Sequence[int] | None = None,
        decoder_prompts: Prompts | None = None,
    ) -> Iterator[NewTokens]:
        """Continue each prompt, and hand over the new tokens as they are chosen; see `generate`."""
        config = config or GenerateConfig()
        if config.experts not in (None, self._seats):
            raise ValueError(
                f"experts={config.experts!r} comes too late for an offloaded model; make it with that, "
                "OffloadedModel(..., experts=...)."
            )
        request, shape, rows = make_request(
            self.config,
            config,
            prompts,
            tokenizer=tokenizer,
            key=key,
            row_ids=row_ids,
            decoder_prompts=decoder_prompts,
        )
        return walk(lambda progress: self._step(shape, request, progress), rows, config)

    def _step(self, shape: Shape, request: Request, progress: Progress | None) -> Progress:
        if progress is None:
            cache = self._start(shape, request)
            ids_BS, mask_BS, ended_B, step = request.ids_BS, request.mask_BS, request.ended_B, np.int32(0)
        else:
            cache, ended_B, step = progress.cache, progress.ended_B, progress.step
            ids_BS, mask_BS = progress.ids_B[:, None], ~ended_B[:, None]
        logits_BV, cache = self.decode(jnp.asarray(ids_BS), cache, jnp.asarray(mask_BS))
        return self._programs.choose(shape, request, logits_BV, ended_B, step)._replace(cache=cache)

    def _start(self, shape: Shape, request: Request) -> Cache:
        batch, length = request.ids_BS.shape
        encoded_BPD = None
        if request.source_BP is not None:
            x_BSD, options = self._programs.begin_source(
                self._state, request.source_BP, request.source_mask_BP
            )
            x_BSD, _ = self._pass(_ENCODER, x_BSD, options)
            encoded_BPD = self._programs.end_source(self._state, x_BSD)
        return self._programs.start_cache(
            self._state, encoded_BPD, request.source_mask_BP, batch=batch, length=length + shape.room
        )

    def decode(
        self, ids_BS: Int[Array, "B S"], cache: Cache, mask_BS: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Score the next token of each row, as `TransformerLM.decode` does; the cache given is used up."""
        x_BSD, options, cache = self._programs.begin(self._state, ids_BS, cache, mask_BS)
        x_BSD, layers = self._pass(_DECODER, x_BSD, options, cache)
        return self._programs.end(self._state, x_BSD), cache._replace(layers=layers)

    def _pass(self, stack: int, x_BSD: Array, options: dict[str, Any], cache: Cache | None = None):
        """Send the tokens through all layers of a stack."""
        layers = None if cache is None else cache.layers
        source = None if cache is None else cache.source
        config = self.config.encoder if stack == _ENCODER else self.config
        for index in range(config.num_super_blocks):
            x_BSD, asked, layers = self._programs.ask[stack](
                self._blocks[stack], np.int32(index), x_BSD, layers, source, options
            )
            assert self._moe is not None
            x_BSD = self.experts.serve(stack, index, asked, x_BSD, self._moe.activation)
        return x_BSD, layers
