"""Where factors lie, given where their weight lies.  `flora.sharding` has the verbs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
from flora._tree.placement import (
    mesh_of,
    names,
    places_of_parts,
    spec_of,
    spec_of_extra,
    spec_problems,
    specs,
)
from flora.quantize import Quantized

MESH = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("x", "y"))
EXPERTS = flora.Layout((2,), (3, 0), (1,))


def test_factors_take_the_entries_of_their_axes():
    found = specs(EXPERTS, Spec("x", None, "y", ("u", "v")), 4)
    assert found.base == Spec("x", None, "y", ("u", "v"))
    assert found.a == Spec("y", ("u", "v"), "x", None)
    assert found.b == Spec("y", None, None)
    assert found.key == Spec("y")


def test_a_short_spec_leaves_the_last_axes_whole():
    found = specs(flora.Layout(), Spec(), 2)
    assert (found.a, found.b, found.key) == (Spec(None, None), Spec(None, None), Spec())
    assert specs(flora.Layout((), (1,), (0,)), Spec("x"), 2).a == Spec(None, None)
    assert specs(flora.Layout((), (1,), (0,)), Spec("x"), 2).b == Spec(None, "x")


def test_the_rank_takes_an_axis_that_the_factor_has_no_other_use_for():
    found = specs(flora.Layout(), Spec("x", None), 2, rank="x")
    assert (found.a, found.b) == (Spec("x", None), Spec("x", None))
    found = specs(flora.Layout(), Spec(None, ("x", "y")), 2, rank="y")
    assert (found.a, found.b) == (Spec(None, "y"), Spec(None, ("x", "y")))


def test_what_a_variant_adds_lies_by_its_shape():
    shape = (5, 7, 3, 2)
    a, b = EXPERTS.factor_shapes(shape, 4)
    w = flora.LoraWeight(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, a, b)),
        layout=EXPERTS, rank=4,
    )  # fmt: skip
    found = specs(EXPERTS, Spec("i", "o", "s", "j"), 4)
    assert spec_of_extra(found, w, (3, 7)) == Spec("s", "o")  # for each output
    assert spec_of_extra(found, w, (3, 2, 5)) == Spec("s", "j", "i")  # each input
    assert spec_of_extra(found, w, (3, 4)) == Spec("s")  # each of a rank
    assert spec_of_extra(found, w, ()) == Spec()
    assert spec_of_extra(found, w, (9,)) == Spec()


@pytest.mark.parametrize("variant", [flora.variants.DoRA(), flora.variants.VeRA()])
def test_what_a_variant_starts_lies_as_the_base_and_as_its_plan(variant):
    place = NamedSharding(MESH, Spec("x", "y"))
    w = jax.device_put(jnp.ones((8, 6)), place)
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place)
    config = flora.LoraConfig(rank=2, target="*", variant=variant)
    fn, x = lambda p, x: x @ p, jnp.ones((2, 8))
    run, plan = (flora.init(jax.random.key(0), config, fn, p, x) for p in (w, shape))
    assert run.a.sharding.spec == Spec("x", None)
    for y, z in zip(jax.tree.leaves(run), jax.tree.leaves(plan), strict=True):
        assert y.sharding == z.sharding
        assert y.shape == z.shape


def test_names_of_a_spec():
    assert names(Spec("x", None, ("y", "z"), Spec.UNCONSTRAINED)) == ["x", "y", "z"]
    assert names(()) == []


def test_what_says_how_it_is_divided():
    place = NamedSharding(MESH, Spec("x"))
    placed = jax.device_put(jnp.ones((8, 6)), place)
    shape = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place)
    for x in (placed, shape):
        assert spec_of(x) == Spec("x")
        assert mesh_of(x) == MESH
    for x in (jnp.ones(2), np.ones(2), None, "label", jax.ShapeDtypeStruct((), int)):
        assert spec_of(x) is None
        assert mesh_of(x) is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tracers_say_it_on_explicit_meshes_only(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, Spec("x")))
    seen = []
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda x: seen.append(spec_of(x)), x)
    explicit = kind is AxisType.Explicit
    assert seen == [Spec("x", None) if explicit else None]


def test_a_stored_weight_says_it_by_its_largest_array():
    place = NamedSharding(MESH, Spec("x", "y"))
    parts = {
        "q": jax.device_put(jnp.ones((8, 6), jnp.int8), place),
        "scale": jnp.ones((1, 6)),
    }
    assert spec_of(Quantized(parts, lambda p: p["q"] * p["scale"])) == Spec("x", "y")
    places = places_of_parts(MESH, parts, Spec("x", ("y",)))
    assert places["q"].spec == Spec("x", ("y",))
    assert places["scale"].spec == Spec(None, ("y",))  # 1 does not divide into 4
    # As many of its mesh axes, from the first on, as divide.
    both, other = Spec(("x", "y"), None), Spec(None, ("y", "x"))
    assert places_of_parts(MESH, jnp.ones((8, 3)), both).spec == both
    assert places_of_parts(MESH, jnp.ones((4, 3)), both).spec == Spec("x", None)
    assert places_of_parts(MESH, jnp.ones((3, 2)), other).spec == Spec(None, "y")
    assert places_of_parts(MESH, jnp.ones((3, 4)), other).spec == Spec(None, "y")
    assert places_of_parts(MESH, jnp.ones((2, 3)), Spec("x", "y")).spec == Spec(
        None, None
    )


@pytest.mark.parametrize(
    ("shape", "spec", "wanted"),
    [
        ((8, 6), Spec("x", "y"), []),
        ((8, 6), Spec(None), []),
        ((), Spec(), []),
        ((8,), Spec(("x", "y")), []),
        ((0, 3), Spec("x"), []),  # none for each device
        ((8,), Spec("x", None), [r"w has shape \(8,\).*2 entries. Write at most 1"]),
        ((8,), Spec("z"), ["no axis 'z', only 'x', 'y'. Pass rules="]),
        ((8, 8), Spec("x", ("y", "x")), ["a mesh axis can divide one axis only"]),
        ((8, 6), Spec(None, ("x", "y")), [r"axis 1 of size 6 does not .*into 8 \("]),
        ((6, 3), Spec("x", "y"), ["axis 0 of size 6 .*into 4 ", "axis 1 of size 3"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_spec(shape, spec, wanted):
    found = list(spec_problems("w", shape, spec, MESH.shape))
    assert len(found) == len(wanted)
    for got, match in zip(found, wanted, strict=True):
        with pytest.raises(flora.LoraError, match=match):
            raise flora.LoraError(got)
