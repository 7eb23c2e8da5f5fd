import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from flora._algebra.choice import Sizes
from flora._trace.rules import dot
from tests.support import contract
from tests.support.contract import array, properties
from tests.support.named import factored
from tests.support.variant_cases import Between


@st.composite
def products(draw):
    """Named axes of weight and activations in any order, and the weight's side."""
    sizes = st.integers(1, 4)
    summed = [("sum", i, draw(sizes)) for i in range(draw(st.integers(1, 2)))]
    batch = [("batch", i, draw(sizes)) for i in range(draw(st.integers(0, 2)))]
    free_w = [("w", i, draw(sizes)) for i in range(draw(st.integers(1, 2)))]
    free_x = [("x", i, draw(sizes)) for i in range(draw(st.integers(0, 2)))]
    w = draw(st.permutations(summed + batch + free_w))
    x = draw(st.permutations(summed + batch + free_x))
    return w, x, draw(st.booleans())


def dimension_numbers(lhs, rhs):
    def where(axes, kind):
        order = sorted(axis for axis in axes if axis[0] == kind)
        return tuple(axes.index(axis) for axis in order)

    return (
        (where(lhs, "sum"), where(rhs, "sum")),
        (where(lhs, "batch"), where(rhs, "batch")),
    )


@properties(25, case=products())
def test_any_dimension_numbers(case):
    w_axes, x_axes, on_the_left = case

    def fn(p, x):
        if on_the_left:
            return lax.dot_general(p["w"], x, dimension_numbers(w_axes, x_axes))
        return lax.dot_general(x, p["w"], dimension_numbers(x_axes, w_axes))

    with jax.enable_x64(True):
        w = array(*(n for *_, n in w_axes), seed=1)
        x = array(*(n for *_, n in x_axes), seed=2)
        adapted = contract.adapt(fn, {"w": w}, x, rank=1, dtype=jnp.float64)
        adapted = contract.randomized(adapted)
        layout = adapted["w"].layout
        for role, kind in (("in_", "sum"), ("stack", "batch"), ("out", "w")):
            axes = tuple(i for i, axis in enumerate(w_axes) if axis[0] == kind)
            assert getattr(layout, role) == axes
        contract.close_to_merged(fn, adapted, x)


EINSUMS = [
    ("bi,io->bo", (5, 7), (7, 11)),
    ("bi,oi->bo", (5, 7), (11, 7)),
    ("bti,iho->bhto", (2, 3, 7), (7, 4, 5)),
    ("bhto,hoi->bti", (2, 4, 3, 5), (4, 5, 7)),
    ("ebi,eio->ebo", (3, 5, 7), (3, 7, 11)),
    ("bi,eio->ebo", (5, 7), (3, 7, 11)),
    ("bsd,cdhk->cbshk", (2, 3, 5), (2, 5, 3, 7)),
]


@pytest.mark.parametrize(("spec", "x", "w"), EINSUMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_contract_of_einsums(x64, spec, x, w, dtype):
    def fn(p, x):
        return jnp.einsum(spec, x, p["w"])

    factors = jnp.float64 if dtype == jnp.float64 else jnp.float32
    params = {"w": array(*w, seed=1, dtype=dtype)}
    contract.check(fn, params, array(*x, seed=2, dtype=dtype), dtype=factors)


def test_float32_factors_over_a_bfloat16_base_keep_their_dtype():
    def fn(p, x):
        return x @ p["w"]

    params = {"w": array(7, 11, dtype=jnp.bfloat16)}
    x = array(5, 7, dtype=jnp.bfloat16)
    adapted = contract.check(fn, params, x)
    _, grads = flora.value_and_grad(lambda t: fn(flora.merge(t), x).sum())(adapted)
    assert adapted["w"].a.dtype == grads["w"].a.dtype == jnp.float32
    assert flora.merge(adapted)["w"].dtype == jnp.bfloat16


def test_a_weight_that_is_used_twice(x64):
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T + jnp.sin(x)

    contract.check(fn, {"w": array(7, 11)}, array(5, 7), dtype=jnp.float64)


PRODUCTS_OF_WEIGHTS = {
    "u v x": lambda p, x: p["u"] @ p["v"] @ x.T,
    "(u v)ᵀ": lambda p, x: (p["u"] @ p["v"]).T * x.sum(),
    "x (u v)": lambda p, x: x @ (p["u"] @ p["w"]),
    "transposed": lambda p, x: jnp.einsum("ij,jk->ki", p["u"], p["v"]) * x.sum(),
    "of itself": lambda p, x: jnp.einsum("ij,kj->ik", p["u"], p["u"]) * x.sum(),
    "(w u) x": lambda p, x: jnp.einsum("ij,ki,bk->bj", p["u"], p["t"], x,
                                       optimize=[(0, 1), (0, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS_OF_WEIGHTS)
def test_weight_times_weight(x64, name):
    every = {
        "u": array(7, 5, seed=1), "v": array(5, 11, seed=2), "w": array(5, 13, seed=3),
        "t": array(11, 7, seed=4),
    }  # fmt: skip
    fn = PRODUCTS_OF_WEIGHTS[name]
    used = {path for path in every if flora.coverage(fn, every, x_for(name))[path].uses}
    params = {path: w for path, w in every.items() if path in used}
    contract.check(fn, params, x_for(name), dtype=jnp.float64)


def x_for(name):
    return array(3, 7, seed=5) if name == "x (u v)" else array(3, 11, seed=5)


def test_stacked_weight_times_stacked_weight(x64):
    def fn(p, x):
        return jnp.einsum("eij,ejk->eik", p["u"], p["v"]) * x

    params = {"u": array(3, 7, 5, seed=1), "v": array(3, 5, 11, seed=2)}
    contract.check(fn, params, array(3, 7, 11), dtype=jnp.float64)


def test_precision_and_preferred_element_type_are_kept():
    dims = (((1,), (0,)), ((), ()))

    def fn(p, x):
        highest = lax.Precision.HIGHEST
        return lax.dot_general(x, p["w"], dims, highest, jnp.float32)

    x, w = array(5, 7, dtype=jnp.bfloat16), array(7, 11, dtype=jnp.bfloat16)
    adapted = contract.check(fn, {"w": w}, x, tolerance=2e-2)
    jaxpr = jax.make_jaxpr(flora.lora(fn))(adapted, x)
    dots = [
        e for e in contract.equations(jaxpr) if e.primitive is contract.P.dot_general
    ]
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert [e.params["precision"] for e in dots] == 3 * [highest]
    assert flora.lora(fn)(adapted, x).dtype == jnp.float32


def test_the_thin_product_that_costs_less_comes_first():
    def fn(p, x):  # attend: the factor that has d first, whatever its name
        return x @ p["embedding"].T + p["embedding"][jnp.array([0, 1])].sum()

    w, x = array(97, 8, dtype=jnp.float32), array(3, 8, dtype=jnp.float32)
    adapted = contract.adapt(fn, {"embedding": w}, x)
    jaxpr = jax.make_jaxpr(flora.lora(fn))(adapted, x)
    dots = [
        e for e in contract.equations(jaxpr) if e.primitive is contract.P.dot_general
    ]
    shapes = [e.outvars[0].aval.shape for e in dots]
    assert shapes == [(3, 97), (3, 2), (3, 97), (2, 8)]


LAYOUTS = {"in, out": flora.Layout(), "out, in": flora.Layout((), (1,), (0,))}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_function_between_a_and_b_in_a_product_of_two_weights(
    x64, left, right, transposed
):
    """It acts on what meets the weight at hand; what meets the other one is refused."""

    def weight(shape, layout, seed, variant):
        shapes = (shape, *layout.factor_shapes(shape, 2))
        base, a, b = (array(*s, seed=seed + i) for i, s in enumerate(shapes))
        return flora.LoraWeight(base, a, b, layout=layout, rank=2, variant=variant)

    def fn(p, x):
        if transposed:
            return x @ (p["v"].T @ p["u"].T).T
        return x @ (p["u"] @ p["v"])

    def met(w, x, layout):
        """X W for W of the variant: f(x A) B or, where x meets B, f(x Bᵀ) Aᵀ."""
        swap = layout == "out, in"
        first, second = (w.b.T, w.a.T) if swap else (w.a, w.b)
        return x @ w.base + w.scale * jax.nn.softmax(x @ first) @ second

    def run(first, second):
        u = weight((7, 5), LAYOUTS[left], 1, first)
        v = weight((5, 4), LAYOUTS[right], 5, second)
        return flora.lora(fn)({"u": u, "v": v}, x), u, v

    x, mine, other = array(3, 7), (Between(), None), (None, Between())
    if transposed:
        mine, other = other, mine
    got, u, v = run(*mine)
    if transposed:
        want = x @ met(v, flora.merge(u), right)
    else:
        turned = dataclasses.replace(u, base=u.base.T)
        back = {"in, out": "out, in", "out, in": "in, out"}[left]
        want = x @ met(turned, flora.merge(v).T, back).T
    contract.close(got, want)
    for kinds in (other, (Between(), Between())):
        with pytest.raises(flora.LoraError, match=r"two weights with .* a variant"):
            run(*kinds)


@pytest.mark.parametrize("spec", ["b,io->bio", "bio,io->b"])
def test_a_function_between_needs_x_to_meet_one_factor(spec):
    def fn(p, x):
        return jnp.einsum(spec, x, p["w"])

    shape = (3, 5, 4) if spec == "bio,io->b" else (3,)
    tree = contract.adapt(
        lambda p, x: x @ p["w"], {"w": jnp.ones((5, 4))}, jnp.ones((3, 5)),
        variant=Between(),
    )  # fmt: skip
    with pytest.raises(flora.LoraError, match="both in and out axes, or over neither"):
        flora.lora(fn)(tree, jnp.ones(shape))


@jax.custom_jvp
def own(w, x):
    return x @ w


own.defjvp(lambda primals, tangents: jax.jvp(
    lambda w, x: x @ w, primals, tangents))  # fmt: skip

ACROSS = flora.Layout((), (0,), (1, 2))
# name -> the product, the shapes of w and x, and what is set
FORMLESS = {
    "dropout": (lambda p, x: x @ p["w"], (5, 4), (3, 5), {"dropout": 0.5}),
    "scaled outputs": (
        lambda p, x: x @ p["w"], (5, 4), (3, 5), {"variant": flora.variants.DoRA()}),
    "a function between": (
        lambda p, x: x @ p["w"], (5, 4), (3, 5), {"variant": Between()}),
    "a change alone": (lambda p, x: own(p["w"], x), (5, 4), (3, 5), {}),
    "complex": (lambda p, x: abs(x @ (p["w"] * (1 + 2j))), (5, 4), (3, 5), {}),
    "narrow": (
        lambda p, x: lax.dot(x.astype(jnp.float8_e4m3fn), p["w"].astype(
            jnp.float8_e4m3fn), preferred_element_type=jnp.float32),
        (5, 4), (3, 5), {}),
    "part of the outputs": (
        lambda p, x: jnp.einsum("bj,ijk->bik", x, p["w"]), (5, 4, 3), (2, 4),
        {"layouts": {"w": ACROSS}}),
    "all of the inputs and more": (
        lambda p, x: jnp.einsum("bij,ijk->bk", x, p["w"]), (5, 4, 3), (2, 5, 4),
        {"layouts": {"w": ACROSS}}),
    "a stack that is summed": (
        lambda p, x: jnp.einsum("bsi,sio->bo", x, p["w"]), (3, 5, 4), (2, 3, 5),
        {"layouts": {"w": flora.Layout((0,), (1,), (2,))}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMLESS)
def test_what_no_form_is_for_is_computed_directly(name):
    fn, shape, of_x, settings = FORMLESS[name]
    x = array(*of_x, dtype=jnp.float32)
    w = array(*shape, seed=1, dtype=jnp.float32)
    tree = contract.adapt(fn, {"w": w}, x, **settings)
    base, adapter = flora.split(contract.randomized(tree))

    @jax.jit
    def slopes(adapter):
        def loss(adapter, form):
            tree = flora.join(base, adapter)
            if "dropout" in settings:
                tree = flora.with_dropout(tree, jax.random.key(0))
            return contract.scalar(flora.lora(fn, form=form)(tree, x))

        return [jax.grad(loss)(adapter, form) for form in ("direct", "concat")]

    contract.close(*slopes(adapter))


def test_what_a_product_counts():
    fn = lambda x, w: jnp.einsum("sbti,sio->sbto", x, w)  # noqa: E731
    x = jnp.ones((2, 3, 4, 5))
    axes = [[("0", 2, "stack")], [("1", 5, "in")], [("2", 6, "out")]]
    w = factored(axes, dtype=jnp.float32)
    (eqn,) = jax.make_jaxpr(fn)(x, w.base).eqns[:1]
    side = int(eqn.invars[1].aval.shape == w.shape)
    met = dot._meeting(eqn, x, w, side)
    assert dot._counts(met) == Sizes(tokens=12, in_=5, out=6, rank=2)
