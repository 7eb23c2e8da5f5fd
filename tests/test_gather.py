import contract
import jax
import jax.numpy as jnp
import pytest
from contract import array
from jax import lax

import flora

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
    "a window of rows": lambda p, ids: lax.dynamic_slice_in_dim(p["w"], ids[0, 0], 4),
    "transposed": lambda p, ids: p["w"].T[:, ids],
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_other_lookups(x64, name):
    fn = LOOKUPS[name]
    rows = (1,) if name == "along axis 1" else (0,)
    layout = flora.Layout((), rows, (1 - rows[0],))
    settings = {"layouts": {"w": layout}, "dtype": jnp.float64}
    adapted = contract.adapt(fn, {"w": array(12, 7)}, jnp.array(IDS), **settings)
    contract.close_to_merged(fn, contract.randomized(adapted), jnp.array(IDS))


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
