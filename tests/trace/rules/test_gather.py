import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
import flora.quantize
from tests.support import contract
from tests.support.contract import array
from tests.support.variant_cases import Between

IDS = [[3, 1, 4], [1, 5, 9]]


def take(mode=None):
    def fn(p, ids):
        return jnp.take(p["embedding"], ids, axis=0, mode=mode) * 2

    return fn


@pytest.mark.parametrize("mode", [None, "clip", "fill", "wrap"])
def test_contract_of_embeddings(x64, mode):
    params = {"embedding": array(11, 7)}
    adapted = contract.check(take(mode), params, jnp.array(IDS), dtype=jnp.float64)
    assert adapted["embedding"].layout == flora.Layout((), (0,), (1,))


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_rows_out_of_bounds_are_what_they_were(mode):
    params, ids = {"embedding": array(11, 7, dtype=jnp.float32)}, jnp.array([2, 11, 40])
    adapted = contract.randomized(contract.adapt(take(mode), params, ids))
    expected = take(mode)(flora.merge(adapted), ids)
    got = flora.lora(take(mode))(adapted, ids)
    assert (jnp.isnan(got) == jnp.isnan(expected)).all()
    contract.close(jnp.nan_to_num(got), jnp.nan_to_num(expected))


def test_zero_fill():
    def fn(p, ids):
        return p["embedding"].at[ids].get(mode="fill", fill_value=0)

    params, ids = {"embedding": array(11, 7, dtype=jnp.float32)}, jnp.array([2, 40])
    adapted = contract.randomized(contract.adapt(fn, params, ids))
    got = flora.lora(fn)(adapted, ids)
    contract.close(got, fn(flora.merge(adapted), ids))
    assert not got[1].any()


LOOKUPS = {
    "along axis 1": lambda p, ids: p["w"][:, ids % 7],
    "of two axes": lambda p, ids: p["w"].reshape(3, 4, 7)[ids % 3, ids % 4],
    "row and column": lambda p, ids: p["w"][ids, ids % 7],
    "one row": lambda p, ids: p["w"][ids[0, 0]],
    "transposed": lambda p, ids: p["w"].T[:, ids],
    "windows": lambda p, ids: jax.vmap(
        lambda i: lax.dynamic_slice(p["w"], (i, 1), (2, 3)))(ids[0]),
}  # fmt: skip


@pytest.mark.parametrize("variant", [None, flora.variants.DoRA()])
@pytest.mark.parametrize("name", LOOKUPS)
def test_other_lookups(x64, name, variant):
    fn = LOOKUPS[name]
    rows = (1,) if name == "along axis 1" else (0,)
    layout = flora.Layout((), rows, (1 - rows[0],))
    settings = {"layouts": {"w": layout}, "dtype": jnp.float64, "variant": variant}
    ids = jnp.array(IDS)
    tree = contract.randomized(contract.adapt(fn, {"w": array(12, 7)}, ids, **settings))
    if variant is None:
        contract.close_to_merged(fn, tree, ids)
    else:
        contract.close(flora.lora(fn)(tree, ids), fn(flora.merge(tree), ids))


def test_a_function_between_a_and_b_acts_on_the_rows_of_a(x64):
    params, ids = {"embedding": array(11, 7)}, jnp.array(IDS)
    settings = {"variant": Between(), "dtype": jnp.float64}
    tree = contract.adapt(take(), params, ids, **settings)
    w = (tree := contract.randomized(tree))["embedding"]
    want = w.base[ids] + w.scale * jax.nn.softmax(w.a[ids]) @ w.b
    contract.close(flora.lora(take())(tree, ids), 2 * want)


def test_tied_embedding_keeps_the_layout_of_attend(x64):
    def fn(p, ids):
        x = p["embedding"][ids]
        return jnp.sin(x) @ p["embedding"].T

    params = {"embedding": array(11, 7)}
    adapted = contract.check(fn, params, jnp.array(IDS), dtype=jnp.float64)
    assert adapted["embedding"].layout == flora.Layout((), (1,), (0,))


def test_experts_chosen_by_index(x64):
    def fn(p, x, ids):
        return jnp.einsum("bi,bio->bo", x, p["experts"][ids])

    params = {"experts": array(4, 7, 5)}
    x, ids = array(3, 7), jnp.array([2, 0, 2])
    adapted = contract.check(fn, params, x, ids, dtype=jnp.float64)
    assert adapted["experts"].layout == flora.Layout((0,), (1,), (2,))


def test_a_window_of_experts(x64):
    def fn(p, x, start):
        chosen = lax.dynamic_slice_in_dim(p["experts"], start, 2)
        return jnp.einsum("bi,eio->ebo", x, chosen) + jax.vmap(
            lambda i: x @ lax.dynamic_slice_in_dim(p["experts"], i, 1)[0]
        )(jnp.array([0, start]))

    params = {"experts": array(4, 7, 5)}
    layout = {"layouts": {"experts": flora.Layout((0,), (1,), (2,))}}
    contract.check(fn, params, array(3, 7), jnp.int32(1), dtype=jnp.float64, **layout)


def test_a_batched_lookup(x64):
    def fn(p, ids):
        return jax.vmap(lambda table, i: table[i])(p["tables"], ids).sum(-1)

    params = {"tables": array(3, 11, 7)}
    ids = jnp.array([[3, 1], [4, 1], [5, 9]])
    layout = {"layouts": {"tables": flora.Layout((0,), (1,), (2,))}}
    contract.check(fn, params, ids, dtype=jnp.float64, **layout)


def test_a_table_with_two_axes_of_features(x64):
    def fn(p, ids):
        return jnp.tanh(p["table"][ids])

    params = {"table": array(11, 3, 5)}
    adapted = contract.check(fn, params, jnp.array(IDS), dtype=jnp.float64)
    assert adapted["table"].layout == flora.Layout((), (0,), (1, 2))


PERMUTED = {
    "joined in axes": (
        lambda w: w.transpose(0, 2, 1, 3).reshape(3, 8, 5), "ni,nio->no", 8),
    "joined out axes": (
        lambda w: w.transpose(0, 1, 3, 2).reshape(3, 2, 20), "ni,nio->no", 2),
    "interleaved": (
        lambda w: w.transpose(0, 3, 1, 2).reshape(3, 10, 4), "ni,nio->no", 10),
}  # fmt: skip


@pytest.mark.parametrize("name", PERMUTED)
def test_a_stack_that_is_indexed_after_its_axes_were_joined(x64, name):
    view, spec, n = PERMUTED[name]

    def fn(p, x):
        chosen = view(p["w"])[jnp.array([2, 0, 1, 2])]
        return jnp.einsum(spec, x, chosen)

    contract.check(fn, {"w": array(3, 2, 4, 5)}, array(4, n), dtype=jnp.float64)


def test_an_in_axis_before_a_stack_axis(x64):
    def fn(p, ids):
        return p["w"][ids, jnp.array([0, 1, 2, 1])]

    layout = {"w": flora.Layout((1,), (0,), (2,))}
    ids = jnp.array([0, 5, 2, 3])
    contract.check(fn, {"w": array(6, 3, 5)}, ids, layouts=layout, dtype=jnp.float64)


def test_rows_of_a_table_with_more_axes_can_be_the_output(x64):
    def fn(p, ids):
        return p["w"][ids]

    adapted = contract.check(fn, {"w": array(6, 3, 5)}, jnp.array([0, 1]),
                             dtype=jnp.float64)  # fmt: skip
    assert adapted["w"].layout == flora.Layout((), (0,), (1, 2))


NOT_ROWS = {
    "a window": lambda p, i: jnp.tanh(lax.dynamic_slice_in_dim(p["w"], i, 2, 1)),
    "joined with a whole weight": lambda p, i: jnp.tanh(
        jnp.concatenate([lax.dynamic_slice_in_dim(p["w"], i, 1, 1), p["v"]], 1)),
    "experts": lambda p, i: jnp.tanh(p["s"][jnp.array([0, i])]),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ROWS)
def test_what_only_looks_like_rows_is_not_silently_dense(name):
    every = {"w": jnp.ones((4, 5)), "v": jnp.ones((4, 3)), "s": jnp.ones((3, 4, 5))}
    fn = NOT_ROWS[name]
    used = {k: x for k, x in every.items() if flora.coverage(fn, every, 1)[k].uses}
    layouts = {"s": flora.Layout((0,), (1,), (2,))} if name == "experts" else {}
    with pytest.raises(
        flora.LoraError, match=r"'(tanh|concatenate)' .*no factored rule"
    ):
        contract.adapt(fn, used, 1, layouts=layouts)


def test_a_batched_lookup_in_a_transposed_stack(x64):
    def fn(p, ids):
        rows = jax.vmap(jax.vmap(lambda w, i: w[i]))
        return rows(p["w"].transpose(1, 0, 2, 3), ids)

    ids = jnp.asarray([[[1, 0], [6, 2], [3, 3]], [[5, 4], [0, 1], [2, 2]]])
    adapted = contract.check(fn, {"w": array(3, 2, 7, 5)}, ids, dtype=jnp.float64)
    assert adapted["w"].layout == flora.Layout((), (0, 1, 2), (3,))


def test_narrow_factors_of_a_table_are_scaled_in_float32():
    def fn(p, ids):
        return p["w"][ids]

    ids, w = jnp.asarray([1, 4, 0]), array(6, 10, dtype=jnp.float32)
    adapted = contract.adapt(fn, {"w": w}, ids, dtype=jnp.bfloat16, alpha=1.1)
    adapted = contract.randomized(adapted)
    contract.close(flora.lora(fn)(adapted, ids), fn(flora.merge(adapted), ids))


def test_a_sum_over_a_row_is_a_lookup():
    def fn(p, i):
        return lax.dynamic_slice(p["w"], (i, 0), (1, 5)).sum(1)

    report = flora.coverage(fn, {"w": jnp.ones((6, 5))}, jnp.asarray(2))
    assert report["w"].layout == flora.Layout((), (0,), (1,))


def test_a_stack_indexed_along_two_axes_at_once_is_refused():
    def fn(p, x, i, j):
        return jnp.einsum("ni,nio->no", x, p["w"][i, j])

    params, i = {"w": array(2, 3, 5, 4, dtype=jnp.float32)}, jnp.array([0, 1, 0])
    x = array(3, 5, dtype=jnp.float32)
    with pytest.raises(flora.LoraError, match="indexed along several axes at once"):
        contract.adapt(fn, params, x, i, i)


def test_rows_that_are_repeated_are_a_lookup():
    def fn(p, x, i):
        row = lax.dynamic_slice(p["w"], (i, 0), (1, 5))
        return x @ jnp.broadcast_to(row, (3, 5)).T

    every = {"w": jnp.ones((6, 5))}
    report = flora.coverage(fn, every, jnp.ones((2, 5)), jnp.asarray(2))
    assert report["w"].layout == flora.Layout((), (0,), (1,))


def test_only_what_has_the_indexed_axis_is_gathered():
    params, ids = {"embedding": jnp.ones((11, 7))}, jnp.array(IDS)
    adapted = contract.adapt(take("clip"), params, ids)
    jaxpr = jax.make_jaxpr(flora.lora(take("clip")))(adapted, ids)
    found = [e for e in contract.equations(jaxpr) if e.primitive is contract.P.gather]
    assert [e.invars[0].aval.shape for e in found] == [(11, 7), (11, 2)]


@pytest.mark.parametrize("block", [None, 2])
def test_rows_of_a_stored_stack_by_indices_of_an_inner_jit(x64, block):
    def fn(p, x):  # `jnp.take` is a jit, in which the indices are made
        stack = jnp.take(p["s"], jnp.array([0, 2, 1]), axis=0)
        return jnp.einsum("bi,bio->bo", x, stack)

    params, x = {"s": array(3, 8, 4)}, array(3, 8, seed=1)
    adapted = contract.randomized(contract.adapt(fn, params, x, target="s"))
    stored = flora.quantize.quantize(adapted, "int8", target="s", block=block)
    dense = flora.quantize.dequantize(stored)
    contract.close(flora.lora(fn)(stored, x), flora.lora(fn)(dense, x))
