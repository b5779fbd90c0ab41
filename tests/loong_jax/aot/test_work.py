"""Bytes and operations counted from programs: what is sliced, updated in place, already in VMEM, or repeated."""

from loong_jax.aot.hlo import Module
from loong_jax.aot.work import hbm_read_bytes, kernel_operands, matmul_flops, vmem_bytes

TEXT = """HloModule m, is_scheduled=true
%pick (w: bf16[4,8,16], i: s32[]) -> bf16[8,16] {
  %w = bf16[4,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %ds = bf16[1,8,16]{2,1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,8,16}
}
%product (w: bf16[4,8,16], i: s32[], x: bf16[2,8]) -> f32[2,16] {
  %w = bf16[4,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[2,8]{1,0:T(8,128)S(1)} parameter(2)
  %one = bf16[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%pick
  ROOT %c = f32[2,16]{1,0} convolution(%x, %one), dim_labels=bf_io->bf
}
%update (pool: bf16[64], new: bf16[2], at: s32[]) -> bf16[64] {
  %pool = bf16[64]{0} parameter(0)
  %new = bf16[2]{0} parameter(1)
  %at = s32[]{:T(128)S(6)} parameter(2)
  ROOT %d = bf16[64]{0} dynamic-update-slice(%pool, %new, %at)
}
%condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %n = s32[] constant(4)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%layer (p: (s32[], bf16[4,8,16], bf16[2,8], bf16[64], bf16[2])) -> (s32[]) {
  %p = (s32[], bf16[4,8,16]{2,1,0}, bf16[2,8]{1,0:T(8,128)S(1)}, bf16[64]{0}, bf16[2]{0}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %w = bf16[4,8,16]{2,1,0} get-tuple-element(%p), index=1
  %x = bf16[2,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=2
  %pool = bf16[64]{0} get-tuple-element(%p), index=3
  %new = bf16[2]{0} get-tuple-element(%p), index=4
  %y = f32[2,16]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%product
  %written = bf16[64]{0} fusion(%pool, %new, %i), kind=kLoop, calls=%update
  %k = f32[8]{0} custom-call(%x, %written), custom_call_target="tpu_custom_call", backend_config={CONFIG}
}
ENTRY %main (a: bf16[32]) -> bf16[32] {
  %a = bf16[32]{0} parameter(0)
  %copied = bf16[32]{0} copy(%a)
  %start = (bf16[32]{0:S(1)}, bf16[32]{0}, u32[]{:S(2)}) copy-start(%copied)
  %done = bf16[32]{0:S(1)} copy-done(%start)
  %used = bf16[32]{0} negate(%done)
  ROOT %w = (s32[]) while(%a), condition=%condition, body=%layer
}
""".replace(
    "CONFIG",
    '"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1000"}],'
    '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"400"}]',
)


def test_reads():
    """A copy and a prefetch of the argument; four times a slice of the weights and what is written into the pool."""
    assert hbm_read_bytes(Module(TEXT)) == 2 * 64 + 4 * (8 * 16 * 2 + 2 * 2)


def test_slices_on_their_way_into_vmem():
    text = """HloModule m, is_scheduled=true
ENTRY %main (w: bf16[64,128]) -> bf16[64,128] {
  %w = bf16[64,128]{1,0} parameter(0)
  %s.1 = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%w), slice={[0:16], [0:128]}
  %d.1 = bf16[16,128]{1,0:T(8,128)S(1)} slice-done(%s.1)
  %s.2 = ((bf16[64,128]{1,0}), bf16[48,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) async-start(%w), calls=%inner
  ROOT %d.2 = bf16[48,128]{1,0:T(8,128)S(1)} async-done(%s.2)
}
"""
    assert hbm_read_bytes(Module(text)) == 64 * 128 * 2


def test_what_a_fusion_only_renames_is_read():
    text = """HloModule m, is_scheduled=true
%rename (w: bf16[1,16,8]) -> bf16[16,8] {
  %w = bf16[1,16,8]{2,1,0} parameter(0)
  ROOT %b = bf16[16,8]{1,0} bitcast(%w)
}
%product (w: bf16[1,16,8], x: bf16[2,8]) -> f32[2,16] {
  %w = bf16[1,16,8]{2,1,0} parameter(0)
  %x = bf16[2,8]{1,0:T(8,128)S(1)} parameter(1)
  %one = bf16[16,8]{1,0} fusion(%w), kind=kLoop, calls=%rename
  ROOT %c = f32[2,16]{1,0} convolution(%x, %one), dim_labels=bf_oi->bf
}
ENTRY %main (w: bf16[1,16,8], x: bf16[2,8]) -> f32[2,16] {
  %w = bf16[1,16,8]{2,1,0} parameter(0)
  %x = bf16[2,8]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %f = f32[2,16]{1,0} fusion(%w, %x), kind=kOutput, calls=%product
}
"""
    assert hbm_read_bytes(Module(text)) == 16 * 8 * 2
    assert matmul_flops(Module(text)) == 2 * 2 * 16 * 8


def test_operations():
    assert matmul_flops(Module(TEXT)) == 4 * 2 * 2 * 8 * 16


def test_padding_of_a_window_is_no_work():
    """A product of [32, 4096] and [24, 4096, 128], as XLA for TPU writes it."""
    text = """HloModule m, is_scheduled=true
ENTRY %main (a: bf16[32,1,4096]) -> f32[32,24,128] {
  %a = bf16[32,1,4096]{2,1,0} parameter(0)
  %b = bf16[24,128,4096]{2,1,0} parameter(1)
  ROOT %c = f32[32,24,128]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=b0f_0oi->b0f
}
""".replace("WINDOW", "window={size=24 pad=23_23 rhs_reversal=1}")
    assert matmul_flops(Module(text)) == 2 * 32 * 4096 * 24 * 128


def test_kernels_and_vmem():
    module = Module(TEXT)
    assert kernel_operands(module) == {"k": [128]}
    assert vmem_bytes(module) == 400
