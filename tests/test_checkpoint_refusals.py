"""What does not fit, or is no checkpoint, is refused by name."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import flora
from flora._files.compare import checksum
from flora.checkpoint import Checkpointer
from tests.support import contract
from tests.support.checkpoints import adapt, params, same, trained
from tests.support.registry import normal


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        yield checkpointer


def refused(saver, adapted, *parts, state=None, **options):
    with pytest.raises(flora.LoraError) as caught:
        saver.restore(adapted, state, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


def test_every_leaf_that_does_not_fit_is_named(saver):
    adapted, state = trained()
    saver.save(4, adapted, state)
    tree = params()
    tree["second"]["kernel"] = tree["second"]["kernel"].at[3, 5].add(1e-6)
    other = adapt(tree, rank_pattern={"first/*": 3}, alpha_pattern={"second/*": 1})
    message = refused(
        saver,
        other,
        "4 problems",
        "Step 4: 'first/kernel': the checkpoint has rank=2, a=bfloat16[8,2], "
        "b=bfloat16[2,16]; the given tree has rank=3, a=bfloat16[8,3], "
        "b=bfloat16[3,16]. Write LoraConfig(rank_pattern={'/first/kernel': 2}).",
        "'second/kernel': the checkpoint has alpha=4.0; the given tree has alpha=1.0. "
        "Write LoraConfig(alpha_pattern={'/second/kernel': 4}).",
        "'second/kernel': the checkpoint was trained on a base of float32[16,8] ",
        "state 'extra': the checkpoint has no such leaf; the given state has "
        "float32[2].",
        state=state_with_extra(state),
    )
    assert "'first/kernel': the checkpoint was trained" not in message


@dataclasses.dataclass
class Extra:
    inner_states: dict
    extra: jax.Array


jax.tree_util.register_dataclass(Extra, ["inner_states", "extra"], [])


def state_with_extra(state):
    return Extra(state.inner_states, jnp.ones(2))


CONFIGS = {
    "rank": ({"rank": 3}, "rank_pattern={'/first/kernel': 2}"),
    "alpha": ({"alpha": 8}, "alpha_pattern={'/first/kernel': 4}"),
    "rank_stabilized": ({"rank_stabilized": True}, "rank_stabilized=False"),
    "dtype": ({"dtype": jnp.float32}, "dtype='bfloat16'"),
    "target": (
        {"target": "second/kernel"},
        "'first/kernel' is trained in the checkpoint alone"),
    "train": ({"train": ()}, "'first/bias' is trained in the checkpoint alone"),
    "role": ({"target": "second/kernel", "train": ["bias", "first/kernel"]},
             "the given tree has trained=float32[8,16]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_other_configs_are_refused(saver, name):
    config, remedy = CONFIGS[name]
    saver.save(1, adapt())
    refused(saver, adapt(**config), "Step 1: 'first/", remedy, check_base=False)


def test_other_layouts_and_shapes_are_refused(saver):
    def fn(p, x):
        return jnp.einsum("bi,ihd->bhd", x, p["w"])

    def heads(layouts, size=5, **config):
        config = flora.LoraConfig(rank=2, target="w", layouts=layouts, **config)
        tree = {"w": normal(6, 4, size)}
        return flora.init(jax.random.key(0), config, fn, tree, normal(3, 6))

    saver.save(1, heads({}))
    refused(
        saver,
        heads({"w": flora.Layout((1,), (0,), (2,))}, fallback="materialize"),
        "layouts={'/w': flora.Layout(in_=(0,), out=(1,2,))}",
    )
    refused(saver, heads({}, size=7), "b=float32[2,4,5]; the given tree has "
            "b=float32[2,4,7]. Pass the model that it was trained with.")  # fmt: skip


def moved(adapted, by=1.0):
    """The tree after a step of an optimizer that was not told what is frozen."""
    updates = jax.tree.map(lambda p: by * 1e-3 * p, adapted)
    return optax.apply_updates(adapted, updates)


def test_a_base_that_moves_while_training_is_noticed(saver, tmp_path):
    adapted = adapt()
    saver.save(0, adapted)
    with pytest.raises(flora.LoraError) as error:
        saver.save(1, moved(adapted))
    for part in ("2 problems", "save: 'second/kernel' is frozen and was float32[16,8] ",
                 "Wrap the optimizer, flora.optimizer(tx, adapted)"):  # fmt: skip
        assert part in str(error.value)
    saver.save(1, contract.randomized(adapted))
    saver.close()
    with Checkpointer(tmp_path / "checkpoints") as another:  # in a later process
        with pytest.raises(flora.LoraError, match="at the step saved before"):
            another.save(2, moved(adapted))
        another.save(2, moved(adapted), check_base=False)
        another.save(3, moved(adapted))
        restored = another.restore(moved(adapted), step=1, check_base=False).adapted
        another.save(4, restored)
        assert another.steps() == (2, 3, 4)


def test_a_base_whose_zeros_changed_their_sign_is_the_same(saver):
    tree = params()
    tree["first"]["kernel"] = tree["first"]["kernel"].at[0, :3].set(-0.0)
    adapted = adapt(tree)
    saver.save(0, adapted)
    saver.save(1, moved(adapted, by=0.0))
    assert saver.restore(adapted).step == 1


def test_other_bases_are_refused_unless_allowed(saver):
    adapted = contract.randomized(adapt())
    saver.save(1, adapted)
    other = adapt(params(dtype=jnp.bfloat16))
    message = refused(
        saver,
        other,
        "'first/kernel': the checkpoint was trained on a base of float32[8,16] ",
        "the given base has bfloat16[8,16] ",
        "check_base=False",
        "'second/kernel'",
    )
    assert "bias" not in message
    got = saver.restore(other, check_base=False).adapted
    same(flora.split(got)[1], flora.split(adapted)[1])
    assert got["first"]["kernel"].base is other["first"]["kernel"].base
    planned = jax.eval_shape(lambda: adapt())
    refused(saver, planned, "'first/kernel' is a ShapeDtypeStruct, float32[8,16]")
    got = saver.restore(planned, check_base=False).adapted
    same(flora.split(got)[1], flora.split(adapted)[1])


def test_other_states_are_refused(saver):
    adapted, state = trained()
    saver.save(1, adapted)
    refused(saver, adapted, "state: step 1 was saved without one", state=state)
    saver.save(2, adapted, state)
    assert saver.restore(adapted).state is None
    sgd = flora.optimizer(optax.sgd(1e-2, momentum=0.9), adapted).init(adapted)
    refused(saver, adapted,
            "the checkpoint has no such leaf; the given state has bfloat16",
            "/mu/first/kernel/a': the checkpoint has bfloat16[8,2]; the given state "
            "has no such leaf", "/trace/first/bias", state=sgd)  # fmt: skip


def test_what_is_no_checkpoint_is_refused(saver, tmp_path):
    adapted = adapt()
    refused(saver, adapted, "has no checkpoint: it holds nothing. Pass the directory")
    saver.save(3, adapted)
    refused(saver, adapted, "has no step 4: it holds steps 3.", step=4)
    with Checkpointer(tmp_path / "checkpoints" / "3") as inside:
        refused(
            inside, adapted, "has no checkpoint: it holds _CHECKPOINT_METADATA, a, b"
        )
    others = tmp_path / "others"
    (others / "5").mkdir(parents=True)
    (others / "5" / "weights").write_text("precious")
    with Checkpointer(others, max_to_keep=1) as wrong:
        refused(
            wrong, adapted, "5 is no checkpoint of flora's. Pass a directory of its own"
        )
        for call in (lambda: wrong.save(6, adapted), lambda: wrong.delete(5)):
            with pytest.raises(flora.LoraError, match="is no checkpoint of flora's"):
                call()
    assert (others / "5" / "weights").read_text() == "precious"


def test_a_file_is_no_directory(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(flora.LoraError, match=r"file is a file. Pass a directory"):
        Checkpointer(path)


def test_another_format_is_refused(saver):
    saver.save(1, adapt())
    saver.wait()
    path = pathlib.Path(saver._directory, "1", "flora", "metadata")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"format": 99, "flora": "9"})
    )
    refused(saver, adapt(), "written by flora 9 in format 99; flora 0", "Install that")


def rewritten(saver, change, *, sign):
    """Step 1 with another record."""
    path = pathlib.Path(saver._directory, "1", "flora", "metadata")
    record = json.loads(path.read_text())
    change(record)
    if sign:
        record["sha256"] = checksum(record)
    path.write_text(json.dumps(record))


RECORDS = {
    "no format": (lambda r: r.pop("format"), "lacks 'format'"),
    "no leaves": (lambda r: r.pop("leaves"), "lacks 'leaves'"),
    "no base": (lambda r: r.pop("base"), "lacks 'base'"),
    "no metadata": (lambda r: r.pop("metadata"), "lacks 'metadata'"),
    "no state": (lambda r: r.pop("state"), "lacks 'state'"),
    "no arrays": (lambda r: r.pop("arrays"), "lacks 'arrays'"),
    "format 0": (lambda r: r.update(format=0), "its format is 0"),
    "text as format": (lambda r: r.update(format="2"), "format is '2', not an int"),
    "list of leaves": (lambda r: r.update(leaves=[]), "leaves is [], not an object"),
    "no arrays of a leaf": (
        lambda r: r["arrays"]["a"].pop("first/kernel"),
        "does not say what the arrays of 'first/kernel' are",
    ),
    "no layout": (
        lambda r: r["leaves"]["first/kernel"].pop("layout"),
        "leaves.first/kernel lacks 'layout'",
    ),
    "huge rank": (
        lambda r: r["leaves"]["first/kernel"]["settings"].update(rank=10**400),
        "leaves.first/kernel.settings.rank is 1000",
    ),
    "nan as alpha": (
        lambda r: r["leaves"]["first/kernel"]["settings"].update(alpha=float("nan")),
        "leaves.first/kernel.settings.alpha is nan",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_lacks_something_is_refused(saver, name):
    change, message = RECORDS[name]
    saver.save(1, adapt())
    saver.wait()
    rewritten(saver, change, sign=True)
    refused(saver, adapt(), "Step 1 of", "its record is damaged", message)


def test_what_changed_in_a_checkpoint_is_noticed(saver):
    adapted = adapt()
    saver.save(1, adapted, metadata={"loss": 1.5})
    saver.wait()
    was = pathlib.Path(saver._directory, "1", "flora", "metadata").read_text()
    rewritten(saver, lambda r: r["metadata"].update(loss=2.5), sign=False)
    refused(saver, adapted, "its record is damaged: its checksum is another")
    pathlib.Path(saver._directory, "1", "flora", "metadata").write_text(was)

    def other_values(record):
        line = record["values"]["b"]["first/kernel"]
        record["values"]["b"]["first/kernel"] = line[:-1] + "x"

    rewritten(saver, other_values, sign=True)
    refused(saver, adapted, "'b' of 'first/kernel' has changed")

    def as_it_was_written_before(record):
        del record["values"]

    rewritten(saver, as_it_was_written_before, sign=True)
    rewritten(saver, lambda record: record.pop("sha256"), sign=False)
    same(flora.split(saver.restore(adapted).adapted)[1], flora.split(adapted)[1])


def test_what_cannot_be_saved_is_refused(saver):
    adapted = adapt()
    saver.save(5, adapted)
    used = jax.tree.map(jnp.copy, adapted)
    used["first"]["kernel"].a.delete()
    cases = [
        ((5, adapted), "step=5, but .* holds steps 5. Steps go up"),
        ((4, adapted), "Steps go up"),
        ((-1, adapted), "int of 0 or more"),
        ((jnp.int32(6), adapted), r"int\(step\)"),
        ((True, adapted), "int of 0 or more"),
        ((6, params()), "none of the tree's 4 leaves is adapted"),
        ((6, flora.split(adapted)[1]), "adapter without its base"),
        (
            (6, jax.eval_shape(lambda: adapted)),
            "'a of first/kernel' is a ShapeDtypeStruct",
        ),
        ((6, used), "'a of first/kernel', bfloat16.*, was donated"),
        ((6, adapted, {"name": "run"}), "'state of name' is a str"),
        ((6, adapted, {"a": {"b": 1}, "a/b": 2}), "Two leaves are named 'a/b'"),
    ]
    for args, message in cases:
        with pytest.raises(flora.LoraError, match=message):
            saver.save(*args)
    with pytest.raises(flora.LoraError, match="is not for JSON"):
        saver.save(6, adapted, metadata={"x": jnp.ones(2)})
    with pytest.raises(flora.LoraError, match="is a tracer"):
        jax.jit(lambda t: saver.save(6, t))(adapted)
    assert saver.steps() == (5,)


def test_arguments_are_checked():
    for args, message in ((("",), "directory=''"), ((3,), "directory=3")):
        with pytest.raises(flora.LoraError, match=message):
            Checkpointer(*args)
    for keep in (0, -1, True, 1.5):
        with pytest.raises(flora.LoraError, match="max_to_keep="):
            Checkpointer("x", max_to_keep=keep)
    with pytest.raises(flora.LoraError, match="also=3"):
        Checkpointer("x", also=3)
