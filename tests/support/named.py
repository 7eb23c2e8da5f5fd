"""Weights with named axes, and what they stand for, by NumPy's einsum."""

import string

import jax.numpy as jnp
import numpy as np

from flora._algebra.axes import RANK, Axis, Factored, Named, Settings

LETTERS = string.ascii_letters
ROLES = {"stack": ("a", "b"), "in": ("a",), "out": ("b",)}


def random(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def factored(axes, *, rank=2, scale=3.0, columns=False, dtype=jnp.float64, **settings):
    """A weight of random numbers.

    Args:
      axes: `[(name, size, role), ...]` for each axis; no role for a piece that neither
        factor holds.
      rank: of A B.
      scale: of A B.
      columns: whether the outputs are scaled.
      dtype: of all arrays.
      **settings: as of `Settings`.
    """
    pieces = [piece for axis in axes for piece in axis]

    def draw(k, seed):
        held = [(n, size) for n, size, role in pieces if k in ROLES.get(role, ())]
        held.insert(seed % (len(held) + 1), (RANK, rank))
        names, shape = tuple(n for n, _ in held), [size for _, size in held]
        return Named(random(*shape, seed=seed, dtype=dtype), names)

    factors = {"a": draw("a", 2), "b": draw("b", 3)}
    if columns:
        held = [(n, size) for n, size, role in pieces if role in ("stack", "out")]
        shape = [size for _, size in held]
        array = random(*shape, seed=4, dtype=dtype)
        factors["scale"] = Named(array, tuple(n for n, _ in held))
    groups = tuple(
        tuple(Axis(n, size, (("w", i),)) for n, size, _ in axis)
        for i, axis in enumerate(axes)
    )
    shape = [int(np.prod([x.size for x in axis])) for axis in groups]
    base = random(*shape, seed=1, dtype=dtype)
    return Factored(base, factors, groups, Settings(("w",), scale, **settings))


def einsum(out, *arrays):
    """The sum over all names that `out` lacks, in float64 or complex128."""
    letters = {}

    def spec(names):
        found = (letters.setdefault(n, LETTERS[len(letters)]) for n in names)
        return "".join(found)

    def wide(x):
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return np.asarray(x).astype(np.complex128 if is_complex else np.float64)

    terms = ",".join(spec(x.names) for x in arrays)
    return np.einsum(f"{terms}->{spec(out)}", *(wide(x.array) for x in arrays))


def apart(w):
    """W + scale A B, times the output scale, with one axis for each piece."""
    sizes = [x.size for x in w.pieces]
    change = np.zeros(sizes)
    if w.factors:
        ones = Named(jnp.ones(sizes, w.a.array.dtype), w.names)
        change = w.settings.scale * einsum(w.names, ones, w.a, w.b)
    base = (
        0 if w.base is None else einsum(w.names, Named(w.base.reshape(sizes), w.names))
    )
    whole = base + change
    if w.output_scale is None:
        return whole
    ones = Named(jnp.ones(sizes, w.a.array.dtype), w.names)
    return whole * einsum(w.names, ones, w.output_scale)


def whole(w):
    """W + scale A B, times the output scale, in W's shape."""
    return apart(w).reshape(w.shape)
