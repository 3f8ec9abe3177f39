"""Compile dropless experts for an accelerator that is not here, and count what the programs do.

Question: does any platform's grouped matmul pay for all experts at every token?
Command:  python benchmarks/compile_grouped.py --platform tpu|h100 [--all] [--json FILE]
          `tpu` needs libtpu (the extra of that name), `h100` jax's CUDA plugin (`gpu`), and neither a driver.
Cost:     a minute or two on two CPU cores, with --all (the other backends too) four.
Result:   a table, and exit code 1 if what matmul=None takes does too much. benchmarks/results/compile-*.json

One product of all rows with [D, F] weights is the unit: a product needs 1, its gradient 2, a layer 2, and 6
with its gradient. "work" is the compiler's own count for TPU, in which a kernel counts as what its author
declares; for a GPU there is none, and "work" adds up the products outside of kernels, where a loop counts as
one turn ("blocks" is such a loop). "largest" is the largest of these: of a dense masked product it is E, and
where there are loops it must be a small part of the rows. "array" is the largest array over one of [E, R, D].
A kernel's real work is the tiles it visits, counted below over random numbers of rows an expert.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import switchmoe as sm
from switchmoe.dispatching.grouped import BACKENDS, Backend
from switchmoe.dispatching.grouped_matmul import choose_backend

if __package__:  # imported as benchmarks.compile_grouped
    from benchmarks import hlo, tiles
else:  # beside a script, which finds its neighbours by their own names
    import hlo
    import tiles

HERE = Path(__file__).parent
GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
ROWS, EXPERTS, D_MODEL, D_FF = 16384, 64, 1024, 4096
CONFIG = sm.MoEConfig(d_model=D_MODEL, d_ff=D_FF, num_experts=EXPERTS, dispatch="dropless")
PLATFORMS = {"tpu": "tpu", "h100": "cuda"}  # as jax calls them
MOST_WORK = 1.1  # times what is needed
MOST_TURN = 4 / EXPERTS  # of all rows' work, for one product where there are loops
MOST_TILES = 1.5  # times the ideal, on average over random numbers of rows


class Program(NamedTuple):
    """A program to compile, and how many products of all rows it needs."""

    name: str
    backend: str
    dtype: str
    fn: Callable[..., Any]
    args: tuple
    needs: int


def topology(platform: str) -> Any:
    """Describe devices that are not here: a v5e of four chips, or one H100."""
    if platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # Without these libtpu asks the machine which TPU it has.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    config = (HERE / "h100.target_config.pbtxt").read_text()
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)


def layer(params, x_TD):
    """Send every token through a dropless layer."""
    y_TD, aux = sm.moe(params, x_TD, CONFIG, train=True)
    return y_TD, sm.aux_loss(aux, CONFIG)


def with_gradient(params, x_TD):
    """Return the layer's output and the gradients for its weights and input."""
    out, pull = jax.vjp(layer, params, x_TD)
    return out, pull(jax.tree.map(jnp.ones_like, out))


def gradient(backend: Backend, x_RI, w_EIO, size_E, g_RO):
    """Return the two products that the gradient of one is."""
    dx_RI = backend.product(g_RO, w_EIO, size_E, transpose_w=True)
    return dx_RI, backend.weight_gradient(x_RI, g_RO, size_E)


def list_programs(platform: str, device: Any, others: bool) -> Iterator[Program]:
    """List the layer and its matmuls with the backend that None takes, then with the others in bfloat16."""

    def like(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    backends = [("None", dtype) for dtype in ("bfloat16", "float32")]
    if others:
        backends += [(name, "bfloat16") for name in BACKENDS if name != "loop"]
    for name, dtype in backends:
        x, w = like(dtype, ROWS, D_MODEL), like(dtype, EXPERTS, D_MODEL, D_FF)
        if name == "None":
            shapes = jax.eval_shape(partial(sm.init_moe, config=CONFIG, dtype=dtype), jax.random.key(0))
            params = jax.tree.map(lambda leaf: like(leaf.dtype, *leaf.shape), shapes)
            yield Program("layer", name, dtype, layer, (params, x), 2)
            yield Program("layer and gradient", name, dtype, with_gradient, (params, x), 6)
        elif BACKENDS[name].available(PLATFORMS[platform]):
            continue
        backend = choose_backend(None) if name == "None" else BACKENDS[name]
        size, g = like("int32", EXPERTS), like(dtype, ROWS, D_FF)
        yield Program("product", name, dtype, backend.product, (x, w, size), 1)
        yield Program("gradient", name, dtype, partial(gradient, backend), (x, w, size, g), 2)


def measure(platform: str, program: Program) -> dict[str, Any]:
    """Compile one program and count."""
    compiled = jax.jit(program.fn).lower(*program.args).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    one = 2 * ROWS * D_MODEL * D_FF
    products = hlo.products(text)
    return {
        "program": program.name,
        "backend": program.backend,
        "dtype": program.dtype,
        "needs": program.needs,
        "work": ((compiled.cost_analysis() or {})["flops"] if platform == "tpu" else sum(products)) / one,
        "largest": max(products, default=0) / one,
        "kernels": hlo.kernels(text),
        "loops": text.count(" while("),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "array": hlo.largest_array(text) / (EXPERTS * ROWS * D_MODEL),
    }


def problems(platform: str, row: dict[str, Any]) -> list[str]:
    """Say what a program does too much of."""
    found = []
    if row["work"] > MOST_WORK * row["needs"]:
        found.append(f"does {row['work']:.2f} products and needs {row['needs']}")
    if row["largest"] > (MOST_TURN if row["loops"] else MOST_WORK):
        where = "a loop, and " if row["loops"] else ""
        found.append(f"has {where}a product of {row['largest']:.1f} times all rows' work")
    if row["array"] >= 1:
        found.append(f"holds an array of {row['array']:.1f} times [E, R, D]")
    if row["kernels"] != row["needs"] and (platform == "tpu" or row["dtype"] == "bfloat16"):
        found.append(f"calls {row['kernels']} kernels for {row['needs']} products")
    return [f"{row['program']}, {row['dtype']}: {problem}" for problem in found]


def count_tiles(platform: str, draws: int = 100) -> list[dict[str, Any]]:
    """Count the rows of the tiles that the platform's kernels visit, over the rows there are."""
    visited = tiles.rows_visited_by_megablox if platform == "tpu" else tiles.rows_visited_by_mosaic_gpu
    rows = []
    for kernel in ("product", "weight_gradient"):
        count = jax.jit(jax.vmap(partial(visited, num_rows=ROWS, kernel=kernel)))
        for sizes, size_NE in tiles.draw_sizes(draws, ROWS, EXPERTS).items():
            over = np.asarray(count(size_NE)) / ROWS
            rows.append(dict(kernel=kernel, sizes=sizes, mean=float(over.mean()), most=float(over.max())))
    return rows


def compile_all(platform: str, others: bool) -> tuple[dict[str, Any], list[str]]:
    """Compile and count everything, printing a line each; return the record, and what does too much."""
    device = topology(platform).devices[0]
    git = subprocess.run(GIT, capture_output=True, text=True, cwd=HERE)
    record = {
        "benchmark": "compile_grouped",
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "device": f"{platform} ({device.device_kind}), compiled for, not run",
        "jax": jax.__version__,
        "sizes": dict(rows=ROWS, experts=EXPERTS, d_model=D_MODEL, d_ff=D_FF),
        "programs": [],
        "tiles": count_tiles(platform),
    }
    wrong = []
    form = "{program:20}{backend:12}{dtype:10}{needs:>6}{work:>8}{largest:>9}{kernels:>9}{array:>7}{temp:>9}"
    headings = ("program", "backend", "dtype", "needs", "work", "largest", "kernels", "array")
    print(form.format(temp="temp MB", **dict(zip(headings, headings, strict=True))))
    for program in list_programs(platform, device, others):
        # jax's Hopper kernel asks the first device for its number of cores: let it see the H100.
        with mock.patch("jax.devices", lambda *_: [device]):
            row = measure(platform, program)
        record["programs"].append(row)
        written = {name: f"{row[name]:.2f}" for name in ("work", "largest", "array")}
        print(form.format(**row | written, temp=f"{(row['temporary_bytes'] or 0) / 1e6:.1f}"), flush=True)
        wrong += problems(platform, row) if program.backend == "None" else []
    for row in record["tiles"]:
        print("tiles visited over ideal, {kernel}, {sizes}: mean {mean:.3f}, most {most:.3f}".format(**row))
        if row["mean"] > MOST_TILES:
            wrong.append(f"{row['kernel']} visits {row['mean']:.2f} times the ideal tiles ({row['sizes']})")
    return record, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=PLATFORMS, required=True)
    parser.add_argument("--all", action="store_true", help="the other backends too, to compare")
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # for all but the compiling
    record, wrong = compile_all(arguments.platform, arguments.all)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(["", "Too much:", *wrong]) if wrong else "\nNothing does more than it should.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
