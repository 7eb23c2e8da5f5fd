"""Adapters with nothing in common but the base, side by side."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.multi
import flora.quantize
import flora.starts
import flora.variants
from tests.support import contract
from tests.support.contract import close
from tests.support.many_adapters import GATHER_IS_SLOW

ROWS = 4


def array(*shape, seed=0):
    return contract.array(*shape, seed=seed, dtype=jnp.result_type(float))


def fn(p, x):
    """Two layers that share a stack, an embedding of three axes, and biases."""
    h = jnp.einsum("ntij,ijd->ntd", x, p["in"]) + p["bias"]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
    return h @ p["out"]


def made():
    params = {
        "in": array(3, 2, 6, seed=1),
        "stack": array(2, 6, 6, seed=2),
        "out": array(6, 5, seed=3),
        "bias": array(6, seed=4),
    }
    return params, array(ROWS, 3, 3, 2, seed=5)


def trained(params, x, seed, **options):
    """An adapter as if trained: every part that trains is moved."""
    config = flora.LoraConfig(**{"rank": 2, "alpha": 3.0} | options)
    adapted = flora.init(jax.random.key(seed), config, fn, params, x)
    adapter = flora.split(adapted)[1]
    leaves, treedef = jax.tree.flatten(adapter)
    moved = [leaf + 0.3 * array(*leaf.shape, seed=seed) for leaf in leaves]
    return treedef.unflatten(moved)


def strangers(params, x):
    """Other targets, ranks, scales, variants, trained leaves and settings."""
    dora, vera = flora.variants.DoRA(), flora.variants.VeRA()
    return {
        "in": trained(params, x, 1, target="in"),
        "stack": trained(params, x, 2, target="stack", rank=3, rank_stabilized=True),
        "all": trained(params, x, 3, target=["in", "stack", "out"], dropout=0.1),
        "dora": trained(params, x, 4, target=["out", "stack"], variant=dora),
        "dora of another rank": trained(params, x, 5, target="out", variant=dora,
                                        rank=1, alpha=0.5),
        "vera": trained(params, x, 6, target="out", variant=vera, rank=4),
        "adalora": trained(params, x, 7, target="in", variant=flora.variants.AdaLoRA()),
        "whole": trained(params, x, 8, target="in", train=["bias", "out"]),
        "bias": trained(params, x, 9, target="out", train="bias"),
        "layers": trained(params, x, 10, target="stack/1", variant=dora),
    }  # fmt: skip


def alone(params, adapter, x):
    if adapter is None:
        return fn(params, x)
    base = jax.tree.map(
        lambda node, w: None if isinstance(node, flora.Trained) else w,
        adapter,
        params,
        is_leaf=lambda n: n is None or isinstance(n, flora.LoraWeight | flora.Trained),
    )
    return fn(flora.merge(flora.join(base, adapter)), x)


@pytest.mark.parametrize("method", GATHER_IS_SLOW)
def test_a_batch_of_strangers(x64, method):
    params, x = made()
    adapters = strangers(params, x)
    stacked = flora.multi.stack([*adapters.values(), None], base=params)
    run = jax.jit(flora.multi.lora(fn, method=method))
    each = [*adapters.values(), None, None]
    ids = [*range(len(adapters) + 1), -1]
    for first in range(0, len(ids), ROWS):
        chosen = (ids * 2)[first : first + ROWS]
        y = run(params, stacked, jnp.array(chosen), x)
        for n, i in enumerate(chosen):
            want = alone(params, each[i], x[n : n + 1])[0]
            close(y[n], want, 1e-11)
            plain = fn(params, x[n : n + 1])[0]
            assert (np.abs(y[n] - plain).max() > 1e-3) == (each[i] is not None)


def test_what_comes_out_of_a_stack_of_strangers(x64):
    params, x = made()
    adapters = strangers(params, x)
    stacked = flora.multi.stack([*adapters.values()], base=params)
    for adapter, one in zip(
        adapters.values(), flora.multi.unstack(stacked), strict=True
    ):
        close(alone(params, one, x), alone(params, adapter, x), 1e-11)


def test_plain_adapters_need_no_base_and_keep_their_scale():
    params, x = made()
    first = trained(params, x, 1, target="in")
    second = trained(params, x, 2, target=["in", "stack"])
    stacked = flora.multi.stack([first, second])
    assert stacked["in"].scale == first["in"].scale
    np.testing.assert_array_equal(stacked["in"].b[0], first["in"].b)
    np.testing.assert_array_equal(stacked["stack"].a[1], second["stack"].a)
    assert not stacked["stack"].a[0].any()
    assert not stacked["stack"].b[0].any()
    assert stacked["out"] is None
    planned = flora.multi.stack(jax.eval_shape(lambda: [first, second, None]))
    whole = flora.multi.stack([first, second, None])
    chex.assert_trees_all_equal_shapes_and_dtypes(planned, whole)
    placed = flora.multi.put(planned, 2, jax.eval_shape(lambda: first))
    chex.assert_trees_all_equal_shapes_and_dtypes(placed, whole)
    within = jax.jit(lambda: flora.multi.stack([first, second, None]))()
    chex.assert_trees_all_equal(within, whole)


def test_the_weight_is_asked_for_where_it_is_needed():
    params, x = made()
    adapters = strangers(params, x)
    stack = flora.multi.stack

    def refused(match, *names, base=None):
        with pytest.raises(flora.LoraError, match=match):
            stack([adapters[n] for n in names], base=base)

    refused(r"'out' is a DoRA\(\).*Pass base=", "in", "dora")
    refused("'out' trains whole in one adapter, and another has factors",
            "whole", "all")  # fmt: skip
    refused("'bias' trains whole.*another has no value of it", "whole", "in")
    short = {k: v for k, v in params.items() if k != "out"}
    refused(r"'out' is a VeRA.*Pass base=", "vera", "all", base=short)
    coded = flora.quantize.quantize({"w": array(64, 64)}, "int8", target="w")
    one = {"w": flora.LoraWeight(None, jnp.ones((64, 1)), jnp.ones((1, 64)))}
    with pytest.raises(flora.LoraError, match=r"'w' trains whole.*cannot train whole"):
        stack([one, {"w": flora.Trained(jnp.ones((64, 64)))}], base=coded)
    other = {**params, "out": array(6, 4), "bias": array(7)}
    refused(r"'out' has base \(6, 4\), a \(6, 2\)", "dora", "all", base=other)
    refused(r"'bias' has shape \(6,\) in an adapter.*\(7,\) in base", "whole", "in",
            base=other)  # fmt: skip
    # Of one kind and one config nothing is needed.
    same = stack([adapters["dora"], adapters["dora"]])
    assert same["out"].variant == flora.variants.DoRA()
    again = stack([adapters["dora"]["out"] and {**adapters["dora"], "stack": None},
                   adapters["dora of another rank"]])  # fmt: skip
    assert again["out"].variant == flora.variants.DoRA()
    assert again["out"].rank == 2


def test_settings_that_differ():
    params, x = made()
    first = trained(params, x, 1, target="in", dropout=0.1, form="direct")
    second = trained(params, x, 2, target="in", fallback="materialize")
    node = flora.multi.stack([first, second])["in"]
    assert (node.dropout, node.form, node.fallback) == (0.0, "auto", "materialize")
    node = flora.multi.stack([first, first])["in"]
    assert (node.dropout, node.form, node.fallback) == (0.1, "direct", "error")


def test_norms_are_divided_out_once():
    params, x = made()
    adapters = strangers(params, x)
    dora = flora.multi.stack([adapters["dora"]] * 2)
    ready = flora.multi.prepare(params, dora)
    assert ready["out"].variant == flora.variants.Columns()
    run = flora.multi.lora(fn)
    ids = jnp.array([0, -1, 1, 0])
    close(run(params, ready, ids, x), run(params, dora, ids, x), 1e-6)
    assert "sqrt" in str(jax.make_jaxpr(run)(params, dora, ids, x))
    assert "sqrt" not in str(jax.make_jaxpr(run)(params, ready, ids, x))
    vera = flora.multi.prepare(params, flora.multi.stack([adapters["vera"]]))
    assert vera["out"].variant is None
    base_row = flora.multi.select(ready, None)["out"]
    assert not base_row.b.any()
    assert (base_row.extra["columns"] == 1).all()
    beyond = jax.jit(flora.multi.select)(ready, 2)["out"]
    assert np.isnan(beyond.b).all()


def test_starts_that_changed_the_base_are_not_mixed():
    params, x = made()
    config = flora.LoraConfig(rank=2, target="out")
    fresh = flora.init(jax.random.key(0), config, fn, params, x)
    base, pissa = flora.split(flora.starts.pissa(fresh))
    plain = trained(params, x, 1, target="out")
    again = flora.multi.stack([pissa, pissa])
    close(flora.multi.lora(fn)(base, again, [0, 1, 1, 0], x), fn(params, x), 1e-5)
    match = "'out' was started by flora.starts.pissa of rank 2.*to_plain"
    for refused in (
        lambda: flora.multi.stack([pissa, plain]),
        lambda: flora.multi.stack([pissa, None]),
        lambda: flora.multi.stack([trained(params, x, 1, target="in"), pissa]),
        lambda: flora.multi.combine([pissa, plain], [1.0, 1.0]),
        lambda: flora.multi.put(flora.multi.stack([plain]), 0, pissa),
        lambda: flora.multi.put(again, 0, plain),
        lambda: flora.multi.put(again, 0, None),
    ):
        with pytest.raises(flora.LoraError, match=match):
            refused()
    one = flora.starts.to_plain(pissa, pissa, params)
    flora.multi.stack([flora.split(one)[1], plain])


@dataclasses.dataclass(frozen=True)
class Squashed:
    frozen = ()

    def start(self, key, weight):
        return weight

    def product(self, weight):
        return flora.variants.Product(weight.a, weight.b, between=jnp.tanh)


def test_a_function_between_a_and_b_fits_nothing_else():
    params, x = made()
    odd = trained(params, x, 1, target="out", variant=Squashed())
    plain = trained(params, x, 2, target="out")
    with pytest.raises(flora.LoraError, match="puts a function between A and B"):
        flora.multi.stack([plain, odd], base=params)
    with pytest.raises(flora.LoraError, match=r"multi\.lora: 'out' is a Squashed"):
        flora.multi.lora(fn)(params, flora.multi.stack([odd]), [0] * ROWS, x)


def test_put_of_a_stranger_compiles_nothing(x64):
    params, x = made()
    adapters = strangers(params, x)
    stacked = flora.multi.stack(
        [adapters[n] for n in ("all", "dora", "bias", "layers")] + [None], base=params
    )
    traces = []

    @jax.jit
    def run(stacked, ids):
        traces.append(1)
        return flora.multi.lora(fn)(params, stacked, ids, x)

    with pytest.raises(flora.LoraError, match="'out' has rank 4, above 2"):
        flora.multi.put(stacked, 4, adapters["vera"], base=params)
    for name in ("in", "dora", "dora of another rank", "adalora", "layers", "bias"):
        new = flora.multi.put(stacked, 4, adapters[name], base=params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, stacked)
        y = run(new, jnp.array([4, -1, 0, 4]))
        for n in (0, 3):
            close(y[n], alone(params, adapters[name], x[n : n + 1])[0], 1e-11)
        close(y[2], alone(params, adapters["all"], x[2:3])[0], 1e-11)
    empty = flora.multi.put(new, 4, None, base=params)
    close(run(empty, jnp.array([4] * ROWS)), fn(params, x), 1e-12)
    assert len(traces) == 1


def test_growth_is_asked_for_and_said(x64):
    params, x = made()
    adapters = strangers(params, x)
    stacked = flora.multi.stack([adapters["in"], adapters["in"]])
    put = flora.multi.put
    for name, why in (
        ("stack", "'stack' has no place in the stack"),
        ("adalora", None),
        ("vera", "'out' has no place in the stack"),
        ("whole", "'bias' has no place in the stack"),
    ):
        if why is None:
            put(stacked, 1, adapters[name], base=params)
        else:
            with pytest.raises(flora.LoraError, match=rf"{why}(.*\n)+.*grow=True"):
                put(stacked, 1, adapters[name], base=params)
        grown = put(stacked, 1, adapters[name], base=params, grow=True)
        y = flora.multi.lora(fn)(params, grown, [0, 1, None, 1], x)
        for n, one in enumerate((adapters["in"], adapters[name], None, adapters[name])):
            close(y[n], alone(params, one, x[n : n + 1])[0], 1e-11)
    dora = flora.multi.stack([adapters["dora"]])
    plain = put(dora, 0, {**adapters["all"], "in": None}, base=params)
    assert plain["out"].variant == flora.variants.DoRA()
    close(alone(params, flora.multi.select(plain, 0), x),
          alone(params, {**adapters["all"], "in": None}, x), 1e-11)  # fmt: skip
    with pytest.raises(flora.LoraError, match="for an int i alone"):
        jax.jit(lambda i: put(stacked, i, adapters["stack"], grow=True))(0)


def test_add_and_remove(x64):
    params, x = made()
    adapters = [*strangers(params, x).values()]
    stacked = flora.multi.stack(adapters[:1])
    for adapter in adapters[1:]:
        stacked = flora.multi.add(stacked, adapter, base=params)
    left = list(adapters)
    for i in (3, 0, len(adapters) - 3):
        stacked = flora.multi.remove(stacked, i)
        del left[i]
    for adapter, one in zip(left, flora.multi.unstack(stacked), strict=True):
        close(alone(params, one, x), alone(params, adapter, x), 1e-11)
    with pytest.raises(flora.LoraError, match=f"there are {len(left)} adapters"):
        flora.multi.remove(stacked, len(left))
    with pytest.raises(flora.LoraError, match="the last adapter"):
        flora.multi.remove(flora.multi.stack(adapters[:1]), 0)
    with pytest.raises(flora.LoraError, match="all adapters are None"):
        flora.multi.stack([None, None])
