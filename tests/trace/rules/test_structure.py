import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora
from tests.support import contract
from tests.support.contract import P, array, properties
from tests.support.variant_cases import Between, acted

MESH = Mesh(np.array(jax.devices("cpu")[:1]), ("x",))
BY_X = NamedSharding(MESH, PartitionSpec("x"))

# name -> what becomes of w, [6, 10], before x [5, 6] multiplies it
VIEWS = {
    "transpose": lambda w: w.T.T,
    "reshape that splits": lambda w: w.reshape(2, 3, 2, 5).reshape(6, 10),
    "cast": lambda w: w.astype(jnp.float32).astype(jnp.float64),
    "squeeze": lambda w: jnp.squeeze(w[None, :, None], (0, 2)),
    "expand_dims": lambda w: lax.expand_dims(w, (0, 3))[0, :, :, 0],
    "copy": lambda w: jnp.copy(w),
    "barrier": lambda w: lax.optimization_barrier(w),
    "checkpoint_name": lambda w: checkpoint_name(w, "w"),
    "sharding constraint": lambda w: lax.with_sharding_constraint(w, BY_X),
    "reduce_precision": lambda w: lax.reduce_precision(w, 11, 52),
    "rev": lambda w: w[::-1, ::-1],
    "slice of out": lambda w: w[:, 2:9:2],
    "dynamic slice of out": lambda w: lax.dynamic_slice(w, (0, 3), (6, 4)),
    "negated": lambda w: -w,
    "scaled": lambda w: 2.0 * w / 3.0,
    "scaled by a traced scalar": lambda w: w * jnp.sqrt(jnp.float64(2)),
    "scaled by columns": lambda w: w * jnp.arange(1.0, 11.0),
    "scaled by rows": lambda w: w / jnp.arange(1.0, 7.0)[:, None],
    "scaled by halves": lambda w: (
        w.reshape(6, 2, 5) * jnp.arange(1.0, 3.0)[:, None]).reshape(6, 10),
    "device_put": lambda w: jax.device_put(w, jax.devices("cpu")[0]),
    "device_put of several": lambda w: jax.device_put((w, jnp.ones(3)))[0],
    "chunk of out": lambda w: w.reshape(6, 2, 5)[:, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_contract_of_views(x64, name):
    def fn(p, x):
        return x @ VIEWS[name](p["w"])

    loose = {"tolerance": 1e-6} if name == "cast" else {}
    params, x = {"w": array(6, 10)}, array(5, 6, seed=1)
    own = (P.mul, P.div, P.neg, P.reduce_precision, P.device_put)
    adapted = contract.check(fn, params, x, dtype=jnp.float64, views=own, **loose)
    assert adapted["w"].layout == flora.Layout((), (0,), (1,))


def test_views_of_a_change_alone(x64):
    """Inside a derivative of the user's own dW is one, with no W beside it."""
    views = {k: f for k, f in VIEWS.items() if "device_put" not in k and k != "cast"}
    views["split"] = lambda w: lax.split(w, [4, 6], 1)[1]
    views["padded"] = lambda w: jnp.pad(w, ((0, 0), (1, 2)))
    views["joined"] = lambda w: jnp.concatenate([w, -w], 1)

    def every(w, x):
        return {name: x @ view(w) for name, view in views.items()}

    own = jax.custom_jvp(every)
    own.defjvp(lambda primals, tangents: jax.jvp(every, primals, tangents))
    params, x = {"w": array(6, 10)}, array(5, 6, seed=1)
    tree = contract.adapt(lambda p, x: x @ p["w"], params, x, dtype=jnp.float64)
    contract.close_to_merged(lambda p, x: own(p["w"], x), contract.randomized(tree), x)


def test_stop_gradient_stops_the_factors_too(x64):
    def fn(p, x):
        return x @ lax.stop_gradient(p["w"]) + x @ p["v"]

    params = {"w": array(6, 10), "v": array(6, 10, seed=2)}
    adapted = contract.randomized(contract.adapt(fn, params, array(5, 6)))
    _, grads = flora.value_and_grad(
        lambda t: contract.scalar(flora.lora(fn)(t, array(5, 6)))
    )(adapted)
    assert not grads["w"].a.any()
    assert not grads["w"].b.any()
    assert grads["v"].a.any()


def test_slices_and_indices_of_a_stack(x64):
    def fn(p, x, i):
        w = p["layers"]
        y = jnp.tanh(x @ w[0]) @ w[1:][0]
        y = jnp.tanh(y @ lax.dynamic_index_in_dim(w, i, keepdims=False))
        return jnp.einsum("ebi,eio->beo", jnp.stack([y, 2 * y, -y]), w[::2])

    params = {"layers": array(5, 7, 7)}
    adapted = contract.adapt(fn, params, array(3, 7), jnp.int32(2), dtype=jnp.float64)
    assert adapted["layers"].layout == flora.Layout((0,), (1,), (2,))
    contract.close_to_merged(fn, contract.randomized(adapted), array(3, 7), 2)


def test_a_parameter_with_a_leading_axis_of_one(x64):
    def fn(p, x):
        return x @ p["w"][0]

    adapted = contract.check(fn, {"w": array(1, 7, 5)}, array(3, 7), dtype=jnp.float64)
    assert adapted["w"].layout == flora.Layout((0,), (1,), (2,))


def test_fused_projection_cut_along_out(x64):
    def fn(p, x):
        q, k, v = jnp.split(p["qkv"].reshape(7, 3, 2, 5), 3, axis=1)
        heads = [jnp.einsum("bd,dchk->bhk", x, w) for w in (q, k, v)]
        return heads[0] * heads[1] + heads[2]

    adapted = contract.check(fn, {"qkv": array(7, 30)}, array(3, 7), dtype=jnp.float64)
    assert adapted["qkv"].layout == flora.Layout((), (0,), (1,))


@st.composite
def chains(draw):
    """Transposes and reshapes that keep rows, columns and stack apart."""
    steps, axes = [], [("s", 2), ("i", 4), ("o", 6)]
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(axes))))
            steps.append(("transpose", order))
            axes = [axes[i] for i in order]
        else:
            k = draw(st.integers(0, len(axes) - 1))
            kind, n = axes[k]
            if n % 2 == 0 and n > 2:
                axes[k : k + 1] = [(kind, 2), (kind, n // 2)]
                steps.append(("reshape", [n for _, n in axes]))
            elif k + 1 < len(axes) and axes[k + 1][0] == kind:
                axes[k : k + 2] = [(kind, n * axes[k + 1][1])]
                steps.append(("reshape", [n for _, n in axes]))
    return steps, axes


@properties(25, case=chains())
def test_any_chain_of_transposes_and_reshapes(case):
    steps, axes = case

    def fn(p, x):
        w = p["w"]
        for name, arg in steps:
            w = w.transpose(arg) if name == "transpose" else w.reshape(arg)
        labels = list(range(len(axes)))
        x_labels = [i for i, (kind, _) in enumerate(axes) if kind != "o"]
        out = [i for i, (kind, _) in enumerate(axes) if kind != "i"]
        return jnp.einsum(x, x_labels, w, labels, out)

    with jax.enable_x64(True):
        x = array(*(n for kind, n in axes if kind != "o"), seed=1)
        adapted = contract.adapt(fn, {"w": array(2, 4, 6)}, x, dtype=jnp.float64)
        assert adapted["w"].layout == flora.Layout((0,), (1,), (2,))
        contract.close_to_merged(fn, contract.randomized(adapted), x)


REFUSED = {
    "regrouping reshape": lambda w, x: x @ w.reshape(4, 15).T[:6],
    "cast to int": lambda w, x: x @ w.astype(jnp.int32).astype(x.dtype),
    "elementwise function": lambda w, x: x @ jnp.tanh(w),
    "maximum": lambda w, x: x.sum() * w.max(),
    "sum of cubes": lambda w, x: x.sum() * (w**3).sum(),
    "scaled element by element": lambda w, x: x @ (w * jnp.ones((6, 10))),
    "weight times weight, elementwise": lambda w, x: x @ (w * w),
    "divided by a weight": lambda w, x: x @ (1 / w),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_named_or_materialized(name):
    def fn(p, x):
        return REFUSED[name](p["w"], x)

    params = {"w": array(6, 10, dtype=jnp.float32)}
    x = array(5, 6, dtype=jnp.float32)
    with pytest.raises(flora.LoraError, match="flora has no factored rule") as error:
        contract.adapt(fn, params, x)
    message = str(error.value)
    assert "'w'" in message
    assert "test_structure.py:" in message
    assert 'fallback="materialize"' in message
    assert "240 B" in message
    adapted = contract.adapt(fn, params, x, fallback="materialize")
    adapted = contract.randomized(adapted)
    contract.close(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x))


def test_complex_scales(x64):
    def fn(p, x):
        row = jnp.arange(10) * 1j + 1
        return jnp.abs(x @ (p["w"] * (1 + 2j))) + jnp.abs(x @ (p["w"] * row))

    contract.check(fn, {"w": array(6, 10)}, array(5, 6), dtype=jnp.float64,
                   views=(P.mul,))  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_factors_are_scaled_in_float32(dtype):
    def tiny(p, x):
        return x @ (p["w"] * 1e-8) * 1e8

    def fused(p, x):
        return x @ jnp.concatenate([p["w"], p["v"]], 1)

    w, v = array(6, 10, dtype=jnp.float32), array(6, 7, seed=1, dtype=jnp.float32)
    x = array(5, 6, dtype=jnp.float32)
    for fn, params in ((tiny, {"w": w}), (fused, {"w": w, "v": v})):
        adapted = contract.adapt(fn, params, x, dtype=dtype, alpha=1.1)
        adapted = contract.randomized(adapted)
        contract.close(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x))


def test_uses_that_swap_in_and_out_agree(x64):
    def fn(p, x):
        return p["w"][1] @ jnp.ones(4) + (x @ p["w"]).sum()

    adapted = contract.adapt(fn, {"w": array(4, 4)}, array(3, 4), dtype=jnp.float64)
    contract.close_to_merged(fn, contract.randomized(adapted), array(3, 4))


SUMS = {
    "in": (lambda p, x: x @ (p["w"] - p["w"].mean(0)), "a sum over in axes"),
    "all": (lambda p, x: x * p["w"].sum(), "a sum over in axes"),
    "columns": (lambda p, x: x @ p["w"][:, jnp.array([3, 0])], "along out axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_a_function_between_a_and_b_is_not_moved(name):
    fn, match = SUMS[name]
    x = jnp.ones((5, 6))
    tree = contract.adapt(
        lambda p, x: x @ p["w"], {"w": jnp.ones((6, 10))}, x, variant=Between()
    )
    with pytest.raises(flora.LoraError, match=match):
        flora.lora(fn)(tree, x)


def test_a_function_between_a_and_b_where_b_alone_is_summed_or_cut(x64):
    def fn(p, x):
        return x @ p["w"].sum(1), x @ p["w"][:, 2:4], (2 * x) @ (p["w"] / 2)

    x = array(5, 6)
    tree = contract.adapt(fn, {"w": array(6, 10)}, x, variant=Between(),
                          dtype=jnp.float64)  # fmt: skip
    tree = contract.randomized(tree)
    y = acted(tree["w"], x)
    third = acted(tree["w"], 2 * x) / 2
    contract.close(flora.lora(fn)(tree, x), (y.sum(1), y[:, 2:4], third))


def test_a_reshape_that_turns_its_operand_first(x64):
    def fn(p, x):
        return x @ lax.reshape(p["w"], (2, 5, 6), dimensions=(1, 0)).sum(0).T

    contract.check(fn, {"w": array(6, 10)}, array(3, 6), dtype=jnp.float64)


def test_a_sum_over_outputs_that_are_scaled_is_refused():
    def fn(p, x):
        return x @ p["w"] + p["w"].sum(1).mean()

    params, x = {"w": array(6, 10, dtype=jnp.float32)}, array(5, 6, dtype=jnp.float32)
    adapted = contract.adapt(fn, params, x, variant=flora.variants.DoRA())
    with pytest.raises(flora.LoraError, match="a sum over out axes, of a weight whose"):
        flora.lora(fn)(adapted, x)
