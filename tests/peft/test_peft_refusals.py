"""What PEFT lets pass, and damaged files: each an error that says where and what."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, D, F, linear, params, up_adapters, values
from tests.support.promptly import promptly

A0 = f"{PREFIX}layers.0.up.lora_A.weight"
B0 = f"{PREFIX}layers.0.up.lora_B.weight"


def tensors(**changes):
    """Those of `up` with some replaced, by short names; `...` takes one away."""
    names = {"a": A0, "b": B0}
    found = up_adapters() | {names.get(k, PREFIX + k): v for k, v in changes.items()}
    return {k: v for k, v in found.items() if v is not ...}


def with_nan():
    a = values(2, D)
    a[1, 2] = np.nan
    return a


TWO_A = {"r": 4, "target_modules": ["up"]}
# (tensors, changes of the config, what the message must hold)
CASES = {
    # the config
    "lower-case type": ({}, {"peft_type": "lora"}, ["peft_type", "'lora'", "'LORA'"]),
    "no type": ({}, {"peft_type": ...}, ["peft_type is missing"]),
    "other type": ({}, {"peft_type": "IA3"}, ["'IA3'", "'LORA'"]),
    "no rank": ({}, {"r": ...}, ["r is missing", "PEFT would take 8"]),
    "no alpha": ({}, {"lora_alpha": ...}, ["lora_alpha is missing"]),
    "rank is text": ({}, {"r": "2"}, ["r is '2'", "an int"]),
    "rank is a float": ({}, {"r": 2.0}, ["r is 2.0", "an int"]),
    "rank zero": ({}, {"r": 0}, ["r is 0"]),
    "rank true": ({}, {"r": True}, ["r is True"]),
    "alpha is text": (
        {}, {"lora_alpha": "16"}, ["lora_alpha is '16'", "a finite number"]),
    "alpha nan": ({}, {"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
    "alpha of a pattern nan": (
        {}, {"alpha_pattern": {"0.up": float("nan")}},
        ["alpha_pattern has nan at '0.up'", "layers.0.up", "a finite number"]),
    "rank of a pattern negative": (
        {}, {"rank_pattern": {"up": -2}},
        ["rank_pattern has -2 at 'up'", "an int of at least 1"]),
    "rank negative": ({}, {"r": -2}, ["r is -2", "an int of at least 1"]),
    "flag is text": (
        {}, {"use_dora": "false"}, ["use_dora is 'false'", "true or false"]),
    "other rank": (
        {}, {"r": 4},
        ["(2, 4) and", "expected rank 4", "layers.0.up", "Write 2 in r or rank_pat"]),
    "no targets": ({}, {"target_modules": None}, ["target_modules", "both empty"]),
    "targets too much": (
        {}, {"target_modules": ["up", "down"]},
        ["layers.0.down.lora_A.weight' is missing"]),
    "targets too little": (
        {}, {"target_modules": ["layers.0.up"]},
        ["layers.1.up' is adapted", "not select"]),
    "regex too little": (
        {}, {"target_modules": r".*\.0\.up"}, ["layers.1.up' is adapted"]),
    "rank_pattern text": ({}, {"rank_pattern": {"up": "2"}}, ["rank_pattern is"]),
    "bad regex": ({}, {"alpha_pattern": {"up(": 2}}, ["alpha_pattern has"]),
    "unknown start": ({}, {"init_lora_weights": "magic"}, ["'magic'", "expected true"]),
    "random start": (
        {}, {"init_lora_weights": "pissa_niter_4"},
        ["pissa_niter_4", "path_initial_model_for_weight_conversion"]),
    "corda": ({}, {"init_lora_weights": "corda"}, ["corda", "cannot be repeated"]),
    "loftq": (
        {}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        ["'loftq'", "was quantized", "dequantized"]),
    "lora_ga": ({}, {"init_lora_weights": "lora_ga"}, ["lora_ga", "Pass start="]),
    "velora": (
        {}, {"velora_config": {"num_groups": 2}}, ["VeLoRA", "lora_velora_embed"]),
    "monteclora": (
        {}, {"monteclora_config": {"num_samples": 8}}, ["MonteCLoRA", "ignore="]),
    "arrow": ({}, {"arrow_config": {"top_k": 2}}, ["routing", "flora.multi"]),
    "megatron": ({}, {"megatron_config": {"x": 1}}, ["Megatron layers"]),
    "activated by text": (
        {}, {"alora_invocation_tokens": ["<go>"]},
        ["alora_invocation_tokens is ['<go>']", "a list of indices"]),
    "replicated": ({}, {"layer_replication": [[0, 1]]}, ["layer_replication"]),
    "unknown field": ({}, {"use_magic": True}, ["use_magic", "does not know"]),
    "bias mode": ({}, {"bias": "some"}, ["bias is 'some'", "'lora_only'"]),
    "dropout": ({}, {"lora_dropout": 1.5}, ["lora_dropout is 1.5"]),
    "bias missing": (
        {}, {"bias": "lora_only"},
        ["layers.0.up.bias' is missing", "bias is 'lora_only'"]),
    "saved module missing": (
        {}, {"modules_to_save": ["head"]}, ["no tensor of 'head'", "modules_to_save"]),
    "not in layers": (
        {}, {"layers_to_transform": [0], "layers_pattern": "layers"},
        ["layers.1.up' is adapted"]),
    # keys
    "missing B": ({"b": ...}, {}, ["layers.0.up' has a but no b", "lora_B.weight"]),
    "missing layer": (
        {"a": ..., "b": ...}, {}, ["layers.0.up.lora_A.weight' is missing"]),
    "deeper": (
        linear("layers.2.up", D, F), {},
        ["layers.2.up.lora_A.weight'", "none of the base"]),
    "unexpected": (
        {"norm.weight": values(D, seed=1)}, {},
        ["norm.weight' differs", "of the base by", "not part", "ignore='norm.weight'"]),
    "no such module": ({"x.y": values(2)}, {}, ["'base_model.model.x.y'", "none of"]),
    "twice": (
        {"layers.0.up.lora_A.default.weight": values(2, D)}, {},
        ["lora_A.default.weight' and another key are both"]),
    "two adapters": (
        {"layers.0.up.lora_A.one.weight": values(2, D),
         "layers.0.up.lora_A.two.weight": values(2, D)}, {},
        ["holds the adapters 'one', 'two'", "ignore='*.two*'"]),
    # tensors
    "nan": ({"a": with_nan()}, {}, [A0, "NaN or infinity in 1 of 8 places"]),
    "inf": ({"b": np.full((F, 2), np.inf, np.float32)}, {}, [B0, "12 of 12"]),
    "wide": (
        {"a": values(2, D + 1)}, {},
        ["has shape (2, 5) and", "expected A (2, 4) and B (6, 2)", "layers/0/up/ker"]),
    "tall": (
        {"b": values(F + 1, 2)}, {},
        ["lora_B.weight' (7, 2)", "expected A (2, 4) and B (6, 2)"]),
    "turned": (
        {"a": values(D, 2), "b": values(2, F)}, {},
        ["(4, 2) and", "expected rank 2", "transposed, or exchanged"]),
    "exchanged": (
        {"a": values(F, 2), "b": values(2, D)}, {},
        ["(6, 2) and", "(2, 4)", "expected rank 2", "transposed, or exchanged"]),
    "of another base": (
        {"a": values(2, 64), "b": values(256, 2)}, {},
        ["(2, 64) and", "(256, 2)", "expected A (2, 4) and B (6, 2)", "another base"]),
    "odd rank": (
        {"b": values(F, 3)}, {}, ["(6, 3)", "expected rank 2", "different adapters"]),
    "window": (
        {"a": values(2, D, 3, 3), "b": values(F, 2, 3, 3)}, {},
        ["(6, 2, 3, 3)", "expected (6, 2, 1, 1)"]),
    "flat": ({"a": values(8)}, {}, ["(8,)", "at least 2"]),
    "integers": ({"a": np.ones((2, D), np.int32)}, {}, ["dtype I32", "F32"]),
    "bytes": ({"b": np.ones((F, 2), np.int8)}, {}, [B0, "dtype I8", "a floating dty"]),
    "booleans": ({"b": np.ones((F, 2), bool)}, {}, [B0, "dtype BOOL"]),
    "empty": ({"a": values(0, D)}, {}, ["(0, 4)", "no elements"]),
    # flags
    "dora without flag": (
        {"layers.0.up.lora_magnitude_vector": values(F)}, {},
        ["lora_magnitude_vector' is there", "use_dora false"]),
    "flag without dora": (
        {}, {"use_dora": True}, ["layers.0.up.lora_magnitude_vector' is missing"]),
    "bias without flag": (
        {"layers.0.up.lora_B.bias": values(F)}, {}, ["lora_B.bias", "lora_bias false"]),
    "flag without bias": ({}, {"lora_bias": True}, ["lora_B.bias' is missing"]),
    "magnitudes of zeros": (
        {f"layers.{i}.up.lora_magnitude_vector": values(F) * i for i in range(2)},
        {"use_dora": True},
        ["layers.0.up.lora_magnitude_vector' is zero throughout"]),
    "magnitudes in a matrix": (
        {f"layers.{i}.up.lora_magnitude_vector": values(F, F) for i in range(2)},
        {"use_dora": True}, ["has shape (6, 6); expected (6,)"]),
    "another network's names": (
        {"a": ..., "b": ..., "layers.0.up.lora_down.weight": values(2, D)}, {},
        ["layers.0.up.lora_down.weight' belongs to", "none of the base's 12"]),
    "an embedding's names": (
        {"a": ..., "b": ..., "layers.0.up.lora_embedding_A": values(2, D),
         "layers.0.up.lora_embedding_B": values(F, 2)}, {},
        ["layers.0.up.lora_embedding_A' is there; expected",
         "layers.0.up.lora_A.weight', since the base's 'layers/0/up/kernel'"]),
    "half of it an embedding's": (
        {"b": ..., "layers.0.up.lora_embedding_B": values(F, 2)}, {},
        ["layers.0.up' has a but no b", "layers.0.up' has b but no a"]),
    "magnitudes too few": (
        {"layers.0.up.lora_magnitude_vector": values(F - 1),
         "layers.1.up.lora_magnitude_vector": values(F)},
        {"use_dora": True},
        ["layers.0.up.lora_magnitude_vector' has shape (5,)", "expected (6,)"]),
    "head of another size": (
        {"head.weight": values(9, D), "head.bias": values(3)},
        {"modules_to_save": ["head"]},
        ["head.weight' has shape (9, 4)", "expected (4, 3), found (4, 9)"]),
    "head in a row": (
        {"head.weight": values(3 * D), "head.bias": values(3)},
        {"modules_to_save": ["head"]},
        ["head.weight' has shape (12,)", "expected (4, 3), found (12,)"]),
    "half a head": (
        {"head.weight": values(3, D)}, {"modules_to_save": ["head"]},
        ["head.bias' is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named(tmp_path, name):
    changes, config, fragments = CASES[name]
    folder = files.write(tmp_path / "adapter", tensors(**_short(changes)), **config)
    with pytest.raises(flora.LoraError) as caught:
        flora.peft.load(folder, params())
    text = str(caught.value)
    assert str(folder) in text
    for fragment in fragments:
        assert fragment in text, text


# What PEFT passes over and writes itself.
IDLE = {
    "targets": {"target_modules": ["up", "elsewhere"]},
    "rank_pattern": {"rank_pattern": {"elsewhere": 4}},
    "alpha_pattern": {"alpha_pattern": {"layers.2.up": 2}},
    "rank zero": {"rank_pattern": {"elsewhere": 0}},
    "alpha nan": {"alpha_pattern": {"elsewhere": float("nan")}},
    "modules_to_save": {"modules_to_save": ["lm_head", "score"]},
    "exclude_modules": {"exclude_modules": ["vision_tower"]},
    "before the first layer": {
        "layers_to_transform": [-1, 0, 1],
        "layers_pattern": "layers",
    },
    "shadowed": {"alpha_pattern": {"up": 4, "0.up": 2}},
    "layers": {"layers_to_transform": [0, 1, 7], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("name", IDLE)
def test_names_and_patterns_that_select_nothing_are_passed_over(tmp_path, name):
    folder = files.write(tmp_path / "adapter", tensors(), **IDLE[name])
    loaded = flora.peft.load(folder, params())
    alpha = 4.0 if name == "shadowed" else 6.0
    for layer, a in (("0", A0), ("1", A0.replace("0.up", "1.up"))):
        w = loaded["layers"][layer]["up"]["kernel"]
        assert (w.rank, w.alpha) == (2, alpha)
        assert np.array_equal(w.a, tensors()[a].T)


def _short(changes):
    return {k.removeprefix(PREFIX): v for k, v in changes.items()}


def test_some_keys_without_the_prefix(tmp_path):
    held = tensors()
    held["layers.0.up.lora_A.weight"] = held.pop(A0)
    folder = files.write(tmp_path / "x", held)
    with pytest.raises(flora.LoraError, match=r"does not start with 'base_model\.mod"):
        flora.peft.load(folder, params())


def test_a_long_list_says_the_file_once(tmp_path):
    """And is cut with a count."""
    held = {k: x for i in range(250) for k, x in linear(f"l.{i}", D, F + 1).items()}
    tree = {"l": {str(i): {"kernel": jnp.ones((D, F))} for i in range(250)}}
    folder = files.write(tmp_path / "x", held, target_modules=r"l\.\d+")
    with pytest.raises(flora.LoraError) as caught:
        flora.peft.load(folder, tree)
    text = str(caught.value)
    assert text.startswith("250 problems:\n")
    assert len(text) <= 4_000
    assert text.count(str(folder)) == 1
    assert text.count("expected A (2, 4) and B (6, 2)") == text.count("\n") - 2
    assert f"and {250 - text.count('expected A')} more" in text


def test_one_error_lists_all(tmp_path):
    folder = files.write(
        tmp_path / "x", tensors(), r="8", lora_alpha=None, bias="maybe"
    )
    with pytest.raises(flora.LoraError) as caught:
        flora.peft.load(folder, params())
    assert "3 problems" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_files_cut_off(tmp_path, kept):
    folder = files.write(tmp_path / "x", tensors())
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(flora.LoraError, match=r"adapter_model\.safetensors: no valid"):
        flora.peft.load(folder, params())


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3", "F4", "F6_E2M3"])
def test_other_dtypes(tmp_path, dtype):
    """Those that NumPy has, and those that it lacks."""
    folder = files.write(tmp_path / "x", tensors())
    bits = {"I32": 32, "F8_E4M3": 8, "F4": 4, "F6_E2M3": 6}[dtype]
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
    header = json.dumps({"odd": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(bits)
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(flora.LoraError) as caught:
        flora.peft.load(folder, params())
    message = str(caught.value)
    assert f"safetensors: 'odd' has dtype {dtype}; expected one of F64" in message
    assert "Save the adapter in a floating dtype." in message
    assert "Copy it anew" not in message


def header(text, data=b"", length=None):
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
# The whole of adapter_model.safetensors, and what the message must hold.
DAMAGED = {
    "empty": (b"", "no valid safetensors file of 0 bytes"),
    "zeros": (bytes(1_000), "its header is no JSON"),
    "a pickle": (b"\x80\x02}q\x00.", "no valid safetensors"),
    "a page": (b"<!DOCTYPE html><html>Not found</html>", "no valid safetensors"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git"),
    "a huge header": (header(b"{}", length=2**60), "header would end at byte 1,152"),
    "a wide header": (header(b" " * 25_000_001), "expected at most 25,000,000"),
    "deep": (header(b"[" * 100_000), "no valid safetensors"),
    "a list": (header(b"[]"), "its header is a list, no dict"),
    "no tensors": (header(b"{}"), "has no tensors; expected"),
    "twice": (header(b"{" + ONE + b"," + ONE + b"}", bytes(4)), "'a' is there twice"),
    "one over the other": (
        header(b"{" + ONE + b"," + ONE.replace(b"a", b"b", 1) + b"}", bytes(4)),
        "'b' starts at byte 0 instead of 4",
    ),
    "too long": (header(b"{" + ONE + b"}", bytes(5)), "take 4 bytes, and 5 are there"),
    "other tensors": (
        header(b"{" + ONE + b"}", bytes(4)), "has 1 tensors, such as 'base_model.mod"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_other_bytes(tmp_path, name):
    data, fragment = DAMAGED[name]
    folder = files.write(tmp_path / "x", tensors())
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(flora.LoraError, match=r"adapter_model\.safetensors") as caught:
        flora.peft.load(folder, params())
    assert fragment in str(caught.value)


def test_links(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = folder / name
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
        flora.peft.load(folder, params())
        for target in (tmp_path / "none", path):
            path.unlink()
            path.symlink_to(target)
            with pytest.raises(flora.LoraError, match=rf"{name} is a link to '.*', wh"):
                flora.peft.load(folder, params())
        path.unlink()
        path.symlink_to(tmp_path / name)


def test_what_the_system_refuses(tmp_path):
    with pytest.raises(flora.LoraError, match="cannot be read: File name too long"):
        flora.peft.load(tmp_path / ("x" * 300), params())


def test_the_marks_of_other_encodings_are_no_fault(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    path = folder / "adapter_config.json"
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        flora.peft.load(folder, params())


def test_header_that_lies(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[2,4]", b"[4,4]", 1))
    with pytest.raises(flora.LoraError, match="no valid safetensors"):
        flora.peft.load(folder, params())


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "a JSON list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"peft_type": "LORA", "r": 8, "r": 4}', "'r' is there twice"),
        ("\xff\xfe", "not valid JSON"),
        ("null", "a JSON NoneType"),
        ('"LORA"', "a JSON str"),
        ("version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
    ],
)
def test_broken_configs(tmp_path, text, fragment):
    folder = files.write(tmp_path / "x", tensors())
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(flora.LoraError, match=r"adapter_config.json: ") as caught:
        flora.peft.load(folder, params())
    assert fragment in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(flora.LoraError, match="does not exist"):
        flora.peft.load(tmp_path / "none", params())
    folder = files.write(tmp_path / "x", tensors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        flora.LoraError, match=r"only adapter_model.bin. That is a pickle"
    ):
        flora.peft.load(folder, params())
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(flora.LoraError, match=r"has no adapter_model.safetensors"):
        flora.peft.load(folder, params())
    with pytest.raises(flora.LoraError, match=r"folders x: name one"):
        flora.peft.load(tmp_path, params())
    for n in (1, 2):
        (folder / f"adapter_model-0000{n}-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(flora.LoraError, match=r"but adapter_model-00001-of-00002\.saf"):
        flora.peft.load(folder, params())
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(flora.LoraError, match=r"safetensors is a directory; expected"):
        flora.peft.load(folder, params())
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    with pytest.raises(flora.LoraError, match=r"config\.json is a directory; expected"):
        flora.peft.load(folder, params())
    for odd in (None, 3, "", b""):
        with pytest.raises(flora.LoraError, match="expected a directory"):
            flora.peft.load(odd, params())


def test_a_pickle_beside_is_never_opened(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    flora.peft.load(folder, params())


def test_trees_that_do_not_fit(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    with pytest.raises(flora.LoraError, match="the tree is empty"):
        flora.peft.load(folder, {})
    with pytest.raises(flora.LoraError, match="none of the base's 2 leaves"):
        flora.peft.load(
            folder, {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        )
    loaded = flora.peft.load(folder, params())
    other = files.write(tmp_path / "y", linear("head", D, 3), target_modules=["head"])
    with pytest.raises(flora.LoraError, match="is adapted in the tree") as caught:
        flora.peft.load(other, loaded)
    assert "'head/kernel', which is not adapted" in str(caught.value)
    with pytest.raises(flora.LoraError, match="an adapter without its base"):
        flora.peft.load(folder, flora.split(loaded)[1])
    with pytest.raises(flora.LoraError, match="Write a floating dtype"):
        flora.peft.load(folder, params(), dtype=jnp.int32)


def test_a_base_without_values_shows_nothing(tmp_path):
    held = tensors(**{"norm.weight": values(D)})  # as the base's
    folder = files.write(tmp_path / "x", held)
    flora.peft.load(folder, params())
    shapes = jax.eval_shape(params)
    with pytest.raises(flora.LoraError, match=r"norm\.weight' cannot be compared"):
        flora.peft.load(folder, shapes)
    flora.peft.load(folder, shapes, ignore="norm.weight")


def test_names_that_do_not_fit(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    for names, fragment in (
        ({"nowhere/kernel": "a"}, "matches none of the"),
        ({"layers/{i}/up": 3}, "Write a module's dotted path"),
        (3, "names is a int"),
        ({3: "a"}, "is no pattern"),
        ({"layers/{i}/up": "layers.{i}.down"}, "none of the base's"),
        ({"layers/{i}/up": "a.{i}", "0/up": "b"}, "all 2 leaves that '0/up' matches"),
        ({"/up": "a"}, "'/up' matches none of the"),
    ):
        with pytest.raises(flora.LoraError, match=fragment):
            flora.peft.load(folder, params(), names=names)
    with pytest.raises(flora.LoraError, match="once each"):
        flora.peft.Module("a", rows=[0, 0])
    with pytest.raises(flora.LoraError, match="kind='dense'"):
        flora.peft.Module("a", kind="dense")


def test_a_leading_slash_anchors_a_name(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    tree = params() | {"vision": params()}  # whose leaves end as the others do
    names = {"/layers/{i}/up": "layers.{i}.up"}
    loaded = flora.peft.load(folder, tree, names=names)
    rows = [r.path for r in flora.summary(loaded).rows if r.role == "lora"]
    assert rows == ["layers/0/up/kernel", "layers/1/up/kernel"]
    flora.peft.save(tmp_path / "y", loaded, names=names)
    again = flora.peft.load(tmp_path / "y", tree, names=names)
    assert [r.path for r in flora.summary(again).rows if r.role == "lora"] == rows


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_of_a_rank_above_both_sides_draws_fewer(tmp_path, start):
    drawn = {k: v for i in "01" for k, v in linear(f"layers.{i}.up", D, F, D).items()}
    config = {"r": 9, "lora_alpha": 9, "init_lora_weights": start}
    folder = files.write(tmp_path / "x", drawn, **config)
    base = params()
    loaded = flora.peft.load(folder, base)
    for i in "01":
        w = loaded["layers"][i]["up"]["kernel"]
        assert (w.rank, w.scale) == (9, 1.0)
        assert abs(np.asarray(w.base)).max() < 1e-6  # all of W was taken out of it
        a, b = (drawn[f"{PREFIX}layers.{i}.up.lora_{n}.weight"].T for n in "AB")
        assert np.array_equal(w.a, np.pad(a, ((0, 0), (0, 9 - D))))
        assert np.array_equal(w.b, np.pad(b, ((0, 9 - D), (0, 0))))
    plain = files.write(tmp_path / "y", drawn, **config | {"init_lora_weights": True})
    with pytest.raises(flora.LoraError, match="expected rank 9"):
        flora.peft.load(plain, base)


def test_a_base_that_is_another(tmp_path):
    embedding = {"embed_tokens": {"embedding": jnp.asarray(values(7, D))}}
    key = f"{PREFIX}embed_tokens"
    held = {
        f"{key}.lora_embedding_A": values(2, 7),
        f"{key}.lora_embedding_B": values(D, 2),
    }
    same = {f"{key}.base_layer.weight": values(7, D)}
    other = {f"{key}.base_layer.weight": values(7, D, seed=3)}
    wider = {f"{key}.base_layer.weight": values(9, D)}
    config = {"target_modules": ["embed_tokens"], "task_type": "FEATURE_EXTRACTION"}
    flora.peft.load(files.write(tmp_path / "1", held | same, **config), embedding)
    with pytest.raises(flora.LoraError, match="trained on another base"):
        flora.peft.load(files.write(tmp_path / "2", held | other, **config), embedding)
    with pytest.raises(flora.LoraError, match="resize the base"):
        flora.peft.load(files.write(tmp_path / "3", held | wider, **config), embedding)


def test_unreadable_json_of_numbers(tmp_path):
    folder = files.write(tmp_path / "x", tensors())
    config = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps(config).replace('"lora_alpha": 6', '"lora_alpha": 1e999')
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(flora.LoraError, match="lora_alpha is inf"):
        flora.peft.load(folder, params())


HANG = "(([a-z0-9_.]+)+)+!"
# Changes of the config, and what the message must name.
BOMBS = {
    "targets": ({"target_modules": HANG}, f"target_modules is '{HANG}'"),
    "backreference": ({"target_modules": r"(.)\1"}, "target_modules has '(.)\\\\1'"),
    "broken whole": ({"modules_to_save": ["a("]}, "modules_to_save has 'a('"),
    "layers": (
        {"layers_to_transform": [0], "layers_pattern": HANG}, "does not select it"
    ),
    "broken layers": (
        {"layers_to_transform": [0], "layers_pattern": ["a("]},
        "layers_pattern has 'a('",
    ),
    "layers of several numbers": (
        {"layers_to_transform": [0], "layers_pattern": "l.*"}, "does not select it"
    ),
    "number as layers": ({"layers_pattern": 0}, "layers_pattern is 0"),
    "huge rank": ({"r": 10**400}, "r is 1000"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "huge dropout": ({"lora_dropout": 10**400}, "lora_dropout is 1000"),
    "tiny alpha": ({"lora_alpha": 1e-300}, "lora_alpha is 1e-300"),
    "escape": ({"target_modules": ["up", "\x1b[2J"]}, "target_modules is ["),
    "many": ({"target_modules": ["up"] * 100_001}, "target_modules is ["),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_no_config_takes_long_or_says_much(tmp_path, name):
    config, fragment = BOMBS[name]
    folder = files.write(tmp_path / "x", tensors(), **config)
    with promptly(), pytest.raises(flora.LoraError) as caught:
        flora.peft.load(folder, params())
    assert fragment in str(caught.value), str(caught.value)
    assert len(str(caught.value)) <= 4_000


@pytest.mark.parametrize(
    "config",
    [
        {"exclude_modules": HANG},
        {"rank_pattern": {HANG: 9}},
        {"alpha_pattern": {HANG: 9}},
        {"modules_to_save": [HANG]},
    ],
)
def test_what_would_hang_and_matches_nothing_changes_nothing(tmp_path, config):
    folder = files.write(tmp_path / "x", tensors(), **config)
    kernel = flora.peft.load(folder, params())["layers"]["0"]["up"]["kernel"]
    assert (kernel.rank, kernel.alpha) == (2, 6)


@pytest.mark.parametrize(
    "name",
    [
        "layers.00.up", "layers.\u0663.up", "layers.\u00b2.up", "layers.+0.up",
        "layers." + "9" * 900 + ".up", "0." * 400 + "up", "layers.-1.up", "l\x1bx.up",
        "x" * 5_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True])
def test_other_numbers_are_no_layers(tmp_path, name, stacked):
    held = up_adapters() | linear(name, D, F)
    folder = files.write(tmp_path / "x", held, target_modules=["up", "down"])
    tree = params()
    if stacked:
        both = tree["layers"].values()
        tree["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *both)
    refused = pytest.raises(flora.LoraError, match=r"which none of|is (a|no) name")
    with promptly(), refused:
        flora.peft.load(folder, tree)


def test_thousands_of_modules_with_ranks_of_their_own_load_in_time(tmp_path):
    """Each is a key of rank_pattern, as flora.peft.save writes them."""
    names = [f"layers.{i}.up" for i in range(400)]
    held = {k: x for n in names for k, x in linear(n, D, F).items()}
    tree = {"layers": {str(i): params()["layers"]["0"] for i in range(400)}}
    patterns = dict.fromkeys(names, 2) | {r"layers\.9\d*\.up": 3}
    folder = files.write(tmp_path / "x", held, r=4, rank_pattern=patterns)
    with promptly():
        loaded = flora.peft.load(folder, tree)
    assert {loaded["layers"][str(i)]["up"]["kernel"].rank for i in range(400)} == {2}
