"""The MoE layer once more, in plain numpy and explicit loops: slow, readable, no line shared with switchmoe.

Every function below walks over groups, tokens, choices, experts and seats one at a time, in the order in
which the specification says that seats are handed out. Nothing here imports jax or switchmoe, so a mistake in
the library cannot hide in the oracle. Arrays are float64. G groups, T tokens in a group, D model, F ff,
E experts, K choices, C capacity.
"""

import math
from typing import NamedTuple

import numpy as np

NOBODY = -1  # stands for the expert of a choice that is not used


class Sums(NamedTuple):
    """What one layer counted, over real tokens only: the oracle of MoEAux."""

    load_E: np.ndarray  # choices per expert, before anybody is dropped
    kept_E: np.ndarray  # choices per expert that found a seat
    prob_sum_E: np.ndarray
    z_sum: float  # sum of logsumexp(logits)**2
    entropy_sum: float  # nats
    top_prob_sum: float
    dropped: float  # choices
    expected_dropped: float  # choices that blind random routing would have dropped
    tokens: float
    choices: float
    unserved: float  # tokens that got no seat at all
    smooth_load_E: np.ndarray  # of a router without noise: the load
    sequence_balance_sum: float  # each sequence's own balance loss, added up
    sequences: float  # those with a real token


class Answer(NamedTuple):
    """The layer's output and every decision on the way to it."""

    y_GTD: np.ndarray
    expert_GTK: np.ndarray
    weight_GTK: np.ndarray
    slot_GTK: np.ndarray  # place in the expert's queue; a place >= capacity is a drop; -1 for a masked token
    kept_GTK: np.ndarray
    sums: Sums


def softmax(logits_E):
    exponentials = [math.exp(logit - max(logits_E)) for logit in logits_E]
    return np.array([value / sum(exponentials) for value in exponentials])


def log_sum_exp(logits_E):
    return max(logits_E) + math.log(sum(math.exp(logit - max(logits_E)) for logit in logits_E))


def best(scores_E, k):
    """The k experts with the highest score, best first, the lower index first among equals."""
    chosen = []
    for _ in range(k):
        winner = None
        for expert in range(len(scores_E)):
            if expert not in chosen and (winner is None or scores_E[expert] > scores_E[winner]):
                winner = expert
        chosen.append(winner)
    return chosen


def sigmoid(logits_E):
    return np.array([1.0 / (1.0 + math.exp(-logit)) for logit in logits_E])


def best_within_groups(scores_E, k, groups, groups_per_token):
    """The k best experts of the best groups; a group is worth its two best experts' scores together."""
    size = len(scores_E) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    worth = [sum(sorted((scores_E[e] for e in group), reverse=True)[:2]) for group in members]
    allowed = [e for g in best(worth, groups_per_token) for e in members[g]]
    return best([score if e in allowed else -math.inf for e, score in enumerate(scores_E)], k)


def queue(expert_TK, drop_order, mask_T, top_prob_T):
    """All choices (token, choice) of real tokens in the order in which they ask for a seat."""
    tokens = [t for t in range(len(expert_TK)) if mask_T[t]]
    choices = range(len(expert_TK[0]))
    if drop_order == "token":
        return [(t, j) for t in tokens for j in choices]
    if drop_order == "choice":
        return [(t, j) for j in choices for t in tokens]
    if drop_order == "priority":  # the surest token first; sorted() is stable, so equals keep their position
        return [(t, j) for j in choices for t in sorted(tokens, key=lambda t: -top_prob_T[t])]
    raise ValueError(drop_order)


def seat(expert_TK, capacity, drop_order="choice", mask_T=None, top_prob_T=None):
    """(slot_TK, kept_TK, seats): who sits where in one group; seats[(expert, place)] = (token, choice)."""
    tokens, k = len(expert_TK), len(expert_TK[0])
    mask_T = [True] * tokens if mask_T is None else mask_T
    slot_TK = -np.ones((tokens, k), int)
    kept_TK = np.zeros((tokens, k), bool)
    waiting, seats = {}, {}
    for token, choice in queue(expert_TK, drop_order, mask_T, top_prob_T):
        expert = int(expert_TK[token][choice])
        if expert == NOBODY:
            continue
        place = waiting.get(expert, 0)
        waiting[expert] = place + 1
        slot_TK[token, choice] = place
        if place < capacity:
            kept_TK[token, choice] = True
            seats[expert, place] = (token, choice)
    return slot_TK, kept_TK, seats


def activate(h, name):
    if name == "relu":
        return np.maximum(h, 0.0)
    if name == "silu":
        return h / (1.0 + np.exp(-h))
    if name == "gelu":  # the tanh form: Hendrycks & Gimpel, arXiv 1606.08415, section 2
        return 0.5 * h * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))
    raise ValueError(name)


def feed_forward(x_D, w_in_DF, w_out_FD, w_gate_DF=None, activation="relu"):
    """One token through one expert; with a gate the activation is on the gate's side (SwiGLU)."""
    if w_gate_DF is None:
        return activate(x_D @ w_in_DF, activation) @ w_out_FD
    return (activate(x_D @ w_gate_DF, activation) * (x_D @ w_in_DF)) @ w_out_FD


def expected_drop(tokens, experts, k, capacity):
    """Choices that overflow when every token picks k different experts blindly.

    An expert's queue is then Binomial(tokens, k / experts); what is longer than the capacity overflows, and
    there are `experts` such queues: E * sum_n P(n) * max(0, n - C).
    """
    p, total = k / experts, 0.0
    if p == 1.0:
        return float(experts * max(0, tokens - capacity))
    for n in range(capacity + 1, tokens + 1):
        log_ways = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        total += math.exp(log_ways + n * math.log(p) + (tokens - n) * math.log1p(-p)) * (n - capacity)
    return experts * total


def layer(
    x_GTD,
    router_DE,
    w_in_EDF,
    w_out_EFD,
    w_gate_EDF=None,
    *,
    k,
    capacity,
    drop_order="choice",
    renormalize=False,
    activation="relu",
    mask_GT=None,
    sequences_per_group=1,
):
    """The whole layer: every token asks, sits or is dropped, is computed, and comes back times its weight."""
    groups, tokens, _ = x_GTD.shape
    experts = router_DE.shape[1]
    y_GTD = np.zeros(x_GTD.shape)
    expert_GTK = np.zeros((groups, tokens, k), int)
    weight_GTK = np.zeros((groups, tokens, k))
    slot_GTK = np.zeros((groups, tokens, k), int)
    kept_GTK = np.zeros((groups, tokens, k), bool)
    load_E, kept_E, prob_sum_E = np.zeros(experts), np.zeros(experts), np.zeros(experts)
    z_sum = entropy_sum = top_prob_sum = dropped = expected = real = unserved = 0.0
    balance_sum, sequences = 0.0, 0
    for g in range(groups):
        mask_T = [True] * tokens if mask_GT is None else list(mask_GT[g])
        top_prob_T, probs_TE = [], np.zeros((tokens, experts))
        for t in range(tokens):
            logits_E = x_GTD[g, t] @ router_DE
            probs_E = softmax(logits_E)
            chosen = best(logits_E, k)
            weights = np.array([probs_E[e] for e in chosen])
            expert_GTK[g, t] = chosen
            weight_GTK[g, t] = weights / sum(weights) if renormalize else weights
            top_prob_T.append(probs_E[chosen[0]])
            probs_TE[t] = probs_E
            if mask_T[t]:
                real += 1
                prob_sum_E += probs_E
                z_sum += log_sum_exp(logits_E) ** 2
                entropy_sum -= sum(p * math.log(p) for p in probs_E if p > 0)
                top_prob_sum += max(probs_E)
                for expert in chosen:
                    load_E[expert] += 1
        slot_GTK[g], kept_GTK[g], seats = seat(expert_GTK[g], capacity, drop_order, mask_T, top_prob_T)
        for (expert, _), (token, choice) in seats.items():
            gate_DF = None if w_gate_EDF is None else w_gate_EDF[expert]
            out_D = feed_forward(x_GTD[g, token], w_in_EDF[expert], w_out_EFD[expert], gate_DF, activation)
            y_GTD[g, token] += weight_GTK[g, token, choice] * out_D
            kept_E[expert] += 1
        dropped += sum(mask_T) * k - len(seats)
        unserved += sum(mask_T[t] and not kept_GTK[g, t].any() for t in range(tokens))
        for row in np.array_split(np.arange(tokens), sequences_per_group):
            inside = [t for t in row if mask_T[t]]
            if inside:
                count_E = np.bincount(expert_GTK[g, inside].reshape(-1), minlength=experts)
                share_E = count_E / (len(inside) * k)
                balance_sum += experts * float(share_E @ probs_TE[inside].mean(axis=0))
                sequences += 1
        expected += expected_drop(sum(mask_T), experts, k, capacity)
    sums = Sums(
        load_E,
        kept_E,
        prob_sum_E,
        z_sum,
        entropy_sum,
        top_prob_sum,
        dropped,
        expected,
        real,
        real * k,
        unserved,
        load_E,
        balance_sum,
        sequences,
    )
    return Answer(y_GTD, expert_GTK, weight_GTK, slot_GTK, kept_GTK, sums)


def slope(function, point, direction, step=1e-6):
    """The derivative of a scalar function along a direction, by a central difference in float64."""
    return (function(point + step * direction) - function(point - step * direction)) / (2.0 * step)
