"""Operations on quantized weights: dequantized where they multiply, not kept dense."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flora
from flora._tree.quantized import dequantized
from flora.quantize import Quantized
from tests.support import contract
from tests.support.contract import P, array, equations
from tests.support.quantized import Scaled, dense_of


def quantized(*shape, seed=0, whole_stack=False):
    q = np.random.default_rng(seed).integers(-9, 9, shape)
    lead = shape[:1] if whole_stack else (1,) * (len(shape) > 2)
    scale = array(*lead, 1, shape[-1], seed=seed + 1, dtype=jnp.float32)
    return Quantized(Scaled(jnp.asarray(q, jnp.int8), scale / 9), dense_of)


def dense(tree):
    """The same tree over bases that are dequantized before anything runs."""

    def one(w):
        if contract.is_weight(w):
            return dataclasses.replace(w, base=dequantized(w.base))
        return dequantized(w)

    def stop(w):
        return contract.is_weight(w) or isinstance(w, Quantized)

    return jax.tree.map(one, tree, is_leaf=stop)


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["s"])[0]


MESH = Mesh(np.array(jax.devices("cpu")[:1]), ("x",))
FUNCTIONS = {
    "product": lambda p, x: x @ p["w"],
    "reshaped first": lambda p, x: x[:, :5] @ p["w"].T.reshape(5, 7)[:, ::-1] * 2,
    "changed often": lambda p, x: x @ -(p["w"] * 3).astype(jnp.float32)[:, 1:4],
    "sum of two": lambda p, x: x @ (p["w"] + p["u"]),
    "joined": lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], 1),
    "split": lambda p, x: (lambda a, b: (x @ a).sum() * (x @ b))(
        *jnp.split(p["w"], [2], 1)),
    "rows": lambda p, x: p["w"][jnp.array([3, 0])],
    "norm": lambda p, x: x @ p["w"] / jnp.sqrt((p["w"] ** 2).sum(0)),
    "scan": scanned,
    "one of a stack": lambda p, x: x @ p["s"][1],
    "jit and remat": lambda p, x: jax.jit(jax.checkpoint(lambda w: x @ w))(p["w"]),
    "jit with shardings": lambda p, x: jax.jit(
        lambda w: x @ w, in_shardings=NamedSharding(MESH, PartitionSpec("x")))(p["w"]),
}  # fmt: skip
EVERY = {
    "w": quantized(7, 5),
    "u": quantized(7, 5, seed=3),
    "s": quantized(3, 7, 7, seed=5, whole_stack=True),
}
X = array(4, 7, seed=9, dtype=jnp.float32)


def adapted(fn, every=EVERY, **config):
    params = contract.used(fn, every, X)
    return contract.randomized(contract.adapt(fn, params, X, **config))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_gradients_are_those_over_the_dense_base(name):
    fn = FUNCTIONS[name]
    tree = adapted(fn)
    assert all(isinstance(w.base, Quantized) for w in contract.weights(tree))

    @jax.jit
    def both(tree):
        def run(tree):
            base, adapter = flora.split(tree)

            def loss(adapter):
                out = flora.lora(fn)(flora.join(base, adapter), X)
                return contract.scalar(out), out

            return jax.value_and_grad(loss, has_aux=True)(adapter)

        def parts(found):
            return found[0], [(w.a, w.b) for w in contract.weights(found[1])]

        return parts(run(tree)), parts(run(dense(tree)))

    contract.close(*both(tree), 1e-5)


def residuals(fn, tree):
    """What the backward pass keeps, in shapes."""
    base, adapter = flora.split(tree)

    def run(adapter, base, x):
        def apply(adapter, x):
            return flora.lora(fn)(flora.join(base, adapter), x)

        return jax.tree.leaves(jax.vjp(apply, adapter, x)[1])

    return jax.eval_shape(run, adapter, base, X)


DENSE = {
    "product": (5, 7), "reshaped first": (5, 7), "changed often": (3, 7),
    "scan": (3, 7, 7), "one of a stack": (7, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_what_is_kept_is_what_is_stored(name):
    fn = FUNCTIONS[name]
    tree = adapted(fn)

    def kept(tree):
        shapes = [
            tuple(sorted(x.shape))
            for x in residuals(fn, tree)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return shapes.count(DENSE[name])

    assert kept(tree) == 0
    assert kept(dense(tree)) == 1  # so that the test would see it


@pytest.mark.parametrize("whole_stack", [True, False])
def test_a_scan_slices_what_is_stored_where_it_can(whole_stack):
    tree = adapted(scanned, {"s": quantized(3, 7, 7, whole_stack=whole_stack)})
    jaxpr = jax.make_jaxpr(flora.lora(scanned))(tree, X)
    (loop,) = (e for e in equations(jaxpr) if e.primitive is P.scan)
    sliced = {v.aval.dtype for v in loop.invars if v.aval.shape == (3, 7, 7)}
    # A scale that all layers share cannot be sliced: all are dequantized before.
    assert sliced == {jnp.dtype(jnp.int8 if whole_stack else jnp.float32)}


def test_a_weight_that_is_not_adapted_is_dequantized_where_it_is_used():
    def fn(p, x):
        return jnp.tanh(x @ p["w"]), x @ p["u"]

    params = {"w": EVERY["w"], "u": EVERY["u"]}
    contract.close(flora.lora(fn)(params, X), fn(dense(params), X), 1e-6)
    tree = contract.adapt(fn, params, X, target="w")
    assert isinstance(tree["u"], Quantized)
    loss = functools.partial(contract.scalar)
    grads = jax.grad(lambda x: loss(flora.lora(fn)(tree, x)))(X)
    contract.close(grads, jax.grad(lambda x: loss(fn(dense(params), x)))(X), 1e-5)
    # What has no rule dequantizes it too: it is frozen, and nothing is lost by that.
    got = flora.lora(lambda p, x: jnp.sin(p["u"]))(tree, X)
    contract.close(got, jnp.sin(EVERY["u"].dense()), 1e-6)


def test_shapes_stand_for_what_is_stored():
    shapes = jax.eval_shape(lambda: {"w": EVERY["w"]})
    tree = contract.adapt(FUNCTIONS["product"], shapes, X)
    assert tree["w"].base == shapes["w"]
    out = jax.eval_shape(flora.lora(FUNCTIONS["product"]), tree, X)
    assert (out.shape, out.dtype) == ((4, 5), jnp.float32)


def own_derivative(wrap):
    """x w + tanh(x u) with derivatives along w and u that are not JAX's own."""

    def product(x, w, u):
        return x @ w + jnp.tanh(x @ u)

    own = wrap(product)
    if wrap is jax.custom_jvp:
        own.defjvp(lambda p, t: (
            own(*p), 3 * t[0] @ p[1] + 2 * p[0] @ t[1] + p[0] @ t[2]))  # fmt: skip
    else:
        own.defvjp(
            lambda x, w, u: (own(x, w, u), (x, w)),
            lambda saved, g: (3 * g @ saved[1].T, 2 * saved[0].T @ g, saved[0].T @ g),
        )
    return own


JVP, VJP = own_derivative(jax.custom_jvp), own_derivative(jax.custom_vjp)
MIXED = {
    "along out": lambda x, w, u: x @ jnp.concatenate([w, u], 1),
    "along in": lambda x, w, u: jnp.concatenate([x, 2 * x], 1) @ jnp.concatenate(
        [w, u], 0),
    "stacked": lambda x, w, u: jnp.einsum("bi,kio->kbo", x, jnp.stack([w, u])),
    "stacked in the middle": lambda x, w, u: jnp.einsum(
        "bi,iko->kbo", x, jnp.stack([w, u], 1)),
    "loop over a stack": lambda x, w, u: lax.scan(
        lambda h, w: (jnp.tanh(h @ w) @ jnp.ones((5, 7)), None), x,
        jnp.stack([w, u]))[0],
    "sum": lambda x, w, u: x @ (w + u),
    "difference": lambda x, w, u: x @ (w - u),
    "complex": lambda x, w, u: jnp.abs(x @ lax.complex(w, u)),
    "centred": lambda x, w, u: x @ (w - u.mean(0)),
    "product": lambda x, w, u: x @ (w @ u.T),
    "custom_jvp": JVP,
    "custom_vjp": VJP,
    "loop": lambda x, w, u: lax.fori_loop(
        0, 2, lambda _, h: jnp.tanh(h @ w) @ u.T, x),
}  # fmt: skip


@pytest.mark.parametrize("base", ["quantized", "dense"])
@pytest.mark.parametrize("name", MIXED)
def test_beside_a_quantized_weight_without_factors(name, base):
    """Both orders; the merged model over dequantized weights says what is right."""
    w = EVERY["w"] if base == "quantized" else EVERY["w"].dense()
    params = {"w": w, "u": EVERY["u"]}

    def fn(p, x):
        one, other = MIXED[name](x, p["w"], p["u"]), MIXED[name](x, p["u"], p["w"])
        return one, other

    tree = contract.randomized(contract.adapt(fn, params, X, target="w"))
    assert isinstance(tree["u"], Quantized)
    contract.close_to_merged_over(fn, tree, dense(tree), X)
