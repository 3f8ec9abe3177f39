"""LMConfig: the shape of a decoder-only language model, sparse or dense, checked when it is made."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp

from switchmoe.config import Activation, MoEConfig, check_at_least, check_choice
from switchmoe.nn.remat import RematPolicy
from switchmoe.routing import make_router

ComputeType = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["xla", "cudnn"]


@dataclass(frozen=True)
class LMConfig:
    """What a Transformer language model is made of.

    Attributes:
      vocab_size: token ids run from 0 to vocab_size - 1; 259 is the byte tokenizer's.
      d_model: features of a token between layers.
      num_layers: attention + feed-forward pairs, a multiple of moe_every.
      num_heads: query heads.
      num_kv_heads: key/value heads, shared by equally many query heads each.
      head_dim: features of a head; None is d_model / num_heads.
      d_ff: hidden width of the dense FFNs.
      moe: the sparse layers, or None for a dense model.
      moe_every: layers in a super-block; its last FFN is the sparse one.
      rope_theta: base of the rotary angles.
      norm_eps: added to the mean square in every RMSNorm.
      activation: of the dense FFNs.
      gated: whether the dense FFNs are gated (SwiGLU and its kin).
      init_scale: dense, attention and untied head matrices start with standard deviation sqrt(init_scale /
        fan_in); the sparse layers have an init_scale of their own in `moe`.
      dropout: probability of dropping a feature of an attention or FFN output, in training only.
      tie_embeddings: whether the output head is the embedding, transposed.
      dtype: of activations and matrix products; parameters, router, norms, softmax and logits are float32.
      remat: what the backward pass computes again, by the name of a policy in `switchmoe.nn.remat`.
      attention_implementation: passed on to `jax.nn.dot_product_attention`: None, "xla" or "cudnn".
      d_ff_sparse: only for a dense twin: width of the FFN that stands where the sparse one was.
      allow_future_leak: accept a router or a drop order that lets later tokens change earlier ones.

    Raises:
      ValueError: one sentence saying which field is wrong and what to change.
    """

    vocab_size: int = 259
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    d_ff: int = 512
    moe: MoEConfig | None = None
    moe_every: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    activation: Activation = "relu"
    gated: bool = False
    init_scale: float = 1.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    dtype: ComputeType = "float32"
    remat: RematPolicy = "none"
    attention_implementation: AttentionImplementation | None = None
    d_ff_sparse: int | None = None
    allow_future_leak: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_names()
        if self.moe is not None:
            self._check_moe(self.moe)

    @property
    def features_per_head(self) -> int:
        """Features of one attention head: head_dim, or d_model / num_heads where that is None."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def num_super_blocks(self) -> int:
        """How many groups of moe_every layers are stacked, and how many sparse layers a sparse model has."""
        return self.num_layers // self.moe_every

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations and matrix products."""
        return jnp.dtype(self.dtype)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "moe_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("head_dim", "d_ff_sparse"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if self.d_ff_sparse is not None and self.moe is not None:
            raise ValueError(
                "d_ff_sparse replaces the sparse layers of a dense twin; drop it, or set moe to None."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, but must be in [0, 1).")
        if self.num_layers % self.moe_every:
            raise ValueError(
                f"num_layers={self.num_layers} is not a multiple of moe_every={self.moe_every}, the layers "
                f"of a super-block; set num_layers to a multiple, or change moe_every."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; every "
                f"key/value head must serve the same number of query heads, so change one of the two."
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; change one of the "
                f"two, or set head_dim."
            )
        if self.features_per_head % 2:
            raise ValueError(
                f"A head has {self.features_per_head} features, but rotary positions turn pairs of them; "
                f"choose an even head_dim (or d_model / num_heads)."
            )

    def _check_names(self) -> None:
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("dtype", self.dtype, get_args(ComputeType))
        check_choice("remat", self.remat, get_args(RematPolicy))
        if self.attention_implementation is not None:
            check_choice(
                "attention_implementation", self.attention_implementation, get_args(AttentionImplementation)
            )

    def _check_moe(self, moe: MoEConfig) -> None:
        router = make_router(moe)  # says what is wrong with the router's name or settings
        if moe.d_model != self.d_model:
            raise ValueError(
                f"moe.d_model={moe.d_model} differs from d_model={self.d_model}; the sparse layers read the "
                f"model's own features, so set both to the same number."
            )
        if self.allow_future_leak:
            return
        if router.leak:
            raise ValueError(
                f"router={moe.router!r} does not suit a causal model, since {router.leak}; choose another "
                f"moe.router, or allow_future_leak=True to force it."
            )
        if moe.dispatch == "dropless":
            return  # nobody competes for seats, so their order says nothing
        leak = "it would let later tokens of a row decide whether an earlier one keeps its seat"
        if moe.drop_order == "priority":
            raise ValueError(
                f"drop_order='priority' does not suit a causal model, since {leak}; "
                f"set moe.drop_order='token', or allow_future_leak=True to force it."
            )
        if moe.drop_order == "choice" and moe.top_k > 1:
            raise ValueError(
                f"drop_order='choice' with top_k={moe.top_k} does not suit a causal model, since {leak}; set "
                f"moe.drop_order='token' or moe.dispatch='dropless', or allow_future_leak=True to force it."
            )
