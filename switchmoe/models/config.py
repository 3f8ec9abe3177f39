"""LMConfig: the shape of a language model, sparse or dense, with an encoder or without, checked when made."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp

from switchmoe.config import Activation, MoEConfig, check_at_least, check_choice
from switchmoe.models.checks import check_heads, check_layers, check_moe
from switchmoe.nn import cudnn
from switchmoe.nn.attention import NormOfHeads
from switchmoe.nn.remat import RematPolicy

ComputeType = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["xla", "cudnn"]
Positions = Literal["rotary", "relative"]


@dataclass(frozen=True)
class LMConfig:
    """What a Transformer language model is made of.

    Attributes:
      vocab_size: token ids run from 0 to vocab_size - 1; 259 is the byte tokenizer's.
      d_model: features of a token between layers.
      num_layers: attention + feed-forward pairs of the decoder, a multiple of moe_every.
      encoder_layers: the same of an encoder, whose output every decoder layer then attends to as well; 0 for
        a decoder alone.
      num_heads: query heads.
      num_kv_heads: key/value heads, shared by equally many query heads each.
      head_dim: features of a head; None is d_model / num_heads.
      d_ff: hidden width of the dense FFNs.
      moe: the sparse layers, or None for a dense model.
      moe_every: layers in a super-block; its last FFN is the sparse one.
      encoder_moe_every: the same in the encoder; None for moe_every.
      positions: how attention knows where a token is: queries and keys turned by it ("rotary"), or a learned
        bias for each bucket of distances and each head, shared by the layers of a stack ("relative": Raffel
        et al. 2020, section 2.1, https://arxiv.org/abs/1910.10683).
      rope_theta: base of the rotary angles.
      relative_buckets: rows of that table of biases.
      relative_distance: from this distance on all are in the last bucket.
      window: a token of the decoder sees itself and the window - 1 tokens before it; None for all.
      qk_norm: whether RMSNorm is applied to queries and keys, over the features of each head ("head") or of
        all heads together ("full"), or not ("none").
      scale_scores: whether attention scores are divided by sqrt(head_dim).
      scale_head: whether features are multiplied by d_model ** -0.5 in front of the output head.
      norm_eps: added to the mean square in every RMSNorm.
      activation: of the dense FFNs.
      gated: whether the dense FFNs are gated (SwiGLU and its kin).
      init_scale: dense, attention and untied head matrices start with standard deviation sqrt(init_scale /
        fan_in); the sparse layers have an init_scale of their own in `moe`.
      dropout: probability of dropping a feature of an attention or FFN output, in training only.
      tie_embeddings: whether the output head is the embedding, transposed.
      dtype: of activations and matrix products; router, norms, softmax and logits are float32.
      param_dtype: that the parameters are drawn and kept in, but for the router's, which are float32.
      scan_layers: whether super-blocks are stacked, so that a deep model compiles as fast as a shallow one.
        Where one token at a time passes through, separate ones are faster, since nothing has to be taken out
        of a stack (see `unroll`).
      remat: what the backward pass computes again, by the name of a policy in `switchmoe.nn.remat`.
      attention_implementation: of `jax.nn.dot_product_attention`: "xla" or "cudnn"; None takes cuDNN where
        it surely runs, our own on a CPU, else XLA (see `nn.Attention`).
      d_ff_sparse: only for a dense twin: width of the FFN that stands where the sparse one was.
      allow_future_leak: accept a router or a drop order that lets later tokens change earlier ones.

    Raises:
      ValueError: one sentence saying which field is wrong and what to change.
    """

    vocab_size: int = 259
    d_model: int = 128
    num_layers: int = 4
    encoder_layers: int = 0
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    d_ff: int = 512
    moe: MoEConfig | None = None
    moe_every: int = 2
    encoder_moe_every: int | None = None
    positions: Positions = "rotary"
    rope_theta: float = 10000.0
    relative_buckets: int = 32
    relative_distance: int = 128
    window: int | None = None
    qk_norm: NormOfHeads = "none"
    scale_scores: bool = True
    scale_head: bool = False
    norm_eps: float = 1e-6
    activation: Activation = "relu"
    gated: bool = False
    init_scale: float = 1.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    dtype: ComputeType = "float32"
    param_dtype: ComputeType = "float32"
    scan_layers: bool = True
    remat: RematPolicy = "none"
    attention_implementation: AttentionImplementation | None = None
    d_ff_sparse: int | None = None
    allow_future_leak: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        check_heads(self)
        self._check_names()
        check_layers(self)
        if self.moe is not None:
            check_moe(self, self.moe)

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

    @property
    def encoder(self) -> "LMConfig":
        """The encoder's layers as a configuration of their own."""
        every = self.moe_every if self.encoder_moe_every is None else self.encoder_moe_every
        return dataclasses.replace(
            self, num_layers=self.encoder_layers, encoder_layers=0, moe_every=every, encoder_moe_every=None
        )

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "moe_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("head_dim", "d_ff_sparse", "window", "encoder_moe_every"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        check_at_least("encoder_layers", self.encoder_layers, 0)
        check_at_least("relative_buckets", self.relative_buckets, 4)
        for name in ("rope_theta", "norm_eps", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, but must be in [0, 1).")

    def _check_names(self) -> None:
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("positions", self.positions, get_args(Positions))
        check_choice("qk_norm", self.qk_norm, get_args(NormOfHeads))
        check_choice("dtype", self.dtype, get_args(ComputeType))
        check_choice("param_dtype", self.param_dtype, get_args(ComputeType))
        check_choice("remat", self.remat, get_args(RematPolicy))
        if self.attention_implementation is not None:
            check_choice(
                "attention_implementation", self.attention_implementation, get_args(AttentionImplementation)
            )
        if self.attention_implementation == "cudnn":
            cudnn.raise_problem(self.dtype, self.features_per_head)
