"""How benchmarks/compile_parallel.py reads compiled programs, on small ones written by hand, without libtpu.

A device of 8 has G=4 groups of 1024 tokens, E=64 experts with C=20 seats each, D=1024, F=4096. A product of
all seats, 64 * 4 * 20 = 5120, with matrices of experts is 2 * 5120 * D * F FLOPs, a chunk's half of that.
"""

import re
import sys
from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh

from benchmarks import compile_parallel, overlap, transfers
from benchmarks.compile_parallel import PROGRAMS
from benchmarks.transfers import Program
from switchmoe.parallel import EXECUTORS
from switchmoe.parallel.hlo import read_module

MESH = AbstractMesh((1, 1, 8, 1), ("data", "fsdp", "expert", "tensor"))
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
FORWARD, BACKWARD = "jit(f)/jvp()/all_to_all", "jit(f)/transpose(jvp())/all_to_all"
BATCH = "size=8 stride=7 lhs_dilate=8"  # how a convolution has a batch of 8
CHUNK = "bf16[64,2,20,1024]"  # the seats of two groups
# The products of a layer: a chunk's with its experts, the same for weights' gradient, and the router's.
FUSIONS = """
%experts (s: bf16[8,320,1024], w: bf16[8,1024,4096]) -> bf16[8,320,4096] {
  %s = bf16[8,320,1024]{2,1,0} parameter(0)
  %w = bf16[8,1024,4096]{2,1,0} parameter(1)
  %c = bf16[8,320,4096]{2,1,0} convolution(%s, %w), window={BATCH}, dim_labels=0bf_0io->0bf
  ROOT %m = bf16[8,320,4096]{2,1,0} maximum(%c, %c)
}

%router (x: f32[4,1024,1024], r: f32[1024,64,1]) -> f32[4,1024,64] {
  %x = f32[4,1024,1024]{2,1,0} parameter(0)
  %r = f32[1024,64,1]{2,1,0} parameter(1)
  ROOT %l = f32[4,1024,64]{2,1,0} convolution(%x, %r), window={size=1}, dim_labels=0bf_io0->0bf
}
""".replace("BATCH", BATCH)
PRODUCT = "  %p{} = bf16[8,320,4096]{{2,1,0}} fusion(%a, %a), kind=kOutput, calls=%experts\n"
SMALL = "  %q = f32[4,1024,64]{2,1,0} fusion(%a, %a), kind=kOutput, calls=%router\n"
ONE = 2 * 8 * 320 * 1024 * 4096


def program(body, scheduled="true"):
    return (
        f"HloModule f, is_scheduled={scheduled}, num_partitions=8\n{FUSIONS}\n"
        f"ENTRY %main (a: {CHUNK}) -> {CHUNK} {{\n  %a = {CHUNK}{{3,2,1,0}} parameter(0)\n{body}}}\n"
    )


def start(name, op_name=FORWARD):
    types = f"(({CHUNK}{{3,2,1,0}}), {CHUNK}{{3,2,1,0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}})"
    return f'  %{name} = {types} all-to-all-start(%a), {GROUPS}, metadata={{op_name="{op_name}"}}\n'


def done(name, op_name=FORWARD):
    return f'  %{name}.d = {CHUNK}{{3,2,1,0}} all-to-all-done(%{name}), metadata={{op_name="{op_name}"}}\n'


def whole(name, op_name=FORWARD, shape=CHUNK):
    return f'  %{name} = {shape}{{3,2,1,0}} all-to-all(%a), {GROUPS}, metadata={{op_name="{op_name}"}}\n'


def test_products_between_start_and_end_count_and_no_others():
    product = [PRODUCT.format(i) for i in range(4)]
    text = program(
        product[0]
        + (start("t1") + product[1] + start("t2", BACKWARD) + product[2] + SMALL + done("t1"))
        + (product[3] + done("t2", BACKWARD) + whole("t3"))
    )
    router = 2 * 4 * 1024 * 64 * 1024
    assert overlap.all_to_alls(text) == [
        ("t1", FORWARD, True, (ONE, ONE, router)),
        ("t2", BACKWARD, True, (ONE, router, ONE)),
        ("t3", FORWARD, False, ()),
    ]
    early = Program("all_to_all", chunks=2, early=True)
    assert transfers.list_overlaps(text, early, 8) == {"forward": [2, None], "backward": [2]}


def test_an_order_that_means_nothing_is_not_read():
    with pytest.raises(ValueError, match="is not scheduled, so the order of its lines means nothing"):
        overlap.all_to_alls(program(whole("t"), scheduled="false"))


@pytest.mark.parametrize(
    ("types", "operation", "flops"),
    [
        # A batch of 8, as a dilated dimension of space; with the matrix turned round; a gradient of weights.
        ("8,640,1024 8,1024,4096 8,640,4096", "0bf_0io->0bf BATCH", 8 * 640 * 1024 * 4096),
        ("8,640,4096 8,1024,4096 8,640,1024", "0bf_0oi->0bf BATCH", 8 * 640 * 1024 * 4096),
        ("8,640,1024 8,640,4096 8,1024,4096", "0fb_0io->0bf BATCH", 8 * 640 * 1024 * 4096),
        # A dimension of space that is summed over, alone and beside a batch.
        ("4,1024,1024 4,1024,64 1024,64,1", "0fb_0io->bf0 size=4", 4 * 1024 * 1024 * 64),
        ("8,3,5,7 8,3,7,9 8,1,5,9", "01bf_01io->01bf size=8x3 stride=7x1 lhs_dilate=8x1", 8 * 5 * 9 * 7 * 3),
        ("5,7 7,9 5,9", "dot", 5 * 7 * 9),
    ],
)
def test_flops_of_a_product(types, operation, flops):
    lhs, rhs, result = (f"bf16[{dims}]{{}}" for dims in types.split())
    labels, *window = operation.replace("BATCH", BATCH).split()
    how = f"convolution(%x, %w), window={{{' '.join(window)}}}, dim_labels={labels}"
    if operation == "dot":
        how = "dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    lines = f"  %x = {lhs} parameter(0)\n  %w = {rhs} parameter(1)\n  %y = {result} {how}\n"
    text = f"ENTRY %f () -> f32[] {{\n{lines}}}\n"
    module = read_module(text)
    computation = module.computations["f"]
    assert overlap.product_flops(module, computation, computation.get("y")) == [2 * flops]
    assert overlap.product_flops(module, computation, computation.get("x")) == []


def test_what_each_program_should_send():
    """Bytes of one direction, by hand: 7 of 8 parts leave the device, there and back."""
    seats, rows = 64 * 4 * 20 * 1024 * 2, 4 * 1024 * 1024 * 2
    numbers = {str(program): transfers.expected(program, 8) for program in PROGRAMS}
    assert numbers == {
        "all_to_all": ({"all-to-all": 4}, 2 * seats * 7 // 8),
        "all_to_all, chunks=2": ({"all-to-all": 8}, 2 * seats * 7 // 8),
        "all_to_all, chunks=2, early": ({"all-to-all": 8}, 2 * seats * 7 // 8),
        "all_gather": ({"all-gather": 2, "reduce-scatter": 2}, 2 * rows * 7),
        "ragged_all_to_all": ({"ragged-all-to-all": 4}, 2 * rows * 7 // 8),
    }
    assert {program.executor for program in PROGRAMS} == set(EXECUTORS)


EARLY = Program("all_to_all", chunks=2, early=True)
TRAVELS = [(f"t{i}", FORWARD if i < 4 else BACKWARD) for i in range(8)]


def check(text, program):
    return transfers.problems(transfers.read(text, program, MESH), program)


def test_a_program_as_it_should_be_has_no_problem():
    small = whole("s", shape="s32[64,2,20,1]").replace("(%a)", "(s32[64,2,20,1]{3,2,1,0} %b)")
    body = "".join(start(*t) + PRODUCT.format(i) + done(*t) for i, t in enumerate(TRAVELS)) + small
    row = transfers.read(program(body), EARLY, MESH)
    assert row["forward_bytes"] == row["backward_bytes"] == row["formula_bytes"] == 18_350_080
    assert row["collectives"] == {"all-to-all": 9} and row["other_bytes"] == 64 * 2 * 20 * 4 * 7 // 8
    assert row["bytes_by_kind"] == {"all-to-all": 2 * 18_350_080 + row["other_bytes"]}
    assert row["beside_all_to_alls"] == {"forward": [1] * 4 + [None], "backward": [1] * 4}
    assert transfers.problems(row, EARLY) == []


def test_what_is_wrong_is_said():
    in_order = "".join(start(*t) + done(*t) + PRODUCT.format(i) for i, t in enumerate(TRAVELS))
    assert check(program(in_order), EARLY) == [f"{EARLY}: has no product of an expert beside an all-to-all"]
    assert check(program(in_order), EARLY._replace(early=False)) == []
    alike = program("".join(whole(*t) for t in TRAVELS))  # as many bytes
    said = "all_to_all: sends tokens by {'all-to-all': 8} and not {'all-to-all': 4}"
    assert check(alike, Program("all_to_all")) == [said] and len(check(alike, EARLY)) == 1
    fewer = program("".join(whole(*t) for t in TRAVELS[:7]))
    assert check(fewer, EARLY._replace(early=False)) == [
        "all_to_all, chunks=2: sends tokens by {'all-to-all': 7} and not {'all-to-all': 8}",
        "all_to_all, chunks=2: sends 13,762,560 bytes backward, and by the formula it is 18,350,080",
    ]


def test_a_dropless_program_has_its_own_transfer_and_kernels():
    """Rows go there in [4096, D] and come back from a buffer with room for 8 times as many, twice."""
    ragged = Program("ragged_all_to_all")
    small, large = "bf16[4096,1024]{1,0}", "bf16[32768,1024]{1,0}"
    rows = [(o, *sizes) for o in (FORWARD, BACKWARD) for sizes in ((small, large), (large, small))]
    lines = [
        f'  %t{i} = {to} ragged-all-to-all({of} %b, {to} %c), {GROUPS}, metadata={{op_name="{op_name}"}}\n'
        for i, (op_name, of, to) in enumerate(rows)
    ]
    kernels = 6 * '  %k = bf16[8]{0} custom-call(), custom_call_target="tpu_custom_call"\n'
    assert check(program("".join(lines) + kernels), ragged) == []
    assert check(program("".join(lines)), ragged) == [f"{ragged}: calls 0 kernels for 6 products"]
    assert len(check(program("".join(lines[:2]) + kernels), ragged)) == 2  # too few, no bytes backward
    seats = program("".join(whole(*t) for t in TRAVELS[2:6]) + kernels)
    said = f"{ragged}: sends tokens by {{'all-to-all': 4}} and not {{'ragged-all-to-all': 4}}"
    assert check(seats, ragged)[0] == said


@pytest.mark.parametrize(
    ("chips", "sentence"),
    [
        (None, "--topology v9: No such chips."),
        (64, "--topology v9 has 64 chips, which do not divide 64 experts and the 16 rows of a chunk; .*16."),
    ],
)
def test_chips_that_cannot_be_are_one_sentence_before_anything_compiles(chips, sentence, monkeypatch, capsys):
    def topology(name):
        if chips is None:
            raise RuntimeError("No such chips.\nAnd a trace.")
        return SimpleNamespace(devices=[None] * chips)

    monkeypatch.setattr(compile_parallel, "topology", topology)
    monkeypatch.setattr(compile_parallel, "compile_all", lambda *_: pytest.fail("something was compiled"))
    monkeypatch.setattr(sys, "argv", ["compile_parallel.py", "--topology", "v9"])
    with pytest.raises(SystemExit, match="2"):
        compile_parallel.main()
    assert re.search(f"error: {sentence}\n$", capsys.readouterr().err)
