"""All programs of one size, timed in the same rounds, as rows of the table."""

import dataclasses
from collections.abc import Callable, Sequence

from switchmoe.config import Dispatch

if __package__:  # imported as benchmarks.compare
    from benchmarks import cases, show, timing
    from benchmarks.settings import Settings
else:  # beside a script, which finds its neighbours by their own names
    import cases
    import show
    import timing
    from settings import Settings


def contenders(case: cases.Case, settings: Settings, extra: Sequence[Callable]) -> dict[str, cases.Facts]:
    """All programs of one size and mode, by a name of their own."""
    found: dict[str, cases.Facts] = {"dense": cases.dense(case)}

    def add(facts: cases.Facts) -> None:
        factor = facts.capacity_factor
        name = facts.contender.name if factor is None else f"{facts.contender.name} at {factor:g}"
        if name in found:
            raise ValueError(f"Two programs are called {name!r}; give the one from --extra another name.")
        found[name] = facts

    for factor in dict.fromkeys((*settings.factors, cases.EXACT)):
        sized = dataclasses.replace(case, capacity_factor=factor)
        slots: list[Dispatch] = [name for name in settings.dispatches if name != "dropless"]
        is_asked = factor in settings.factors
        if is_asked or "dropless" in settings.dispatches:
            add(cases.bare_experts(sized))
        if not is_asked:
            continue
        for dispatch in slots:
            if dispatch != "einsum" or cases.table_bytes(sized) <= cases.LARGEST_TABLE_BYTES:
                add(cases.layer(sized, dispatch))
        if slots:
            add(cases.routing(sized, slots[0]))
        for function in extra:
            for outside in function(sized):
                add(cases.Facts(cases.Contender(*outside), factor, bare="bare experts"))
    if "dropless" in settings.dispatches:
        exact = dataclasses.replace(case, capacity_factor=cases.EXACT)
        add(cases.routing(exact, "dropless"))
        for matmul in (None, *settings.matmuls):
            add(cases.layer(exact, "dropless", matmul))
    return found


def time_size(case: cases.Case, settings: Settings, extra: Sequence[Callable]) -> list[show.Row]:
    """Compile and time all programs of one size and mode, and make their rows."""
    found = contenders(case, settings, extra)
    programs = {name: timing.prepare(one.contender.fn, one.contender.args) for name, one in found.items()}
    calls = {name: program.call for name, program in programs.items()}
    seconds = timing.time_together(calls, settings.rounds)
    least = {name: min(rounds) for name, rounds in seconds.items()}
    rows = []
    for name, facts in found.items():
        factor = facts.capacity_factor
        at = f" at {factor if factor is not None else cases.EXACT:g}"
        dense = facts.contender.dense
        dropped = None
        if facts.reads_aux:
            aux = programs[name].call()[1]
            dropped = float(aux.dropped / aux.choices)
        is_part = facts.useful is None and facts.executed is None and not facts.bare  # routing by itself
        share = f"{facts.routing}{at if factor is not None else ''}"
        rows.append(
            {
                "tokens": case.tokens,
                "num_experts": case.num_experts,
                "mode": case.mode,
                "name": facts.contender.name,
                "capacity_factor": factor,
                "seconds": least[name],
                "to_dense": None if is_part else least[name] / least[f"{dense}{at}" if dense else "dense"],
                "to_bare": least[name] / least[f"{facts.bare}{at}"] if facts.bare else None,
                "useful_flops": facts.useful,
                "executed_flops": facts.executed,
                "dropped_fraction": dropped,
                "temporary_bytes": programs[name].temporary_bytes,
                "routing_share": least[share] / least[name] if facts.routing else None,
                "rounds": seconds[name],
            }
        )
    return rows
