"""The grouped matmul's benchmark: one tiny run as a person would start it, and what it refuses."""

import contextlib
import io
import json
import re
import sys
import textwrap

import jax
import pytest

from benchmarks import grouped, grouped_cases

OUTSIDE = """
    from switchmoe.dispatching.grouped import BACKENDS

    def product(*arrays, **options):
        return -BACKENDS["loop"].product(*arrays, **options)

    def wrong():
        return {"wrong": BACKENDS["loop"]._replace(product=product)}
"""
TINY = ["--sizes", "64:4", "--d-in", "16", "--d-out", "32", "--rounds", "2"]


def run_benchmark(*arguments):
    """Run the command in this process; return its exit code and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "argv", ["grouped.py", *arguments])
        with contextlib.redirect_stdout(said):
            code = grouped.main()
    return code, said.getvalue()


def test_a_tiny_run(tmp_path):
    """A wrong backend from outside, blocks and dense, at both loads: what is wrong is seen to be off."""
    (tmp_path / "outside_grouped.py").write_text(textwrap.dedent(OUTSIDE))
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster, and no time is looked at
    file = tmp_path / "new" / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        outside = ["--extra", "outside_grouped:wrong", "--backends", "blocks"]
        code, printed = run_benchmark(*TINY, "--json", str(file), *outside)
    jax.config.update("jax_disable_most_optimizations", False)
    record = json.loads(file.read_text())
    rows = {(row["load"], row["backend"], row["kind"]): row for row in record["rows"]}
    kinds = ("product", "back", "to weights")
    assert code == 0 and record["versions"]["jax"] == jax.__version__ and record["device"]
    assert set(rows) == {
        (load, name, kind)
        for load in ("fair", "unfair")
        for name in ("dense", "blocks", "wrong")
        for kind in kinds
    }
    for (load, name, kind), row in rows.items():
        dense = rows[load, "dense", kind]
        assert row["seconds"] == min(row["rounds"]) and len(row["rounds"]) == 2
        assert row["flops_per_second"] == 2 * 64 * 16 * 32 / row["seconds"]
        assert row["of_dense"] == dense["seconds"] / row["seconds"]
        if name == "blocks":
            assert row["off"] < 1e-5
        if name == "wrong":  # twice the norm away, where its sign is turned around
            assert row["off"] == pytest.approx(0.0 if kind == "to weights" else 2.0)
    assert re.search(r"64 rows, 4 experts, 16 -> 32, float32\nproduct +load +backend +tiles +ms", printed)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sizes", "4096"], "The size '4096' is not TOKENS:EXPERTS; write it like 4096:8."),
        (["--d-in", "0"], "d_in is 0, but must be at least 1."),
        (["--dtype", "float8"], "dtype='float8' is not known; use float32 or bfloat16."),
        (["--backends", "bloks"], "matmul='bloks' is not known; did you mean 'blocks'.*"),
        (["--backends", "mosaic_gpu"], "matmul='mosaic_gpu' can't run here: .*"),
        (["--sweep"], "There is nothing to sweep: its kernels are for NVIDIA GPUs, not cpu; .*"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(grouped, "draw", lambda *_: pytest.fail("something ran"))
    monkeypatch.setattr(sys, "argv", ["grouped.py", *arguments])
    assert grouped.main() == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {sentence}\n", said), said


def test_a_sweep_has_each_kind_once_a_tile_and_only_tiles_that_fit():
    found = grouped_cases.swept_products(1024, 4096)
    names = [(program.kind, program.tiles) for program in found]
    assert len(set(names)) == len(names)
    assert {kind for kind, _ in names} == {"product", "back", "to weights"}
    assert (
        "back",
        "128x128x64x4x16",
    ) not in names  # sixteen strips of 128 are 2,048 columns, and it has 1,024
    assert ("product", "128x128x64x4x16") in names
