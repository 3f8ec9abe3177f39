# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Routing from scratch: from a dense FFN to Switch
#
# [![Open in Colab][badge]][colab]
#
# A Transformer block sends every token through the same feed-forward network (FFN). A *Mixture-of-Experts*
# layer has many FFNs, the experts, and a small router that picks one for each token: many more parameters, and
# hardly more arithmetic. This notebook builds the layer of the
# [Switch Transformer](https://arxiv.org/abs/2101.03961) step by step, and compares each step with the function
# of the library that does the same.
#
# You need a little JAX. A CPU is enough; all of it runs in about a minute.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/switchmoe/switchmoe/blob/main/colab/01_routing_from_scratch.ipynb

# %%
import subprocess
import sys
from importlib.metadata import version

if "google.colab" in sys.modules:
    # --no-deps installs what is named and nothing else, so Colab's own jax stays as it is.
    before = version("jax"), version("jaxlib")
    source = "switchmoe @ git+https://github.com/switchmoe/switchmoe"
    needed = [source, "einops", "jaxtyping", "wadler-lindig"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *needed], check=True)
    assert (version("jax"), version("jaxlib")) == before

# %%
import html
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from switchmoe.report.palette import expert_colours

import switchmoe as sm

FAST = os.environ.get("SWITCHMOE_FAST", "0") not in ("", "0")  # a shorter training run, for tests

# GPUs and TPUs round the inputs of a matrix product unless told not to; below, equal shall mean equal.
jax.config.update("jax_default_matmul_precision", "highest")
plt.rcParams.update({
    "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
})  # fmt: skip
INK, BLUE, ORANGE, GREEN = "#222222", "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's, safe for colour-blind eyes
print(f"switchmoe {sm.__version__}, jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## 1. A dense FFN, and what it costs
#
# Our tokens are the words of a sentence. Each word has a random vector of `D` features, so equal words are equal
# vectors. (Inside a real model a token's vector also depends on its neighbours.)
#
# The letters after an underscore name an array's dimensions, here and in the whole library: `x_TD` has **T**okens
# and mo**D**el features; **F** is the hidden size of the FFN, **E** counts experts, **C** the capacity of an expert.

# %%
words = (
    "the cat saw the dog and the dog saw the cat so the cat ran up the tree and the dog sat under it"
).split()
vocabulary = sorted(set(words))
T, D, F, E = len(words), 32, 128, 4

embedding_VD = jax.random.normal(jax.random.key(0), (len(vocabulary), D))
x_TD = embedding_VD[jnp.array([vocabulary.index(word) for word in words])]


def ffn(x_TD, w_in_DF, w_out_FD):
    return jax.nn.relu(x_TD @ w_in_DF) @ w_out_FD


def count_flops(function, *arguments):
    """Ask the compiler for the number of floating-point operations."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


w_in_DF = jax.random.normal(jax.random.key(1), (D, F)) / D**0.5
w_out_FD = jax.random.normal(jax.random.key(2), (F, D)) / F**0.5

by_hand = 2 * T * D * F + 2 * T * F * D  # two matrix products; a multiplication and an addition for each entry
counted = count_flops(ffn, x_TD, w_in_DF, w_out_FD)
dense_flops = counted
print(f"{T} tokens through one FFN: {by_hand:,} FLOPs by hand, {counted:,.0f} counted by the compiler")
assert abs(counted / by_hand - 1) < 0.02  # the compiler also counts the relu

# %% [markdown]
# ## 2. A router
#
# The router is one matrix, `[D, E]`. It gives each token a score for each expert; softmax turns a token's scores
# into probabilities; argmax picks the expert. The probability `p` of the picked expert is kept: it will multiply
# what the expert says. Step 7 shows why.

# %%
config = sm.MoEConfig(d_model=D, d_ff=F, num_experts=E, router="switch", capacity_factor=1.0)
params = sm.init_moe(jax.random.key(4), config)

logits_TE = x_TD @ params.router_DE
probs_TE = jax.nn.softmax(logits_TE)
expert_T = jnp.argmax(probs_TE, axis=-1)
p_T = jnp.max(probs_TE, axis=-1)

routing = sm.route(logits_TE, config)  # the same in one call
assert jnp.array_equal(routing.expert_GTK[:, 0], expert_T)  # K choices a token: one, for Switch
assert jnp.allclose(routing.weight_GTK[:, 0], p_T)
print(f"p is between {p_T.min():.2f} and {p_T.max():.2f}; an undecided router would say {1 / E:.2f}")

# %% cellView="form"
# @title Figure: the router's probabilities
figure, axes = plt.subplots(figsize=(10, 2.3))
image = axes.imshow(probs_TE.T, cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
for t in range(T):
    for e in range(E):
        chosen = e == int(expert_T[t])
        ink = "white" if probs_TE[t, e] > 0.38 else INK
        axes.text(t, e, f".{100 * probs_TE[t, e]:02.0f}", ha="center", va="center", color=ink, size=8,
                  weight="bold" if chosen else "normal")  # fmt: skip
        if chosen:
            axes.add_patch(plt.Rectangle((t - 0.47, e - 0.47), 0.94, 0.94, fill=False, edgecolor=ORANGE, lw=1.8))
axes.set_xticks(range(T), words, rotation=50, ha="right", rotation_mode="anchor")
axes.set_yticks(range(E), [f"expert {e}" for e in range(E)])
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
axes.set_title("Each word's probability for each expert; the largest, framed, is the choice")
plt.show()

# %% [markdown]
# *Equal words go to equal experts: the router sees nothing but the vector.*
#
# ## 3. Many experts, one for each token
#
# First the wasteful way: every expert computes every token, and we pick. It is easy to trust, and it costs `E` times
# the dense FFN.

# %%
w_in_EDF, w_out_EFD, _ = params.experts  # the third is the gate of a gated FFN; here there is none


def every_expert(x_TD):
    return jax.vmap(ffn, in_axes=(None, 0, 0))(x_TD, w_in_EDF, w_out_EFD)


y_dense_TD = p_T[:, None] * every_expert(x_TD)[expert_T, jnp.arange(T)]
print(f"every expert for every token: {count_flops(every_expert, x_TD) / dense_flops:.2f} x the dense FFN's FLOPs")

# %% [markdown]
# Then only where it is needed: each expert computes its own tokens.

# %%
y_sparse_TD, rows_computed = np.zeros((T, D)), 0
for e in range(E):
    mine = np.flatnonzero(expert_T == e)
    y_sparse_TD[mine] = p_T[mine, None] * ffn(x_TD[mine], w_in_EDF[e], w_out_EFD[e])
    rows_computed += len(mine)
    print(f"expert {e}: {len(mine):2} tokens")

assert np.allclose(y_sparse_TD, y_dense_TD, atol=1e-5)
assert rows_computed == T  # as many as the dense FFN has

# %% [markdown]
# The same result, for the arithmetic of one FFN. But this loop cannot be compiled: an array's shape must be known
# before the program runs, and how many tokens an expert gets is known only afterwards.

# %%
try:
    jax.jit(lambda expert_T: jnp.flatnonzero(expert_T == 0))(expert_T)
except jax.errors.ConcretizationTypeError as error:
    print(str(error).splitlines()[0])
else:
    raise AssertionError("this was expected to fail")

# %% [markdown]
# ## 4. Capacity: a fixed number of seats
#
# So Switch gives each expert a fixed number of seats, `C = ceil(capacity_factor * T / E)`. Tokens sit down in the order
# of the sentence. A token that finds its expert full is *dropped*: the layer gives it exactly zero, and the
# residual connection around the layer carries it on unchanged.

# %%
C = sm.capacity(tokens=T, experts=E, k=1, factor=1.0)
plan = sm.assign_slots(routing, capacity=C)  # who sits where
kept_T = plan.kept_GTK[:, 0]
print(f"{T} tokens, {E} experts with {C} seats each: {int((~kept_T).sum())} tokens dropped")

# %% cellView="form"
# @title Figure: the seating plan
colours = expert_colours(8)


def draw_decision(axes):
    for t in range(T):
        for e in range(E):
            axes.add_patch(plt.Rectangle((t + 0.05, e + 0.05), 0.9, 0.9, color="#f3f3f3"))
        e = int(expert_T[t])
        if kept_T[t]:
            axes.add_patch(plt.Rectangle((t + 0.05, e + 0.05), 0.9, 0.9, color=colours[e]))
            axes.text(t + 0.5, e + 0.5, int(plan.slot_GTK[t, 0]) % C, ha="center", va="center")
        else:
            axes.add_patch(plt.Rectangle((t + 0.08, e + 0.08), 0.84, 0.84, fill=False, edgecolor=INK, ls=":", lw=1.2))
            axes.text(t + 0.5, e + 0.48, "×", ha="center", va="center", size=15)
    axes.set_xticks(np.arange(T) + 0.5, words, rotation=50, ha="right", rotation_mode="anchor")
    for label, kept in zip(axes.get_xticklabels(), kept_T, strict=True):
        label.set(color=INK if kept else ORANGE, weight="normal" if kept else "bold")
    axes.set_title("Where each token goes: the number of its seat, or × for dropped (in orange below)")


def draw_seats(axes):
    for e in range(E):
        for c in range(C):
            t = int(plan.token_GEC[e, c])  # T where the seat is empty
            taken = t < T
            axes.add_patch(plt.Rectangle((c + 0.05, e + 0.05), 0.9, 0.9, facecolor=colours[e] if taken else "white",
                                         edgecolor=colours[e], ls="-" if taken else "--"))  # fmt: skip
            axes.text(c + 0.5, e + 0.5, words[t] if taken else "", ha="center", va="center")
    axes.set_xticks(np.arange(C) + 0.5, [f"seat {c}" for c in range(C)])
    axes.set_title(f"The same plan from the experts' side: {E} × {C} seats, dashed where empty")


figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 5.2))
draw_decision(top)
draw_seats(bottom)
for axes in (top, bottom):
    axes.set(xlim=(0, T if axes is top else C), ylim=(E, 0))
    axes.set_yticks(np.arange(E) + 0.5, [f"expert {e}" for e in range(E)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# *Some experts turn words away while others keep empty seats: that is the price of a fixed shape.*
#
# With the plan the rest is three lines, all of fixed shape: carry the tokens to their seats (`dispatch`), run the
# experts, carry the results back, each times its `p` (`combine`).

# %%
x_ECD = sm.dispatch(x_TD, plan)
y_ECD = jax.vmap(ffn)(x_ECD, w_in_EDF, w_out_EFD)  # the dense FFN of step 1, once an expert
y_TD = sm.combine(y_ECD, plan)

assert jnp.allclose(y_TD[kept_T], y_dense_TD[kept_T], atol=1e-5)  # who has a seat gets what it got before
assert jnp.all(y_TD[~kept_T] == 0)  # who has none gets exactly zero
assert (~kept_T).sum() > 0 and (plan.token_GEC == T).sum() > 0  # and both happened here

# %% [markdown]
# ### How much is dropped, and how much of that is bad luck?
#
# Even a perfectly fair router drops tokens, since chance alone fills some experts more than others. The library
# computes this floor exactly (`expected_drop`), and shows it beside each measured drop rate. Below it is held against a
# simulation, and then against real text: rows of the bundled corpus, each byte a token with a random vector, and
# a router that has learnt nothing yet.

# %%
factors = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0]
corpus = sm.data.load_packed(sm.data.DataConfig(sequence_length=128))  # packed once, then read from a cache


def drop_percent(logits_GTE, factor):
    """Route each group of T tokens on its own and count who is left standing."""
    tokens, experts = logits_GTE.shape[-2:]
    wide = sm.MoEConfig(num_experts=experts)
    plan = sm.assign_slots(sm.route(logits_GTE, wide), sm.capacity(tokens, experts, 1, factor))
    return 100 * float(1 - plan.kept_GTK.mean())


def floor_percent(tokens, experts, factor):
    seats = sm.capacity(tokens, experts, 1, factor)
    return 100 * sm.dispatching.expected_drop(tokens, experts, 1, seats) / tokens


experts, sizes = 16, [128, 256, 1024]
floor, simulated = {}, {}
for tokens in sizes:
    noise_GTE = jax.random.normal(jax.random.key(tokens), (200, tokens, experts))  # every expert is equally likely
    floor[tokens] = [floor_percent(tokens, experts, factor) for factor in factors]
    simulated[tokens] = [drop_percent(noise_GTE, factor) for factor in factors]
    assert np.allclose(floor[tokens], simulated[tokens], atol=0.5), "within half a percentage point"

some_rows = np.linspace(0, len(corpus.train.tokens) - 1, 200).astype(int)
bytes_GT = corpus.train.tokens[some_rows][:, :128]
random_VD = jax.random.normal(jax.random.key(0), (sm.data.ByteTokenizer.vocab_size, 64))
fresh_router_DE = sm.init_moe(jax.random.key(0), sm.MoEConfig(d_model=64, num_experts=experts)).router_DE
text_GTE = random_VD[bytes_GT] @ fresh_router_DE
on_text = [drop_percent(text_GTE, factor) for factor in factors]
assert all(text > chance + 10 for text, chance in zip(on_text, floor[128], strict=True))

# %% cellView="form"
# @title Figure: dropped tokens against the capacity factor
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for tokens, colour in zip(sizes, (BLUE, GREEN, INK), strict=True):
    left.plot(factors, floor[tokens], color=colour, lw=1.5)
    left.plot(factors, simulated[tokens], "o", color=colour, ms=5)
    left.annotate(f"{tokens // experts} tokens\nper expert", (1.0, floor[tokens][0]), xytext=(-8, 0), color=colour,
                  textcoords="offset points", ha="right", va="center", size=9)  # fmt: skip
left.set(xlim=(0.72, 2.03), ylim=(0, None), ylabel="tokens dropped, %")
left.set_title("Chance alone: computed (lines), simulated (dots)")
right.fill_between(factors, floor[128], on_text, color=ORANGE, alpha=0.15, lw=0)
right.plot(factors, on_text, "o-", color=ORANGE)
right.plot(factors, floor[128], color=BLUE, lw=1.5)
right.annotate("text, fresh router", (factors[2], on_text[2]), xytext=(6, 8), textcoords="offset points", color=ORANGE)
right.annotate("chance", (factors[2], floor[128][2]), xytext=(6, 6), textcoords="offset points", color=BLUE)
right.set(ylim=(0, None), ylabel="tokens dropped, %", title=f"Real text, {128 // experts} tokens per expert")
for axes in (left, right):
    axes.set_xlabel("capacity factor")
    axes.set_xticks([1, 1.25, 1.5, 1.75, 2])
    axes.grid(axis="y", color="#e5e5e5")
plt.show()
for factor, text, chance in zip(factors, on_text, floor[128], strict=True):
    print(f"capacity factor {factor:4}: {text:4.1f}% of the text dropped, {chance:4.1f}% by chance")

# %% [markdown]
# *More seats or larger groups cure bad luck; they do not cure a lopsided router.* Equal bytes go to equal experts, and
# some bytes are much more frequent than others. Step 6 comes back to this.
#
# ## 5. The whole layer
#
# `sm.moe` is the composition of the steps above. It also returns sums from which `sm.summarize` makes losses and
# metrics.

# %%
y_layer_TD, aux = sm.moe(params, x_TD, config, train=True)  # train=True: use the training capacity factor
assert jnp.allclose(y_layer_TD, y_TD, atol=1e-5)

for name, value in sm.summarize(aux).items():
    print(f"{name:17}", np.round(value, 3))

# %% [markdown]
# Three of them will be needed now. With $f_e$ the share of tokens that chose expert $e$, before anything is dropped, and
# $P_e$ the mean probability the router gave it:
#
# - `balance_loss` is $E \sum_e f_e P_e$ (equations 4 to 6 of the paper). It is 1 when all experts are used alike. Its gradient
#   lowers the probability of the experts that are used too much.
# - `max_vio`, MaxVio, is the load of the busiest expert over the mean load, minus 1. It is 0 in perfect balance and
#   $E - 1$ when one expert takes everything.
# - `dropped_fraction` is the share of dropped tokens, and `dropped_floor` its floor from chance.
#
# ## 6. Why balance matters
#
# Now train. A small model of text predicts the next byte from the last 8: their vectors, side by side, go
# through one MoE layer with 8 experts and a residual connection, and one more matrix makes the prediction. We train it
# three times, with the same batches and the same start, and only the weight of the balance loss differs: 0, 0.01
# (the paper's choice) and 0.1.

# %%
SEEN, EMBED, EXPERTS, STEPS = 8, 16, 8, 30 if FAST else 250
COEFS = (0.0, 0.01, 0.1)


def init_model(key, config):
    embed, moe, head = jax.random.split(key, 3)
    return {
        "embed_VD": jax.random.normal(embed, (259, EMBED)),
        "moe": sm.init_moe(moe, config),
        "head_DV": jax.random.normal(head, (config.d_model, 259)) / config.d_model**0.5,
    }


def normalise(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def see(params, rows):
    """Give each position the vectors of the last 8 bytes before it, side by side."""
    padded = jnp.pad(rows, ((0, 0), (SEEN, 0)))
    windows = jnp.stack([padded[:, i : i + rows.shape[1]] for i in range(SEEN)], axis=-1)[:, 1:]
    return normalise(params["embed_VD"][windows].reshape(*windows.shape[:2], SEEN * EMBED))


def loss_fn(params, rows, config, train):
    x_BSD = see(params, rows)
    y_BSD, aux = sm.moe(params["moe"], x_BSD, config, train=train)  # each row is one group
    logits_BSV = normalise(x_BSD + y_BSD) @ params["head_DV"]
    log_p_BS = jnp.take_along_axis(jax.nn.log_softmax(logits_BSV), rows[:, 1:, None], axis=-1)[..., 0]
    loss = -log_p_BS.mean()
    return loss + sm.aux_loss(aux, config), (loss, aux)


def train(coef, rate=3e-3, fade=(0.9, 0.99)):
    config = sm.MoEConfig(d_model=SEEN * EMBED, d_ff=256, num_experts=EXPERTS, balance_coef=coef)
    params = init_model(jax.random.key(0), config)
    moments = [jax.tree.map(jnp.zeros_like, params)] * 2

    @jax.jit
    def step(params, moments, rows, t):  # Adam, by hand, so that nothing else needs to be installed
        (_, (loss, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows, config, True)
        powers = (grads, jax.tree.map(jnp.square, grads))
        moments = [
            jax.tree.map(lambda m, g, b=b: b * m + (1 - b) * g, moment, power)
            for moment, power, b in zip(moments, powers, fade, strict=True)
        ]
        first, second = (1 - b**t for b in fade)
        params = jax.tree.map(
            lambda p, m, v: p - rate * (m / first) / (jnp.sqrt(v / second) + 1e-8), params, *moments
        )
        return params, moments, sm.summarize(aux)

    draw, history = np.random.default_rng(0), []
    for t in range(1, STEPS + 1):
        rows = corpus.train.tokens[draw.integers(0, len(corpus.train.tokens), 8)].astype(np.int32)
        params, moments, metrics = step(params, moments, rows, float(t))
        history.append(metrics)
    history = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(history))
    rows = corpus.validation.tokens[::8].astype(np.int32)
    _, (loss, aux) = jax.jit(loss_fn, static_argnums=(2, 3))(params, rows, config, False)
    return config, params, history, float(loss), jax.device_get(sm.summarize(aux))


runs = {coef: train(coef) for coef in COEFS}

# %% cellView="form"
# @title Figure: who gets the tokens
colours = expert_colours(EXPERTS)
inks = dict(zip(COEFS, (ORANGE, INK, BLUE), strict=True))
names = {0.0: "without balance loss", 0.01: "balance loss × 0.01", 0.1: "balance loss × 0.1"}


def smooth(values, width=1 + STEPS // 25):
    """The mean of each value and the ones before it."""
    return np.stack([values[max(0, i + 1 - width) : i + 1].mean(axis=0) for i in range(len(values))])


figure, grid = plt.subplot_mosaic([["a", "b", "c"], ["vio", "drop", "drop"]], figsize=(10, 5.8), height_ratios=[1, 0.9])
figure.get_layout_engine().set(hspace=0.08)
for letter, coef in zip("abc", COEFS, strict=True):
    share_SE = 100 * smooth(runs[coef][2]["load_fraction"])
    axes = grid[letter]
    axes.stackplot(range(STEPS), share_SE.T, colors=colours, edgecolor="white", lw=0.5)
    last = np.cumsum(share_SE[-1])
    for e in range(EXPERTS):
        if share_SE[-1, e] > 3.5:
            axes.text(STEPS, last[e] - share_SE[-1, e] / 2, f" {e}", va="center", size=9, color=INK)
    axes.set(title=names[coef], xlim=(0, STEPS - 1), ylim=(0, 100), xlabel="step")
    axes.title.set_color(inks[coef])
grid["a"].set_ylabel("share of tokens, %")
for coef in COEFS:
    history = runs[coef][2]
    for letter, values in (("vio", history["max_vio"]), ("drop", 100 * history["dropped_fraction"])):
        grid[letter].plot(smooth(values), color=inks[coef], lw=1.8)
        grid[letter].annotate(f" {coef:g}", (STEPS - 1, smooth(values)[-1]), color=inks[coef], va="center", size=9)
grid["drop"].axhline(100 * history["dropped_floor"][-1], color=GREEN, ls="--", lw=1.5)
grid["drop"].annotate("chance", (0, 100 * history["dropped_floor"][-1]), xytext=(4, 4), textcoords="offset points",
                      color=GREEN, size=9)  # fmt: skip
grid["vio"].set(title="MaxVio: how far the busiest is above the mean", ylim=(0, None), xlabel="step")
grid["drop"].set(title="Tokens dropped, %, with 1.25 times the seats of an even share", ylim=(0, None), xlabel="step")
for letter in ("vio", "drop"):
    grid[letter].grid(axis="y", color="#e5e5e5")
    grid[letter].set_xlim(0, STEPS - 1)
plt.show()

# %%
print("On held-out text, with two times the seats of an even share (eval_capacity_factor):")
print("balance_coef   loss (nats per byte)   MaxVio   dropped   by chance")
for coef, (_, _, _, loss, metrics) in runs.items():
    drop, chance = 100 * metrics["dropped_fraction"], 100 * metrics["dropped_floor"]
    print(f"{coef:12g} {loss:22.3f} {metrics['max_vio']:8.2f} {drop:8.1f}% {chance:10.2f}%")

lopsided, _, balanced = (runs[coef] for coef in COEFS)
assert balanced[4]["max_vio"] < 0.5 * lopsided[4]["max_vio"]
assert balanced[4]["dropped_fraction"] < 0.5 * lopsided[4]["dropped_fraction"]
assert FAST or balanced[3] < lopsided[3]  # the loss; a shortened run is too short to tell

# %% [markdown]
# *Without the balance loss a few experts take nearly everything and the others starve.* An expert that is chosen early gets
# trained, gets better, and is chosen more. The model then pays twice: most of its parameters lie idle, and where the
# crowd meets a fixed number of seats, tokens are dropped. Balance improves the loss on held-out text here. This is one seed
# of a tiny model, so take it as an illustration; the repository's `experiments/RESULTS.md` has the measurements.
#
# Even the balanced router drops more than chance in training. The loss balances experts over the batch, while seats
# are counted in each row, and the bytes of one row resemble each other.
#
# ### What did the experts learn to read?

# %%
config_8, params_8 = balanced[:2]
rows = np.asarray(corpus.validation.tokens[::8]).astype(np.int32)
domain = np.repeat(corpus.validation.domain[::8], rows.shape[1] - 1)
_, _, trace = sm.moe_with_trace(params_8["moe"], see(params_8, rows), config_8)
choice_BS, kept_BS = np.asarray(trace.expert_SK[..., 0]), np.asarray(trace.kept_SK[..., 0])


def explained(choice, by):
    """The share of the choice's entropy that is gone once `by` is known."""
    joint = np.zeros((choice.max() + 1, by.max() + 1))
    np.add.at(joint, (choice, by), 1 / len(choice))
    entropy = -sum(p * np.log(p) for p in joint.sum(axis=1) if p > 0)
    outer = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    return np.sum(joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])) / entropy


by_byte = explained(choice_BS.reshape(-1), rows[:, :-1].reshape(-1))
by_domain = explained(choice_BS.reshape(-1), domain.astype(int))
print(f"Knowing the last byte explains {by_byte:.0%} of which expert is chosen; knowing the domain, {by_domain:.0%}.")

lines = []
for name in ("bible_english", "python_stdlib", "wordnet_glosses"):
    row = int(np.flatnonzero(corpus.validation.domain[::8] == corpus.domains.index(name))[0])
    spans = [
        f'<span style="background:{colours[e] if kept else "#fff"};color:#111">{html.escape(chr(max(byte - 3, 32)))}</span>'
        for byte, e, kept in zip(rows[row, :-1], choice_BS[row], kept_BS[row], strict=True)
    ]
    lines.append(f'<b>{name}</b><pre style="white-space:pre-wrap;line-height:1.5">{"".join(spans)}</pre>')
legend = " ".join(f'<span style="background:{c};color:#111">&nbsp;{e}&nbsp;</span>' for e, c in enumerate(colours))
display(HTML(f"<p>expert: {legend} (white: dropped)</p>{''.join(lines)}"))

# %% [markdown]
# *Each byte has the colour of the expert that read it.* At this size the experts share out bytes rather than
# domains.
#
# ## 7. Why `p` must multiply
#
# Argmax has no gradient: a small change of the router's weights changes no choice. The router learns only because `p`, which
# depends smoothly on its weights, multiplies the expert's result. Divide the weight by itself, so that it is always
# 1, as *renormalised* weights with one expert a token are, and the router gets no gradient from the task at all.

# %%
target_TD = jax.random.normal(jax.random.key(7), (T, D))


def task_loss(router_DE, renormalize):
    routing = sm.routing.choose_top_k(x_TD @ router_DE, k=1, renormalize=renormalize)
    plan = sm.assign_slots(routing, capacity=T)  # a seat for everybody
    y_TD = sm.combine(jax.vmap(ffn)(sm.dispatch(x_TD, plan), w_in_EDF, w_out_EFD), plan)
    return jnp.mean((y_TD - target_TD) ** 2)


slope = {name: jax.grad(task_loss)(params.router_DE, name) for name in (False, True)}
for name, grad in slope.items():
    print(f"renormalize={name!s:5}: norm of the router's gradient {jnp.linalg.norm(grad):.1e}")
assert jnp.linalg.norm(slope[True]) < 1e-4 * jnp.linalg.norm(slope[False])

try:
    sm.MoEConfig(top_k=1, renormalize=True)
except ValueError as error:
    print("The library refuses it:", error)
else:
    raise AssertionError("this was expected to be refused")

# %% cellView="form"
# @title Figure: the loss along a line through the router's weights
direction_DE = slope[False] / jnp.linalg.norm(slope[False])
distances = jnp.linspace(-1.5, 1.5, 301)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
for axes, renormalize, colour, title in (
    (panels[0], False, BLUE, "Times p: slopes to follow, with jumps"),
    (panels[1], True, ORANGE, "Weight always 1: a staircase, flat everywhere else"),
):
    losses = jax.lax.map(lambda d, r=renormalize: task_loss(params.router_DE + d * direction_DE, r), distances)
    axes.plot(distances, losses, ".", ms=2.5, color=colour)
    axes.axvline(0, color="#bbbbbb", lw=1, zorder=0)
    axes.set(title=title, xlabel="distance from the router's weights")
    axes.ticklabel_format(useOffset=False)
panels[0].set_ylabel("task loss")
plt.show()

# %% [markdown]
# *Each jump is a token that changes its expert, and no gradient sees it; only the slope between jumps can teach the
# router.* The balance loss has a gradient too, through $P_e$, but that one knows nothing of the task.
#
# ## 8. Experts add parameters, not FLOPs
#
# Last, the reason for all of this. Only shapes are needed, so nothing is allocated and nothing is run.

# %%
counts = [1, 2, 4, 8, 16, 32, 64]
tokens, sizes = 1024, {"d_model": 128, "d_ff": 512}
shape = jax.ShapeDtypeStruct
x_shape = shape((tokens, 128), jnp.float32)
ffn_params = 2 * 128 * 512
ffn_flops = count_flops(ffn, x_shape, shape((128, 512), jnp.float32), shape((512, 128), jnp.float32))

table = []
for experts in counts:
    many = sm.MoEConfig(num_experts=experts, capacity_factor=1.25, **sizes)
    shapes = jax.eval_shape(lambda key, many=many: sm.init_moe(key, many), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    executed = count_flops(lambda p, x, many=many: sm.moe(p, x, many, train=True)[0], shapes, x_shape)
    useful = 4 * tokens * 128 * 512 + 2 * tokens * 128 * experts  # one expert and the router, without empty seats
    table.append((total / ffn_params, executed / ffn_flops, useful / ffn_flops))
    print(f"{experts:3} experts: {table[-1][0]:6.2f} x the parameters, {table[-1][1]:.2f} x the FLOPs of a dense FFN")
in_params, executed, useful = np.array(table).T
assert in_params[-1] > 64 and executed.max() < 1.5

# %% cellView="form"
# @title Figure: parameters and FLOPs against the number of experts
figure, axes = plt.subplots(figsize=(6.4, 3.8))
axes.loglog(counts, in_params, "o-", color=BLUE, base=2)
axes.loglog(counts, executed, "s-", color=ORANGE, base=2)
axes.loglog(counts, useful, "--", color=INK, lw=1.2, base=2)
axes.annotate("parameters", (counts[4], in_params[4]), xytext=(-8, 6), textcoords="offset points", ha="right", color=BLUE)
axes.annotate("FLOPs, counted by the compiler", (counts[2], executed[2]), xytext=(0, 8), textcoords="offset points",
              color=ORANGE)  # fmt: skip
axes.annotate("FLOPs without empty seats", (counts[2], useful[2]), xytext=(0, -14), textcoords="offset points", color=INK)
axes.set(xlabel="number of experts", ylabel="times a dense FFN", ylim=(0.6, 100))
axes.set_xticks(counts, counts)
axes.set_yticks([1, 4, 16, 64], [1, 4, 16, 64])
axes.grid(axis="y", color="#e5e5e5")
plt.show()

# %% [markdown]
# *The parameters grow with the number of experts, while the FLOPs stay near the capacity factor.* What is left of the growth is
# the router, one column an expert, and seats rounded up to whole numbers.
#
# ## 9. Where next
#
# - **A whole language model.** In a clone of the [repository](https://github.com/switchmoe/switchmoe), `make quickstart` trains a
#   small Switch Transformer beside a dense model of the same FLOPs per token, and writes a page with their losses, the load
#   of each expert and text coloured by expert.
# - **In your own model.** `sm.moe` is a pure function; `sm.nn.MoE` is the same as a Flax NNX module. The
#   [README](https://github.com/switchmoe/switchmoe#readme) shows both.
# - **Your own router.** One file and one line in `sm.ROUTERS`:
#   [CONTRIBUTING](https://github.com/switchmoe/switchmoe/blob/main/CONTRIBUTING.md) has a worked example.
# - **Try here.** Set `COEFS` to other weights, `EXPERTS` to 32, or `router="top_k", top_k=2` in `train`. Which of them would you
#   expect to drop more?

# %%
print("Routers of this version:", ", ".join(sm.ROUTERS))
