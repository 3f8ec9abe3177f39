"""Weights of others, both ways: Hugging Face's Switch, Mixtral, OLMoE, Qwen3-MoE and Llama, and T5X's Switch.

    model = switchmoe.interop.from_hf(folder)       # config.json + safetensors -> a model
    logits_BSV = model(ids_BS)[0]
    switchmoe.interop.to_hf(model, other_folder)    # and back, as transformers loads it

Logits are the same as those of transformers 5.24 to 1e-4 in float32, and so are 64 greedily chosen tokens
(tests/live compares with it, tests/interop with what it recorded). What to know beside that:

- Switch: an expert has `expert_capacity` seats for each row, in evaluation too, and tokens that find none are
  dropped, here as there. transformers from 5.0 until its pull request 48421 (issue 48293) summed over the
  wrong dimension and never dropped one: with those, logits differ wherever a token is dropped here.
- Padding takes seats of Switch's experts there, and never here. Behind the tokens (on the right) that makes
  no difference, since seats go to the first that come.
- Routers choose in float32 here, and in the weights' type in their Mixtral, OLMoE and Qwen3-MoE: with
  bfloat16 weights close choices may fall differently.

Losses differ, so coefficients, which are taken over as they are, do not weigh the same:

- Balance loss of Mixtral, OLMoE and Qwen3-MoE: theirs is k when perfectly balanced, since shares are of
  tokens and not of choices; ours, and the paper's at k=1, is 1.0. Theirs takes shares and probabilities over
  the tokens of all layers together, so that one layer's imbalance can cancel another's; ours is one loss a
  layer, and `aux_loss` adds them up. So router_aux_loss_coef=c weighs as much as balance_coef = c * k / L.
- Balance loss of Switch: theirs joins the layers of a stack along the row, takes each row by itself and the
  mean over rows, and adds the encoder's to the decoder's; ours is one a layer over all rows (Switch
  Transformers, equations 4-6), so c weighs as much as balance_coef = 2 * c / L. Where every layer is sparse
  (Switch-C) theirs is 0 without a word. Both look at choices before any is dropped.
- z-loss of Switch: the same formula (ST-MoE, equation 5), joined as above, so with the same factor 2 / L, and
  computed on probabilities by the releases named above. Their other families have none.
- Dropout: theirs, in Switch, also drops hidden features of FFNs and attention's probabilities; dropout_rate
  becomes that of layers' outputs here, and `expert_dropout` stays 0 unless changed.
- Padding counts in Switch's losses there, and in none here. Jitter there changes what experts read as well,
  here only what the router reads, as in the paper.

T5X: `from_t5x` and `to_t5x`, see `switchmoe.interop.t5x` for what could be checked and what could not.
`save_weights` and `load_weights` keep any model under our own names.
"""

from switchmoe.interop.errors import WeightsError
from switchmoe.interop.families import FAMILIES, read_config
from switchmoe.interop.load import from_hf
from switchmoe.interop.own import MODEL_TYPE, load_weights, save_weights
from switchmoe.interop.save import to_hf
from switchmoe.interop.t5x import from_t5x, to_t5x
from switchmoe.interop.target import new_folder

__all__ = [
    "FAMILIES",
    "MODEL_TYPE",
    "WeightsError",
    "from_hf",
    "from_t5x",
    "load_weights",
    "new_folder",
    "read_config",
    "save_weights",
    "to_hf",
    "to_t5x",
]
