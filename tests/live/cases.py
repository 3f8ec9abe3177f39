"""Small random models of transformers, and inputs whose routers and logits are far from a tie.

Float32 sums differ in their last bits between two implementations, so a choice between two experts, or two
tokens, that are closer than `MARGIN` may fall either way: such inputs are drawn again.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

MARGIN = 1e-4
NEW_TOKENS = 64
VOCAB = 61
LENGTHS = (12, 8, 5)
DECODER_LENGTHS = (9, 6, 9)
_TRIES = 50
_WRITERS = (".o.weight", ".wo.weight", ".o_proj.weight", ".down_proj", ".down_proj.weight")

_SWITCH = dict(
    vocab_size=VOCAB,
    d_model=16,
    d_kv=4,
    d_ff=12,
    num_heads=4,
    num_experts=4,
    pad_token_id=0,
    eos_token_id=None,
    decoder_start_token_id=0,
)
_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
# Name -> (transformers' name for the family, settings). Nearly each setting that is read from config.json
# differs from its default in one of them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "switch": (
        "SwitchTransformers",
        _SWITCH
        | dict(
            num_layers=4,
            num_sparse_encoder_layers=2,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            expert_capacity=2,
        ),
    ),
    "switch_all_sparse": (
        "SwitchTransformers",
        _SWITCH
        | dict(
            num_layers=2,  # no fewer than the decoder: transformers' cache has as many as the encoder
            num_sparse_encoder_layers=2,
            num_decoder_layers=1,
            num_sparse_decoder_layers=1,
            expert_capacity=1,
            dense_act_fn="gelu_new",
            tie_word_embeddings=False,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=10,
            layer_norm_epsilon=1e-3,
        ),
    ),
    "mixtral": ("Mixtral", _DECODER | dict(num_local_experts=5)),
    "mixtral_window": (
        "Mixtral",
        _DECODER | dict(num_local_experts=3, sliding_window=4, head_dim=6, rms_norm_eps=1e-3),
    ),
    "olmoe": ("Olmoe", _DECODER | dict(num_experts=6, num_experts_per_tok=3)),
    "olmoe_renormalized": (
        "Olmoe",
        _DECODER | dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        _DECODER
        | dict(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=8,
            decoder_sparse_step=2,
            head_dim=6,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
    ),
    "qwen3_moe_window": (
        "Qwen3Moe",
        _DECODER
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4)
        | dict(use_sliding_window=True, sliding_window=5),
    ),
    "llama": ("Llama", _DECODER | dict(tie_word_embeddings=True)),
}


class Inputs(NamedTuple):
    """Rows of unequal length, padded behind; `decoder_ids` and its mask are None without an encoder."""

    ids: np.ndarray
    mask: np.ndarray
    decoder_ids: np.ndarray | None
    decoder_mask: np.ndarray | None


class Answers(NamedTuple):
    """What transformers makes of them.

    Attributes:
      logits: at every position of the decoder, of padding too.
      tokens: NEW_TOKENS greedy ones behind each row (behind the start token, with an encoder).
      dropped: tokens without a seat in encoder and decoder, padding left out.
      margin: how far the nearest two experts or tokens that were chosen between are from a tie.
    """

    logits: np.ndarray
    tokens: np.ndarray
    dropped: tuple[int, int]
    margin: float


def make(name: str, seed: int) -> Any:
    """Build the model of a case with weights drawn so that experts and tokens are chosen decidedly."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = "ForConditionalGeneration" if family == "SwitchTransformers" else "ForCausalLM"
    model = getattr(transformers, family + kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in sorted(model.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                drawn = 1 + 0.2 * drawn
            elif "embed_tokens" not in key and "shared" not in key:
                drawn = drawn * weight.shape[-1] ** -0.5
            if key.endswith(_WRITERS):  # loud, so that tokens don't just repeat themselves
                drawn = drawn * 3
            weight.copy_(drawn)
        if family == "SwitchTransformers":  # one table, which untied models of transformers have three of
            for stack in (model.encoder, model.decoder):
                stack.embed_tokens.weight.copy_(model.shared.weight)
    return model


def draw_inputs(name: str, seed: int) -> Inputs:
    """Draw rows of unequal lengths, without the ids 0 (padding and start) and 1."""
    rng = np.random.default_rng(seed)

    def rows(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return np.where(mask, rng.integers(2, VOCAB, mask.shape), 0).astype(np.int32), mask

    encoder = CASES[name][0] == "SwitchTransformers"
    return Inputs(*rows(LENGTHS), *(rows(DECODER_LENGTHS) if encoder else (None, None)))


def answer(model: Any, inputs: Inputs) -> Answers:
    """Run transformers: all positions at once, and then greedily from the prompts."""
    ids, mask = torch.tensor(inputs.ids).long(), torch.tensor(inputs.mask).long()
    encoder = inputs.decoder_ids is not None
    options = {}
    if encoder:
        options["decoder_input_ids"] = torch.tensor(inputs.decoder_ids).long()
        options["decoder_attention_mask"] = torch.tensor(inputs.decoder_mask).long()
    with torch.no_grad(), _routers(model) as seen:
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
        dropped = _count_dropped(model, seen, inputs) if encoder else (0, 0)
        if not encoder:  # prompts are padded in front
            ids, mask = (torch.tensor(pad_in_front(a, inputs.mask)).long() for a in (inputs.ids, inputs.mask))
        said = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    gaps = [_gap(scores, 1) for scores in said.scores]
    gaps += [_gap(torch.softmax(logits, -1), k) for _, k, logits, _ in seen]
    return Answers(
        logits.numpy(), np.ascontiguousarray(said.sequences[:, -NEW_TOKENS:].numpy()), dropped, min(gaps)
    )


def settle(name: str) -> tuple[Any, Inputs, Answers]:
    """Draw a case until nothing in it is close to a tie and, with seats, both stacks drop tokens."""
    for seed in range(_TRIES):
        model = make(name, seed)
        inputs = draw_inputs(name, seed)
        answers = answer(model, inputs)
        seated = inputs.decoder_ids is None or min(answers.dropped) > 0
        if answers.margin > MARGIN and seated:
            return model, inputs, answers
    raise AssertionError(f"no draw of {name} out of {_TRIES} is {MARGIN} away from every tie.")


def pad_in_front(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Move what is behind a row to its front."""
    return np.stack([np.roll(row, len(row) - kept.sum()) for row, kept in zip(rows, mask, strict=True)])


def prompts_of(inputs: Inputs) -> list[list[int]]:
    """Give the rows without their padding."""
    return [row[kept].tolist() for row, kept in zip(inputs.ids, inputs.mask, strict=True)]


@contextlib.contextmanager
def _routers(model: Any) -> Iterator[list[tuple[Any, int, torch.Tensor, torch.Tensor]]]:
    """Note (router, k, logits, chosen) each time that a router runs."""
    seen: list[tuple[Any, int, torch.Tensor, torch.Tensor]] = []

    def note(router, _, output):
        chosen, _, logits = output if hasattr(router, "classifier") else output[::-1]
        seen.append((router, getattr(router, "top_k", 1), logits, chosen))

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    handles = [router.register_forward_hook(note) for router in routers]
    yield seen
    for handle in handles:
        handle.remove()


def _count_dropped(model: Any, seen: list, inputs: Inputs) -> tuple[int, int]:
    counts = []
    for stack, mask in ((model.encoder, inputs.mask), (model.decoder, inputs.decoder_mask)):
        own = set(stack.modules())
        kept = [chosen.sum(-1).bool().numpy() for router, _, _, chosen in seen if router in own]
        counts.append(sum(int((mask & ~seated).sum()) for seated in kept))
    return counts[0], counts[1]


def _gap(values: torch.Tensor, k: int) -> float:
    """Tell how far the k best are from each other and from the rest, at least."""
    if values.shape[-1] <= k:
        return float("inf")
    best = torch.topk(values, k + 1, dim=-1).values
    return (best[..., :-1] - best[..., 1:]).min().item()
