"""What `collectives` reads in hand-written programs, with the answers worked beside them."""

import itertools

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from switchmoe.parallel.hlo import ArrayShape
from switchmoe.parallel.replica_groups import read_groups, spanned_axes
from switchmoe.parallel.wire import collectives

from .hlo_texts import MESH, REDUCE, program

BY_EXPERT = ((0, 1, 2, 3), (4, 5, 6, 7))
BY_DATA = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1,2,3},{4,5,6,7}}", BY_EXPERT),
        ("[2,4]<=[8]", BY_EXPERT),
        ("[4,2]<=[2,4]T(1,0)", BY_DATA),
        ("[1,8]<=[8]", (tuple(range(8)),)),
        ("{}", (tuple(range(8)),)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        # An array [2, 2, 2] of places, transposed: rows of two that differ in the middle digit.
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", BY_EXPERT),
        ("mesh['data'=2,'expert'=4] {'data'}", BY_DATA),
        ("mesh[data=2,expert=4] {data}", BY_DATA),
        ("mesh['data'=2,'expert'=4] {'data','expert'}", (tuple(range(8)),)),
        ("mesh['a'=8] {'a':(1)2}", BY_DATA),  # 8 = [1, 2, 4]
        ("mesh['a'=8] {'a':(2)4}", BY_EXPERT),  # 8 = [2, 4, 1]
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),  # 8 = [2, 2, 2]
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The devices stand as [[0, 4], [1, 5], [2, 6], [3, 7]]: columns, then rows.
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", BY_EXPERT),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", BY_DATA),
    ],
)
def test_every_way_of_writing_groups(text, groups):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert {frozenset(group) for group in read_groups(attributes, 8)} == {
        frozenset(group) for group in groups
    }


def test_pairs_join_the_devices_they_connect():
    ring = ", source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
    assert read_groups(ring, 8) == BY_EXPERT
    assert read_groups(", source_target_pairs={{0,0},{1,5}}", 8) == ((0,), (1, 5))


def test_the_axes_of_every_subset_of_a_mesh():
    names, sizes = ("data", "fsdp", "expert", "tensor"), (2, 1, 3, 2)
    places = np.arange(12).reshape(sizes)
    for count in range(5):
        for subset in itertools.combinations(range(4), count):
            rest = [axis for axis in range(4) if axis not in subset]
            rows = places.transpose([*rest, *subset]).reshape(
                -1, int(np.prod([sizes[axis] for axis in subset]))
            )
            groups = tuple(tuple(int(place) for place in row) for row in rows)
            # fsdp has one device, so nothing ever crosses it.
            expected = tuple(names[axis] for axis in subset if axis != 1)
            assert spanned_axes(groups, dict(zip(names, sizes, strict=True))) == expected


def test_bytes_of_arrays():
    sizes = {
        "f32": 96,
        "bf16": 48,
        "pred": 24,
        "s4": 12,
        "c64": 192,
        "f8e4m3fn": 24,
        "f4e2m1fn": 12,
        "u16": 48,
    }
    assert {dtype: ArrayShape(dtype, (4, 6)).bytes for dtype in sizes} == sizes
    assert ArrayShape("s4", (3,)).bytes == 2 and ArrayShape("f32", ()).bytes == 4


def test_a_merged_all_reduce_has_an_entry_an_operand():
    text = program(
        """  %g = f32[16]{0} multiply(%x, %x), metadata={op_name="jit(f)/experts"}
  %s = f32[] constant(1)
  %all = (f32[16]{0}, f32[], /*index=2*/bf16[4,8]{1,0:T(8,128)(2,1)}) all-reduce(%g, %s, bf16[4,8]{1,0:T(8,128)(2,1)} %y), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/(a:b)"}
  %part = f32[] get-tuple-element(%all), index=1, metadata={op_name="jit(f)/loss"}
"""  # noqa: E501
    )
    entries = collectives(text, MESH)
    assert [(entry.dtype, entry.shape, entry.op_name) for entry in entries] == [
        ("f32", (16,), "jit(f)/experts"),  # from the line that makes it
        ("f32", (), "jit(f)/loss"),  # from the line that takes it out again
        ("bf16", (4, 8), "jit(f)/(a:b)"),  # from the merged one
    ]
    assert {(entry.kind, entry.axes, entry.devices, entry.name) for entry in entries} == {
        ("all-reduce", ("data",), 2, "all")
    }
    assert [entry.axes for entry in collectives(text)] == [None] * 3


@pytest.mark.parametrize(
    "line, kind, sent",
    [
        # x is f32[4,8], 128 bytes, and a group has 4 devices.
        ("f32[4,8] all-to-all(%x), dimensions={0}", "all-to-all", 96),
        ("f32[16,8] all-gather(%x), dimensions={0}", "all-gather", 384),
        ("f32[1,8] reduce-scatter(%x), dimensions={0}, to_apply=%add", "reduce-scatter", 96),
        ("f32[4,8] all-reduce(%x), to_apply=%add", "all-reduce", 192),
        ("f32[4,8] collective-broadcast(%x)", "collective-broadcast", 128),
        # There into a larger array, with room for what may come, and back.
        ("f32[9,8] ragged-all-to-all(%x, %out, %o, %s, %t, %r)", "ragged-all-to-all", 96),
        ("f32[4,8] ragged-all-to-all(%out, %x, %o, %s, %t, %r)", "ragged-all-to-all", 96),
        ("f32[4,8] all-reduce-start(%x), to_apply=%add", "all-reduce", 192),
        ("(f32[4,8], f32[16,8]) all-gather-start(f32[4,8] %x), dimensions={0}", "all-gather", 384),
        ("((f32[4,8]), f32[1,8]) reduce-scatter-start(%x), dimensions={0}", "reduce-scatter", 96),
    ],
)
def test_bytes_on_the_wire(line, kind, sent):
    indices = "".join(f"  %{name} = s32[4]{{0}} constant(0)\n" for name in "ostr")
    start = f"  %out = f32[9,8]{{1,0}} copy(%x)\n{indices}  %c = {line}, replica_groups=[2,4]<=[8]\n"
    end = f"  %d = f32[4,8] {kind}-done(%c)\n" if "-start(" in line else ""
    (entry,) = collectives(program(start + end), MESH)
    assert (entry.kind, entry.axes, entry.devices, entry.bytes) == (kind, ("expert",), 4, 128)
    assert (entry.wire_bytes, entry.total_wire_bytes) == (sent, sent)


def test_permutations_and_the_pieces_of_an_all_to_all():
    permute = "(f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs="
    (entry,) = collectives(program(f"  %c = {permute}{{{{0,4}},{{4,0}}}}\n"), MESH)
    assert (entry.kind, entry.axes, entry.wire_bytes) == ("collective-permute", ("data",), 128)
    (entry,) = collectives(program(f"  %c = {permute}{{{{0,0}},{{1,1}}}}\n"), MESH)
    assert (entry.axes, entry.devices, entry.wire_bytes) == ((), 1, 0)

    pieces = "".join(f"  %s{i} = f32[2,3]{{1,0}} slice(%x), slice={{[{i}:{i + 1}]}}\n" for i in range(4))
    line = "  %a = (f32[2,3], f32[2,3], f32[2,3], f32[2,3]) all-to-all(%s0, %s1, %s2, %s3), replica_groups="
    (entry,) = collectives(program(f"{pieces}{line}[2,4]<=[8]\n"), MESH)
    assert (entry.shape, entry.bytes, entry.wire_bytes) == ((4, 2, 3), 96, 72)


def test_text_that_cannot_be_read():
    with pytest.raises(ValueError, match="no ENTRY computation; pass jax.jit"):
        collectives("module @jit_f { func.func public @main() }")
    one = program(f"  %r = f32[4,8] all-reduce(%x), {REDUCE}\n")
    with pytest.raises(ValueError, match="for 8 devices, but mesh has 4; pass the mesh"):
        collectives(one, AbstractMesh((4,), ("data",)))
    with pytest.raises(ValueError, match="No replica_groups"):
        collectives(one.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups=new(1)"))
    with pytest.raises(ValueError, match="does not say how many"):
        collectives(one.replace("{{0,4},{1,5},{2,6},{3,7}}", "{}").replace(", num_partitions=8", ""))
    with pytest.raises(ValueError, match="'%y' of 'main' is not one array"):
        collectives(one.replace("all-reduce(%x)", "all-reduce(%y)"))
    assert collectives(program("  ROOT %y = f32[4,8] negate(%x)\n"), MESH) == []
