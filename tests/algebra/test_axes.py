"""Named arrays, and weights whose axes are regrouped, against NumPy."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flora._algebra.axes import (
    RANK,
    Axis,
    Factored,
    Named,
    Settings,
    Squared,
    axes_of_leaf,
    by_position,
    divided,
    from_weight,
    fused,
    is_lazy,
    new_name,
    regrouped,
    renamed,
    require_linear,
    require_no_output_scale,
    reshaped,
    sources_of,
    swapped,
    undiscovered,
    with_axis,
)
from flora._tree.errors import Unfactorable
from flora._tree.layout import Layout
from flora._tree.weight import LoraWeight, Product
from tests.support.contract import properties
from tests.support.named import ROLES, factored, random, whole

# --- Named ----------------------------------------------------------------------------


def numbers(*shape):
    return jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)


U = Named(numbers(2, 3, 4), ("i", "j", "k"))
N = np.asarray(U.array)


def same(got, names, array):
    assert got.names == tuple(names)
    assert got.array.dtype == jnp.asarray(array).dtype
    np.testing.assert_array_equal(got.array, array)


def test_sizes_and_dtype_of_a_named_array():
    assert U.sizes == {"i": 2, "j": 3, "k": 4}
    assert U.astype(jnp.int32).array.dtype == jnp.int32
    same(U.astype(jnp.bfloat16), "ijk", jnp.asarray(N, jnp.bfloat16))
    with pytest.raises(ValueError, match="zip"):
        _ = Named(U.array, ("i", "j")).sizes


def test_ordered_and_aligned():
    np.testing.assert_array_equal(U.ordered("kij"), N.transpose(2, 0, 1))
    np.testing.assert_array_equal(U.ordered("kxijy"), N.transpose(2, 0, 1))
    got = U.aligned("xkiyjz")
    np.testing.assert_array_equal(got, N.transpose(2, 0, 1)[None, :, :, None, :, None])


def test_along_an_axis():
    def half(x, at):
        return lax.slice_in_dim(x, 0, 2, axis=at)

    same(U.along("j", half), "ijk", N[:, :2])
    assert U.along("x", half) is U


def test_repeated():
    same(U.repeated("x", 5), "xijk", np.broadcast_to(N, (5, 2, 3, 4)))


def test_padded():
    want = np.full((2, 8, 4), 7, np.float32)
    want[:, 1:6:2] = N
    same(U.padded("j", 1, 2, 1, value=7), "ijk", want)
    same(U.padded("k", -1, 2), "ijk", np.pad(N[..., 1:], [(0, 0), (0, 0), (0, 2)]))
    assert U.padded("x", 1, 1) is U


def test_summed():
    same(U.summed(["k", "x", "i"]), "j", N.sum((0, 2)))
    assert U.summed(["x"]) is U


def test_times():
    by = Named(numbers(4, 2) + 1, ("k", "i"))
    factor = np.asarray(by.array).T[:, None]
    same(U.times(by), "ijk", N * factor)
    same(U.times(by, lax.div), "ijk", N / factor)
    narrow = U.astype(jnp.bfloat16).times(by)
    assert narrow.array.dtype == jnp.bfloat16


def test_renamed():
    same(U.renamed({"i": "k", "k": "i", "x": "y"}), "kji", N)


def test_split():
    pieces = {"k": [("k0", 2), ("k1", 2)], "i": [("i", 2)], "x": [("y", 9)]}
    same(U.split(pieces), ["i", "j", "k0", "k1"], N.reshape(2, 3, 2, 2))
    same(Named(U.array[:, :1], U.names).split({"j": ()}), "ik", N[:, 0])


def test_merged():
    same(U.merged({"m": ["i", "j"]}), "mk", N.reshape(6, 4))
    # In row order of the group, where the first of it stood.
    same(U.merged({"m": ["k", "i"]}), "jm", N.transpose(1, 2, 0).reshape(3, 8))
    assert U.merged({"m": ["x", "y"]}) is U
    back = U.merged({"m": ["i", "j"]}).split({"m": [("i", 2), ("j", 3)]})
    same(back, "ijk", N)


def test_a_named_array_is_a_pytree_whose_names_are_static():
    doubled = jax.jit(lambda u: jax.tree.map(lambda x: 2 * x, u))(U)
    same(doubled, "ijk", 2 * N)
    assert jax.tree.structure(U) != jax.tree.structure(U.renamed({"i": "x"}))


# --- Weights --------------------------------------------------------------------------

ALL_ROLES = [
    [("0", 2, "stack")],
    [("1", 3, "in"), ("2", 4, "in")],
    [("3", 5, "out")],
]


def keeps(before, after, shape=None, turn=None):
    """Both weights are the same array, and each factor fits the axes."""
    want = whole(before)
    want = want if turn is None else turn(want)
    assert after.shape == (want.shape if shape is None else tuple(shape))
    if after.base is not None:
        assert after.base.shape == after.shape
    sizes = {x.name: x.size for x in after.pieces}
    assert len(sizes) == len(after.pieces), "a name twice"
    for factor in after.factors.values():
        held = {n: size for n, size in factor.sizes.items() if n != RANK}
        assert held.items() <= sizes.items()
    np.testing.assert_allclose(whole(after), want.reshape(after.shape), rtol=1e-12)


def test_roles_are_read_off_the_factors(x64):
    w = factored([*ALL_ROLES, [("4", 2, "")]])
    roles = [w.role(n) for n in ("0", "1", "2", "3", "4", "unknown")]
    assert roles == ["stack", "in", "in", "out", "", ""]
    assert (w.shape, w.rank) == ((2, 12, 5, 2), 2)
    assert w.names == ("0", "1", "2", "3", "4")
    bare = w.frozen(w.base)
    assert [bare.role(n) for n in w.names] == [""] * 5
    assert bare.factors == {}
    assert bare.base is w.base


def test_parts_of_a_weight(x64):
    w = factored(ALL_ROLES, columns=True)
    assert w.a is w.factors["a"]
    assert w.b is w.factors["b"]
    assert w.output_scale is w.factors["scale"]
    assert w.key is None
    assert {*w.without("scale", "key").factors} == {"a", "b"}
    assert w.sole(2).name == "3"
    with pytest.raises(Unfactorable, match="axis 1 joins several axes"):
        w.sole(1)
    assert w.resized({"2": 9})[1] == (Axis("1", 3), Axis("2", 9))


def test_sources_do_not_count_where_weights_are_compared():
    one, other = Axis("0", 3, (("u", 0),)), Axis("0", 3, (("v", 1),))
    assert one == other
    assert one != Axis("0", 4)
    assert Settings(("u",)) == Settings(("v",))
    assert Settings(("u",)) != Settings(("u",), scale=2.0)
    assert Settings(("u", "v")).path == "u' and 'v"
    pieces = [one, other, one]
    assert sources_of(pieces) == (("u", 0), ("v", 1))


def test_what_is_lazy(x64):
    w = factored(ALL_ROLES)
    assert is_lazy(w)
    assert is_lazy(Squared(w.base, w))
    assert not is_lazy(w.base)


@dataclasses.dataclass(frozen=True)
class Made:
    """A variant with an output scale and a function between A and B."""

    frozen = ()

    def product(self, weight):
        return Product(weight.a, weight.b, weight.extra["c"], jnp.tanh)


def test_the_view_of_a_leaf(x64):
    layout = Layout((2,), (3, 0), (1,))
    shape = (5, 4, 3, 2)
    shapes = [shape, *layout.factor_shapes(shape, 2)]
    base, a, b = (random(*s, seed=i) for i, s in enumerate(shapes))
    leaf = LoraWeight(
        base, a, b, layout=layout, rank=2, alpha=3.0, fallback="materialize",
        form="concat",
    )  # fmt: skip
    w = from_weight(leaf, "x/w")
    assert [[*w.a.names], [*w.b.names]] == [["2", "3", "0", RANK], ["2", RANK, "1"]]
    assert w.settings == Settings((), 1.5, 0.0, "materialize", "concat")
    assert w.settings.paths == ("x/w",)
    assert [x.sources for x in w.pieces] == [(("x/w", i),) for i in range(4)]
    want = np.asarray(base) + 1.5 * np.einsum("sdir,sro->iosd", a, b)
    np.testing.assert_allclose(whole(w), want)
    leaf = dataclasses.replace(leaf, dropout=0.5, variant=Made(), extra={"c": b[:, 0]})
    assert from_weight(leaf, "w").key is None  # no step has begun
    keyed = dataclasses.replace(leaf, key=jax.random.split(jax.random.key(0), 3))
    w = from_weight(keyed, "w")
    assert w.key.names == ("2",)
    assert w.output_scale.names == ("2", "1")
    assert w.settings.between is jnp.tanh
    assert from_weight(dataclasses.replace(keyed, dropout=0.0), "w").key is None


def test_a_leaf_whose_layout_is_not_known():
    w = undiscovered(jnp.ones((3, 1)), "w", "materialize")
    assert w.factors == {}
    assert w.axes == axes_of_leaf("w", (3, 1)) == ((Axis("0", 3),), (Axis("1", 1),))
    assert w.settings.fallback == "materialize"
    assert undiscovered(w.base, "w").settings.fallback == "error"


# --- Reshapes -------------------------------------------------------------------------


@st.composite
def reshapes(draw):
    """A weight, and a shape of as many elements, with units anywhere."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3]), min_size=1, max_size=4))
    shape, new = (_grouped(draw, factors) for _ in range(2))
    pieces = [[(f"{i}", n, draw(st.sampled_from([*ROLES, ""])))]
              for i, n in enumerate(shape)]  # fmt: skip
    return factored(pieces), new


def _grouped(draw, factors):
    """The factors, in order, as the lengths of axes."""
    shape = [1] * draw(st.integers(0, 1))
    for n in factors:
        if shape and draw(st.booleans()):
            shape[-1] *= n
        else:
            shape += [1] * draw(st.integers(0, 1)) + [n]
    return shape + [1] * draw(st.integers(0, 1))


@properties(20, data=st.data())
def test_reshaped_is_numpys_reshape(data):
    with jax.enable_x64(True):
        w, shape = data.draw(reshapes())
        base = w.base.reshape(shape)
        if not _fits(w.shape, shape):
            with pytest.raises(Unfactorable, match="regroups"):
                reshaped(w, base, shape)
            return
        new = reshaped(w, base, shape)
        keeps(w, new, shape)
        _roles_kept(w, new)
        assert all(x.sources for x in new.pieces)
        # The reshape's inverse needs no further piece.
        back = reshaped(new, w.base, w.shape)
        keeps(w, back, w.shape)


def _borders(shape):
    ends = np.cumprod([n for n in shape[::-1] if n > 1])
    return {int(n) for n in ends}


def _fits(old, new):
    """Whether all borders of both shapes divide one another, from the right."""
    every = sorted(_borders(old) | _borders(new))
    return all(b % a == 0 for a, b in itertools.pairwise(every))


def _roles_kept(w, new):
    for x in new.pieces:
        stem = x.name.split(".")[0]
        assert new.role(x.name) == w.role(stem)


def test_splits_of_splits_are_named_in_row_order(x64):
    w = factored([[("0", 24, "in")], [("1", 6, "out")]])
    new = reshaped(w, w.base.reshape(2, 3, 4, 2, 3), (2, 3, 4, 2, 3))
    assert new.names == ("0.0", "0.1.0", "0.1.1", "1.0", "1.1")
    keeps(w, new, (2, 3, 4, 2, 3))
    assert new.a.sizes == {RANK: 2, "0.0": 2, "0.1.0": 3, "0.1.1": 4}
    keeps(w, reshaped(w, w.base.reshape(48, 3), (48, 3)), (48, 3))


def test_axes_of_length_1_stay_as_long_as_there_is_room(x64):
    axes = [[("0", 1, "stack")], [("1", 3, "in")], [("2", 1, "out")]]
    w = factored(axes)
    same_shape = reshaped(w, w.base, (1, 3, 1))
    assert same_shape.names == ("0", "1", "2")
    one = reshaped(w, w.base.reshape(3, 1), (3, 1))
    assert one.names == ("1", "0")
    keeps(w, one, (3, 1))
    none = reshaped(w, w.base.reshape(3), (3,))
    assert none.names == ("1",)
    assert (none.a.names, none.b.names) == (("1", RANK), (RANK,))
    keeps(w, none, (3,))
    more = reshaped(w, w.base.reshape(1, 1, 1, 3, 1), (1, 1, 1, 3, 1))
    assert [len(axis) for axis in more.axes] == [1, 1, 0, 1, 0]
    keeps(w, more, (1, 1, 1, 3, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ((4, 6), (6, 4), "regroups"), ((6, 4), (4, 6), "regroups"),
        ((2, 3), (0, 6), "no elements"),
    ],
)  # fmt: skip
def test_reshapes_that_are_refused(x64, old, new, message):
    w = factored([[(str(i), n, "in")] for i, n in enumerate(old)])
    with pytest.raises(Unfactorable, match=message):
        reshaped(w, None, new)


def test_regrouped_moves_pieces_and_drops_units(x64):
    w = factored([[("0", 1, "stack")], [("1", 3, "in")], [("2", 4, "out")]])
    unit, one, two = w.pieces
    new = regrouped(w, w.base.reshape(12), [[one, two]])
    keeps(w, new, (12,))
    assert new.a.names == ("1", RANK)
    assert regrouped(w, w.base, w.axes).factors is not None
    turned = regrouped(w, w.base[0].T[:, None], [[two], [unit], [one]])
    keeps(w, turned, (4, 1, 3), lambda x: x[0].T[:, None])


def test_a_transpose_touches_no_factor(x64):
    w = factored(ALL_ROLES)
    new = regrouped(w, w.base.transpose(2, 0, 1), [w.axes[i] for i in (2, 0, 1)])
    assert new.factors is w.factors
    keeps(w, new, turn=lambda x: x.transpose(2, 0, 1))


# --- Pieces made one ------------------------------------------------------------------

PIECES = [
    [("p", 2, "in"), ("u", 1, "out"), ("q", 3, "in"), ("r", 2, "out"), ("s", 2, "out")],
    [("t", 1, "stack")],
    [],
    [("v", 2, "stack"), ("x", 3, "stack")],
]


@pytest.mark.parametrize("columns", [False, True])
def test_fused_pieces_share_a_role(x64, columns):
    w = factored(PIECES, columns=columns)
    new = fused(w)
    assert [[x.name for x in axis] for axis in new.axes] == [
        ["p+q", "r+s"], ["t"], [], ["v+x"],
    ]  # fmt: skip
    assert [new.role(n) for n in new.names] == ["in", "out", "stack", "stack"]
    assert [x.size for x in new.pieces] == [6, 4, 1, 6]
    keeps(w, new)
    assert new.pieces[0].sources == (("w", 0),)
    assert fused(new, [1, 2]) is new


def test_a_fused_piece_has_the_sources_of_all(x64):
    w = factored([[("p", 2, "in"), ("q", 3, "in")]])
    first, second = (Axis(n, k, ((n, 0),)) for n, k in (("p", 2), ("q", 3)))
    w = dataclasses.replace(w, axes=((first, second),))
    assert fused(w).pieces[0].sources == (("p", 0), ("q", 0))


def test_fused_at_some_axes_alone(x64):
    w = factored(PIECES)
    new = fused(w, [3])
    assert new.axes[:3] == w.axes[:3]
    assert new.names[-1] == "v+x"
    keeps(w, new)
    with pytest.raises(Unfactorable, match="an axis that joins axes of other roles"):
        fused(w, [0])
    assert fused(w, [1, 2]) is w


def test_an_axis_of_units_keeps_one(x64):
    w = factored([[("p", 1, "in"), ("q", 1, "out")], [("r", 3, "in")]])
    new = fused(w)
    assert new.names == ("p", "r")
    keeps(w, new)


def test_without_factors_all_pieces_of_an_axis_fuse(x64):
    w = factored(PIECES)
    new = fused(w.frozen(w.base))
    assert [len(axis) for axis in new.axes] == [1, 1, 0, 1]
    assert new.shape == w.shape


def test_by_position(x64):
    w = factored([[("p", 2, "in"), ("q", 3, "in")], [], [("r", 4, "out")]])
    new = by_position(w)
    assert new.names == ("0", "2")
    assert new.a.sizes == {"0": 6, RANK: 2}
    keeps(w, new)
    with pytest.raises(Unfactorable, match="other roles"):
        by_position(factored(PIECES))


def test_renamed_names_factors_alike(x64):
    w = factored(ALL_ROLES, columns=True)
    new = renamed(w, {"0": "3", "3": "0"})
    assert new.names == ("3", "1", "2", "0")
    assert new.role("3") == "stack"
    assert new.pieces[0].sources == w.pieces[0].sources
    keeps(w, new)


TB = [("t", 6), ("b", 8)]
DIVIDED = {
    "into heads": (TB, (6, 2, 4), {"b": (2, 4)}),
    "in three": (TB, (6, 2, 2, 2), {"b": (2, 2, 2)}),
    "both": (TB, (2, 3, 4, 2), {"t": (2, 3), "b": (4, 2)}),
    "the first": (TB, (3, 2, 8), {"t": (3, 2)}),
    "nothing": (TB, (6, 8), {}),
    "joined": (TB, (48,), {}),
    "joined, another divided": ([*TB, ("c", 4)], (48, 2, 2), {"c": (2, 2)}),
    "divided, others joined": ([*TB, ("c", 4)], (2, 3, 32), {"t": (2, 3)}),
    "other groups": (TB, (8, 6), {}),
    "other groups, then heads": ([*TB, ("c", 4)], (8, 6, 2, 2), {"c": (2, 2)}),
    "groups that straddle": (TB, (4, 3, 4), {}),
    "a group that ends within": ([("a", 6), ("b", 10)], (3, 4, 5), {}),
    "ones in the shape": (TB, (1, 6, 1, 2, 4, 1), {"b": (2, 4)}),
    "ones among the axes": (
        [("u", 1), ("t", 6), ("v", 1), ("b", 8), ("w", 1)], (6, 2, 4), {"b": (2, 4)}
    ),
    "ones alone": ([("u", 1)], (1, 1), {}),
    "a one for heads": (TB, (6, 1, 8), {}),
    "no axes": ([], (), {}),
    "no elements": ([("t", 0), ("b", 8)], (0, 2, 4), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_divided(name):
    sizes, shape, want = DIVIDED[name]
    got = divided(sizes, shape)
    assert {n: tuple(size for _, size in parts) for n, parts in got.items()} == want
    names = [n for parts in got.values() for n, _ in parts]
    assert len({*names}) == len(names)
    # Row order stays, so that a reshape gives either array.
    array = np.arange(math.prod(n for _, n in sizes))
    u = Named(jnp.asarray(array.reshape([n for _, n in sizes])), tuple(dict(sizes)))
    np.testing.assert_array_equal(u.split(got).array.ravel(), array)


def test_swapped(x64):
    w = factored(ALL_ROLES)
    new = swapped(w)
    assert [new.role(n) for n in w.names] == ["stack", "out", "out", "in"]
    keeps(w, new)
    bare = w.frozen(w.base)
    assert swapped(bare) is bare
    with pytest.raises(Unfactorable, match=r"change places, of a weight whose outputs"):
        swapped(factored(ALL_ROLES, columns=True))


@pytest.mark.parametrize("role", ["stack", "in", "out"])
@pytest.mark.parametrize("unit", [[], [("u", 1, "in")]])
def test_with_axis_repeats_the_weight(x64, role, unit):
    w = factored([[("p", 3, "in")], unit, [("r", 4, "out")]], columns=True)
    new = with_axis(w, 1, Axis("new", 5), role)
    assert new.shape == (3, 5, 4)
    assert new.role("new") == role
    assert ("new" in new.output_scale.names) == (role != "in")
    want = np.repeat(whole(w), 5, axis=1)
    new = dataclasses.replace(new, base=jnp.repeat(w.base, 5, axis=1))
    np.testing.assert_allclose(whole(new), want)
    assert with_axis(w, 1, Axis("new", 5)).role("new") == "out"


def test_with_axis_gives_keys_to_stacks_alone(x64):
    w = factored([[("p", 3, "in")], [], [("r", 4, "out")]])
    key = Named(jax.random.key(0), ())
    w = dataclasses.replace(w, factors={**w.factors, "key": key})
    assert with_axis(w, 1, Axis("new", 5), "stack").key.sizes == {"new": 5}
    assert with_axis(w, 1, Axis("new", 5), "out").key is key


def test_a_new_name_is_new(x64):
    w = factored([[("new0", 3, "in")], [("new1", 4, "out")], [("new3", 2, "out")]])
    assert new_name(w) == "new2"


def test_what_a_rule_cannot_keep_is_refused(x64):
    plain = factored(ALL_ROLES)
    require_linear(plain, "a sum")
    require_no_output_scale(plain, "a sum")
    with pytest.raises(Unfactorable, match=r"^a sum, of a weight whose outputs are"):
        require_no_output_scale(factored(ALL_ROLES, columns=True), "a sum")
    with pytest.raises(Unfactorable, match=r"^a sum, of a weight whose variant acts"):
        require_linear(factored(ALL_ROLES, between=jnp.tanh), "a sum")


def test_a_weight_is_a_pytree_of_its_arrays(x64):
    w = factored(ALL_ROLES, columns=True)
    leaves, treedef = jax.tree.flatten(w)
    assert len(leaves) == 4
    other = factored(ALL_ROLES, columns=True)
    other = dataclasses.replace(
        other, settings=dataclasses.replace(other.settings, paths=("another",))
    )
    assert jax.tree.structure(other) == treedef
    assert isinstance(treedef.unflatten(leaves), Factored)
