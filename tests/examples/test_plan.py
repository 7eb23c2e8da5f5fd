"""The planner of sharded steps, and how bytes of collectives are counted."""

import textwrap

import _tpu
import jax
import jax.numpy as jnp
import plan_tpu
import pytest
import sharded
from benchmarks import _plan


def hlo(text):
    return "HloModule m\n\n" + textwrap.dedent(text)


def test_a_collective_of_several_parts_counts_once():
    # An asynchronous all-gather: started and ended in fused computations of its own.
    text = hlo("""
        %start (p: bf16[8,16]) -> bf16[32,16] {
          %all-gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), \
              channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
        }

        %done (p: bf16[8,16]) -> bf16[32,16] {
          ROOT %all-gather.2 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), \
              channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
        }

        ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
          %f = bf16[32,16] fusion(%p), kind=kCustom, calls=%start
          ROOT %g = bf16[32,16] fusion(%f), kind=kCustom, calls=%done
        }
    """)
    assert _tpu.collectives(text) == {"all-gather": 32 * 16 * 2}


def test_kinds_tuples_and_starts():
    text = hlo("""
        %all-reduce-scatter.1 (p: bf16[64,2]) -> bf16[16,2] {
          %all-reduce.9 = bf16[64,2]{1,0} all-reduce(%p), channel_id=9, to_apply=%add
        }

        ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
          %all-reduce.1 = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0}, \
              /*index=2*/pred[]) all-reduce(%p, %q, %r), channel_id=1, to_apply=%add
          %all-reduce-start = f32[4]{0} all-reduce-start(%p), channel_id=2, \
              to_apply=%add
          %all-reduce-done = f32[4]{0} all-reduce-done(%all-reduce-start)
          %permute = (s8[8,2]{1,0}, s8[8,2]{1,0}, u32[]{:S(2)}, \
              u32[]{:S(2)}) collective-permute-start(%p), channel_id=4, \
              source_target_pairs={{0,1},{1,0}}
          %all-gather-start = ((bf16[2]{0}, bf16[4]{0}), (bf16[8]{0}, \
              bf16[16]{0})) all-gather-start(%p, %q), channel_id=5, \
              replica_groups={{0,1,2,3}}
          %reduce-scatter.1 = bf16[2,4]{1,0} reduce-scatter(%p), \
              replica_groups={{0,1},{2,3}}, dimensions={0}
          %reduce-scatter.2 = bf16[2,4]{1,0} reduce-scatter(%p), \
              replica_groups=mesh['a'=4,'b'=8] {'a'}, dimensions={0}
          %reduce-scatter.3 = bf16[2,4]{1,0} reduce-scatter(%p), \
              replica_groups=[2,8]<=[16], dimensions={0}
          %fusion = bf16[16,2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
          ROOT %all-to-all.1 = s4[8,16]{1,0} all-to-all(%permute), channel_id=6, \
              replica_groups={{0,1}}
        }
    """)
    assert _tpu.collectives(text) == {
        "all-reduce": 8 * 16 * 2 + 4 * 4 + 1 + 4 * 4,
        "collective-permute": 8 * 2,
        "all-gather": 2 * (8 + 16),
        "reduce-scatter": 2 * 4 * 2 * (2 + 4 + 8) + 64 * 2 * 2,
        "all-to-all": 8 * 16 // 2,
    }


LOOP = """
    %body (t: (f32[4], s32[])) -> (f32[4], s32[]) {
      %t = (f32[4]{0}, s32[]) parameter(0)
      %x = f32[4]{0} get-tuple-element(%t), index=0
      %i = s32[] get-tuple-element(%t), index=1
      %permute = f32[4]{0} collective-permute(%x), channel_id=1, \
          source_target_pairs={{0,1}}
      %gather = f32[8]{0} all-gather(%x), channel_id=2, replica_groups={{0,1}}
      %step = s32[] constant(STEP)
      %next = s32[] add(%i, %step)
      ROOT %tuple = (f32[4]{0}, s32[]) tuple(%permute, %next)
    }

    %condition (t: (f32[4], s32[])) -> pred[] {
      %t.1 = (f32[4]{0}, s32[]) parameter(0)
      %i.1 = s32[] get-tuple-element(%t.1), index=1
      %n = s32[] constant(8)
      ROOT %less = pred[] compare(%i.1, %n), direction=LT
    }

    ENTRY %main (p: f32[4]) -> f32[4] {
      %gather.1 = f32[8]{0} all-gather(%p), channel_id=2, replica_groups={{0,1}}
      ROOT %while = (f32[4]{0}, s32[]) while(%init), condition=%condition, body=%body
    }
"""


@pytest.mark.parametrize(("step", "trips"), [(1, 8), (2, 4), (3, 3)])
def test_collectives_in_a_loop_count_each_trip(step, trips):
    # Channel 2 starts before the loop and goes on behind it: it runs once.
    found = _tpu.collectives(hlo(LOOP.replace("STEP", str(step))))
    assert found == {"collective-permute": trips * 16, "all-gather": 32}


BRANCH = """
    %body (t: (pred[], f32[4])) -> (pred[], f32[4]) {
      %t = (pred[], f32[4]{0}) parameter(0)
      %flag = pred[] get-tuple-element(%t), index=0
      %x = f32[4]{0} get-tuple-element(%t), index=1
      %permute = f32[4]{0} collective-permute(%x), channel_id=1, \
          source_target_pairs={{0,1}}
      %flipped = pred[] not(%flag)
      ROOT %tuple = (pred[], f32[4]{0}) tuple(%flipped, %permute)
    }

    %condition (t: (pred[], f32[4])) -> pred[] {
      %t.1 = (pred[], f32[4]{0}) parameter(0)
      ROOT %flag.1 = pred[] get-tuple-element(%t.1), index=0
    }

    ENTRY %main (p: f32[4]) -> f32[4] {
      ROOT %while = (pred[], f32[4]{0}) while(%init), condition=%condition, body=%body
    }
"""


def test_a_branch_that_is_not_taken_counts_for_nothing():
    assert _tpu.collectives(hlo(BRANCH)) == {"collective-permute": 0}


def test_flops_count_loops_and_what_is_computed_again():
    w = jnp.ones((3, 8, 8))

    def fn(x):
        body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return jax.lax.scan(body, x, w)[0].sum()

    x, once = jnp.ones((4, 8)), 2 * 4 * 8 * 8
    assert _plan.product_flops(jax.make_jaxpr(fn)(x)) == 3 * once
    assert _plan.product_flops(jax.make_jaxpr(jax.grad(fn))(x)) == 3 * 3 * once


def test_meshes_are_those_asked_for():
    assert list(plan_tpu.meshes(4, "")) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]
    assert list(plan_tpu.meshes(8, "8x1,2x2x2")) == [(1, 8, 1), (2, 2, 2)]
    with pytest.raises(ValueError, match="2x2: write AxB or AxBxC of 8 chips"):
        list(plan_tpu.meshes(8, "2x2"))


@pytest.mark.tpu_compiler
def test_a_plan_that_fits(capsys):
    (plan,) = plan_tpu.main(["--smoke", "--topology", "v5e:2x2", "--mesh", "2x2"])
    assert plan.fits("v5e")
    assert plan.base + plan.adapter + plan.optimizer + plan.temp <= 1.1 * plan.peak
    assert plan.flops > 0
    assert plan.cycles > 0
    assert plan.collectives["all-gather"] > 0
    assert "Planned in" in capsys.readouterr().out


@pytest.mark.tpu_compiler
def test_a_plan_that_does_not_fit(capsys):
    options = ["--topology", "v5e:2x2", "--batch", "4", "--mesh", "4x1"]
    (plan,) = plan_tpu.main(["--model", "70b", *options])
    assert not plan.fits("v5e")
    assert plan.base > 2 * 68e9 / 4
    assert "exceeds available HBM (15.75G)" in plan.problem
    (plan,) = plan_tpu.main(["--smoke", *options[:3], "3", "--mesh", "4x1"])
    assert plan.problem == "3 sequences do not divide over 4 chips"


# Bytes of flora's collectives to the frozen model's.
TO_FROZEN = {
    "FSDP x TP": 1.10,
    "FSDP x TP, sequence": 1.10,
    "FSDP": 1.05,
    "experts": 1.05,
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("case", TO_FROZEN)
def test_factors_move_little_between_chips(case):
    found = sharded.measure(case)["flora auto"]
    assert found["bytes_to_frozen"] <= TO_FROZEN[case], found


@pytest.mark.tpu_compiler
def test_on_data_alone_only_the_factors_gradients_move():
    found = sharded.measure("data")
    moved, frozen = found["flora auto"]["bytes"], found["frozen"]["bytes"]
    # Gradients of B are summed in float32, and of A in bfloat16.
    assert moved - frozen <= 2 * found["flora auto"]["factor_bytes"]
