"""Time every grouped matmul that runs here against one dense product of the same rows, in one process.

Question: how near does each backend come to the rate of a dense product, by experts and their load?
Command:  python benchmarks/grouped.py [--json FILE] [--sizes 4096:8 32768:64] [--dtype bfloat16] [--sweep]
Cost:     a minute on two CPU cores, or for large sizes in bfloat16 on a GPU, where --sweep adds another.
Result:   a table of each size, and in FILE the same with each round's time, written as sizes are finished.

Three products make an expert's matrix and its gradient: rows times weights ("product"), the rows' gradient
times the transposed weights ("back"), and the weights' gradient ("to weights"). Each is compared with the
dense product of the same shapes, in which all rows meet one matrix: "of dense" is its rate over that one's,
with FLOPs counted once a row, whatever else a backend does. Loads are "fair", where a row is at any expert
alike, and "unfair", where first the experts' shares are drawn; a program is compiled once for both. "off" is
the distance from what the backend "loop" gives for the timed arrays, over that one's norm. A backend's
`clean` is not timed: a layer makes its rows so.

--sweep times the Hopper kernels with other tiles too, at a fair load, written as in `mosaic_gpu.Tiles`.
--extra brings backends from elsewhere: the function takes nothing and returns `Backend`s by their names.
"""

import dataclasses
import datetime
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from switchmoe.dispatching.grouped import BACKENDS, Backend
from switchmoe.dispatching.grouped_matmul import choose_backend, platform_name
from switchmoe.train import RunError
from switchmoe.train.command_line import fail
from switchmoe.train.errors import bad_input
from switchmoe.train.records import environment, prepare_folder, write_json

if __package__:  # imported as benchmarks.grouped
    from benchmarks import grouped_cases as cases
    from benchmarks import show, tiles, timing
    from benchmarks.settings import load_extra, read_sizes
else:  # beside a script, which finds its neighbours by their own names
    import grouped_cases as cases
    import show
    import tiles
    import timing
    from settings import load_extra, read_sizes

# A masked copy of the rows for each expert that is larger than this isn't made: ragged_dot is left out there.
LARGEST_MASK_BYTES = 2**32
COLUMNS = (
    ("kind", "product", "{}"),
    ("load", "load", "{}"),
    ("backend", "backend", "{}"),
    ("tiles", "tiles", "{}"),
    ("seconds", "ms", "{:.3f}"),
    ("flops_per_second", "TFLOP/s", "{:.2f}"),
    ("of_dense", "of dense", "{:.3f}"),
    ("off", "off", "{:.1e}"),
    ("temporary_bytes", "temp MB", "{:.1f}"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time grouped matmuls against dense products.

    Attributes:
      json: file for the results.
      sizes: rows and experts, each as ROWS:EXPERTS.
      backends: which to time; all that run here but "loop" unless said.
      d_in: features of a row.
      d_out: features of its result.
      dtype: of rows and weights.
      rounds: interleaved rounds; the least time counts.
      sweep: time the Hopper kernels with other tiles too.
      extra: functions that return backends from elsewhere, as module:function.
    """

    json: Path | None = None
    sizes: tuple[str, ...] = ("4096:8", "4096:64")
    backends: tuple[str, ...] = ()
    d_in: int = 512
    d_out: int = 2048
    dtype: str = "float32"
    rounds: int = 5
    sweep: bool = False
    extra: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise a ValueError that says what to change, before anything is compiled."""
        read_sizes(self.sizes)
        for name in ("rounds", "d_in", "d_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not known; use float32 or bfloat16.")
        for name in self.backends:
            choose_backend(name)
        if self.sweep and (problem := BACKENDS["mosaic_gpu"].available(platform_name())):
            raise ValueError(f"There is nothing to sweep: {problem}")


def draw(settings: Settings, num_rows: int, num_experts: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw x_RI, w_EIO and g_RO, and by the name of a load how many rows each expert has."""
    shapes = (
        (num_rows, settings.d_in),
        (num_experts, settings.d_in, settings.d_out),
        (num_rows, settings.d_out),
    )
    arrays = tuple(
        jax.random.normal(jax.random.key(n), shape, settings.dtype) for n, shape in enumerate(shapes)
    )
    loads = tiles.draw_sizes(1, num_rows, num_experts)
    return arrays, {name: jnp.asarray(loads[name][0], jnp.int32) for name in ("fair", "unfair")}


def programs(settings: Settings, extra: dict[str, Backend], arrays: Sequence[Any]) -> list[cases.Program]:
    """List what is timed for these arrays; whatever can't take them is left out, unless it was asked for."""
    x_RI, w_EIO, g_RO, size_E = arrays
    asked = {name: BACKENDS[name] for name in settings.backends or BACKENDS if name != "loop"}
    found = cases.dense_products()
    for name, backend in {**asked, **extra}.items():
        mask_bytes = len(size_E) * max(x_RI.nbytes, g_RO.nbytes) if name == "ragged_dot" else 0
        is_possible = not backend.available(platform_name(), x_RI, w_EIO, size_E)
        if name in settings.backends or (is_possible and mask_bytes <= LARGEST_MASK_BYTES):
            found += cases.three_products(name, backend)
    if settings.sweep:
        found += cases.swept_products(settings.d_in, settings.d_out)
    return found


def compile_all(found: Sequence[cases.Program], arrays: Sequence[Any]) -> list[Any]:
    """Compile each program; one that can't be is replaced by the exception.

    Those of the sweep are compiled side by side. The others are not, since XLA times its products' variants
    while it compiles them.
    """

    def compile_one(program: cases.Program) -> Any:
        try:
            compiled = jax.jit(program.fn).lower(*arrays).compile()
            jax.block_until_ready(compiled(*arrays))
            return compiled
        except Exception as error:  # a kernel may ask for more than the device has, in many ways
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alone = [compile_one(program) for program in found if not program.tiles]
        return [*alone, *pool.map(compile_one, [program for program in found if program.tiles])]


def distance(actual: Any, expected: Any) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    wide = [array.astype(jnp.float32) for array in (actual, expected)]
    return float(jnp.linalg.norm((wide[0] - wide[1]).ravel()) / jnp.linalg.norm(wide[1].ravel()))


def time_size(settings: Settings, extra: dict[str, Backend], rows: int, experts: int) -> list[show.Row]:
    """Compile and time everything at one size, and make its rows."""
    arrays, loads = draw(settings, rows, experts)
    found = programs(settings, extra, (*arrays, loads["fair"]))
    found.sort(key=lambda program: bool(program.tiles))  # as they are compiled
    compiled = compile_all(found, (*arrays, loads["fair"]))
    loops = {one.kind: jax.jit(one.fn) for one in cases.three_products("loop", BACKENDS["loop"])}
    flops, table = 2.0 * rows * settings.d_in * settings.d_out, []
    for load, size_E in loads.items():
        ready = {
            number: (lambda one=one, size_E=size_E: one(*arrays, size_E))
            for number, (program, one) in enumerate(zip(found, compiled, strict=True))
            if not isinstance(one, Exception) and not (program.tiles and load != "fair")
        }
        seconds = timing.time_together(ready, settings.rounds)
        least = {number: min(times) for number, times in seconds.items()}
        dense = {
            found[number].kind: time for number, time in least.items() if found[number].backend == "dense"
        }
        right = {kind: loop(*arrays, size_E) for kind, loop in loops.items()}
        for number, program in enumerate(found):
            row = {"rows": rows, "num_experts": experts, "load": load, **program._asdict()}
            del row["fn"]
            row |= dict.fromkeys(("seconds", "flops_per_second", "of_dense", "off", "temporary_bytes"))
            one = compiled[number]
            if isinstance(one, Exception):
                row["problem"] = f"{type(one).__name__}: {one}"[:300]
            elif number in ready:
                memory = one.memory_analysis()
                is_dense = program.backend == "dense"
                row |= {
                    "seconds": least[number],
                    "flops_per_second": flops / least[number],
                    "of_dense": dense[program.kind] / least[number],
                    "off": None if is_dense else distance(ready[number](), right[program.kind]),
                    "temporary_bytes": memory.temp_size_in_bytes if memory else None,
                    "rounds": seconds[number],
                }
            else:
                continue
            table.append(row)
    return table


def run(settings: Settings) -> int:
    """Time every size in turn, print each table when it is done, and keep the file up to date."""
    with bad_input():
        settings.check()
    extra = {name: one for function in load_extra(settings.extra) for name, one in function().items()}
    if settings.json is not None:
        prepare_folder(settings.json.absolute().parent)
    about = environment()
    for private in ("command", "platform"):  # places on this machine, and its kernel
        about.pop(private)
    record = {
        "benchmark": "grouped",
        "date": datetime.date.today().isoformat(),
        **about,
        "clock": timing.CLOCKS[timing.clock_kind()],
        "settings": {name: value for name, value in dataclasses.asdict(settings).items() if name != "json"},
        "rows": [],
    }
    for num_rows, num_experts in read_sizes(settings.sizes):
        table = time_size(settings, extra, num_rows, num_experts)
        widths = f"{settings.d_in} -> {settings.d_out}"
        title = f"{num_rows:,} rows, {num_experts} experts, {widths}, {settings.dtype}"
        show.show(title, table, Console(), COLUMNS)
        for row in table:
            if "problem" in row:
                print(f"{row['kind']} by {row['backend']} {row['tiles']}: {row['problem']}")
        record["rows"] += table
        if settings.json is not None:
            write_json(settings.json, record)
    return 0


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except RunError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
