"""The layout of each weight, read off what consumes it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flora
from flora import Layout
from flora._trace.discover import discover
from flora._trace.stage import stage


def found(fn, shapes, *args, given=None):
    """What `discover` finds of weights `{path: shape}`, without running anything."""
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    leaves, treedef = jax.tree.flatten(params)
    staged = stage(fn, leaves, treedef, args, {}, verb="test")
    return discover(staged, leaves, dict(enumerate(sorted(params))), given)


def of(fn, shape, *args, **kwargs):
    return found(lambda p, *args: fn(p["w"], *args), {"w": shape}, *args, **kwargs)["w"]


def x(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
LAYOUTS = {
    "dense": (lambda w, x: x @ w, (7, 5), Layout()),
    "weight first": (lambda w, x: w @ x.T, (5, 7), Layout((), (1,), (0,))),
    "heads": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (7, 2, 4),
        Layout((), (0,), (1, 2))),
    "heads out": (
        lambda w, x: jnp.einsum("bhd,hdo->bo", x.reshape(3, 1, 7), w), (1, 7, 4),
        Layout((), (0, 1), (2,))),
    "fused, split later": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(7, 2, 4)), (7, 8),
        Layout()),
    "stack of scan": (
        lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
        (4, 7, 7), Layout((0,), (1,), (2,))),
    "many of one x by vmap": (
        lambda w, x: jax.vmap(jnp.matmul, (None, 0))(x, w), (4, 7, 5),
        Layout((), (1,), (0, 2))),
    "stack that is indexed": (
        lambda w, x: x @ w[1] @ w[2], (4, 7, 7), Layout((0,), (1,), (2,))),
    "batch axis": (
        lambda w, x: jnp.einsum("ei,eio->eo", x, w), (3, 7, 5),
        Layout((0,), (1,), (2,))),
    "convolution": (
        lambda w, x: lax.conv_general_dilated(
            x[:, :, None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (3, 1, 4), Layout((), (0, 1), (2,))),
    "axis of size 0": (lambda w, x: x @ w, (7, 0), Layout()),
    "normalized": (
        lambda w, x: x @ (w / jnp.sqrt((w * w).sum(0))), (7, 5), Layout()),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_that_the_uses_imply(name):
    fn, shape, layout = LAYOUTS[name]
    finding = of(fn, shape, x(3, 7))
    assert finding.layout == layout
    assert (finding.status, finding.conflict, finding.returned) == (
        "factored",
        "",
        False,
    )
    assert finding.dense == []
    assert {use.path for use in finding.uses} == {"w"}


def test_a_table_is_indexed_along_its_in_axis_and_a_tied_head_decides():
    finding = of(lambda w, ids: w[ids], (9, 7), IDS)
    assert finding.layout == Layout((), (0,), (1,))

    def tied(w, ids):
        return jnp.einsum("btd,vd->btv", w[ids], w)

    finding = of(tied, (9, 7), IDS)
    assert finding.layout == Layout((), (1,), (0,))
    assert {use.primitive for use in finding.uses} == {"gather", "dot_general"}


INDEXED = {
    "slice": lambda w, x: x @ lax.slice_in_dim(w, 1, 2).reshape(7, 5),
    "squeeze": lambda w, x: x @ lax.squeeze(lax.slice_in_dim(w, 1, 2), (0,)),
    "dynamic_slice": lambda w, x: x @ lax.dynamic_index_in_dim(w, x.size, 0, False),
    "split": lambda w, x: x @ lax.split(w, [1, 3])[0].reshape(7, 5),
    "gather": lambda w, x: x @ jnp.take(w, x.astype(int)[0, :2], 0, mode="clip"),
    "scan": lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w),
}


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_suggests_a_stack_and_binds_nothing(name):
    uses = of(INDEXED[name], (4, 7, 5), x(3, 7)).uses
    said = {use.primitive: use.roles for use in uses if not use.binding}
    assert said[name] == ((0, "stack"),)


def test_rows_that_a_function_returns_are_a_use_too():
    finding = of(lambda w, i: lax.dynamic_index_in_dim(w, i, 0, False), (9, 7), 3)
    assert finding.layout == Layout()
    assert [use.primitive for use in finding.uses if "output" in use.primitive] == [
        "output"
    ]
    assert not finding.returned


def test_uses_that_swap_in_and_out_are_one_layout():
    finding = of(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w.T), (7, 5), x(3, 7))
    assert finding.layout == Layout()
    assert finding.status == "factored"


def test_a_product_of_many_rows_decides_against_one_of_one_row():
    finding = of(lambda w, x: (w @ x[0], x @ w), (5, 5), x(3, 5))
    assert finding.layout == Layout()
    finding = of(lambda w, x: (x[0] @ w, w @ x.T), (5, 5), x(3, 5))
    assert finding.layout == Layout((), (1,), (0,))


CONFLICTS = {
    "two layouts": (
        lambda w, x: (jnp.einsum("i,ijk->jk", x[0], w), jnp.einsum("ij,ijk->k", x, w)),
        (3, 3, 3), (3, 3),
        "'dot_general' at test_discover.py:.*reads it as in=.* out=.*, "
        "'dot_general' at test_discover.py:.*as in="),
    "half an axis": (
        lambda w, x: jnp.einsum("bi,ijk->bjk", x, w.reshape(4, 2, 5)),
        (8, 5), (3, 4), "contracts one part of axis 0 and keeps another"),
    "only summed": (
        lambda w, x: x + w.sum(), (7, 5), (3,),
        "'add' at .* sums over it, and nothing multiplies by it"),
    "no out axis": (
        lambda w, x: jnp.tensordot(x, w, 2), (7, 5), (7, 5), "there is no out axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_uses_that_disagree_are_a_conflict_with_their_lines(name):
    fn, shape, of_x, message = CONFLICTS[name]
    finding = of(fn, shape, x(*of_x))
    assert finding.layout is None
    assert finding.status == "dense"
    with pytest.raises(flora.LoraError, match=message):
        raise flora.LoraError(finding.conflict)
    # A layout that is given stands, whatever the uses say.
    layout = Layout((), (0,), tuple(range(1, len(shape))))
    again = of(fn, shape, x(*of_x), given={"w": layout})
    assert (again.layout, again.conflict) == (layout, "")


def test_dense_uses_name_operation_line_and_bytes():
    finding = of(lambda w, x: x @ w + jnp.tanh(w).sum(), (7, 5), x(3, 7))
    (use,) = finding.dense
    assert (use.primitive, use.bytes) == ("tanh", 7 * 5 * 4)
    assert use.source.startswith("test_discover.py:")
    assert "no factored rule for it (no rule for this primitive)" in str(use)
    assert finding.status == "dense"
    assert finding.layout == Layout()


def test_unused_and_returned():
    finding = of(lambda w, x: x, (7, 5), x(3, 7))
    assert (finding.status, finding.uses, finding.layout) == ("unused", (), None)
    same = of(lambda w, x: (w, x), (7, 5), x(3, 7))
    assert (same.status, same.returned) == ("unused", False)
    changed = of(lambda w, x: (x @ w, w.T), (7, 5), x(3, 7))
    assert changed.returned
    assert changed.layout == Layout()
    only = of(lambda w, x: (w.T, x), (7, 5), x(3, 7))
    assert (only.returned, only.status) == (True, "dense")
    # A scan that takes slices but does nothing with them reads nothing.
    idle = of(
        lambda w, x: lax.scan(lambda c, w: (c, None), x, w)[0], (4, 7, 5), x(3, 7)
    )
    assert idle.status == "unused"


def test_what_only_a_layout_refuses_is_found_by_walking_again():
    def fn(w, x):
        return jnp.einsum("bi,ihd->bhd", x, w) / (w**2).sum((0, 2))[:, None]

    assert of(fn, (7, 2, 4), x(3, 7)).status == "factored"

    def parts(w, x):
        norms = (w**2).sum((0, 2)) + (w**2).sum(2)[0]
        return jnp.einsum("bi,ihd->bhd", x, w) / norms[:, None]

    finding = of(parts, (6, 2, 4), x(3, 6))
    assert finding.layout == Layout((), (0,), (1, 2))
    assert finding.status == "dense"
    (use,) = finding.dense
    assert "parts of in and out axes" in use.dense


def test_every_leaf_has_its_own_finding():
    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] + p["bias"]

    got = found(fn, {"a": (7, 5), "b": (5, 3), "bias": (3,), "idle": (2, 2)}, x(3, 7))
    assert {k: f.status for k, f in got.items()} == {
        "a": "factored", "b": "factored", "bias": "dense", "idle": "unused",
    }  # fmt: skip
    assert all(use.path == k for k, f in got.items() for use in f.uses)


def test_only_the_leaves_that_are_asked_for():
    params = {"a": x(7, 5), "b": x(5, 3)}
    leaves, treedef = jax.tree.flatten(params)
    staged = stage(
        lambda p, x: x @ p["a"] @ p["b"], leaves, treedef, (x(3, 7),), {}, verb="test"
    )
    assert list(discover(staged, leaves, {1: "b"})) == ["b"]
    assert discover(staged, leaves, {}) == {}
