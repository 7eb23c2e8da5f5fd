"""Hints name what is close, however many names there are."""

import jax
import pytest

import flora
import flora.hf
from flora._tree.nearest import Nearest
from tests.support.promptly import promptly

NAMES = [
    f"layers.{i}.{part}.weight"
    for i in range(2500)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up", "norm")
]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "layers.7.self_attn.q_proj.weight"),
        ("layers.812.self_attn.q_porj.weight", "layers.812.self_attn.q_proj.weight"),
        ("layers.3.mlp.up.wieght", "layers.3.mlp.up.weight"),
        ("layer.3.norm.weight", "layers.3.norm.weight"),
    ],
)
def test_the_closest_of_many(name, wanted):
    assert Nearest(NAMES).to(name) == [wanted]


def test_the_ends_of_names_count_where_there_is_a_separator():
    assert Nearest(NAMES, 0.5, ".").to("q_porj.weight") == [
        "layers.0.self_attn.q_proj.weight"
    ]
    assert "q_proj" not in Nearest(NAMES, 0.5).to("q_porj.weight")[0]
    assert Nearest(["a/b", "c/d"], 0.4, "/").to("zzzz", 3) == []


def test_twenty_questions_are_answered():
    near = Nearest(["up", "down"])
    assert [near.to("dwn") for _ in range(21)] == [["down"]] * 20 + [[]]


def test_thousands_of_wrong_names_take_no_time(tmp_path):
    like = {name: jax.ShapeDtypeStruct((1,), "float32") for name in NAMES}
    tree = {f"model.{name}": jax.numpy.zeros(1) for name in NAMES[:1500]}
    own = {name: flora.hf.Tensor(name) for name in tree}
    flora.hf.save(tmp_path, tree, own)
    names = {name: flora.hf.Tensor(name) for name in like}
    with promptly(), pytest.raises(flora.LoraError) as caught:
        flora.hf.load(tmp_path, like, names)
    assert "Closest: 'model.layers.0.self_attn.q_proj.weight'" in str(caught.value)
    assert len(str(caught.value)) <= 4_000
