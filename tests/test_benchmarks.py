"""The layer benchmark: one tiny run as a person would start it, what it writes, and what it refuses."""

import contextlib
import functools
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import get_args

import jax
import pytest

import switchmoe as sm
from benchmarks import cases, layer, timing
from benchmarks.settings import Settings

TINY = ["--sizes", "64:4", "--d-model", "8", "--d-ff", "16", "--rounds", "2", "--factors", "1.25"]
EXTRA = """
    import jax

    def double(case):
        run = jax.jit(lambda x: 2 * x)
        return [("double", run, (case.x_TD,)), ("plain", lambda: case.x_TD, (), "double")]
"""


def run_benchmark(*arguments):
    """Run the command in this process; return its exit code and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "argv", ["layer.py", *arguments])
        with contextlib.redirect_stdout(said):
            code = layer.main()
    return code, said.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What one tiny run printed and wrote, and its rows by name and capacity factor."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "outside_moe.py").write_text(textwrap.dedent(EXTRA))
    file = folder / "new" / "tiny.json"
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster, and no time is looked at
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        outside = ["--extra", "outside_moe:double"]
        code, printed = run_benchmark(*TINY, "--modes", "gradient", "--json", str(file), *outside)
    jax.config.update("jax_disable_most_optimizations", False)
    record = json.loads(file.read_text())
    rows = {(row["name"], row["capacity_factor"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"])
    return code, printed, record, rows


def test_the_file_says_what_was_timed_and_where(tiny):
    code, _, record, _ = tiny
    assert code == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert record["versions"]["jax"] == jax.__version__ and record["device"] and "commit" in record
    assert record["clock"] == timing.CLOCKS["cpu"]
    assert record["settings"]["sizes"] == ["64:4"] and record["settings"]["activation"] == "relu"
    assert str(Path(__file__).parents[1]) not in json.dumps(record)  # no place on this machine


def test_every_program_has_its_row(tiny):
    *_, rows = tiny
    whole = {("dense", None), ("dropless", None), ("routing, sorted", None), ("bare experts", 1.0)}
    names = ("bare experts", "gather", "einsum", "routing, slots", "double", "plain")
    assert set(rows) == whole | {(name, 1.25) for name in names}


def test_ratios_and_counts_of_a_row(tiny):
    """64 tokens, 4 experts, D=8, F=16: at factor 1.25 an expert has 20 seats, 80 in all."""
    *_, rows = tiny
    row = rows["gather", 1.25]
    assert row["seconds"] == min(row["rounds"]) and len(row["rounds"]) == 2
    assert row["to_dense"] == row["seconds"] / rows["dense", None]["seconds"]
    assert row["to_bare"] == row["seconds"] / rows["bare experts", 1.25]["seconds"]
    assert row["routing_share"] == rows["routing, slots", 1.25]["seconds"] / row["seconds"]
    assert row["temporary_bytes"] > 0 and 0 <= row["dropped_fraction"] < 1
    router, expert = 8 * 4, 2 * 8 * 16
    assert row["useful_flops"] == 3 * 2 * 64 * (router + expert)
    assert row["executed_flops"] == 3 * 2 * (64 * router + 80 * expert)
    assert rows["dense", None]["useful_flops"] == 3 * 2 * 64 * expert
    assert rows["bare experts", 1.25]["executed_flops"] == 3 * 2 * 80 * expert
    dropless = rows["dropless", None]
    assert dropless["dropped_fraction"] == 0
    assert dropless["to_bare"] == dropless["seconds"] / rows["bare experts", 1.0]["seconds"]


def test_outside_programs_are_timed_in_the_same_rounds(tiny):
    *_, rows = tiny
    double, plain = (rows[name, 1.25] for name in ("double", "plain"))
    assert double["to_dense"] == double["seconds"] / rows["dense", None]["seconds"]
    assert double["temporary_bytes"] is not None and plain["temporary_bytes"] is None
    assert plain["to_dense"] == plain["seconds"] / double["seconds"]  # against its own


def test_the_table_has_a_line_a_row(tiny):
    _, printed, record, _ = tiny
    assert "64 tokens, 4 experts, top-1, gradient" in printed
    assert re.search(r"implementation +capacity +ms +to dense +to bare +useful GF", printed)
    assert len(re.findall(r"(?m)^(dense|bare|gather|einsum|dropless|routing|double|plain)", printed)) == len(
        record["rows"]
    )
    line = re.search(r"(?m)^gather +1\.25 .*$", printed)
    assert line and re.search(r" \d+\.\d\d +\d+\.\d{3} .*\d\.\d\d% +\d+\.\d +\d+\.\d\d%$", line[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", "4096x8"], "The size '4096x8' is not TOKENS:EXPERTS; write it like 4096:8."),
        (["--sizes", "0:8"], "The size '0:8' is not TOKENS:EXPERTS; write it like 4096:8."),
        (["--rounds", "0"], "rounds is 0, but must be at least 1."),
        (["--dtype", "float8"], "dtype='float8' is not known; use float32 or bfloat16."),
        (["--top-k", "5", "--sizes", "64:4"], "num_experts=4 is less than top_k=5: .*"),
        (["--factors", "-1"], r"capacity_factor is -1\.0, but must be a finite number above 0; .*"),
        (["--matmuls", "bloks"], "matmul='bloks' is not known; did you mean 'blocks'.*"),
        (["--extra", "no_such_module:f"], "--extra no_such_module:f can't be loaded .*on PYTHONPATH."),
        (["--extra", "json"], "--extra json can't be loaded .*module:function, .*"),
        (["--json", "setup.cfg/x.json"], "the run folder .* can't be written .*"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(cases, "draw_case", lambda *_, **__: pytest.fail("something ran"))
    monkeypatch.setattr(sys, "argv", ["layer.py", *arguments])
    assert layer.main() == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {sentence}\n", said), said


def test_the_one_hot_table_is_left_out_where_it_is_large():
    """4 * T * E * C bytes: 4096 tokens at factor 1.25 are 84 MB, four times as many tokens 1.3 GB."""
    small, large = shapes(4096, 64), shapes(4 * 4096, 64)
    assert cases.table_bytes(small) <= cases.LARGEST_TABLE_BYTES < cases.table_bytes(large)


def test_dispatch_names_are_the_configs():
    assert set(Settings().dispatches) == set(cases.DISPATCHES) >= {"gather", "einsum", "dropless"}


def test_rounds_are_interleaved_and_turn_around(monkeypatch):
    """Three rounds of two programs: forwards, backwards, forwards; before them two calls of each."""
    called = []
    monkeypatch.setitem(timing.LEAST_SECONDS, "cpu", 0.0)  # one call a measurement
    seconds = timing.time_together({name: functools.partial(called.append, name) for name in "ab"}, rounds=3)
    assert "".join(called) == "aabb" + "ab" + "ba" + "ab"
    assert all(len(rounds) == 3 for rounds in seconds.values())


def test_forward_alone_has_a_third_of_the_flops():
    code, printed = run_benchmark(*TINY, "--modes", "forward", "--dispatches", "gather")
    assert code == 0 and "top-1, forward" in printed
    forward, gradient = (cases.layer(shapes(64, 4, mode=mode), "gather") for mode in get_args(cases.Mode))
    assert 3 * forward.useful == gradient.useful and 3 * forward.executed == gradient.executed


def shapes(tokens, num_experts, mode="gradient", d_model=8, d_ff=16, factor=1.25):
    """A case that can be compiled, without numbers in its arrays."""
    config = sm.MoEConfig(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
    params = jax.eval_shape(lambda: sm.init_moe(jax.random.key(0), config))
    x_TD = jax.ShapeDtypeStruct((tokens, d_model), "float32")
    return cases.Case(tokens, num_experts, d_model, d_ff, 1, "relu", mode, factor, params, x_TD, x_TD)


def test_gathers_memory_does_not_grow_with_experts():
    """At the benchmark's widths: scratch at E=64 within 1.2 of E=8, and no array as large as [T, E, C]."""
    scratch = {}
    for num_experts in (8, 64):
        case = shapes(4096, num_experts, d_model=512, d_ff=2048)
        program = cases.layer(case, "gather").contender
        compiled = program.fn.lower(*program.args).compile()
        scratch[num_experts] = compiled.memory_analysis().temp_size_in_bytes
        sizes = {
            math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", compiled.as_text())
        }
        weights = num_experts * case.d_model * case.d_ff
        assert weights in sizes
        assert max(sizes - {weights}) < case.tokens * num_experts * case.seats
    assert scratch[64] <= 1.2 * scratch[8]
