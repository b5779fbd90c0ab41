"""Programs read from text: shapes, loops and what they count to, calls."""

from loong_jax.aot.hlo import Array, Module, arrays

TEXT = """HloModule m, is_scheduled=true

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%data_condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %t = (s32[], f32[8]{0}) fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="x"}
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %p = (s32[], f32[8]{0}) parameter(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %three = s32[] constant(3)
  %given = s32[] get-tuple-element(%a), index=0
  %t.1 = (s32[], f32[8]{0}) tuple(%zero, %a)
  %known = (s32[], f32[8]{0}) while(%t.1), condition=%condition, body=%body
  %t.2 = (s32[], s32[]) tuple(%zero, %three)
  %carried = (s32[], s32[]) while(%t.2), condition=%data_condition, body=%body
  %t.3 = (s32[], s32[]) tuple(%zero, %given)
  %data = (s32[], s32[]) while(%t.3), condition=%data_condition, body=%body
  %told = (s32[]) while(%t.3), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %c = f32[8]{0} conditional(%a, %t.1, %t.2), branch_computations={%body, %inner}
}
"""


def test_arrays_of_shapes():
    assert arrays("bf16[2,3]{1,0:T(8,128)(2,1)}") == [Array((2, 3), 12, True)]
    assert arrays("(f32[4]{0:T(128)S(1)}, /*index=5*/s32[]{:T(128)S(6)}, pred[])") == [
        Array((4,), 16, False),
        Array((), 4, False),
        Array((), 1, True),
    ]


def test_loops_and_their_trips():
    module = Module(TEXT)
    assert module.is_scheduled
    assert module.entry == "main"
    loops = {op.name: module.loop("main", op) for op in module.computations["main"] if op.opcode == "while"}
    assert {name: loop and loop.trips for name, loop in loops.items()} == {
        "known": 5,
        "carried": 3,
        "data": None,
        "told": 7,
    }
    assert {loop.body for loop in loops.values() if loop} == {"body"}


def test_calls():
    module = Module(TEXT)
    names = module.by_name
    assert names["body"]["t"].called == ["inner"]
    assert names["main"]["c"].called == ["body", "inner"]
    assert names["main"]["c"].operands == ("a", "t.1", "t.2")
    assert [op.opcode for op in module.within("body")] == ["parameter", "fusion", "parameter"]


def test_kernels():
    call = '  %k.1 = f32[8]{0} custom-call(%a), custom_call_target="TARGET", metadata={}'
    module = lambda target: Module("ENTRY %main (a: f32[8]) -> f32[8] {\n" + call.replace("TARGET", target) + "\n}")
    found = {t: module(t).by_name["main"]["k.1"].is_kernel for t in ("tpu_custom_call", "mosaic_gpu_v2", "Sharding")}
    assert found == {"tpu_custom_call": True, "mosaic_gpu_v2": True, "Sharding": False}
