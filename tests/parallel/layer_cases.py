"""Which layers are compared on which meshes: a selection for `make test`, and products for tests/full."""

from switchmoe.parallel import Rules
from switchmoe.routing import ROUTERS
from tests.parallel.worlds import MESHES, ONLY_SEATS, Case, make_case

SHARED = dict(shared_experts=2, gated=True, activation="silu")
PAIRS = dict(sequences_per_group=2)

# Every transport on two meshes, and what differs most between routers and between layers.
SELECTION = {
    (4, 1, 2, 1): [make_case("noisy_top_k", "all_gather", dispatch="einsum")],
    (2, 1, 4, 1): [
        make_case("gshard", "ragged_all_to_all", dispatch="dropless"),
        make_case("expert_choice", "all_gather"),
    ],
    (2, 2, 2, 1): [make_case("soft_moe", "all_to_all")],
    (2, 1, 2, 2): [make_case("top_k", "all_to_all", how=dict(chunks=2), overflow="next", **PAIRS, **SHARED)],
    (1, 2, 2, 2): [make_case("sigmoid", "ragged_all_to_all", replays=True, dispatch="dropless", **SHARED)],
}
# On a mesh where everything is split, to be compared at the tolerance of bfloat16.
NARROW = {(1, 2, 2, 2): [make_case("switch", dtype="bfloat16", **SHARED)]}

# Other rules than the usual ones: another order of the rows, and experts over other axes.
OTHER_RULES = {
    (2, 1, 2, 2): [
        make_case("switch", how=dict(rules=rules), **SHARED)
        for rules in (
            Rules(rows=("expert", "fsdp", "data")),
            Rules(experts="data"),
            Rules(experts=None),
            Rules(rows=("tensor", "data", "fsdp", "expert"), experts="tensor", hidden=None, heads=None),
        )
    ],
    (1, 2, 2, 2): [
        make_case("top_k", dispatch="dropless", how=dict(rules=Rules(experts="fsdp", model="expert")))
    ],
}

# How tokens can travel: (dispatch, executor).
WAYS = [
    ("gather", "all_to_all"),
    ("gather", "all_gather"),
    ("einsum", "all_to_all"),
    ("einsum", "all_gather"),
    ("dropless", "ragged_all_to_all"),
    ("dropless", "all_gather"),
]


def every_router_every_way() -> dict[tuple[int, ...], list[Case]]:
    """Routers x dispatch x executor, each on one of the meshes that split experts, in turn."""
    cases = [
        make_case(router, executor, dispatch=dispatch)
        for dispatch, executor in WAYS
        for router in ROUTERS
        if not (dispatch == "dropless" and router in ONLY_SEATS)
    ]
    meshes = MESHES[1:]
    return {sizes: cases[at :: len(meshes)] for at, sizes in enumerate(meshes)}


def every_feature() -> dict[tuple[int, ...], list[Case]]:
    """What else a layer can have, on meshes that split rows, experts, storage and hidden features."""
    cases = [
        make_case("top_k", overflow="next"),
        make_case("switch", "all_gather", replays=True, overflow="next"),
        make_case("top_k", "all_gather", dispatch="dropless", replays=True),
        make_case("switch", exploration="sample", drop_order="priority"),
        make_case("top_k", drop_order="token", replays=True, **PAIRS),
        make_case("top_k", dispatch="dropless", **PAIRS, **SHARED),
        make_case("soft_moe", "all_gather", **SHARED),
        make_case("expert_choice", "all_gather", **PAIRS, **SHARED),
    ]
    chunked = [
        make_case("top_k", executor, how=dict(chunks=2), **SHARED)
        for executor in ("all_to_all", "all_gather")
    ]
    return dict.fromkeys([(8, 1, 1, 1), (2, 1, 4, 1), (1, 2, 2, 2)], cases + chunked)
