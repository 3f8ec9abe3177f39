"""Compile the layer across devices for TPU chips that are not here, and read what they will send.

Question: what does TPU's own compiler send between 8 chips, and does it travel while the experts work?
Command:  python benchmarks/compile_parallel.py [--topology v5e:2x4] [--json FILE]
          It needs libtpu (the extra `tpu`), and no TPU.
Cost:     a minute or two on two CPU cores.
Result:   a table a program, and exit code 1 if it sends anything else than the formulas below, or if nothing
          overlaps where it should. benchmarks/results/*-parallel-tpu-v5e.json

All chips are on the expert axis. A device of n has G groups of T tokens; C seats of each group at each of E
experts. The layer and its gradient send, a device and direction:

    all_to_all         seats to their experts and back           2 * [E, G, C, D] (n-1)/n
    all_gather         tokens to everyone, sums back             2 * [G, T, D] (n-1)
    ragged_all_to_all  rows to their experts and back; how many, no program knows. Where every expert is as
                       popular as the next, 2 * [G*T, D] (n-1)/n; the table counts buffers, which have room
                       for more, as if they were full

Whether a transfer overlaps is read in the order that the compiler gives a chip's instructions: what stands
between the start of an all-to-all and its end can run meanwhile. It is the compiler's plan and not a measured
time, and does not say that a transfer is hidden whole. By default this compiler starts no all-to-all before
it waits for it, and `chunks` brings nothing. With xla_tpu_enable_async_all_to_all ("early") and chunks=2 some
of the eight travel beside products of the other half.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import switchmoe as sm
from switchmoe.parallel import Layout, collectives, make_mesh, stored_as, wire_table

if __package__:  # imported as benchmarks.compile_parallel
    from benchmarks.transfers import D_FF, D_MODEL, EXPERTS, ROWS, TOKENS, Program, problems, read
else:  # beside a script, which finds its neighbours by their own names
    from transfers import D_FF, D_MODEL, EXPERTS, ROWS, TOKENS, Program, problems, read

HERE = Path(__file__).parent
GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
EARLY: dict[str, str | bool] = {"xla_tpu_enable_async_all_to_all": "true"}
PROGRAMS = (
    Program("all_to_all"),
    Program("all_to_all", chunks=2),
    Program("all_to_all", chunks=2, early=True),
    Program("all_gather"),
    Program("ragged_all_to_all"),
)


def topology(name: str) -> Any:
    """Describe TPU chips that are not here."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Without these libtpu asks the machine which TPU it has.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def compile_layer(program: Program, mesh: jax.sharding.Mesh) -> Any:
    """Compile the layer with the gradients for its weights and input, in bfloat16."""
    config = program.config
    layout = Layout(mesh, executor=program.executor, chunks=program.chunks)

    def placed(path, leaf):
        spec = stored_as(layout, path, leaf.ndim) if leaf.ndim == 3 else None  # the router is whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(spec))

    def layer(params, x_BSD):
        y_BSD, aux = sm.parallel.moe(params, x_BSD, config, layout=layout, train=True)
        return y_BSD, sm.aux_loss(aux, config)

    def with_gradient(params, x_BSD, dy_BSD):
        out, pull = jax.vjp(layer, params, x_BSD)
        return out, pull((dy_BSD, jnp.ones_like(out[1])))

    shapes = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config, dtype="bfloat16"))
    params = jax.tree.map_with_path(placed, shapes)
    rows = layout.sharding(layout.batch_spec())
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, D_MODEL), "bfloat16", sharding=rows)
    lowered = jax.jit(with_gradient).lower(params, x, x)
    return lowered.compile(compiler_options=EARLY if program.early else None)


def measure(program: Program, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compile one program, read it, and print what was read."""
    start = time.perf_counter()
    compiled = compile_layer(program, mesh)
    seconds = round(time.perf_counter() - start, 1)
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    row: dict[str, Any] = dict(program=str(program), compile_seconds=seconds, temporary_bytes=temporary)
    row |= read(text, program, mesh)
    print(f"\n{program}: compiled in {seconds} s, {(temporary or 0) / 1e6:.0f} MB of temporaries", end="")
    print(f", {row['kernels']} kernels\n{wire_table(collectives(text, mesh))}")
    form = (
        "bytes of tokens forward {forward_bytes:,}, backward {backward_bytes:,}, by formula {formula_bytes:,}"
    )
    print(form.format(**row), f"of all else {row['other_bytes']:,}", sep="; ", flush=True)
    for direction, numbers in row["beside_all_to_alls"].items():
        if numbers:
            written = ", ".join("-" if number is None else f"{number}" for number in numbers)
            print(f"products of experts beside each all-to-all {direction}: {written}", flush=True)
    return row


def compile_all(name: str, devices: list) -> tuple[dict[str, Any], list[str]]:
    """Compile and read everything; return the record, and what is wrong."""
    mesh = make_mesh(data=1, expert=len(devices), devices=devices)
    git = subprocess.run(GIT, capture_output=True, text=True, cwd=HERE)
    record = {
        "benchmark": "compile_parallel",
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "device": f"{name} ({len(devices)} x {devices[0].device_kind}), compiled for, not run",
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "sizes": dict(
            rows=ROWS, tokens=TOKENS, experts=EXPERTS, d_model=D_MODEL, d_ff=D_FF, dtype="bfloat16"
        ),
        "early": EARLY,
        "programs": [],
    }
    wrong = []
    for program in PROGRAMS:
        row = measure(program, mesh)
        record["programs"].append(row)
        wrong += problems(row, program)
    return record, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x4", help="as libtpu names it (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # for all but the compiling
    try:
        devices = topology(arguments.topology).devices
    except (RuntimeError, NotImplementedError) as error:  # of jax and libtpu, in many lines
        parser.error(f"--topology {arguments.topology}: {str(error).splitlines()[0]}")
    if ROWS // 2 % len(devices) or EXPERTS % len(devices):
        parser.error(
            f"--topology {arguments.topology} has {len(devices)} chips, which do not divide {EXPERTS} "
            f"experts and the {ROWS // 2} rows of a chunk; take 2, 4, 8 or 16."
        )
    record, wrong = compile_all(arguments.topology, devices)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(["", "Not as it should be:", *wrong]) if wrong else "\nAll is sent as it should be.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
