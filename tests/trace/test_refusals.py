"""What has no factored form is refused, each by the guard that is there for it."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from tests.support.contract import array
from tests.support.variant_cases import Between

F32 = jnp.float32
MATRIX = flora.Layout((), (0,), (1,))
STACK = flora.Layout((0,), (1,), (2,))
TABLE = flora.Layout((), (0, 1), (2,))
WIDE = flora.Layout((), (0,), (1, 2))
DORA = flora.variants.DoRA()


def weight(layout, *shape, **fields):
    """A weight of rank 2, of any layout."""
    a, b = (array(*s, seed=1, dtype=F32) for s in layout.factor_shapes(shape, 2))
    if fields.get("variant") == DORA:
        fields["extra"] = {
            "magnitude": jnp.ones(
                (*b.shape[: len(layout.stack)], *b.shape[len(layout.stack) + 1 :])
            )
        }
    if "dropout" in fields:
        keys = jax.random.split(jax.random.key(0), b.shape[: len(layout.stack)])
        fields["key"] = keys
    return flora.LoraWeight(
        array(*shape, dtype=F32), a, b, layout=layout, rank=2, **fields
    )


def conv(x, w, groups=1):
    numbers = ("NWC", "WIO", "NWC")[: x.ndim]
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def windows(w, shape, slice_sizes):
    """The first window of w, again and again."""
    numbers = lax.GatherDimensionNumbers((1, 2), (), ())
    return lax.gather(w, jnp.zeros((*shape, 0), int), numbers, slice_sizes)


@jax.custom_jvp
def placed(w, x):
    return x @ w


@placed.defjvp
def _(primals, tangents):
    dw, dx = tangents
    w, x = primals
    return x @ w, x @ jax.device_put(dw, jax.devices()[0]) + dx @ w


@jax.custom_vjp
def outer(w, x):
    return jnp.vdot(w, w) * x


outer.defvjp(lambda w, x: (x, w), lambda w, g: (w, g))


@jax.custom_jvp
def product(w, x):
    return x @ w


product.defjvp(lambda primals, tangents: jax.jvp(
    lambda w, x: x @ w, primals, tangents))  # fmt: skip

# what is said, weights, and what is done with them and x, [3, 4]
REFUSED = [
    # structure
    ("a sum over a stack of weights",
        {"w": weight(STACK, 3, 4, 5)}, lambda p, x: x @ p["w"].sum(0)),
    ("a sum over a stack of weights",
        {"w": weight(STACK, 3, 4, 5)}, lambda p, x: x * p["w"].sum()),
    ("a sum over in axes",
        {"w": weight(MATRIX, 4, 5, variant=Between())}, lambda p, x: p["w"].sum(0)),
    ("a sum over out axes",
        {"w": weight(MATRIX, 4, 5, variant=DORA)}, lambda p, x: p["w"].sum(1)),
    ("a weight as the padding",
        {"w": weight(MATRIX, 1, 1)},
        lambda p, x: lax.pad(x, p["w"].reshape(()), [(0, 0, 0), (1, 0, 0)])),
    ("padding of a stack with dropout",
        {"w": weight(STACK, 3, 4, 5, dropout=0.5)},
        lambda p, x: x @ jnp.pad(p["w"], ((1, 0), (0, 0), (0, 0)))),
    ("a product of two weights, element by element",
        {"w": weight(MATRIX, 4, 5), "v": weight(MATRIX, 4, 5)},
        lambda p, x: x @ (p["w"] * p["v"])),
    ("a factor of another weight",
        {"w": weight(MATRIX, 4, 5), "v": weight(MATRIX, 1, 5)},
        lambda p, x: x @ (p["w"] * p["v"])),
    ("a division by a weight",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: 1 / p["w"]),
    ("a product that repeats the weight",
        {"w": weight(MATRIX, 1, 5)}, lambda p, x: lax.mul(p["w"], jnp.ones((3, 5)))),
    ("a factor for each element of the weight",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: p["w"] * x.sum() * x.mean(
            0)[:, None] * jnp.sin(x[0][:, None] + jnp.arange(5.0))),
    ("a factor that varies along in and out axes",
        {"w": weight(TABLE, 4, 3, 5)},
        lambda p, x: p["w"] * (x[0][:, None, None] + jnp.arange(5.0))),
    # squares
    ("squares summed over parts of in and out axes",
        {"w": weight(flora.Layout((), (0, 1), (2, 3)), 4, 3, 5, 2)},
        lambda p, x: (p["w"] ** 2).sum((0, 2))),
    ("a power of the weight's elements other than the square",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: (p["w"] ** 3).sum()),
    ("the square, of a weight whose outputs are scaled",
        {"w": weight(MATRIX, 4, 5, variant=DORA)}, lambda p, x: (p["w"] ** 2).sum()),
    ("the square, of a weight whose variant acts",
        {"w": weight(MATRIX, 4, 5, variant=Between())},
        lambda p, x: (p["w"] ** 2).sum()),
    # lookups
    ("a lookup along out axes",
        {"w": weight(MATRIX, 4, 5, variant=Between())}, lambda p, x: p["w"][:, 1:3][
            :, jnp.array([0, 1])]),
    ("a lookup along out axes",
        {"w": weight(MATRIX, 4, 5, variant=Between())}, lambda p, x: jax.vmap(
            lambda i: lax.dynamic_slice(p["w"], (i, 0), (1, 2)))(jnp.array([2, 0]))),
    ("a lookup that repeats the weight",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: windows(p["w"], (3,), (1, 5))),
    ("an index that repeats the weight",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: windows(p["w"], (3,), (4, 5))),
    ("a stack indexed along several axes at once",
        {"w": weight(flora.Layout((0, 1), (2,), (3,)), 2, 3, 4, 5)},
        lambda p, x: x[0] @ p["w"][jnp.array([0, 1]), jnp.array([2, 0])]),
    ("an index in an axis that joins several of the weight's",
        {"w": weight(flora.Layout((0,), (2,), (1, 3)), 3, 4, 5, 2)},
        lambda p, x: p["w"].reshape(12, 5, 2)[jnp.array([7, 1])]),
    # products
    ("a product of two weights, of which one has scaled outputs",
        {"w": weight(MATRIX, 4, 5, variant=DORA), "v": weight(MATRIX, 5, 4)},
        lambda p, x: x @ (p["w"] @ p["v"])),
    ("a product of two weights, of which one has scaled outputs",
        {"w": weight(MATRIX, 4, 5, variant=DORA), "v": weight(MATRIX, 5, 4)},
        lambda p, x: p["v"] @ p["w"]),
    ("a product of two weights with joined axes or a variant",
        {"w": weight(MATRIX, 4, 20), "v": weight(STACK, 5, 4, 3)},
        lambda p, x: x @ (p["w"] @ p["v"].reshape(20, 3))),
    ("a product over both in and out axes, or over neither",
        {"w": weight(MATRIX, 4, 5, variant=Between())}, lambda p, x: jnp.vdot(
            x.mean(0)[:, None] * jnp.ones(5), p["w"])),
    ("scaled outputs along axes that the result does not have",
        {"w": weight(WIDE, 5, 4, 2, variant=DORA)},
        lambda p, x: jnp.einsum("bj,ijk->bik", x, p["w"])),
    # convolutions, [batch, width, channels] with [window, in, out]
    ("a weight as the input of a convolution",
        {"w": weight(STACK, 3, 4, 5)}, lambda p, x: conv(p["w"], jnp.ones((2, 5, 3)))),
    ("a convolution across the axes of the weight's layout",
        {"w": weight(flora.Layout((1,), (0,), (2,)), 3, 4, 5)},
        lambda p, x: conv(x[None], p["w"])),
    ("a convolution across the axes of the weight's layout",
        {"w": weight(flora.Layout((), (0, 2), (1, 3)), 3, 2, 4, 5)},
        lambda p, x: conv(x[None], p["w"].reshape(6, 4, 5))),
    ("a convolution with groups across stacked kernels",
        {"w": weight(flora.Layout((2,), (0, 1), (3,)), 3, 2, 3, 4)},
        lambda p, x: conv(x[None], p["w"].reshape(3, 2, 12), groups=2)),
    # mixtures of experts
    ("a weight as the tokens of a ragged product",
        {"w": weight(MATRIX, 4, 5)},
        lambda p, x: lax.ragged_dot(p["w"], jnp.ones((2, 5, 3)), jnp.array([3, 1]))),
    ("a ragged product with joined axes",
        {"w": weight(flora.Layout((0,), (2,), (1, 3)), 2, 2, 4, 5)},
        lambda p, x: lax.ragged_dot(x, p["w"].reshape(4, 4, 5), jnp.array([1] * 4))),
    ("a ragged product with batch or other ragged axes",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: lax.ragged_dot_general(
            x, p["w"], jnp.array([2, 2]), lax.RaggedDotDimensionNumbers(
                (((1,), (0,)), ((), ())), [1], []))),
    ("a ragged product across the axes of the weight's layout",
        {"w": weight(flora.Layout((1,), (0,), (2,)), 2, 4, 5)},
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 1]))),
    # joins
    ("a sum that repeats the weight",
        {"w": weight(MATRIX, 1, 5)}, lambda p, x: lax.add(p["w"], jnp.ones((3, 5)))),
    ("weights of other layouts, joined",
        {"w": weight(STACK, 3, 4, 5),
         "v": weight(flora.Layout((1,), (0,), (2,)), 3, 4, 5)},
        lambda p, x: x @ (p["w"] + p["v"])),
    ("in and out axes that change places",
        {"w": weight(MATRIX, 4, 5), "v": weight(MATRIX, 5, 4, variant=DORA)},
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"].T], 1)),
    ("axis 0 joins several axes of the leaf",
        {"w": weight(STACK, 3, 4, 5)}, lambda p, x: p["w"].reshape(12, 5)[2:]),
    ("an axis that joins axes of other roles",
        {"w": weight(STACK, 3, 4, 5), "v": weight(MATRIX, 12, 5)},
        lambda p, x: p["w"].reshape(12, 5) + p["v"]),
    ("a weight with no elements",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: p["w"][:0].reshape(5, 0)),
    ("a reshape that regroups the weight's elements",
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: p["w"].reshape(10, 2)),
    # functions inside
    ("a weight as a loop's result",
        {"w": weight(MATRIX, 3, 4)},
        lambda p, x: lax.scan(lambda c, _: (p["w"], None), x, None, length=2)[0]),
    ("a weight as a loop's result",
        {"w": weight(MATRIX, 3, 4)},
        lambda p, x: lax.fori_loop(0, 2, lambda i, c: p["w"], x)),
    ("a placement of a change to a weight). Write exclude='/w' in LoraConfig, or pass "
     'fallback="materialize" (forms W + scale·A·B, 80 B',
        {"w": weight(MATRIX, 4, 5)}, lambda p, x: placed(p["w"], x)),
    ("a function with a derivative of its own, of a weight whose outputs are scaled",
        {"w": weight(MATRIX, 4, 5, variant=DORA)}, lambda p, x: product(p["w"], x)),
    ("a function with a derivative of its own, of a weight whose variant acts",
        {"w": weight(MATRIX, 4, 5, variant=Between())},
        lambda p, x: product(p["w"], x)),
    ("dropout in a function with a derivative of its own",
        {"w": weight(MATRIX, 4, 5, dropout=0.5)}, lambda p, x: product(p["w"], x)),
    ("a weight as a gradient",
        {"w": weight(MATRIX, 3, 4)}, lambda p, x: outer(p["w"], x)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "tree", "fn"), REFUSED, ids=[reason for reason, *_ in REFUSED]
)
def test_what_has_no_factored_form_is_refused(reason, tree, fn):
    x = array(3, 4, dtype=F32)

    def loss(tree):
        return jnp.sum(flora.lora(fn)(tree, x))

    def slope(tree):
        return flora.value_and_grad(loss)(tree)[0]

    def change(tree):
        base, adapter = flora.split(tree)
        return jax.jvp(lambda a: loss(flora.join(base, a)), (adapter,), (adapter,))

    step = slope if "gradient" in reason else change if "change to" in reason else loss
    with pytest.raises(flora.LoraError, match=re.escape(f"({reason}")):
        jax.eval_shape(step, tree)
