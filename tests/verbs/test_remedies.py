"""What an error offers, written as it stands, does what the error says."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora
import flora.budget
import flora.checkpoint
import flora.hf
import flora.monitor
import flora.multi
import flora.quantize
import flora.recipes
from flora._files.safetensors import write
from flora._tree.paths import exactly, matches

ODD = "a[0]*?/kernel"  # a glob would read it otherwise
# One path is the end of another, and one is what the odd one matches as a glob.
PATHS = ("dense/kernel", "mlp/dense/kernel", ODD, "a0xy/kernel")
X = jnp.ones((2, 4))


def tree(path="", value=None):
    p = {"mlp": {}}
    for q in PATHS:
        *parents, module, last = q.split("/")
        inside = p["mlp"] if parents else p
        inside[module] = {last: value if q == path else jnp.ones((4, 4))}
    return p


def at(p, path):
    for word in path.split("/"):
        p = p[word]
    return p


def chain(use=lambda q, x, w: x @ w):
    def fn(p, x):
        for q in PATHS:
            x = use(q, x, at(p, q))
        return x

    return fn


def init(f=None, p=None, **settings):
    config = flora.LoraConfig(**{"rank": 2, **settings})
    p = tree() if p is None else p
    return flora.init(jax.random.key(0), config, f or chain(), p, X)


def error_of(call, *args, **kwargs):
    with pytest.raises(flora.LoraError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def written(message, name):
    """The value that a message says to write for a name."""
    value = rf"[Ww]rite .*?{name}=('[^']*'|\[.*?'\]|\{{.*?\}}|\d+)"
    value = re.search(value, message)[1]
    return ast.literal_eval(value)


def adapted(t):
    return [q for q in PATHS if isinstance(at(t, q), flora.LoraWeight)]


def others(path):
    return [q for q in PATHS if q != path]


def test_a_leading_slash_anchors_a_glob():
    for path in PATHS:
        assert [q for q in PATHS if matches(exactly(path), q, None)] == [path]
    assert adapted(init(target="dense/kernel")) == [*PATHS[:2]]
    assert adapted(init(target="/dense/kernel")) == [PATHS[0]]
    assert adapted(init(target="/mlp/*")) == [PATHS[1]]


@pytest.mark.parametrize("path", PATHS)
def test_exclude_takes_out_that_leaf_alone(path):
    def nonlinear(q, x, w):
        return x @ (jnp.tanh(w) if q == path else w)

    def unused(q, x, w):
        return x if q == path else x @ w

    for use in (nonlinear, unused):
        exclude = written(error_of(init, chain(use)), "exclude")
        assert adapted(init(chain(use), exclude=exclude)) == others(path)
    message = error_of(init, p=tree(path, jnp.ones((4, 4), jnp.int32)))
    assert written(message, "exclude") == exactly(path)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_targeted_and_trains_is_excluded(path):
    exclude = written(error_of(init, train=exactly(path)), "exclude")
    made = init(train=exactly(path), exclude=exclude)
    assert isinstance(at(made, path), flora.Trained)
    assert adapted(made) == others(path)


@pytest.mark.parametrize("path", PATHS)
def test_a_layout_is_that_leafs_alone(path):
    def both(q, x, w):
        if q != path:
            return x @ w
        outer = jnp.outer(x[0], x[0])
        return x + jnp.tensordot(x[0], w, 1).sum(0) + jnp.tensordot(outer, w, 2)

    p = tree(path, jnp.ones((4, 4, 4)))
    message = error_of(init, chain(both), p)
    key = ast.literal_eval(re.search(r"layouts=\{('[^']*'): flora.Layout", message)[1])
    made = init(chain(both), p, layouts={key: flora.Layout((), (0,), (1, 2))})
    assert str(at(made, path).layout) == "in=0 out=1,2"
    assert {str(at(made, q).layout) for q in others(path)} == {"in=0 out=1"}


def test_vectors_train_whole():
    def fn(p, x):
        return x @ p["kernel"] * p["scale"] + p["bias"]

    p = {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4), "bias": jnp.ones(4)}
    cases = [
        (["kernel", "scale"], "/scale", {"scale"}),
        ("bias", "/bias", {"bias"}),
        (re.compile("s.*|b.*"), ["/bias", "/scale"], {"bias", "scale"}),
    ]
    for target, train, trained in cases:
        assert written(error_of(init, fn, p, target=target), "train") == train
        made = init(fn, p, target=target, train=train)
        assert {k for k in p if isinstance(made[k], flora.Trained)} == trained


def test_a_shadowed_entry_is_written_before_the_others():
    given = {"kernel": 2, "mlp/*": 3}
    message = error_of(init, rank_pattern=given)
    assert "Write it before 'kernel'" in message
    made = init(rank_pattern=dict(reversed(given.items())))
    assert [at(made, q).rank for q in PATHS] == [2, 3, 2, 2]
    trained = init(target="kernel")
    rates = {"*": 2.0, exactly(ODD): 3.0}
    message = error_of(flora.recipes.scale_rates, rates, trained)
    assert "Write it before '*'" in message
    flora.recipes.scale_rates(dict(reversed(rates.items())), trained)
    same = {"kernel": 1.0, "*/kernel": 2.0}
    assert "Take it out." in error_of(flora.recipes.scale_rates, same, trained)


def test_a_group_for_the_rest():
    transforms = {"one": optax.sgd(1.0), "rest": optax.sgd(0.1)}
    groups = {exactly(ODD): "one"}
    partition = flora.recipes.partition
    assert "add '*': group as the last" in error_of(
        partition, transforms, groups, init()
    )
    partition(transforms, groups | {"*": "rest"}, init())


@pytest.mark.parametrize("path", PATHS)
def test_a_checkpoint_says_how_it_was_made(tmp_path, path):
    settings = {
        "rank_pattern": {exactly(path): 3},
        "alpha_pattern": {exactly(path): 1 / 3},
        "variant": flora.variants.DoRA(),
    }
    with flora.checkpoint.Checkpointer(tmp_path / "run") as saver:
        saver.save(1, init(**settings))
        message = error_of(saver.restore, init(variant=flora.variants.DoRA()))
        found = {k: written(message, k) for k in ("rank_pattern", "alpha_pattern")}
        made = init(**found, variant=flora.variants.DoRA())
        assert saver.restore(made).step == 1
        text = re.search(r"variant=(flora\S+\(\))", error_of(saver.restore, init()))
        assert eval(text[1]) == flora.variants.DoRA()


@pytest.mark.parametrize("path", PATHS)
def test_a_leaf_that_is_not_stored_in_fewer_bits(path):
    p = tree(path, jnp.ones((3, 5)))
    quantize = flora.quantize.quantize
    exclude = written(error_of(quantize, p, "int8", block=2), "exclude")
    made = quantize(p, "int8", block=2, exclude=exclude)
    for q in PATHS:
        assert isinstance(at(made, q), jax.Array) == (q == path)
    for options in ({"target": ["kernel", "krnl"]}, {"exclude": ["mlp/*", "krnl"]}):
        message = error_of(quantize, tree(), "int8", block=2, **options)
        assert "has 'krnl', which selects none" in message


@pytest.mark.parametrize("path", PATHS)
def test_a_change_of_a_frozen_leaf_is_ignored(path):
    made = init(exclude=exactly(path))
    new = tree(path, jnp.zeros((4, 4)))
    ignore = written(error_of(flora.multi.extract, made, new), "ignore")
    assert flora.multi.extract(made, new, ignore=ignore).errors[path] == 1
    message = error_of(flora.multi.extract, made, new, ignore=[ignore, "krnl"])
    assert "ignore has 'krnl', which selects none" in message


def test_tensors_that_no_leaf_needs(tmp_path):
    names = {q.replace("/", "."): np.ones((4, 4), np.float32) for q in PATHS}
    names |= {"b/dense": np.ones(3, np.float32), "dense": np.ones(3, np.float32)}
    write(tmp_path / "model.safetensors", names, {"format": "pt"})
    like = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    tensors = {"kernel": flora.hf.Tensor("a0xy.kernel")}
    message = error_of(flora.hf.load, tmp_path, like, tensors)
    unused = [ast.literal_eval(x) for x in re.findall(r"unused=('[^']*')", message)]
    assert len(unused) == len(names) - 1
    flora.hf.load(tmp_path, like, tensors, unused=unused)
    for one in unused:
        rest = [x for x in unused if x != one]
        message = error_of(flora.hf.load, tmp_path, like, tensors, unused=rest)
        rest.append(written(message, "unused"))
        flora.hf.load(tmp_path, like, tensors, unused=rest)


def test_numbers_that_are_offered_fit():
    def fn(p, x):
        return x @ p["wide"] @ p["thin"]

    p = {"wide": jnp.ones((4, 9)), "thin": jnp.ones((9, 2))}
    made = init(fn, p, target="*")
    k = written(error_of(flora.monitor.reference, made), "k")
    assert {x.in_.shape[-1] for x in flora.monitor.reference(made, k).values()} == {2}
    parameters = written(error_of(flora.budget.rank_pattern, made, 5), "parameters")
    assert flora.budget.rank_pattern(made, parameters) == {"thin": 1, "wide": 1}
    start = flora.initializers.orthogonal()
    rank = written(error_of(init, fn, p, target="*", rank=3, init=start), "rank")
    assert init(fn, p, target="*", rank=rank, init=start)["wide"].rank == 4
    dora = init(fn, p, target="*", variant=flora.variants.DoRA())
    adapters = [flora.split(made)[1], flora.split(dora)[1]]
    message = error_of(flora.multi.combine, adapters, [1, -1], base=p)
    flora.multi.combine(adapters, [1, -1], base=p, method=written(message, "method"))
