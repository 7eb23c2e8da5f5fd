"""Formulas of the variants in NumPy, and functions that use one weight."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import flora
from flora.variants import AdaLoRA, DoRA, VeRA
from tests.support.contract import array, is_weight

VARIANTS = {"DoRA": DoRA(), "VeRA": VeRA(), "AdaLoRA": AdaLoRA()}

# --- The formulas, on [stack, in, out], in NumPy, float64 -----------------------------


def matrices(w):
    """W, A, B as `[stack, in, out]`, `[stack, in, rank]`, `[stack, rank, out]`."""
    layout, shape = w.layout, w.base.shape
    order = [*layout.stack, *layout.in_, *layout.out]
    s, i, o = (
        int(np.prod([shape[k] for k in g], dtype=int))
        for g in (layout.stack, layout.in_, layout.out)
    )
    base = np.asarray(w.base, np.float64).transpose(order).reshape(s, i, o)
    a = np.asarray(w.a, np.float64).reshape(s, i, -1)
    return base, a, np.asarray(w.b, np.float64).reshape(s, -1, o), (s, i, o)


def in_place(w, x):
    layout, shape = w.layout, w.base.shape
    order = [*layout.stack, *layout.in_, *layout.out]
    return x.reshape([shape[k] for k in order]).transpose(np.argsort(order))


def formula(w, g=None):
    """W_eff `[...]` or, with g = ∂L/∂W_eff, the gradients of all that trains."""
    base, a, b, (s, _, o) = matrices(w)
    extra = {k: np.asarray(x, np.float64) for k, x in w.extra.items()}
    if g is not None:
        order = [*w.layout.stack, *w.layout.in_, *w.layout.out]
        g = np.asarray(g, np.float64).transpose(order).reshape(base.shape)
    if isinstance(w.variant, DoRA):
        v = base + w.scale * a @ b
        c = extra["magnitude"].reshape(s, 1, o) / np.sqrt((v * v).sum(1, keepdims=True))
        if g is None:
            return in_place(w, v * c)
        norm = np.sqrt((v * v).sum(1))
        dv = w.scale * g * c  # the norm is held fixed
        found = {
            "a": dv @ b.swapaxes(1, 2),
            "b": a.swapaxes(1, 2) @ dv,
            "magnitude": (g * v).sum(1) / norm,
        }
    else:
        vera = isinstance(w.variant, VeRA)
        d = extra["d" if vera else "e"].reshape(s, 1, -1)
        p, q = a * d, b * extra["v"].reshape(s, 1, o) if vera else b
        if g is None:
            return in_place(w, base + w.scale * p @ q)
        dp, dq = w.scale * g @ q.swapaxes(1, 2), w.scale * p.swapaxes(1, 2) @ g
        of_rank = (dp * a).sum(1)
        if vera:
            found = {"d": of_rank, "v": (dq * b).sum(1), "a": 0 * a, "b": 0 * b}
        else:
            found = {"a": dp * d, "b": dq, "e": of_rank}
    parts = {"a": w.a, "b": w.b, **w.extra}
    return {name: x.reshape(parts[name].shape) for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Between:
    """A variant that puts a function of all ranks between A and B."""

    function: Callable = jax.nn.softmax
    frozen = ()

    def start(self, key, weight):
        return weight

    def product(self, weight):
        return flora.variants.Product(weight.a, weight.b, between=self.function)


def acted(w, x):
    """X W + scale f(x A) B for a weight `[in, out]`; plain LoRA has no f."""
    z = x @ w.a
    z = w.variant.function(z) if w.variant else z
    return x @ w.base + w.scale * z @ w.b


# --- Where the weights are used -------------------------------------------------------


def conv(params, x, groups=1, strides=(1, 2)):
    return jax.lax.conv_general_dilated(
        x, params["w"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def scanned(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), x.sum()

    return jax.lax.scan(jax.checkpoint(layer), x, params["w"])


def branches(params, x):
    def more(x):
        return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ params["w"]), x)

    y = jax.lax.cond(x.sum() > 0, more, lambda x: x @ params["w"].T[:4].T, x)
    return y


CASES = {
    "dense": (lambda p, x: x @ p["w"], (5, 4), (3, 5)),
    "transposed": (lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]), (4, 5), (3, 5)),
    "heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]), (6, 2, 4), (3, 6)),
    "heads out": (
        lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]), (2, 4, 6), (3, 2, 4),
    ),
    "reshaped, sliced": (
        lambda p, x: x @ p["w"][:, 2:8].reshape(6, 3, 2)[:, ::-1, 1], (6, 10), (3, 6),
    ),
    "joined": (
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((5, 2))], 1), (5, 4), (3, 5),
    ),
    "there and back": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T), (5, 4), (3, 5),
    ),
    "stack of scan": (scanned, (3, 5, 5), (2, 5)),
    "stack of vmap": (
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (3, 5, 4), (3, 2, 5),
    ),
    "one of a stack": (lambda p, x: x @ p["w"][1] @ p["w"][0], (2, 5, 5), (3, 5)),
    "convolution": (conv, (3, 3, 4, 6), (2, 5, 6, 4)),
    "grouped convolution": (
        functools.partial(conv, groups=2), (3, 3, 2, 6), (2, 5, 6, 4),
    ),
    "inner branch and loop": (branches, (4, 4), (2, 4)),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.float64) * 2, (5, 4), (3, 5)),
}  # fmt: skip


def lookup(params, ids):
    return params["w"][ids]


def experts(params, x, sizes):
    return jax.lax.ragged_dot(x, params["w"], sizes)


def case(name):
    if name == "embedding":
        return lookup, {"w": array(9, 5, seed=1)}, (jnp.array([[1, 8, 0], [3, 3, 2]]),)
    if name == "experts":
        sizes = jnp.array([3, 0, 4], jnp.int32)
        return experts, {"w": array(3, 5, 4, seed=1)}, (array(7, 5), sizes)
    fn, weight, x = CASES[name]
    return fn, {"w": array(*weight, seed=1)}, (array(*x),)


def trained(adapted, key=1, size=0.3):
    """All that an adapter holds, moved at random."""
    base, adapter = flora.split(adapted)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [
        (x + size * jax.random.normal(k, x.shape)).astype(x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return flora.join(base, treedef.unflatten(moved))


def dense(adapted):
    """The tree with W_eff by the formula."""
    return jax.tree.map(
        lambda w: jnp.asarray(formula(w), w.base.dtype) if is_weight(w) else w,
        adapted,
        is_leaf=is_weight,
    )
