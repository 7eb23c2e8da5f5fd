"""The contract that every rule keeps, checked against the merged model and NumPy."""

import collections
import dataclasses
import functools
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from jax.extend.core import jaxprs_in_params  # noqa: TID251

import flora
from flora._trace.compat import P, open_jaxpr
from flora._tree.paths import named_leaves

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
# A few units in the last place.
COMPILED = {"float64": 2e-15, "float32": 1e-6, "bfloat16": 6e-2, "float16": 8e-3}

# What may have the shape of a weight: the weight itself, seen otherwise.
VIEWS = {
    P.stop_gradient, P.transpose, P.reshape, P.squeeze, P.reduce_sum,
    P.broadcast_in_dim, P.slice, P.dynamic_slice, P.split, P.rev, P.concatenate,
    P.stack, P.convert_element_type, P.copy, P.jit, P.remat, P.scan, P.while_, P.cond,
    P.optimization_barrier, P.sharding_constraint, P.checkpoint_name,
    P.gather,
}  # fmt: skip

# What a test run saw: the worst relative error of each dtype, and drawn examples.
WORST: dict[str, float] = collections.defaultdict(float)
EXAMPLES: dict[str, int] = collections.defaultdict(int)


def properties(examples, **drawn):
    """A test of that many drawn examples; FLORA_EXAMPLES multiplies them."""
    examples *= int(os.environ.get("FLORA_EXAMPLES", "1"))

    def decorate(test):
        @settings(max_examples=examples)
        @given(**drawn)
        @functools.wraps(test)
        def run(*args, **kwargs):
            EXAMPLES[test.__name__] += 1
            return test(*args, **kwargs)

        return run

    return decorate


def array(*shape, seed=0, dtype=jnp.float64):
    """Normal numbers; float64 needs the `x64` fixture."""
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


def waves(key, a, b, dtype):
    """A of no meaning and B = 0, which compile quickly."""
    del key
    return jnp.sin(3 * jnp.arange(a[0] * a[1], dtype=dtype) + 1).reshape(a), jnp.zeros(
        b, dtype
    )


def adapt(fn, params, *args, key=0, **config):
    """An adapted tree; every leaf of two axes or more is a target unless told."""
    settings = {"rank": 2, "alpha": 6.0, "target": "*", "init": waves} | config
    return flora.init(
        jax.random.key(key), flora.LoraConfig(**settings), fn, params, *args
    )


def randomized(adapted, key=1, size=0.3):
    """The adapted tree with A and B random, as if trained."""
    leaves, treedef = jax.tree.flatten(adapted, is_leaf=is_weight)
    drawn = np.random.default_rng(key)

    def draw(x):
        return jnp.asarray(size * drawn.normal(size=x.shape), x.dtype)

    return treedef.unflatten(
        [
            dataclasses.replace(x, a=draw(x.a), b=draw(x.b)) if is_weight(x) else x
            for x in leaves
        ]
    )


def is_weight(x):
    return isinstance(x, flora.LoraWeight)


def used(fn, every, *args):
    """Those of a dict of weights that a function reads."""
    report = flora.coverage(fn, every, *args)
    return {k: w for k, w in every.items() if report[k].uses}


def weights(tree):
    found = jax.tree.leaves(tree, is_leaf=is_weight)
    return [x for x in found if is_weight(x)]


def close(actual, expected, tolerance=None):
    """Same structure, shapes and dtypes; values within tolerance of max|expected|.

    The tolerance is a number, or one for each dtype.
    """
    of_dtype = tolerance if isinstance(tolerance, dict) else TOLERANCE
    number = None if isinstance(tolerance, dict) else tolerance
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        tol = number or of_dtype.get(str(y.dtype), 0)
        dtype, x, y = str(y.dtype), np.asarray(x, np.float64), np.asarray(y, np.float64)
        largest = max(np.abs(y).max(initial=0), 1e-30)
        usual = tol and tol <= 10 * of_dtype.get(dtype, 0)
        if usual and x.size and np.isfinite(x).all():
            error = np.abs(x - y).max() / largest
            WORST[dtype] = max(WORST[dtype], float(error))
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * largest)


def scalar(out):
    """A loss whose gradient touches every output differently."""
    total = jnp.zeros(())
    for i, y in enumerate(jax.tree.leaves(out)):
        if jnp.issubdtype(y.dtype, jnp.inexact):
            y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
            wave = jnp.cos(jnp.arange(y.size, dtype=y.dtype) + i).reshape(y.shape)
            total = total + jnp.sum(wave * y + 0.1 * y * y)
    return total


def factor_gradients(weight, dw):
    """∂L/∂A = scale ∂L/∂ΔW Bᵀ and ∂L/∂B = scale Aᵀ ∂L/∂ΔW, in NumPy, float64."""
    layout, shape = weight.layout, weight.base.shape
    order = [*layout.stack, *layout.in_, *layout.out]
    dims = [
        int(np.prod([shape[i] for i in g]))
        for g in (layout.stack, layout.in_, layout.out)
    ]
    g = np.asarray(dw, np.float64).transpose(order).reshape(dims)
    a = np.asarray(weight.a, np.float64).reshape(dims[0], dims[1], -1)
    b = np.asarray(weight.b, np.float64).reshape(dims[0], -1, dims[2])
    da = weight.scale * np.einsum("sio,sro->sir", g, b)
    db = weight.scale * np.einsum("sir,sio->sro", a, g)
    return da.reshape(weight.a.shape), db.reshape(weight.b.shape)


def gradients(fn, adapted, *args):
    """`{path: (∂L/∂A, ∂L/∂B)}` of the factored model, and `{path: ∂L/∂W}` merged."""
    apply = flora.lora(fn)
    _, grads = flora.value_and_grad(lambda t: scalar(apply(t, *args)))(adapted)
    dense = jax.grad(lambda t: scalar(fn(t, *args)), allow_int=True)(
        flora.merge(adapted)
    )
    dense = dict(named_leaves(dense)[0])
    pairs = {p: (w.a, w.b) for p, w in named_leaves(grads)[0] if is_weight(w)}
    return pairs, {p: dense[p] for p in pairs}


def close_to_formula(adapted, pairs, dense, tolerance=None):
    """The gradients of A and B are those that the merged model's dW implies."""
    for path, w in named_leaves(adapted)[0]:
        if is_weight(w):
            tol = tolerance or TOLERANCE[str(w.base.dtype)]
            wanted = factor_gradients(w, dense[path])
            for got, want in zip(pairs[path], wanted, strict=True):
                got, atol = np.asarray(got, np.float64), tol * np.abs(want).max()
                np.testing.assert_allclose(got, want, rtol=0, atol=max(atol, 1e-30))


def close_to_merged(fn, adapted, *args, tolerance=1e-12, of_gradients=None, start=None):
    """Outputs and gradients, in one compiled program; in float64 unless told.

    `start` is the tree as `adapt` made it: there the base model's outputs come out.
    """

    @jax.jit
    def both(t, args):
        outs = flora.lora(fn)(t, *args), fn(flora.merge(t), *args)
        return outs, gradients(fn, t, *args)

    if start is not None:
        close(*both(start, args)[0], COMPILED)
    outs, grads = both(adapted, args)
    close(*outs, tolerance)
    close_to_formula(adapted, *grads, tolerance=of_gradients or tolerance)


def close_to_merged_over(fn, adapted, dense, *args, tolerance=1e-5):
    """The same with the merged model of another tree, such as a dequantized one."""

    @jax.jit
    def both(adapted, dense, args):
        outs = flora.lora(fn)(adapted, *args), fn(flora.merge(dense), *args)
        base, adapter = flora.split(adapted)

        def loss(adapter):
            return scalar(flora.lora(fn)(flora.join(base, adapter), *args))

        return outs, jax.grad(loss)(adapter), gradients(fn, dense, *args)[1]

    outs, grads, wanted = both(adapted, dense, args)
    close(*outs, tolerance)
    pairs = {p: (w.a, w.b) for p, w in named_leaves(grads)[0] if is_weight(w)}
    close_to_formula(dense, pairs, wanted, tolerance=tolerance)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def named_equations(jaxpr, outer=""):
    """`(name, equation)` of all, by the name that a profile has: those around in it."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        name = f"{outer}/{eqn.source_info.name_stack}"
        yield name, eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from named_equations(inner, name)


def dense_arrays(fn, shapes, *args, views=()):
    """Equations that make an array of one of the shapes, and are no mere views.

    In any order of the axes: JAX makes a dense dW transposed.
    """
    jaxpr, sizes = jax.make_jaxpr(fn)(*args), {tuple(sorted(s)) for s in shapes}
    return [
        eqn
        for eqn in equations(jaxpr)
        for v in eqn.outvars
        if eqn.primitive not in {*VIEWS, *views}
        and tuple(sorted(getattr(v.aval, "shape", ()))) in sizes
    ]


def close_at_start(fn, adapted, params, *args):
    """The base model's outputs, bit for bit, where operations run one by one.

    Loops and branches JAX compiles even then: those are left to compiled programs.
    """
    kinds = {eqn.primitive for eqn in equations(jax.make_jaxpr(fn)(params, *args))}
    if not kinds & {P.scan, P.while_, P.cond, P.remat, P.shard_map}:
        outs = flora.lora(fn)(adapted, *args), fn(params, *args)
        chex.assert_trees_all_equal(*outs)


def check(fn, params, *args, tolerance=None, views=(), vmap=True, **config):
    """The whole contract for `fn(params, *args)`; returns the adapted tree.

    Compiled, it starts within a few units in the last place of the base model, since
    XLA fuses other operations on other machines.
    `views` are primitives by which the function itself makes other arrays of a weight's
    shape.  `vmap=False` is for operations that JAX itself cannot batch.
    """
    adapted = adapt(fn, params, *args, **config)
    close_at_start(fn, adapted, params, *args)
    run = jax.jit(lambda t, args: _everything(fn, t, args, vmap))
    start = run(adapted, args)
    plain = start["merged"]  # by the base's own weights, since B = 0
    chex.assert_trees_all_equal(*map(of_floats, (start["weights"], params)))
    close(start["factored"], plain, COMPILED)
    adapted = randomized(adapted)
    got = run(adapted, args)
    expected, _ = got.pop("merged"), got.pop("weights")
    differs = jax.tree.map(lambda x, y: not np.array_equal(x, y), expected, plain)
    assert any(jax.tree.leaves(differs)), "the factors change nothing"
    pairs, dense = got.pop("gradients")
    close_to_formula(adapted, pairs, dense, tolerance)
    for w in weights(got.pop("whole")):
        assert not np.any(np.asarray(w.base)), "the base received a gradient"
    for name, out in got.items():
        close(out, expected, tolerance)
        assert name
    dense = dense_arrays_of_step(fn, adapted, *args, views=views)
    assert dense == [], [eqn.primitive for eqn in dense]
    return adapted


def of_floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _everything(fn, adapted, args, vmap):
    """The function in every transformation of the contract, as one program."""
    apply = flora.lora(fn)
    base, adapter = flora.split(adapted)
    two = jax.tree.map(lambda x: jnp.stack([x, 0 * x]), adapter)

    def run(one):
        return apply(flora.join(base, one), *args)

    def first(out):
        return jax.tree.map(lambda y: y[0], out)

    merged = flora.merge(adapted)
    return {
        "weights": merged,
        "merged": fn(merged, *args),
        "factored": apply(adapted, *args),
        "remat": jax.checkpoint(apply)(adapted, *args),
        "inner jit": flora.lora(jax.jit(fn))(adapted, *args),
        **({"vmap": first(jax.vmap(run)(two))} if vmap else {}),
        "scan": first(jax.lax.scan(lambda c, one: (c, run(one)), 0, two)[1]),
        "gradients": gradients(fn, adapted, *args),
        "whole": jax.grad(lambda t: scalar(apply(t, *args)), allow_int=True)(adapted),
    }


def dense_arrays_of_step(fn, adapted, *args, views=()):
    """What has a weight's shape in the gradient step's jaxpr, but is not a weight."""
    apply = flora.lora(fn)
    base, adapter = flora.split(adapted)
    step = jax.grad(lambda a, b: scalar(apply(flora.join(b, a), *args)))
    shapes = {w.base.shape for w in weights(adapted)}
    return dense_arrays(step, shapes, adapter, base, views=views)


def check_model(model):
    """The contract in two programs, for models that take long to compile.

    `model.settings` may have `views` and `tolerance`; all else goes to `adapt`.
    """
    fn, params, args = model.fn, model.params, model.args
    config = dict(model.settings)
    views, tolerance = config.pop("views", ()), config.pop("tolerance", 2e-5)
    adapted = adapt(fn, params, *args, target=model.target, **config)
    close_at_start(fn, adapted, params, *args)
    # Not too large: a model that is ill-conditioned there magnifies rounding.
    start, adapted = adapted, randomized(adapted, size=0.1)
    loose = {"tolerance": tolerance, "of_gradients": 3 * tolerance}
    close_to_merged(fn, adapted, *args, start=start, **loose)
    dense = dense_arrays_of_step(fn, adapted, *args, views=views)
    assert dense == [], [eqn.primitive for eqn in dense]
    report = flora.coverage(fn, params, *args)
    for row in flora.summary(adapted).rows:
        if row.role == "lora":
            assert report[row.path].status == "factored", report[row.path]
            assert report[row.path].layout == row.layout
    return adapted
