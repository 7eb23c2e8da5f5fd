"""Programs, lookups and dtypes that Hypothesis draws, against the merged oracle."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flora
from tests.support import contract
from tests.support.contract import array, properties

# Blocks take x [b, 4] to [b, 4]; no two axes of a weight have one length.
BLOCKS = {
    "mlp": lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"],
    "tied": lambda p, x: jnp.tanh(x @ p["u"]) @ p["u"].T,
    "heads": lambda p, x: jnp.einsum(
        "bhk,hkd->bd", jnp.einsum("bd,dhk->bhk", x, p["q"]), p["o"]),
    "lookup": lambda p, x: x + p["e"][jnp.arange(x.shape[0]) % 7],
    "convolution": lambda p, x: lax.conv_general_dilated(
        x[..., None], p["c"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ).sum(-1),
    "experts": lambda p, x: jnp.einsum(
        "bd,gdf,gfe->be", x, p["s"], p["t"], optimize="optimal"),
    "layers": lambda p, x: lax.scan(
        lambda x, w: (jnp.sin(x @ w[0] @ w[1]), None), x, (p["s"], p["t"]))[0],
    "fused": lambda p, x: jnp.sin(
        x @ jnp.concatenate([p["u"], p["q"].reshape(4, -1)], 1))[:, :4],
    "summed": lambda p, x: jnp.sin(x @ (p["u"] - p["v"].T))[:, :4],
    "normed": lambda p, x: jnp.sin(
        x @ (p["u"] / jnp.linalg.norm(p["u"], axis=0)))[:, :4],
    "one of a stack": lambda p, x: x @ p["s"][1] @ p["t"][lax.rem(5, 3)],
    "joined layers": lambda p, x: lax.scan(
        lambda x, w: (jnp.sin(x @ w[0] @ w[1]), None), x, tuple(
            jnp.concatenate([p[k][::2], -p[k][:1]]) for k in "st"))[0],
    "stacked": lambda p, x: jnp.einsum(
        "bd,gdf->bgf", x, jnp.stack([p["u"], p["v"].T])).sum(1) @ p["v"],
    "sums": lambda p, x: x @ p["u"] @ p["v"] * p["u"].sum(1) + p["s"].sum((1, 2))[
        1] * (x @ p["s"][0])[:, :4],
}  # fmt: skip
SHAPES = {"u": (4, 5), "v": (5, 4), "q": (4, 2, 3), "o": (2, 3, 4), "e": (7, 4),
          "c": (3, 1, 2), "s": (3, 4, 5), "t": (3, 5, 4)}  # fmt: skip


def in_loop(f):
    return lambda p, x: lax.scan(lambda x, _: (f(p, x), None), x, None, length=2)[0]


def in_custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def in_custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda p, x: jax.vjp(f, p, x), lambda pull, dy: pull(dy))
    return g


def in_while(f):
    return lambda p, x: lax.fori_loop(0, 2, lambda i, x: f(p, x), x)


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": in_loop,
    "cond": lambda f: lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: 2 * x, p, x),
    "rows": lambda f: lambda p, x: jax.vmap(lambda row: f(p, row[None])[0])(x),
    "inner gradient": lambda f: lambda p, x: jax.grad(lambda x: f(p, x).sum())(x) * x,
    "custom_jvp": in_custom_jvp,
    "custom_vjp": in_custom_vjp,
}


def build(program, wrappers):
    """The function of a drawn program, and its parameters."""

    def run(f, p, x):
        return f(p, x) + x

    fns = []
    for block, chain in program:
        f = BLOCKS[block]
        for name in chain:
            f = wrappers[name](f)
        fns.append(f)

    def fn(params, x):
        for i, f in enumerate(fns):
            x = run(f, params[str(i)], x)
        return x

    everything = {
        str(i): {
            # Small, so that programs that repeat themselves stay well-conditioned.
            k: 0.4 * array(*s, seed=10 * i + n)
            for n, (k, s) in enumerate(SHAPES.items())
        }
        for i in range(len(program))
    }
    report = flora.coverage(fn, everything, jnp.ones((3, 4)))
    params = {
        i: {k: w for k, w in group.items() if report[f"{i}/{k}"].status != "unused"}
        for i, group in everything.items()
    }
    return fn, params


def programs(wrappers):
    chain = st.lists(st.sampled_from(sorted(wrappers)), max_size=2)
    steps = st.tuples(st.sampled_from(sorted(BLOCKS)), chain)
    return st.lists(steps.filter(is_differentiable), min_size=1, max_size=2)


def is_differentiable(step):
    """A norm's derivative multiplies W by dW, element by element: that is refused."""
    block, chain = step
    return block != "normed" or not any(name.startswith("custom") for name in chain)


def adapted_program(program, wrappers):
    fn, params = build(program, wrappers)
    x = 0.5 * array(3, 4, seed=99)
    return fn, contract.adapt(fn, params, x, rank=1, alpha=1.0, dtype=jnp.float64), x


@properties(30, program=programs(WRAPPERS))
def test_any_program_forward_and_gradient(program):
    with jax.enable_x64(True):
        fn, start, x = adapted_program(program, WRAPPERS)
        tree = contract.randomized(start)
        contract.close_to_merged(fn, tree, x, tolerance=1e-10, start=start)


FORWARD = {k: f for k, f in WRAPPERS.items() if k != "custom_vjp"} | {"while": in_while}


@properties(15, program=programs(FORWARD))
def test_any_program_in_forward_mode(program):
    with jax.enable_x64(True):
        fn, start, x = adapted_program(program, FORWARD)
        tree = contract.randomized(start)
        base, adapter = flora.split(tree)

        @jax.jit
        def both(adapter, direction, x):
            def along(run):
                whole = lambda a: run(flora.join(base, a), x)  # noqa: E731
                return jax.jvp(whole, (adapter,), (direction,))

            return along(flora.lora(fn)), along(lambda t, x: fn(flora.merge(t), x))

        direction = flora.split(contract.randomized(tree, key=5))[1]
        contract.close(*both(adapter, direction, x), 1e-10)
        (at_start, _), (plain, _) = both(flora.split(start)[1], direction, x)
        contract.close(at_start, plain, contract.COMPILED)


def wave(w, k):
    """A factor that varies along axis k."""
    shape = [n if i == k else 1 for i, n in enumerate(w.shape)]
    return jnp.cos(jnp.arange(w.shape[k], dtype=w.dtype)).reshape(shape)


def indexed(w, k, i):
    return w[(*[slice(None)] * k, i)]


# What becomes of a weight w along axis k, beside another v of which the same became.
STEPS = {
    "sum": lambda w, v, k: w.sum(k),
    "centre": lambda w, v, k: w - w.mean(k, keepdims=True),
    "join": lambda w, v, k: jnp.concatenate([w, 2 * v], k),
    "join an array": lambda w, v, k: jnp.concatenate([jnp.ones(w.shape), w], k),
    "stack": lambda w, v, k: jnp.stack([w, -v], k),
    "add": lambda w, v, k: w - 2 * v,
    "add a part": lambda w, v, k: w + lax.slice_in_dim(v, 0, 1, axis=k),
    "repeat": lambda w, v, k: jnp.repeat(w, 2, k),
    "broadcast": lambda w, v, k: jnp.stack([w, w], k),
    "tile": lambda w, v, k: jnp.tile(w, [1 + (i == k) for i in range(w.ndim)]),
    "pad": lambda w, v, k: jnp.pad(w, [(i == k, 0) for i in range(w.ndim)]),
    "scale": lambda w, v, k: w * wave(w, k),
    "one": lambda w, v, k: indexed(w, k, w.shape[k] // 2),
    "some": lambda w, v, k: indexed(w, k, np.array([w.shape[k] - 1, 0])),
    "table": lambda w, v, k: indexed(w, k, np.array([[w.shape[k] - 1], [0]])),
    "cut": lambda w, v, k: lax.slice_in_dim(w, 0, w.shape[k], 2, k),
    "reverse": lambda w, v, k: jnp.flip(w, k),
    "move": lambda w, v, k: jnp.moveaxis(w, k, 0),
    "flatten": lambda w, v, k: w.reshape(*w.shape[:k], -1),
}
LAYOUTS = [((0,), (1,), (2,)), ((1,), (2,), (0,)), ((), (0, 1), (2,)),
           ((), (0,), (1, 2)), ((0, 2), (1,), (3,))]  # fmt: skip


@st.composite
def stacks(draw):
    """A layout, steps, a role in a product for each axis, and a variant."""
    layout = flora.Layout(*draw(st.sampled_from(LAYOUTS)))
    shape, steps = (3, 4, 5, 2)[: len(layout.order)], []
    for _ in range(draw(st.integers(1, 3))):
        if 0 < len(shape) < 5:
            name, k = draw(st.sampled_from(sorted(STEPS))), draw(st.integers(0, 4))
            step = functools.partial(STEPS[name], k=k % len(shape))
            like = jax.ShapeDtypeStruct(shape, jnp.float32)
            shape = jax.eval_shape(step, like, like).shape
            steps.append(step)
    roles = [draw(st.sampled_from(["in", "out", "batch"])) for _ in shape]
    return layout, steps, roles, draw(st.sampled_from([None, flora.variants.DoRA()]))


@properties(60, case=stacks())
def test_any_reduction_join_and_repeat_of_a_stack(case):
    """Its numbers are right, or it is refused."""
    layout, steps, roles, variant = case

    def fn(p, x):
        w, v = p["w"], p["v"]
        for step in steps:
            w, v = step(w, v), step(v, w)
        labels = [*range(w.ndim)]
        met = [i for i in labels if roles[i] != "out"]
        out = [i for i in labels if roles[i] != "in"]
        x = jnp.sin(x + jnp.arange(math.prod(w.shape[i] for i in met)))
        x = x.reshape([2, *(w.shape[i] for i in met)])
        return [jnp.einsum(x, [9, *met], u, labels, [9, *out]) for u in (w, v)]

    with jax.enable_x64(True):
        shape, x = (3, 4, 5, 2)[: len(layout.order)], array(2, 1)
        params = {"w": array(*shape), "v": array(*shape, seed=1)}
        try:
            tree = contract.adapt(
                fn, params, x, layouts=dict.fromkeys(params, layout), variant=variant,
                dtype=jnp.float64,
            )  # fmt: skip
            tree = contract.randomized(tree)
            got, want = jax.jit(
                lambda t: (flora.lora(fn)(t, x), fn(flora.merge(t), x))
            )(tree)
        except flora.LoraError:
            return
        contract.close(got, want, 1e-11)


@st.composite
def lookups(draw):
    """An index for each axis of a stack [3], rows [5, 2] and columns [4]."""
    shape = draw(st.sampled_from([(), (2,), (2, 3)]))

    def index(n):
        ids = st.integers(0, n - 1)
        return draw(st.lists(ids, min_size=6, max_size=6)), shape

    stack = draw(st.sampled_from(["all", "one", "many"]))
    return stack, index(3), index(5), index(2), draw(st.booleans()), draw(st.booleans())


@properties(25, case=lookups())
def test_any_lookup(case):
    stack, *indices, both, transposed = case
    s, i, j = (
        jnp.array(ids[: int(np.prod(shape))], int).reshape(shape)
        for ids, shape in indices
    )

    def fn(p, x):
        w = p["w"]
        if transposed:
            w = w.transpose(3, 1, 0, 2).transpose(2, 1, 3, 0)
        rows = (i, j) if both else (i,)
        if stack == "all":
            y = w[:, *rows]
        else:
            y = w[(s.reshape(-1)[0] if stack == "one" else s, *rows)]
        return jnp.sin(y) * x

    with jax.enable_x64(True):
        layout = flora.Layout((0,), (1, 2), (3,))
        if not both:
            layout = flora.Layout((0,), (1,), (2, 3))
        tree = contract.adapt(
            fn, {"w": array(3, 5, 2, 4)}, jnp.ones(()), rank=2, dtype=jnp.float64,
            layouts={"w": layout},
        )  # fmt: skip
        contract.close_to_merged(fn, contract.randomized(tree), jnp.ones(()))


FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@properties(
    30, base=st.sampled_from(FLOATS), compute=st.sampled_from(FLOATS[:4]),
    factors=st.sampled_from(FLOATS[:4]), batch=st.integers(1, 3),
)  # fmt: skip
def test_any_dtypes(base, compute, factors, batch):
    def fn(p, x):
        return x @ p["w"].astype(compute)

    with jax.enable_x64(True):
        w, x = array(7, 5).astype(base), array(batch, 7, seed=1).astype(compute)
        tree = contract.adapt(fn, {"w": w}, x, dtype=jnp.dtype(factors))
        plain = fn({"w": w}, x)
        got = flora.lora(fn)(tree, x)
        assert got.dtype == plain.dtype
        assert (got == plain).all()
        tree = contract.randomized(tree)
        got = flora.lora(fn)(tree, x).astype(jnp.float64)
        node, x = tree["w"], np.asarray(x, np.float64)
        low = x @ np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
        want = x @ np.asarray(w, np.float64) + node.scale * low
        contract.close(got, jnp.asarray(want), contract.TOLERANCE[compute])


def small():
    def fn(p, x):
        return jnp.tanh(x @ p["u"]) @ p["v"]

    params, x = {"u": array(4, 3), "v": array(3, 2)}, array(5, 4, seed=3)
    tree = contract.randomized(contract.adapt(fn, params, x, rank=1, dtype=jnp.float64))
    base, adapter = flora.split(tree)

    def loss(run):
        return lambda a, x: contract.scalar(run(flora.join(base, a), x))

    factored = loss(flora.lora(fn))
    merged = loss(lambda t, x: fn(flora.merge(t), x))
    return factored, merged, adapter, x


MODES = {
    "grad": jax.grad,
    "hessian": jax.hessian,
    "jacfwd": jax.jacfwd,
    "vmap of grad": lambda f: lambda a, x: jax.vmap(jax.grad(f), (None, 0))(a, x),
    "grad of vmap": lambda f: jax.grad(
        lambda a, x: jax.vmap(f, (None, 0))(a, x).sum()),
    "linearize": lambda f: lambda a, x: jax.linearize(lambda a: f(a, x), a)[1](a),
    "jvp of grad": lambda f: lambda a, x: jax.jvp(
        lambda a: jax.grad(f)(a, x), (a,), (a,)),
    "pmap": lambda f: lambda a, x: jax.pmap(
        jax.grad(f), in_axes=(None, 0), devices=jax.devices()[:5])(a, x),
    "checkpointed": lambda f: jax.grad(jax.checkpoint(f)),
    "jitted": lambda f: jax.jit(jax.value_and_grad(jax.jit(f))),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_modes_of_differentiation(x64, name):
    factored, merged, adapter, x = small()

    def both(adapter, x):
        return MODES[name](factored)(adapter, x), MODES[name](merged)(adapter, x)

    run = both if name in ("pmap", "jitted", "grad") else jax.jit(both)
    contract.close(*run(adapter, x))


def test_lora_inside_lora(x64):
    """The inner adapter is part of the function that the outer one adapts."""

    def plain(p, x):
        return jnp.tanh(x @ p["u"]) @ p["v"]

    params, x = {"u": array(4, 3), "v": array(3, 2)}, array(5, 4, seed=3)
    inner = contract.adapt(plain, params, x, rank=1, target="u", dtype=jnp.float64)
    inner = contract.randomized(inner)

    def fn(p, x):
        return flora.lora(plain)({"u": dataclasses.replace(inner["u"], base=p["u"]),
                                  "v": p["v"]}, x)  # fmt: skip

    contract.check(fn, params, x, rank=1, dtype=jnp.float64)
