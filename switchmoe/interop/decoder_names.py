"""The names that Mixtral, OLMoE, Qwen3-MoE and Llama have for their weights."""

from switchmoe.interop.names import Named

_LAYER = "model.layers.{layer}."
_ATTENTION = {
    "embedding_VD": Named("model.embed_tokens.weight", "v d -> v d"),
    "head_DV": Named("lm_head.weight", "v d -> d v"),
    "final_norm.scale_D": Named("model.norm.weight", "d -> d"),
    "attention_norm.scale_D": Named(_LAYER + "input_layernorm.weight", "d -> d"),
    "attention.w_q_DHA": Named(_LAYER + "self_attn.q_proj.weight", "(h a) d -> d h a"),
    "attention.w_k_DNA": Named(_LAYER + "self_attn.k_proj.weight", "(h a) d -> d h a"),
    "attention.w_v_DNA": Named(_LAYER + "self_attn.v_proj.weight", "(h a) d -> d h a"),
    "attention.w_o_HAD": Named(_LAYER + "self_attn.o_proj.weight", "d (h a) -> h a d"),
    "attention.q_norm.scale_D": Named(_LAYER + "self_attn.q_norm.weight", "d -> d"),
    "attention.k_norm.scale_D": Named(_LAYER + "self_attn.k_norm.weight", "d -> d"),
    "feed_forward_norm.scale_D": Named(_LAYER + "post_attention_layernorm.weight", "d -> d"),
}
_DENSE = {
    "feed_forward.w_gate_DF": Named(_LAYER + "mlp.gate_proj.weight", "f d -> d f"),
    "feed_forward.w_in_DF": Named(_LAYER + "mlp.up_proj.weight", "f d -> d f"),
    "feed_forward.w_out_FD": Named(_LAYER + "mlp.down_proj.weight", "d f -> f d"),
}
# Buffers of positions that older files carry along.
POSITION_BUFFERS = r"\.rotary_emb\.inv_freq$"


def _sparse(layer: str, gate: str, up: str, down: str) -> dict[str, Named]:
    """Name the experts' weights by what each family calls the three matrices of one."""
    experts = f"{layer}experts.{{expert}}."
    gate_up, out = _LAYER + "mlp.experts.gate_up_proj", _LAYER + "mlp.experts.down_proj"
    return {
        "feed_forward.router_DE": Named(f"{layer}gate.weight", "e d -> d e", also=_LAYER + "mlp.gate.weight"),
        "feed_forward.w_gate_EDF": Named(f"{experts}{gate}.weight", "f d -> d f", gate_up, 0, 2),
        "feed_forward.w_in_EDF": Named(f"{experts}{up}.weight", "f d -> d f", gate_up, 1, 2),
        "feed_forward.w_out_EFD": Named(f"{experts}{down}.weight", "d f -> f d", out),
    }


_DECODER = _ATTENTION | _DENSE
_THREE = ("gate_proj", "up_proj", "down_proj")
LLAMA_NAMES = _DECODER
MIXTRAL_NAMES = _DECODER | _sparse(_LAYER + "block_sparse_moe.", "w1", "w3", "w2")
OLMOE_NAMES = QWEN3_MOE_NAMES = _DECODER | _sparse(_LAYER + "mlp.", *_THREE)
