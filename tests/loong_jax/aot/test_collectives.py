"""Collectives in programs: what is asynchronous, what runs meanwhile, over which axis."""

import pytest

from loong_jax.aot.collectives import collectives_of, permute_overlaps, traffic_of
from loong_jax.aot.hlo import Module

KERNEL = '  %flash.1 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"'
START = "  %s.1 = (f32[8]{0}, f32[8]{0}) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}"
DONE = "  %d.1 = f32[8]{0} collective-permute-done(%s.1)"


def program(*lines: str, scheduled: bool = True) -> str:
    head = "HloModule m, is_scheduled=true" if scheduled else "HloModule m"
    return "\n".join([head, "ENTRY %main (a: f32[8]) -> f32[8] {", *lines, "}"])


def test_permutes_that_wait_are_seen():
    """As XLA schedules a ring of unrolled steps: transfers first, kernels after them."""
    assert permute_overlaps(program(START, KERNEL, KERNEL, DONE)) == ([2], 0)
    assert permute_overlaps(program(START, DONE, KERNEL)) == ([0], 0)
    sync = "  %p = f32[8]{0} collective-permute(%b), source_target_pairs={{0,1}}"
    assert permute_overlaps(program(KERNEL, sync)) == ([], 1)
    with pytest.raises(ValueError, match="not scheduled"):
        permute_overlaps(program(KERNEL, scheduled=False))


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "sp"),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tp"),
        ("replica_groups=[4,2]<=[8]", "tp"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "sp"),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", "all"),
        ("replica_groups=mesh[sp=4,tp=2] {sp}", "sp"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", "sp"),
    ],
)
def test_axes(groups: str, axis: str):
    line = f"  %g = bf16[4,8]{{1,0}} all-gather(%a), {groups}, dimensions={{0}}"
    (found,) = collectives_of(Module(program(line)), 2)
    assert (found.kind, found.axis, found.num_bytes, found.times, found.form) == ("all-gather", axis, 64, 1, "sync")


def test_groups_of_one_send_nothing():
    for groups in ("{{0},{1}}", "[8,1]<=[8]"):
        assert collectives_of(Module(program(f"  %g = f32[8]{{0}} all-reduce(%a), replica_groups={groups}")), 1) == []


def test_what_runs_meanwhile():
    product = "  %dot = f32[8]{0} dot(%a, %a), lhs_contracting_dims={0}"
    found = lambda *lines: [(c.form, c.kernels, c.products) for c in collectives_of(Module(program(*lines)), 1)]
    assert found(START, KERNEL, DONE) == [("overlapped", 1, 0)]
    assert found(START, product, DONE) == [("overlapped", 0, 1)]
    assert found(START, DONE, product) == [("async", 0, 0)]


def test_loops_of_known_and_of_unknown_length():
    text = """HloModule m, is_scheduled=true
%layers_condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %n = s32[] constant(32)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%tiles_condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %p), direction=LT
}
%tile (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %c = bf16[2]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
%layer (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %g = bf16[8]{0} all-gather(%p), replica_groups={{0,1}}
  %w = (s32[]) while(%p), condition=%tiles_condition, body=%tile
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = (s32[]) parameter(0)
  %w = (s32[]) while(%a), condition=%layers_condition, body=%layer
  ROOT %r = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}
}
"""
    found = [(c.kind, c.times, c.part, c.in_layer) for c in collectives_of(Module(text), 1)]
    assert found == [
        ("all-gather", 32, "fixed", True),
        ("collective-permute", 32, "ring", True),
        ("all-reduce", 1, "fixed", False),
    ]
    numbers, num_bytes = traffic_of(text).total(ring_tiles=3, query_tiles=0)
    assert numbers["collective-permute"] == 96
    assert num_bytes["collective-permute"] == 96 * 4
    assert num_bytes["all-gather"] == 32 * 16
