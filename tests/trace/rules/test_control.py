import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from tests.support import contract
from tests.support.contract import array

PARAMS = ("w", "v", "layers")


def params():
    return {
        "w": array(7, 7, seed=1) / 3,
        "layers": array(4, 7, 7, seed=2) / 3,
        "v": array(7, 5, seed=3),
    }


def layer(w, x):
    return jnp.tanh(x @ w)


@jax.jit
def jitted(p, x):
    return layer(p["w"], x) @ p["v"]


def nested_jit(p, x):
    return jax.jit(lambda w, x: jax.jit(layer)(w, x) * 2)(p["w"], x) @ p["v"]


def remat(p, x):
    policy = jax.checkpoint_policies.dots_saveable
    y = jax.checkpoint(layer)(p["w"], x)
    return jax.checkpoint(layer, policy=policy)(p["w"], y) @ p["v"]


def scan_over_layers(p, x):
    y, ys = lax.scan(lambda c, w: (layer(w, c), c.sum()), x, p["layers"])
    return y @ p["v"], ys


def scan_backwards_and_unrolled(p, x):
    y, _ = lax.scan(lambda c, w: (layer(w, c), None), x, p["layers"], reverse=True,
                    unroll=2)  # fmt: skip
    return y @ p["v"]


def scan_with_constants(p, x):
    def step(c, row):
        return layer(p["w"], c + row), c @ p["v"]

    return lax.scan(step, x[0], x)


def scan_of_remat(p, x):
    step = jax.checkpoint(lambda c, w: (layer(w, c), None), prevent_cse=False)
    return lax.scan(step, x, p["layers"])[0] @ p["v"]


def scan_that_carries_the_weight(p, x):
    def step(carry, row):
        w, c = carry
        return (w, layer(w, c + row)), None

    return lax.scan(step, (p["w"], x[0]), x)[0][1] @ p["v"]


def scan_of_one_step_that_carries_a_layer(p, x):
    """As trainers run one rematerialized layer: its state goes in and comes out."""

    @jax.checkpoint
    def step(carry, _):
        w, c = carry
        return (w, layer(w, c)), None

    (w, y), _ = lax.scan(step, (p["w"], x), None, 1)
    return layer(w, y) @ p["v"]


def scan_that_returns_its_layers(p, x):
    """As modules whose state goes through a scan: the stack comes back as it was."""
    step = jax.checkpoint(lambda c, w: (layer(w, c), (c.sum(), w)))
    y, (sums, layers) = lax.scan(step, x, p["layers"])
    return lax.scan(lambda c, w: (layer(w, c), None), y, layers)[0] * sums.mean()


def scan_over_rows_of_a_weight(p, x):
    def step(c, w):
        return c + jnp.outer(x[:, 0], jnp.ones(5)) * 0 + x @ w[:, None], None

    return lax.scan(step, jnp.zeros((x.shape[0], 5)), p["v"].T)[0] + x @ p["v"]


def fori(p, x):
    y = lax.fori_loop(0, 3, lambda i, c: layer(p["layers"][i], c), x)
    return y @ p["v"]


def while_with_a_weight_in_its_condition(p, x):
    def go(carry):
        i, c = carry
        return (i < 3) & (jnp.abs(c @ p["v"]).sum() > 0)

    return lax.while_loop(go, lambda c: (c[0] + 1, layer(p["w"], c[1])), (0, x))[1]


def while_that_carries_the_weight(p, x):
    def step(carry):
        i, w, c = carry
        return i + 1, w, layer(w, c)

    return lax.while_loop(lambda c: c[0] < 3, step, (0, p["w"], x))[2]


def while_that_carries_the_weight_through_a_jit(p, x):
    step = jax.jit(lambda c: (c[0] + 1, c[1], layer(c[1], c[2])))
    return lax.while_loop(lambda c: c[0] < 3, lambda c: step(c), (0, p["w"], x))[2]


def cond(p, x):
    return lax.cond(x.sum() > 0, lambda x: layer(p["w"], x), lambda x: x, x) @ p["v"]


def switch(p, x):
    branches = [lambda x, i=i: x @ p["layers"][i] for i in range(4)]
    ys = [lax.switch(i, branches, x) for i in range(4)]
    return sum(ys) @ p["v"]


def vmapped_layers(p, x):
    return jax.vmap(layer, (0, None))(p["layers"], x) @ p["v"]


def grad_inside(p, x):
    return jax.grad(lambda x: layer(p["w"], x).sum())(x) @ p["v"]


REVERSE = [
    jitted, nested_jit, remat, scan_over_layers, scan_backwards_and_unrolled,
    scan_with_constants, scan_of_remat, scan_that_carries_the_weight,
    scan_of_one_step_that_carries_a_layer, scan_that_returns_its_layers,
    scan_over_rows_of_a_weight, cond, switch, vmapped_layers, grad_inside,
]  # fmt: skip


def used(fn, x):
    return contract.used(fn, params(), x)


@pytest.mark.parametrize(
    "fn", REVERSE, ids=lambda fn: getattr(fn, "__name__", "jitted")
)
def test_contract_of_control_flow(x64, fn):
    x = array(3, 7)
    contract.check(fn, used(fn, x), x, dtype=jnp.float64)


FORWARD = [
    fori, while_with_a_weight_in_its_condition, while_that_carries_the_weight,
    while_that_carries_the_weight_through_a_jit,
]  # fmt: skip


@pytest.mark.parametrize("fn", FORWARD)
def test_loops_that_only_run_forward(x64, fn):
    x = array(3, 7)
    adapted = contract.adapt(fn, used(fn, x), x, dtype=jnp.float64)
    assert jnp.array_equal(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x))
    adapted = contract.randomized(adapted)
    expected = fn(flora.merge(adapted), x)
    contract.close(jax.jit(flora.lora(fn))(adapted, x), expected)
    _, tangent = jax.jvp(lambda t: flora.lora(fn)(t, x), (adapted,), (adapted,))
    assert jnp.isfinite(tangent).all()


def test_forward_mode_and_hessians(x64):
    def fn(p, x):
        return jnp.sum(scan_over_layers(p, x)[0] ** 2)

    x = array(3, 7)
    adapted = contract.adapt(fn, used(fn, x), x, rank=1, dtype=jnp.float64)
    base, adapter = flora.split(contract.randomized(adapted))

    def both(adapter):
        joined = flora.join(base, adapter)
        return flora.lora(fn)(joined, x), fn(flora.merge(joined), x)

    tangent = jax.tree.map(jnp.ones_like, adapter)
    contract.close(*jax.jvp(both, (adapter,), (tangent,))[1], 1e-11)
    _, linear = jax.linearize(both, adapter)
    contract.close(*linear(tangent), 1e-11)

    def turned(f):
        return jax.jvp(jax.grad(lambda a: both(a)[f]), (adapter,), (tangent,))[1]

    contract.close(turned(0), turned(1), 1e-10)


def test_an_inner_jit_keeps_its_name_and_the_profile_its_scopes():
    @jax.jit
    def my_layer(w, x):
        with jax.named_scope("attention"):
            return x @ w

    def fn(p, x):
        with jax.named_scope("block"):
            return my_layer(p["w"], x)

    p, x = {"w": array(7, 5, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    adapted = contract.adapt(fn, p, x)
    jaxpr = jax.make_jaxpr(flora.lora(fn))(adapted, x)
    assert [e.params["name"] for e in jaxpr.eqns if e.primitive is contract.P.jit] == [
        "my_layer"
    ]
    text = jax.jit(flora.lora(fn)).lower(adapted, x).as_text(debug_info=True)
    base = jax.jit(fn).lower(p, x).as_text(debug_info=True)
    for scope in ("block", "attention/dot_general"):
        assert text.count(scope) >= base.count(scope) > 0


def test_layers_that_share_a_jitted_function_share_its_trace():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        for i in range(6):
            x = layer(p[f"w{i}"], x)
        return layer(p["w0"], x)

    p = {f"w{i}": array(7, 7, seed=i, dtype=jnp.float32) for i in range(6)}
    x = array(3, 7, dtype=jnp.float32)
    adapted = contract.randomized(contract.adapt(fn, p, x, dropout=0.5))
    inner = [e.params["jaxpr"] for e in jax.make_jaxpr(flora.lora(fn))(adapted, x).eqns
             if e.primitive is contract.P.jit]  # fmt: skip
    assert len(inner) == 7
    assert len({id(jaxpr) for jaxpr in inner}) == 1
    contract.close(flora.lora(fn)(adapted, x), fn(flora.merge(adapted), x), 1e-4)
    keyed = flora.with_dropout(adapted, jax.random.key(0))
    inner = [
        e.params["jaxpr"]
        for e in jax.make_jaxpr(flora.lora(fn))(keyed, x).eqns
        if e.primitive is contract.P.jit and e.params["name"] == "layer"
    ]
    assert len({id(jaxpr) for jaxpr in inner}) == 7  # each use has its own mask


def test_inner_shardings_are_kept():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(jax.devices("cpu"), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    inner = jax.jit(lambda w, x: x @ w, in_shardings=(rows, None), out_shardings=rows)

    def fn(p, x):
        return inner(p["w"], x)

    p, x = {"w": array(8, 5, dtype=jnp.float32)}, array(16, 8, dtype=jnp.float32)
    adapted = contract.adapt(fn, p, x)
    out = jax.jit(flora.lora(fn))(adapted, x)
    assert out.sharding.is_equivalent_to(rows, 2)
    contract.close(out, fn(p, x))


def test_weights_that_branches_return(x64):
    def choose(p, x):
        w = lax.cond(x.sum() > 0, lambda: p["w"], lambda: -p["u"])
        y = x @ w
        w = lax.switch(
            2, [lambda: p["w"], lambda: jnp.ones((7, 7)), lambda: 2 * p["u"]]
        )
        return jnp.tanh(y) @ w

    def score(p, x):  # what the derivative of a branch remembers is the weight
        f = lambda x: lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x).sum()  # noqa: E731
        return jax.grad(lambda x: jnp.sin(f(x)))(x) + x @ p["u"]

    p, x = {"w": array(7, 7), "u": array(7, 7, seed=1)}, jnp.abs(array(3, 7))
    for fn in (choose, score):
        own = (contract.P.neg, contract.P.mul)
        adapted = contract.check(fn, p, x, dtype=jnp.float64, views=own)
        assert adapted["w"].layout == adapted["u"].layout


REFUSED = {
    "a weight that a loop changes": lambda w, x: lax.scan(
        lambda c, r: (c * 2 + 1, r @ c), w, x)[1],
    "a weight as a branch's result": lambda w, x: x @ lax.cond(
        x.sum() > 0, lambda: w, lambda: w.reshape(7, 7, 1).transpose(1, 0, 2)[..., 0]),
    "a weight as a loop's output": lambda w, x: x @ lax.scan(
        lambda c, r: (c, w), 0, x)[1][0],
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_loops_and_branches_cannot_factor_is_named(reason):
    def fn(p, x):
        return REFUSED[reason](p["w"], x)

    p, x = {"w": array(7, 7, dtype=jnp.float32)}, array(3, 7, dtype=jnp.float32)
    with pytest.raises(flora.LoraError, match=reason):
        contract.adapt(fn, p, x)
    adapted = contract.randomized(contract.adapt(fn, p, x, fallback="materialize"))
    contract.close(jax.jit(flora.lora(fn))(adapted, x), fn(flora.merge(adapted), x))


def test_branches_by_platform(x64):
    def fn(p, x):
        return lax.platform_dependent(
            x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: x @ w.T
        )

    contract.check(fn, {"w": array(7, 7)}, array(3, 7), dtype=jnp.float64, vmap=False,
                   layouts={"w": flora.Layout()})  # fmt: skip
