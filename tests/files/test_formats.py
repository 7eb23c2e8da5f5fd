"""Files of the first version can be read; both kinds describe a leaf by one record."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import flora
import flora.peft
from flora._files.compare import compared, description
from flora._files.items import items_of
from flora._files.records import (
    _encoded,
    decoded,
    foreign_settings,
    record_of,
    weight_of,
)
from flora._files.safetensors import read
from flora._tree.weight import Variant
from flora.checkpoint import Checkpointer
from flora.variants import AdaLoRA, DoRA, VeRA
from tests.support.checkpoints import same

BF16 = ml_dtypes.bfloat16


def ramp(start, *shape, dtype=BF16):
    """start, start + 1/8, ..."""
    return (np.arange(np.prod(shape)).reshape(shape) / 8 + start).astype(dtype)


def node(base, a, b, magnitude, rank, **layout):
    return flora.LoraWeight(
        jnp.asarray(base), jnp.asarray(a), jnp.asarray(b),
        extra={"magnitude": jnp.asarray(magnitude)}, layout=flora.Layout(**layout),
        rank=rank, alpha=4.0, rank_stabilized=True, dropout=0.25, form="direct",
        variant=DoRA(),
    )  # fmt: skip


F32 = np.float32
BASE = {
    "w": np.arange(24, dtype=F32).reshape(2, 3, 2, 2),
    "bias": np.zeros(2, F32),
    "kernel": np.arange(12, dtype=F32).reshape(4, 3) / 8,
    "stats": np.zeros(3, F32),
}
# Everything that is in the two files below.
WANTED = {
    "bias": flora.Trained(jnp.asarray(ramp(1, 2, dtype=F32))),
    "kernel": node(
        BASE["kernel"], ramp(2, 4, 2), ramp(3, 2, 3), ramp(4, 3, dtype=F32), 2
    ),
    "stats": jnp.arange(3.0),
    "w": node(
        BASE["w"], ramp(5, 2, 3, 1), ramp(6, 2, 1, 2, 2), ramp(7, 2, 2, 2, dtype=F32),
        1, stack=(0,), in_=(1,), out=(2, 3),
    ),
}  # fmt: skip

# What flora.save(path, WANTED, also="stats") wrote, byte by byte.
ADAPTER = (
    b'\xe8\x07\x00\x00\x00\x00\x00\x00{"__metadata__":{"flora":"{\\"format\\": 1, '
    b'\\"flora\\": \\"0.1.0\\", \\"leaves\\": {\\"bias\\": {\\"kind\\": \\"trained'
    b'\\", \\"shape\\": [2]}, \\"kernel\\": {\\"kind\\": \\"lora\\", \\"shape\\": ['
    b'4, 3], \\"extra\\": [\\"magnitude\\"], \\"layout\\": {\\"stack\\": [], \\"in'
    b'\\": [0], \\"out\\": [1]}, \\"settings\\": {\\"rank\\": 2, \\"alpha\\": 4.0, '
    b'\\"rank_stabilized\\": true, \\"dropout\\": 0.25, \\"fallback\\": \\"error\\"'
    b', \\"form\\": \\"direct\\", \\"variant\\": {\\"class\\": \\"flora.variants:Do'
    b'RA\\", \\"fields\\": {}}}}, \\"stats\\": {\\"kind\\": \\"also\\", \\"shape\\"'
    b': [3]}, \\"w\\": {\\"kind\\": \\"lora\\", \\"shape\\": [2, 3, 2, 2], \\"extra'
    b'\\": [\\"magnitude\\"], \\"layout\\": {\\"stack\\": [0], \\"in\\": [1], \\"ou'
    b't\\": [2, 3]}, \\"settings\\": {\\"rank\\": 1, \\"alpha\\": 4.0, \\"rank_stab'
    b'ilized\\": true, \\"dropout\\": 0.25, \\"fallback\\": \\"error\\", \\"form\\"'
    b': \\"direct\\", \\"variant\\": {\\"class\\": \\"flora.variants:DoRA\\", \\"fi'
    b'elds\\": {}}}}}, \\"base\\": {\\"kernel\\": \\"float32[4,3] 21c24f6a1f20bf44'
    b'\\", \\"w\\": \\"float32[2,3,2,2] 961c6708a3fc2e0f\\"}, \\"arrays\\": {\\"a/k'
    b'ernel\\": \\"bfloat16[4,2] 8dd5b67a53fd9375\\", \\"a/w\\": \\"bfloat16[2,3,1'
    b'] c7176ddaced7f0fc\\", \\"b/kernel\\": \\"bfloat16[2,3] 15e9a97d73140c73\\"'
    b', \\"b/w\\": \\"bfloat16[2,1,2,2] 8261051691e26de6\\", \\"extra/magnitude/k'
    b'ernel\\": \\"float32[3] ec4c50c6f312cc60\\", \\"extra/magnitude/w\\": \\"flo'
    b'at32[2,2,2] 6e86e865dd818558\\", \\"whole/bias\\": \\"float32[2] e2e758a7d'
    b'7743bd1\\", \\"whole/stats\\": \\"float32[3] 53fd34cf7fd589b3\\"}}","flora_'
    b'sha256":"4f51d71a3c2d90115c71bc8578b896bca99d0976d6e482f8fbffae485b47c'
    b'0db"},"extra/magnitude/kernel":{"dtype":"F32","shape":[3],"data_offset'
    b's":[0,12]},"extra/magnitude/w":{"dtype":"F32","shape":[2,2,2],"data_of'
    b'fsets":[12,44]},"whole/bias":{"dtype":"F32","shape":[2],"data_offsets"'
    b':[44,52]},"whole/stats":{"dtype":"F32","shape":[3],"data_offsets":[52,'
    b'64]},"a/kernel":{"dtype":"BF16","shape":[4,2],"data_offsets":[64,80]},'
    b'"a/w":{"dtype":"BF16","shape":[2,3,1],"data_offsets":[80,92]},"b/kerne'
    b'l":{"dtype":"BF16","shape":[2,3],"data_offsets":[92,104]},"b/w":{"dtyp'
    b'e":"BF16","shape":[2,1,2,2],"data_offsets":[104,120]}}\x00\x00\x80@\x00\x00'
    b"\x84@\x00\x00\x88@\x00\x00\xe0@\x00\x00\xe4@\x00\x00\xe8@\x00\x00\xec@\x00"
    b"\x00\xf0@\x00\x00\xf4@\x00\x00\xf8@\x00\x00\xfc@\x00\x00\x80?\x00\x00\x90?"
    b"\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00@\x00@\x08@\x10@\x18@ @(@0@8@\xa0@"
    b"\xa4@\xa8@\xac@\xb0@\xb4@@@H@P@X@`@h@\xc0@\xc4@\xc8@\xcc@\xd0@\xd4@\xd8@\xdc@"
)

# What Checkpointer(path, also="stats").save(7, WANTED, state) gave to Orbax.
RECORD = {
    "format": 1,
    "flora": "0.1.0",
    "leaves": {
        "bias": {"trained": "float32[2]"},
        "kernel": {
            "layout": "in=0 out=1",
            "rank": 2,
            "alpha": 4.0,
            "rank_stabilized": True,
            "a": "bfloat16[4,2]",
            "b": "bfloat16[2,3]",
            "variant": "DoRA()",
            "extra": {"magnitude": "float32[3]"},
        },
        "stats": {"also": "float32[3]"},
        "w": {
            "layout": "stack=0 in=1 out=2,3",
            "rank": 1,
            "alpha": 4.0,
            "rank_stabilized": True,
            "a": "bfloat16[2,3,1]",
            "b": "bfloat16[2,1,2,2]",
            "variant": "DoRA()",
            "extra": {"magnitude": "float32[2,2,2]"},
        },
    },
    "state": {
        "0/trace/bias/value": "float32[2]",
        "0/trace/kernel/a": "bfloat16[4,2]",
        "0/trace/kernel/b": "bfloat16[2,3]",
        "0/trace/kernel/extra/magnitude": "float32[3]",
        "0/trace/w/a": "bfloat16[2,3,1]",
        "0/trace/w/b": "bfloat16[2,1,2,2]",
        "0/trace/w/extra/magnitude": "float32[2,2,2]",
    },
    "base": {
        "kernel": "float32[4,3] 21c24f6a1f20bf44",
        "w": "float32[2,3,2,2] 961c6708a3fc2e0f",
    },
    "step": 7,
    "metadata": {"note": "old"},
}
ITEMS = {
    "a": {"kernel": ramp(2, 4, 2), "w": ramp(5, 2, 3, 1)},
    "b": {"kernel": ramp(3, 2, 3), "w": ramp(6, 2, 1, 2, 2)},
    "extra": {
        "kernel/magnitude": ramp(4, 3, dtype=F32),
        "w/magnitude": ramp(7, 2, 2, 2, dtype=F32),
    },
    "whole": {"bias": ramp(1, 2, dtype=F32), "stats": np.arange(3, dtype=F32)},
    "state": {
        "0/trace/bias/value": ramp(8, 2, dtype=F32),
        "0/trace/kernel/a": ramp(9, 4, 2),
        "0/trace/kernel/b": ramp(10, 2, 3),
        "0/trace/kernel/extra/magnitude": ramp(11, 3, dtype=F32),
        "0/trace/w/a": ramp(12, 2, 3, 1),
        "0/trace/w/b": ramp(13, 2, 1, 2, 2),
        "0/trace/w/extra/magnitude": ramp(14, 2, 2, 2, dtype=F32),
    },
}


def test_an_adapter_of_the_first_version(tmp_path):
    (tmp_path / "old").write_bytes(ADAPTER)
    got = flora.load(tmp_path / "old", jax.tree.map(jnp.asarray, BASE))
    same(got, WANTED)
    chex.assert_trees_all_equal_structs(got, WANTED)  # all settings too


def write_old(folder, items):
    args = {k: ocp.args.PyTreeSave(v) for k, v in items.items()}
    with ocp.CheckpointManager(folder / "old") as manager:
        record = ocp.args.JsonSave(RECORD)
        manager.save(7, args=ocp.args.Composite(flora=record, **args))


@pytest.fixture
def old(tmp_path):
    write_old(tmp_path, ITEMS)
    with Checkpointer(tmp_path / "old", also="stats") as checkpointer:
        yield checkpointer


def test_a_checkpoint_of_the_first_version(old):
    empty = jax.tree.map(jnp.zeros_like, flora.split(WANTED)[1])
    fresh = flora.join(flora.split(WANTED)[0], empty)
    tx = optax.sgd(0.1, momentum=0.9)
    got = old.restore(fresh, tx.init(empty))
    assert (got.step, old.metadata(7)) == (7, {"note": "old"})
    same(got.adapted, WANTED)
    chex.assert_trees_all_equal_structs(got.adapted, WANTED)
    chex.assert_trees_all_equal(jax.tree.leaves(got.state), [*ITEMS["state"].values()])
    old.save(8, got.adapted, got.state)  # on with it, in the format of today
    again = old.restore(fresh, tx.init(empty))
    same(again[:2], got[:2])
    assert again.step == 8


def test_what_does_not_fit_an_old_checkpoint_is_named(old):
    w = dataclasses.replace(WANTED["w"], variant=None, extra=None, alpha=2.0)
    kernel = dataclasses.replace(
        WANTED["kernel"], base=WANTED["kernel"].base.T, a=ramp(0, 4, 2),
        layout=flora.Layout((), (1,), (0,)),
    )  # fmt: skip
    with pytest.raises(flora.LoraError) as error:
        old.restore(WANTED | {"w": w, "kernel": kernel}, check_base=False)
    for part in (
        "'w': the checkpoint has alpha=4.0, variant=DoRA(), "
        "extra={'magnitude': 'float32[2,2,2]'}; the given tree has alpha=2.0. Write "
        "LoraConfig(alpha_pattern={'/w': 4}, variant=flora.variants.DoRA()).",
        "'kernel': the checkpoint has layout=in=0 out=1; the given tree has "
        "layout=in=1 out=0. Write LoraConfig("
        "layouts={'/kernel': flora.Layout(in_=(0,), out=(1,))}).",
    ):
        assert part in str(error.value)


@dataclasses.dataclass(frozen=True)
class Own(DoRA):
    """A variant that is not flora's."""

    power: float = 2.0


VARIANTS = [None, DoRA(), VeRA(seed=3), AdaLoRA(std=0.5)]


def weight(variant: Variant | None):
    return dataclasses.replace(
        WANTED["w"], variant=variant, fallback="materialize", form="concat"
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_a_record_tells_all_of_a_node(variant):
    x = weight(variant)
    record = json.loads(json.dumps(record_of("w", x, ())))
    again = weight_of(record, x.base, x.a, x.b, x.extra)
    chex.assert_trees_all_equal_structs(again, x)
    assert list(foreign_settings(record)) == []


def test_a_variant_of_others_is_compared_and_never_made(tmp_path):
    own = {"w": weight(Own())}
    record = json.loads(json.dumps(record_of("w", own["w"], ())))
    assert [*foreign_settings(record)] == [("variant", "Own(power=2.0)")]
    with pytest.raises(flora.LoraError, match=r"needs Own\(power=2.0\), which flora"):
        decoded(record["settings"]["variant"])
    for gone in ("flora.nowhere:X", "flora.variants:Gone", "os:system"):
        with pytest.raises(flora.LoraError, match=f"needs {gone}, which flora"):
            decoded({"class": gone, "fields": {}})
    with pytest.raises(flora.LoraError, match=r"needs flora\.variants:VeRA, which"):
        decoded({"class": "flora.variants:VeRA", "fields": {"newer": 1}})
    with Checkpointer(tmp_path) as saver:
        saver.save(1, own)
        saver.restore(own)
        with pytest.raises(flora.LoraError, match=r"has variant=Own\(power=2.0\); the "
                           r"given tree has variant=Own\(power=3.0\)"):  # fmt: skip
            saver.restore({"w": weight(Own(power=3.0))})


def test_both_files_hold_the_same_record(tmp_path):
    flora.save(tmp_path / "x", WANTED, also="stats")
    file = json.loads(read(tmp_path / "x").metadata["flora"])["leaves"]
    with Checkpointer(tmp_path / "c", also="stats") as saver:
        saver.save(1, WANTED)
    path = pathlib.Path(tmp_path, "c", "1", "flora", "metadata")
    assert json.loads(path.read_text())["leaves"] == file
    given = description(WANTED, items_of(WANTED, None, "stats"), "stats")
    assert compared(json.loads(path.read_text())) == compared(given) == compared(RECORD)


OTHERS = {
    "wider": (ramp(2, 4, 3), r"shapes: \(4, 3\) != \(4, 2\)"),
    "of another dtype": (ramp(2, 4, 2, dtype=F32), "types: float32 != bfloat16"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_arrays_that_are_not_as_the_record_says_are_refused(tmp_path, name):
    """Orbax itself reads them without a word."""
    array, message = OTHERS[name]
    write_old(tmp_path, ITEMS | {"a": ITEMS["a"] | {"kernel": array}})
    with (
        Checkpointer(tmp_path / "old", also="stats") as saver,
        pytest.raises(flora.LoraError, match=rf"Step 7 of .*old cannot be read: 'a' "
                      rf"differs .* in leaves 'kernel': {message}"),
    ):  # fmt: skip
        saver.restore(WANTED)


def test_variants_of_peft_are_named_by_where_users_find_them():
    """Files written before they had public names still load."""
    groups = {"class": "flora._peft.groups:AcrossGroups", "fields": {"groups": 2}}
    found = decoded(groups)
    assert type(found).__name__ == "AcrossGroups"
    for variant in (found, flora.peft.Activated((1, 2)), flora.peft.Added()):
        written = _encoded(variant)
        assert written["class"] == f"flora.peft:{type(variant).__name__}"
        assert decoded(written) == variant
