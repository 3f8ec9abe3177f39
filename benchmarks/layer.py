"""Time the MoE layer against a dense FFN and against its bare experts, in one process.

Question: what does the layer cost beside the arithmetic it is made of, however many experts there are?
Command:  python benchmarks/layer.py [--json FILE] [--sizes 4096:8 16384:64] [--extra module:function]
Cost:     all sizes about 20 minutes on two CPU cores; `--sizes 4096:8 --rounds 3` less than one.
Result:   a table of each size, and in FILE the same with each round's time, written as sizes are finished.

"Dense" is an FFN that handles the same tokens with the same FLOPs a token: as wide as k experts together.
"Bare experts" are the layer's experts on ready-made [E, C, D] input: two batched products with an activation
between. For dropless dispatch they have as many seats as there are choices. All programs run in interleaved
rounds, and the least of the rounds is shown. Gradients are for all weights and the tokens; the layer computes
every sum of `MoEAux` and both of its losses. "routing" is the time from logits to a plan, by itself, over the
layer's. FLOPs are those of matrix products; an einsum dispatch with a larger table than 256 MB is left out.

Implementations from elsewhere are timed in the same rounds with `--extra module:function`, where the function
takes a `Case` of benchmarks/cases.py and returns a list of programs, which may be empty:

    # peers.py, on PYTHONPATH
    def my_layer(case):
        params = my_init(case.num_experts, case.d_model, case.d_ff)
        run = jax.jit(my_forward if case.mode == "forward" else my_forward_and_gradient)
        return [("mine", run, (params, case.x_TD, case.g_TD))]

A program is (name, function, arguments), or with a fourth entry the name of another one of the same list, a
dense FFN, that it is compared with instead (for another framework). It is called once for each capacity
factor; one call must do all the work of `case.mode` at `case.capacity_factor`.
"""

import dataclasses
import datetime
import sys

import tyro
from rich.console import Console

from switchmoe.train import RunError
from switchmoe.train.command_line import fail
from switchmoe.train.errors import bad_input
from switchmoe.train.records import environment, prepare_folder, write_json

if __package__:  # imported as benchmarks.layer
    from benchmarks import cases, compare, show, timing
    from benchmarks.settings import Settings, load_extra
else:  # beside a script, which finds its neighbours by their own names
    import cases
    import compare
    import show
    import timing
    from settings import Settings, load_extra


def run(settings: Settings) -> int:
    """Time every size and mode in turn, print each table when it is done, and keep the file up to date."""
    with bad_input():
        settings.check()
    extra = load_extra(settings.extra)
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    record = describe(settings)
    console = Console()
    for tokens, num_experts in settings.shapes():
        for mode in settings.modes:
            case = cases.draw_case(tokens, num_experts, mode, dtype=settings.dtype, **settings.widths())
            rows = compare.time_size(case, settings, extra)
            title = f"{tokens:,} tokens, {num_experts} experts, top-{settings.top_k}, {mode}"
            show.show(title, rows, console)
            record["rows"] += rows
            if settings.json is not None:
                write_json(settings.json, record)
    return 0


def describe(settings: Settings) -> dict:
    """Say what is timed, with what, and where; the rows come later."""
    about = environment()
    for private in ("command", "platform"):  # places on this machine, and its kernel
        about.pop(private)
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"}
    return {
        "benchmark": "layer",
        "date": datetime.date.today().isoformat(),
        **about,
        "clock": timing.CLOCKS[timing.clock_kind()],
        "settings": asked,
        "rows": [],
    }


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except RunError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
