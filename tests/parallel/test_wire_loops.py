"""How often `collectives` says that something runs, in hand-written programs with loops and fusions."""

import pytest

from switchmoe.parallel.wire import collectives, wire_table

from .hlo_texts import MESH, REDUCE, computation, program


def test_an_async_computation_counts_once():
    inner = computation("async", f"  ROOT %r = f32[2,8] reduce-scatter(%p), dimensions={{0}}, {REDUCE}\n")
    text = program(
        """  %s = ((f32[4,8]), f32[2,8]) async-start(%x), calls=%async
  %u = ((f32[4,8]), f32[2,8]) async-update(%s), calls=%async
  ROOT %d = f32[2,8] async-done(%u), calls=%async
""",
        inner,
    )
    (entry,) = collectives(text, MESH)
    assert (entry.kind, entry.shape, entry.times, entry.axes) == ("reduce-scatter", (4, 8), 1, ("data",))


def test_loops_multiply():
    reduce = f"  %r = f32[4,8] all-reduce(%p), {REDUCE}\n"
    trips = 'backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"5"}}'
    old = 'backend_config="{\\"known_trip_count\\":{\\"n\\":\\"3\\"}}"'
    text = program(
        f"""  %w = f32[4,8] while(%x), condition=%cond, body=%outer, {old}
  %v = f32[4,8] while(%w), condition=%never, body=%endless
  %b = f32[4,8] conditional(%q, %v, %v), true_computation=%yes, false_computation=%no
  %o = f32[4,8] conditional(%i, %b), branch_computations={{%only}}
  %f = f32[4,8] fusion(%v), kind=kLoop, calls=%fused
  %g = f32[4,8] fusion(%f), kind=kLoop, calls=%fused
""",
        computation("inner", reduce.replace("%r", "%in_inner"))
        + computation("cond", "  ROOT %t = pred[] constant(true)\n")
        + computation("never", reduce.replace("%r", "%in_condition"))
        + computation("outer", f"  %w = f32[4,8] while(%p), condition=%cond, body=%inner, {trips}\n")
        + computation("endless", reduce.replace("%r", "%in_endless"))
        + computation("yes", reduce.replace("%r", "%in_branch"))
        + computation("only", reduce.replace("%r", "%in_only_branch"))
        + computation("no", "  ROOT %n = f32[4,8] negate(%p)\n")
        + computation("fused", reduce.replace("%r", "%in_fused"))
        + computation("unused", reduce.replace("%r", "%in_unused")),
    )
    entries = collectives(text, MESH)
    assert {entry.name: (entry.times, entry.times_known) for entry in entries} == {
        "in_inner": (15, True),
        "in_condition": (2, False),
        "in_endless": (1, False),
        "in_branch": (1, False),
        "in_only_branch": (1, True),
        "in_fused": (2, True),
    }
    assert "1? x 128 bytes" in str(next(entry for entry in entries if entry.name == "in_endless"))
    totals = wire_table(entries).splitlines()  # 15 + 2 + 1 + 1 + 1 + 2 runs of 2 * 128 / 2 bytes
    assert totals[1].split() == ["all-reduce", "data", "2", "6", "22", "2,816"]


@pytest.mark.parametrize(
    "start, limit, step, times, known",
    [(0, 4, 1, 4, True), (2, 9, 3, 3, True), (5, 5, 1, 0, True), ("x", 4, 1, 1, False), (0, 4, -1, 1, False)],
)
def test_a_loop_of_jax_form_without_a_note(start, limit, step, times, known):
    """TPU programs lose the note. The loop runs while counter < limit, here handed over in the tuple."""
    carry = "(s32[], f32[4,8], s32[])"
    text = program(
        f"""  %zero = s32[]{{:T(128)}} {"parameter(1)" if start == "x" else f"constant({start})"}
  %start = s32[] copy(%zero)
  %limit = s32[] constant({limit})
  %init = {carry} tuple(%start, %x, %limit)
  %loop = {carry} while(%init), condition=%cond, body=%body
""",
        f"""%cond (c: {carry}) -> pred[] {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%body (c.1: {carry}) -> {carry} {{
  %c.1 = {carry} parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%i.1, %one)
  %p = f32[4,8] get-tuple-element(%c.1), index=1
  %n.1 = s32[] get-tuple-element(%c.1), index=2
  %r = f32[4,8] all-reduce(%p), {REDUCE}
  ROOT %out = {carry} tuple(%next, %r, %n.1)
}}
""",
    )
    found = [(entry.times, entry.times_known) for entry in collectives(text, MESH)]
    assert found == ([(times, known)] if times else [])


def test_what_tpu_programs_fuse():
    """An all-gather beside other work is printed there too; a reduce-scatter is an all-reduce, sliced."""
    gather = (
        "  %all-gather.{0} = bf16[8,8] all-gather(%p), replica_groups=mesh['a'=2,'b'=4] {{'a'}}, "
        'dimensions={{0}}, frontend_attributes={{chain_id="{1}"}}, '
        'backend_config={{"async_collective_fusion_config":{{"flag_start":"-1"}}}}\n'
    )
    text = program(
        """  %async-collective-start = (f32[4,8], u32[]) fusion(%x), kind=kCustom, calls=%f1
  %work = f32[4,8] fusion(%x), kind=kCustom, calls=%f2
  %async-collective-done = f32[8,8] fusion(%x), kind=kCustom, calls=%f3
  %other = f32[8,8] fusion(%x), kind=kCustom, calls=%f4
  %s = f32[2,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone, metadata={op_name="jit(f)/w"}
""",
        "".join(computation(f"f{i}", gather.format(i, "0" if i < 4 else "1")) for i in range(1, 5))
        + computation(
            "all-reduce-scatter.1.clone",
            f"  %r = f32[4,8] all-reduce(%p), {REDUCE}\n"
            "  ROOT %d = f32[2,8] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,8}\n",
        ),
    )
    entries = collectives(text, MESH)
    assert [(entry.kind, entry.name) for entry in entries] == [
        ("all-gather", "all-gather.1"),
        ("all-gather", "all-gather.4"),
        ("reduce-scatter", "r"),
    ]
    assert (entries[2].wire_bytes, entries[2].op_name) == (64, "jit(f)/w")
