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
# layer has many FFNs, the experts, and a small router that picks one for each token: many more parameters,
# and hardly more arithmetic. This notebook builds the layer of the [Switch
# Transformer](https://arxiv.org/abs/2101.03961) step by step, and compares each step with the function of
# the library that does the same.
#
# You need a little JAX, and a CPU is enough. In Colab, the code of the figures is folded away behind their
# titles.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/switchmoe/switchmoe/blob/main/colab/01_routing_from_scratch.ipynb

# %%
import subprocess
import sys
from importlib.metadata import version

if "google.colab" in sys.modules:
    # --no-deps installs what is named and nothing else, so Colab's own jax stays as it is. (wadler-lindig is
    # what jaxtyping needs.)
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

import switchmoe as sm
from switchmoe.report.palette import expert_colours

FAST = os.environ.get("SWITCHMOE_FAST", "0") not in ("", "0")  # a shorter training run, for tests

# GPUs and TPUs round the inputs of a matrix product unless told not to; below, equal shall mean equal.
jax.config.update("jax_default_matmul_precision", "highest")
plt.rcParams.update({
    "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
})  # fmt: skip
# Colours that colour-blind eyes can tell apart (Okabe and Ito's).
INK, BLUE, ORANGE, GREEN = "#222222", "#0072b2", "#d55e00", "#009e73"
print(f"switchmoe {sm.__version__}, jax {jax.__version__} on {jax.default_backend()}")

# %% [markdown]
# ## 1. A dense FFN, and what it costs
#
# Our tokens are the words of a sentence. Each word has a random vector of `D` features, so equal words are
# equal vectors. (Inside a real model a token's vector also depends on its neighbours.)
#
# The letters after an underscore name an array's dimensions, here and in the whole library: `x_TD` has
# **T**okens and mo**D**el features; **F** is the hidden size of the FFN, **E** counts experts, **C** the
# capacity of an expert.

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

by_hand = 2 * (T * D * F) + 2 * (T * F * D)  # two products, each entry a multiplication and an addition
dense_flops = count_flops(ffn, x_TD, w_in_DF, w_out_FD)
print(f"{T} tokens through one FFN: {by_hand:,} FLOPs by hand, {dense_flops:,.0f} by the compiler")
assert abs(dense_flops / by_hand - 1) < 0.02  # the compiler also counts the relu

# %% [markdown]
# ## 2. A router
#
# The router is one matrix, `[D, E]`. It gives each token a score for each expert; softmax turns a token's
# scores into probabilities; argmax picks the expert. The probability `p` of the picked expert is kept: it
# will multiply what the expert says. Step 7 shows why.

# %%
config = sm.MoEConfig(d_model=D, d_ff=F, num_experts=E, router="switch", capacity_factor=1.0)
params = sm.init_moe(jax.random.key(4), config)

logits_TE = x_TD @ params.router
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
axes.imshow(probs_TE.T, cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
for t in range(T):
    for e in range(E):
        chosen = e == int(expert_T[t])
        ink = "white" if probs_TE[t, e] > 0.38 else INK
        axes.text(t, e, f".{100 * probs_TE[t, e]:02.0f}", ha="center", va="center", color=ink, size=8,
                  weight="bold" if chosen else "normal")  # fmt: skip
        if chosen:
            frame = plt.Rectangle((t - 0.47, e - 0.47), 0.94, 0.94, fill=False, edgecolor=ORANGE, lw=1.8)
            axes.add_patch(frame)
axes.set_xticks(range(T), words, rotation=50, ha="right", rotation_mode="anchor")
axes.set_yticks(range(E), [f"expert {e}" for e in range(E)])
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
axes.set_title("Each word's probability for each expert; the largest, framed, is the choice")
plt.show()

# %% [markdown]
# *The same word always goes to the same expert: the router sees nothing but its vector.*
#
# ## 3. Many experts, one for each token
#
# First the wasteful way: every expert computes every token, and we pick. It is easy to trust, and it costs
# `E` times the dense FFN.

# %%
w_in_EDF, w_out_EFD = params.experts.w_in_EDF, params.experts.w_out_EFD


def every_expert(x_TD):
    return jax.vmap(ffn, in_axes=(None, 0, 0))(x_TD, w_in_EDF, w_out_EFD)


y_dense_TD = p_T[:, None] * every_expert(x_TD)[expert_T, jnp.arange(T)]
ratio = count_flops(every_expert, x_TD) / dense_flops
print(f"every expert for every token: {ratio:.2f} x the FLOPs of the dense FFN")

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
# The same result, for the arithmetic of one FFN. But this loop cannot be compiled: an array's shape must be
# known before the program runs, and how many tokens an expert gets is known only afterwards.

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
# So Switch gives each expert a fixed number of seats, `C = ceil(capacity_factor * T / E)`. Tokens sit down
# in the order of the sentence. A token that finds its expert full is *dropped*: the layer gives it exactly
# zero, and the residual connection around the layer carries it on unchanged.

# %%
C = sm.capacity(tokens=T, experts=E, k=1, factor=1.0)
plan = sm.assign_slots(routing, capacity=C)  # who sits where
kept_T = plan.kept_GTK[:, 0]
print(f"{T} tokens, {E} experts with {C} seats each: {int((~kept_T).sum())} tokens dropped")

# %% cellView="form"
# @title Figure: the seating plan
colours = expert_colours(8)


def box(axes, x, y, text="", **style):
    axes.add_patch(plt.Rectangle((x + 0.05, y + 0.06), 0.9, 0.88, **style))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=INK)


figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 5.2))
for t, e in np.ndindex(T, E):
    if e != expert_T[t]:
        box(top, t, e, color="#f3f3f3")
    elif kept_T[t]:
        box(top, t, e, int(plan.slot_GTK[t, 0]) % C, color=colours[e])  # a slot is expert * C + seat
    else:
        box(top, t, e, "×", facecolor="white", edgecolor=INK, ls=":", lw=1.2)
for e, c in np.ndindex(E, C):
    t = int(plan.token_GEC[e, c])  # T where the seat is empty
    box(bottom, c, e, words[t] if t < T else "", facecolor=colours[e] if t < T else "white",
        edgecolor=colours[e], ls="-" if t < T else "--")  # fmt: skip
top.set_title("Where each token goes: the number of its seat, or × for dropped (orange words)")
top.set_xticks(np.arange(T) + 0.5, words, rotation=50, ha="right", rotation_mode="anchor")
for label, kept in zip(top.get_xticklabels(), kept_T, strict=True):
    label.set(color=INK if kept else ORANGE, weight="normal" if kept else "bold")
bottom.set_title(f"The same plan from the experts' side: {E} × {C} seats, dashed where empty")
bottom.set_xticks(np.arange(C) + 0.5, [f"seat {c}" for c in range(C)])
for axes, width in ((top, T), (bottom, C)):
    axes.set(xlim=(0, width), ylim=(E, 0))
    axes.set_yticks(np.arange(E) + 0.5, [f"expert {e}" for e in range(E)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# *Some experts turn words away while others keep empty seats: that is the price of a fixed shape.*
#
# With the plan the rest is three lines, all of fixed shape: carry the tokens to their seats (`dispatch`),
# run the experts, carry the results back, each times its `p` (`combine`).

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
# Even a perfectly fair router drops tokens, since chance alone fills some experts more than others. The
# library computes this floor (`expected_drop`) and shows it beside each measured drop rate. Here it is held
# against a simulation, and then against real text: rows of 128 bytes from the bundled corpus, each byte a
# token with a random vector, and a router that has learnt nothing yet.
#
# Seats are handed out in order, so one plan with a seat for everybody tells who is dropped when there are
# only `C`: those whose seat has a number of `C` or more.

# %%
corpus = sm.data.load_packed(sm.data.DataConfig(sequence_length=128))  # packed once, then read from a cache
train_rows = corpus.train.tokens[corpus.train.tokens.all(axis=1)]  # without the few rows that end in padding
bytes_GT = train_rows[:: len(train_rows) // 400, :128][:400].astype(np.int32)

factors, experts, sizes = np.array([1.0, 1.1, 1.25, 1.5, 1.75, 2.0]), 16, [128, 256, 1024]
wide = sm.MoEConfig(num_experts=experts)


@jax.jit
def seat_everybody(logits_GTE):
    T = logits_GTE.shape[1]
    return sm.assign_slots(sm.route(logits_GTE, wide), capacity=T).slot_GTK % T  # a slot is expert * T + seat


def drop_percents(logits_GTE):
    """The percentage of tokens dropped at each capacity factor; each group G is seated on its own."""
    seat_GTK, T = np.asarray(seat_everybody(logits_GTE)), logits_GTE.shape[1]
    return [100 * np.mean(seat_GTK >= sm.capacity(T, experts, 1, factor)) for factor in factors]


def floor_percents(T):
    seats = [sm.capacity(T, experts, 1, factor) for factor in factors]
    return [100 * sm.dispatching.expected_drop(T, experts, 1, C) / T for C in seats]


floor = {size: floor_percents(size) for size in sizes}
fair = {size: jax.random.normal(jax.random.key(0), (400 * 128 // size, size, experts)) for size in sizes}
simulated = {size: drop_percents(logits_GTE) for size, logits_GTE in fair.items()}
assert all(np.allclose(floor[size], simulated[size], atol=0.5) for size in sizes)  # half a percentage point

byte_VD = jax.random.normal(jax.random.key(1), (sm.data.ByteTokenizer.vocab_size, 64))
on_text = drop_percents(byte_VD[bytes_GT] @ jax.random.normal(jax.random.key(2), (64, experts)))
assert np.all(np.array(on_text) > np.array(floor[128]) + 10)

# %% cellView="form"
# @title Figure: dropped tokens against the capacity factor
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for tokens, colour in zip(sizes, (BLUE, GREEN, INK), strict=True):
    left.plot(factors, floor[tokens], color=colour, lw=1.5)
    left.plot(factors, simulated[tokens], "o", color=colour, ms=5)
    left.annotate(f"{tokens // experts} tokens\nper expert", (1.0, floor[tokens][0]), xytext=(-9, 0),
                  textcoords="offset points", ha="right", va="center", color=colour, size=9)  # fmt: skip
left.set(xlim=(0.74, 2.03), ylim=(0, 15), ylabel="tokens dropped, %")
left.set_title("Chance alone: computed (lines), simulated (dots)")
right.fill_between(factors, floor[128], on_text, color=ORANGE, alpha=0.15, lw=0)
right.plot(factors, on_text, "o-", color=ORANGE)
right.plot(factors, floor[128], color=BLUE, lw=1.5)
right.text(factors[2] + 0.04, on_text[2] + 1.5, "text, fresh router", color=ORANGE)
right.text(factors[2] + 0.04, floor[128][2] + 1.5, "chance", color=BLUE)
right.set(ylim=(0, None), ylabel="tokens dropped, %", title=f"Real text, {128 // experts} tokens per expert")
for axes in (left, right):
    axes.set_xlabel("capacity factor")
    axes.set_xticks([1, 1.25, 1.5, 1.75, 2])
    axes.grid(axis="y", color="#e5e5e5")
plt.show()
for factor, text, chance in zip(factors, on_text, floor[128], strict=True):
    print(f"capacity factor {factor:4}: {text:4.1f}% of the text dropped, {chance:4.1f}% by chance")

# %% [markdown]
# *More seats or larger groups cure bad luck; a lopsided router still drops tokens with twice the seats.*
# Equal bytes go to the same expert, and some bytes are much more frequent than others. Step 6 comes back to
# this.
#
# ## 5. The whole layer
#
# `sm.moe` is the composition of the steps above. It also returns sums from which `sm.summarize` makes
# losses and metrics.

# %%
layer = jax.jit(sm.moe, static_argnames=("config", "train"))
y_layer_TD, aux = layer(params, x_TD, config, train=True)  # train=True: with the training capacity factor
assert jnp.allclose(y_layer_TD, y_TD, atol=1e-5)

for name, value in sm.summarize(aux).items():
    print(f"{name:17}", np.round(np.asarray(value, float), 3))

# %% [markdown]
# Three of them will be needed now. Let `f` be the share of tokens that chose each expert, before anything
# is dropped, and `P` the mean probability that the router gave it:
#
# - `balance_loss` is `E * sum(f * P)` (equations 4 to 6 of the paper). It is 1 when all experts are used
#   alike. Its gradient, which flows through `P` alone, lowers the probability of experts that are used too
#   much.
# - `max_vio`, MaxVio, is the load of the busiest expert over the mean load, minus 1. It is 0 in perfect
#   balance and `E - 1` when one expert takes everything.
# - `dropped_fraction` is the share of dropped tokens, and `dropped_floor` its floor from chance.
#
# ## 6. Why balance matters
#
# Now train. A small model of text predicts the next byte from the last 8: their vectors, side by side, go
# through one MoE layer with 8 experts and a residual connection, and one more matrix makes the prediction.
# We train it three times, with the same batches and the same start, and only the weight of the balance loss
# differs: 0, 0.01 (the paper's choice) and 0.1.

# %%
COEFS = (0.0, 0.01, 0.1)
SEEN, EMBED, EXPERTS, STEPS = 8, 16, 8, 30 if FAST else 250
small = sm.MoEConfig(d_model=SEEN * EMBED, d_ff=256, num_experts=EXPERTS)
whole = corpus.validation.tokens.all(axis=1)
held_out = corpus.validation.tokens[whole][::8].astype(np.int32)
domain_B = corpus.validation.domain[whole][::8]


@jax.jit
def init_model(key):
    embed, moe, head = jax.random.split(key, 3)
    return {
        "embed_VD": jax.random.normal(embed, (259, EMBED)),
        "moe": sm.init_moe(moe, small),
        "head_DV": jax.random.normal(head, (small.d_model, 259)) / small.d_model**0.5,
    }


def normalise(x):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def see(params, rows):
    """Give each position the vectors of the last 8 bytes, its own the last of them, side by side."""
    padded = jnp.pad(rows[:, :-1], ((0, 0), (SEEN - 1, 0)))
    windows = jnp.stack([padded[:, i : i + rows.shape[1] - 1] for i in range(SEEN)], axis=-1)
    return normalise(params["embed_VD"][windows].reshape(*windows.shape[:2], small.d_model))


def loss_fn(params, rows, coef, train):
    x_BSD = see(params, rows)
    y_BSD, aux = sm.moe(params["moe"], x_BSD, small, train=train)  # each row of the batch is a group
    logits_BSV = normalise(x_BSD + y_BSD) @ params["head_DV"]
    log_probs_BSV = jax.nn.log_softmax(logits_BSV)
    loss = -jnp.take_along_axis(log_probs_BSV, rows[:, 1:, None], axis=-1).mean()
    metrics = sm.summarize(aux)
    return loss + coef * metrics["balance_loss"], metrics | {"loss": loss}


@jax.jit
def step(params, moments, rows, coef, t, rate=3e-3):
    """One update by Adam, written out so that nothing else needs to be installed."""
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, rows, coef, True)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, moments[1], grads)
    params = jax.tree.map(
        lambda p, m, v: p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.99**t)) + 1e-8),
        params, first, second,
    )  # fmt: skip
    return params, (first, second), metrics


def train(coef):
    params, draw, history = init_model(jax.random.key(0)), np.random.default_rng(0), []
    moments = 2 * (jax.tree.map(jnp.zeros_like, params),)
    for t in range(1, STEPS + 1):
        rows = train_rows[draw.integers(0, len(train_rows), 8)].astype(np.int32)
        params, moments, metrics = step(params, moments, rows, coef, float(t))
        history.append(jax.device_get(metrics))
    return params, jax.tree.map(lambda *values: np.stack(values), *history)


evaluate = jax.jit(loss_fn, static_argnames="train")
runs, held_out_metrics = {}, {}
for coef in COEFS:
    params_8, runs[coef] = train(coef)
    held_out_metrics[coef] = jax.device_get(evaluate(params_8, held_out, coef, train=False)[1])
best_balanced = params_8  # of the last and largest coefficient

# %% cellView="form"
# @title Figure: who gets the tokens
colours = expert_colours(EXPERTS)
inks = dict(zip(COEFS, (ORANGE, INK, BLUE), strict=True))


def smooth(values, width=1 + STEPS // 25):
    """The mean of each value and the ones before it."""
    return np.stack([values[max(0, i + 1 - width) : i + 1].mean(axis=0) for i in range(len(values))])


figure, grid = plt.subplot_mosaic("aabbcc;vvvddd", figsize=(10, 5.8))
figure.get_layout_engine().set(hspace=0.05)
for letter, coef in zip("abc", COEFS, strict=True):
    axes, share_SE = grid[letter], 100 * smooth(runs[coef]["load_fraction"])
    axes.stackplot(range(STEPS), share_SE.T, colors=colours, edgecolor="white", lw=0.5)
    middle_E = np.cumsum(share_SE[-1]) - share_SE[-1] / 2
    for e in np.flatnonzero(share_SE[-1] > 3.5):
        axes.text(STEPS, middle_E[e], f" {e}", va="center", size=9, color=INK)
    title = f"balance loss × {coef:g}" if coef else "without balance loss"
    axes.set_title(title, color=inks[coef], weight="bold")
    axes.set(ylim=(0, 100))
    history = runs[coef]
    for letter, values in (("v", history["max_vio"]), ("d", 100 * history["dropped_fraction"])):
        values = smooth(values)
        grid[letter].plot(values, color=inks[coef], lw=1.8)
        grid[letter].text(
            STEPS, values[-1], f" × {coef:g}" if coef else " without", color=inks[coef], va="center", size=9
        )
grid["a"].set_ylabel("share of tokens by expert, %")
chance = 100 * history["dropped_floor"][-1]
grid["d"].axhline(chance, color=GREEN, ls="--", lw=1.5)
grid["d"].text(STEPS * 0.6, chance - 0.8, "chance", color=GREEN, size=9, va="top")
grid["v"].set_title("MaxVio")
grid["d"].set_title("Tokens dropped, % (capacity factor 1.25)")
for letter, axes in grid.items():
    axes.set(xlabel="step", xlim=(0, STEPS - 1))
    if letter in "vd":
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_ylim(bottom=-3.5 if letter == "d" else 0)
plt.show()

# %%
print("On held-out text, capacity factor 2:")
print("balance_coef   loss, nats per byte   MaxVio   dropped   by chance   busiest 3 experts")
for coef, metrics in held_out_metrics.items():
    drop, chance = 100 * metrics["dropped_fraction"], 100 * metrics["dropped_floor"]
    busiest = 100 * np.sort(metrics["load_fraction"])[-3:].sum()
    print(f"{coef:12g}{metrics['loss']:22.3f}{metrics['max_vio']:9.2f}", end="")
    print(f"{drop:9.1f}%{chance:11.2f}%{busiest:17.0f}%")

lopsided, middle, balanced = held_out_metrics.values()
assert np.sort(lopsided["load_fraction"])[-3:].sum() > 0.75  # even shares would give 3 / 8
assert balanced["max_vio"] < min(middle["max_vio"], 0.5 * lopsided["max_vio"])
assert balanced["dropped_fraction"] < 0.5 * lopsided["dropped_fraction"]
assert FAST or balanced["loss"] < middle["loss"] < lopsided["loss"]  # a shortened run is too short to tell

# %% [markdown]
# *Without the balance loss a few experts take nearly everything and the others starve.* An expert that is
# chosen early gets trained, gets better, and is chosen more. The model pays twice: most of its parameters
# lie idle, and tokens of the crowded experts find no seat. Here the loss on held-out text falls as the
# balance improves. (One seed of a tiny model: an illustration. The repository's `experiments/RESULTS.md`
# has the measurements.)
#
# ### What did the experts learn to read?
#
# We take the best balanced of the three models, ask where it sends each byte of the held-out text
# (`sm.moe_with_trace`), and measure how much of its choice is explained by the byte itself, and how much by
# the domain of the text.

# %%
where = jax.jit(lambda params, rows: sm.moe_with_trace(params["moe"], see(params, rows), small)[2])
trace = where(best_balanced, held_out)
choice_BS, kept_BS = np.asarray(trace.expert_SK[..., 0]), np.asarray(trace.kept_SK[..., 0])


def explained(choice_N, by_N):
    """The share of the choice's entropy that is gone once `by` is known."""
    joint = np.histogram2d(choice_N, by_N, bins=(EXPERTS, by_N.max() + 1))[0] / len(choice_N)
    marginal = joint.sum(axis=1, keepdims=True)
    known = joint > 0
    information = np.sum(joint[known] * np.log((joint / (marginal * joint.sum(axis=0) + 1e-30))[known]))
    return information / -np.sum(marginal * np.log(marginal + 1e-30))


by_byte = explained(choice_BS.reshape(-1), held_out[:, :-1].reshape(-1))
by_domain = explained(choice_BS.reshape(-1), np.repeat(domain_B, choice_BS.shape[1]))
print(f"The byte explains {by_byte:.1%} of the choice of an expert, the domain {by_domain:.1%}.")
assert by_byte > 5 * by_domain


def mark(text, colour):
    return f'<span style="background:{colour};color:#111">{html.escape(text)}</span>'


page = "expert: " + " ".join(mark(f" {e} ", colour) for e, colour in enumerate(colours)) + " (white: dropped)"
for name in ("bible_english", "python_stdlib", "wordnet_glosses"):
    row = np.flatnonzero(domain_B == corpus.domains.index(name))[1]
    text = "".join(
        mark(chr(max(token - 3, 32)), colours[e] if kept else "white")  # token 3 is byte 0
        for token, e, kept in zip(held_out[row, :-1], choice_BS[row], kept_BS[row], strict=True)
    )
    page += f'<br><b>{name}</b><pre style="white-space:pre-wrap;line-height:1.5">{text}</pre>'
display(HTML(page))

# %% [markdown]
# *Each byte has the colour of the expert that read it: this small model shares out bytes and their
# surroundings, not domains.*
#
# ## 7. Why `p` must multiply
#
# Argmax has no gradient: a small change of the router's weights changes no choice. The router learns only
# because `p`, which depends smoothly on its weights, multiplies the expert's result. Divide the weight by
# itself, so that it is always 1, as *renormalised* weights with one expert a token are, and the router gets
# no gradient from the task at all.

# %%
target_TD = jax.random.normal(jax.random.key(7), (T, D))
strong_DE = jax.random.normal(jax.random.key(3), (D, E)) / D**0.5  # stronger weights than a fresh layer's,
strong_EDF = jax.random.normal(jax.random.key(10), (E, D, F)) / D**0.5  # so that slopes are easy to see
strong_EFD = jax.random.normal(jax.random.key(11), (E, F, D)) / F**0.5


def task_loss(router_DE, renormalize):
    routing = sm.routing.choose_top_k(x_TD @ router_DE, k=1, renormalize=renormalize)
    plan = sm.assign_slots(routing, capacity=T)  # a seat for everybody
    y_ECD = jax.vmap(ffn)(sm.dispatch(x_TD, plan), strong_EDF, strong_EFD)
    return jnp.mean((sm.combine(y_ECD, plan) - target_TD) ** 2)


gradient = jax.jit(jax.grad(task_loss), static_argnames="renormalize")
with_p, without_p = (gradient(strong_DE, renormalize) for renormalize in (False, True))
print(f"gradient of the router's weights, its norm: {jnp.linalg.norm(with_p):.1e} times p, "
      f"{jnp.linalg.norm(without_p):.1e} renormalised")  # fmt: skip
assert jnp.linalg.norm(without_p) < 1e-5 * jnp.linalg.norm(with_p)

try:
    sm.MoEConfig(top_k=1, renormalize=True)
except ValueError as error:
    print(error)
else:
    raise AssertionError("the library was expected to refuse this")

# %% cellView="form"
# @title Figure: the loss along a line through the router's weights
direction_DE = with_p / jnp.linalg.norm(with_p)
steps = jnp.linspace(-0.6, 0.6, 401)
choice_NT = jnp.argmax(x_TD @ (strong_DE + steps[:, None, None] * direction_DE), axis=-1)
jump_N = np.append(False, np.any(np.diff(choice_NT, axis=0) != 0, axis=1))
along = jax.jit(
    lambda renormalize: jax.lax.map(lambda s: task_loss(strong_DE + s * direction_DE, renormalize), steps),
    static_argnums=0,
)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.4))
for axes, renormalize, grad_DE, title in (
    (panels[0], False, with_p, "times p: between jumps there is a slope to follow"),
    (panels[1], True, without_p, "weight always 1: flat between jumps, nothing to follow"),
):
    loss_N = np.where(jump_N, np.nan, along(renormalize))  # a gap where it jumps
    axes.plot(steps, loss_N, color=ORANGE if renormalize else BLUE, lw=2.2)
    here, slope = float(loss_N[len(steps) // 2]), float(jnp.sum(grad_DE * direction_DE))
    ends = np.array([-0.3, 0.3])
    axes.plot(ends, here + slope * ends, "--", color=INK, lw=1.2)
    axes.plot(0, here, "o", color=INK)
    axes.annotate(
        "what the gradient says", (0, here), xytext=(12, -18), textcoords="offset points", color=INK
    )
    axes.set(title=title, xlabel="how far the router's weights are moved")
panels[0].set_ylabel("loss of the task")
plt.show()
print(f"{jump_N.sum()} jumps along this line")

# %% [markdown]
# *Each jump is a word that changes its expert. No gradient sees the jumps; what teaches the router is the
# slope between them, and only `p` gives it one.* (The balance loss also has a gradient, but that one knows
# nothing of the task.)
#
# ## 8. Experts add parameters, not FLOPs
#
# Last, the reason for all of this: a layer for 1,024 tokens, with more and more experts. The compiler
# counts from shapes alone, so nothing is allocated and nothing runs.

# %%
# On a CPU large experts run one after the other, in a loop whose body the compiler counts once: not here.
sm.experts.SMALL_PRODUCT = float("inf")
counts, tokens = [1, 2, 4, 8, 16, 32, 64], 1024
one_ffn = 4 * tokens * 128 * 512  # FLOPs
x_shape = jax.ShapeDtypeStruct((tokens, 128), jnp.float32)
table = []
for experts in counts:
    many = sm.MoEConfig(d_model=128, d_ff=512, num_experts=experts, capacity_factor=1.25)
    shapes = jax.eval_shape(lambda key, many=many: sm.init_moe(key, many), jax.random.key(0))
    total = sum(weight.size for weight in jax.tree.leaves(shapes))
    executed = count_flops(lambda p, x, many=many: sm.moe(p, x, many, train=True)[0], shapes, x_shape)
    useful = one_ffn + 2 * tokens * 128 * experts  # one expert and the router: without empty seats
    table.append([total / (2 * 128 * 512), executed / one_ffn, useful / one_ffn])
in_params, executed, useful = np.array(table).T
for experts, by_params, by_flops in zip(counts, in_params, executed, strict=True):
    print(f"{experts:3} experts: {by_params:6.2f} x the parameters and {by_flops:.2f} x the FLOPs of one FFN")
assert in_params[-1] > 64 and executed.max() < 1.5
assert np.isclose(executed[-1] - executed[1], useful[-1] - useful[1], atol=0.01)  # only the router grows

# %% cellView="form"
# @title Figure: parameters and FLOPs against the number of experts
figure, axes = plt.subplots(figsize=(6.4, 3.8))
axes.loglog(counts, in_params, "o-", color=BLUE, base=2)
axes.loglog(counts, executed, "s-", color=ORANGE, base=2)
axes.loglog(counts, useful, "--", color=INK, lw=1.2, base=2)
axes.text(14, 18, "parameters", ha="right", color=BLUE)
axes.text(4, 1.5, "FLOPs, counted by the compiler", color=ORANGE)
axes.text(4, 0.72, "FLOPs without empty seats", color=INK)
axes.set(xlabel="number of experts", ylabel="times a dense FFN", ylim=(0.6, 100))
axes.set_xticks(counts, counts)
axes.set_yticks([1, 4, 16, 64], [1, 4, 16, 64])
axes.grid(axis="y", color="#e5e5e5")
plt.show()

# %% [markdown]
# *The parameters grow with the number of experts, while the FLOPs stay near the capacity factor.* What
# still grows is the router, by one column an expert.
#
# ## 9. Where next
#
# - **A whole language model.** In a clone of the [repository](https://github.com/switchmoe/switchmoe),
#   `make quickstart` trains a small Switch Transformer beside a dense model of the same FLOPs per token,
#   and writes a page with their losses, the load of each expert and text coloured by expert.
# - **In your own model.** `sm.moe` is a pure function; `sm.nn.MoE` is the same as a Flax NNX module. The
#   [README](https://github.com/switchmoe/switchmoe#readme) shows both.
# - **Your own router.** One file and one line in `sm.ROUTERS`:
#   [CONTRIBUTING](https://github.com/switchmoe/switchmoe/blob/main/CONTRIBUTING.md) has a worked example.
# - **Try here.** Set `COEFS` to other weights, `EXPERTS` to 32, or `router="top_k", top_k=2` in `small`.
#   Which of them would you expect to drop more?

# %%
print("Routers of this version:", ", ".join(sm.ROUTERS))
