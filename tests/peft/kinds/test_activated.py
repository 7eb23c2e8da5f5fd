"""Activated LoRA: ΔW at positions from the invocation tokens on, nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
import flora.peft
from flora._peft.kinds.activated import positions
from tests.support import peft_files as files
from tests.support.peft_files import PREFIX, values

V, D, LAYERS = 11, 4, 3
INVOCATION = (5, 1)
IDS = jnp.asarray([[5, 1, 0, 5, 1, 2, 7], [3, 5, 2, 1, 5, 0, 0]])


def params():
    return {
        "embed": jnp.asarray(values(V, D)),
        "layers": {
            str(i): {"mix": {"kernel": jnp.asarray(values(D, D, seed=i))}}
            for i in range(LAYERS)
        },
    }


def layer(kernel, x):
    """Looks at the positions before it, as attention does."""
    return x + jnp.tanh(jnp.cumsum(x, 1) @ kernel)


def fn(p, ids):
    x = p["embed"][ids]
    for i in range(LAYERS):
        x = layer(p["layers"][str(i)]["mix"]["kernel"], x)
    return x


def shared(p, ids):
    """The same, each layer a call of one jitted function that is run again backward."""
    run = jax.checkpoint(jax.jit(layer))
    x = p["embed"][ids]
    for i in range(LAYERS):
        x = run(p["layers"][str(i)]["mix"]["kernel"], x)
    return x


def in_a_row(p, ids):
    """The same, with all positions in one axis where they meet a weight."""

    def flat(kernel, x):
        seen = jnp.cumsum(x, 1).reshape(-1, D)
        return x + jnp.tanh(seen @ kernel).reshape(x.shape)

    x = p["embed"][ids]
    for i in range(LAYERS):
        x = flat(p["layers"][str(i)]["mix"]["kernel"], x)
    return x


def scanned(p, ids):
    return jax.lax.scan(
        lambda x, kernel: (layer(kernel, x), None),
        p["embed"][ids],
        p["layers"]["mix"]["kernel"],
    )[0]


def tensors():
    found = {}
    for i in range(LAYERS):
        found |= files.linear(f"layers.{i}.mix", D, D, seed=10 + i)
    return found


def saved(folder, **config):
    config = {
        "alora_invocation_tokens": [*INVOCATION],
        "target_modules": ["mix"],
    } | config
    return files.write(folder, tensors(), **config)


def wanted(ids):
    """Each layer with W + ΔW where it is active and with W where it is not."""
    p, active = params(), np.zeros(ids.shape, bool)
    active[0, 3:] = True  # the last occurrence; the second row has none
    x = p["embed"][ids]
    for i in range(LAYERS):
        w = p["layers"][str(i)]["mix"]["kernel"]
        changed = w + files.delta(tensors(), f"layers.{i}.mix", 3.0)
        x = jnp.where(active[..., None], layer(changed, x), layer(w, x))
    return x


def stack(tree):
    kernels = [tree["layers"][str(i)]["mix"]["kernel"] for i in range(LAYERS)]
    return {"embed": tree["embed"], "layers": {"mix": {"kernel": jnp.stack(kernels)}}}


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("run", [fn, shared, in_a_row])
@pytest.mark.parametrize("jitted", [False, True])
def test_only_positions_from_the_invocation_on_change(tmp_path, run, jitted):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())

    def call(tree, ids):
        return flora.lora(run)(flora.peft.activate(tree, ids), ids)

    got = (jax.jit(call) if jitted else call)(loaded, IDS)
    close(got, wanted(IDS))
    np.testing.assert_array_equal(got[1], fn(params(), IDS)[1])


def test_layers_in_a_loop(tmp_path):
    names = {"layers/mix": "layers.{i}.mix"}
    base = stack(params())
    loaded = flora.peft.load(saved(tmp_path / "a"), base, names=names)
    activated = flora.peft.activate(loaded, IDS)
    close(jax.jit(flora.lora(scanned))(activated, IDS), wanted(IDS))


def test_gradients_are_those_of_the_formula(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())

    def loss(tree):
        run = flora.lora(shared)
        return (run(flora.peft.activate(tree, IDS), IDS) ** 2).sum()

    _, grads = jax.jit(flora.value_and_grad(loss))(loaded)
    flora.peft.save(tmp_path / "grads", grads)
    got = files.read(tmp_path / "grads")[1]
    p, active = params(), positions(IDS, INVOCATION)[..., None]

    def by_hand(held):
        x = p["embed"][IDS]
        for i in range(LAYERS):
            seen = jnp.cumsum(x, 1)
            a = held[f"{PREFIX}layers.{i}.mix.lora_A.weight"]
            b = held[f"{PREFIX}layers.{i}.mix.lora_B.weight"]
            y = seen @ p["layers"][str(i)]["mix"]["kernel"]
            x = x + jnp.tanh(y + active * 3.0 * (seen @ a.T @ b.T))
        return (x**2).sum()

    for key, want in jax.grad(by_hand)(tensors()).items():
        np.testing.assert_allclose(got[key], want, rtol=1e-3, atol=1e-3)


def test_steps_of_decoding_say_where_they_are(tmp_path):
    """With positions of their own: the last token alone, after the invocation."""
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    one = IDS[:, -1:]
    every = flora.peft.activate(loaded, jnp.ones(one.shape, bool))
    none = flora.peft.activate(loaded, jnp.zeros(one.shape, bool))
    plain = {**loaded, "layers": jax.tree.map(lambda x: x, params()["layers"])}
    close(flora.lora(fn)(none, one), fn(plain, one))
    changed = params()
    for i in range(LAYERS):
        own = changed["layers"][str(i)]["mix"]
        own["kernel"] = own["kernel"] + files.delta(tensors(), f"layers.{i}.mix", 3.0)
    close(flora.lora(fn)(every, one), fn(changed, one))


def test_what_is_missing_is_said(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    with pytest.raises(flora.LoraError, match=r"Write flora\.peft\.activate"):
        flora.lora(fn)(loaded, IDS)
    with pytest.raises(flora.LoraError, match="No merged weight is that"):
        flora.merge(loaded)
    other = flora.peft.activate(loaded, IDS[:, :5])
    with pytest.raises(flora.LoraError, match=r"positions have shape \(2, 5\)"):
        flora.lora(fn)(other, IDS)
    for tokens, text in ((IDS * 1.0, "dtype float32"), ([1], "Pass an array")):
        with pytest.raises(flora.LoraError, match=text):
            flora.peft.activate(loaded, tokens)
    plain = flora.peft.load(
        saved(tmp_path / "b", alora_invocation_tokens=None), params()
    )
    with pytest.raises(flora.LoraError, match="no leaf is an activated LoRA"):
        flora.peft.activate(plain, IDS)
    saved(tmp_path / "c", init_lora_weights="mica")
    with pytest.raises(flora.LoraError, match="are on together"):
        flora.peft.load(tmp_path / "c", params())


def test_what_was_loaded_is_written_again(tmp_path):
    loaded = flora.peft.load(saved(tmp_path / "a"), params())
    for tree in (loaded, flora.peft.activate(loaded, IDS)):
        flora.peft.save(tmp_path / "b", tree)
        config, held = files.read(tmp_path / "b")
        assert config["alora_invocation_tokens"] == [*INVOCATION]
        assert config["task_type"] == "CAUSAL_LM"
        for key, x in tensors().items():
            np.testing.assert_array_equal(held[key], x)
    with pytest.raises(flora.LoraError, match="do not serve"):
        flora.peft.save(tmp_path / "b", loaded, serving=True)
    mixed = flora.peft.load(
        saved(tmp_path / "c", alora_invocation_tokens=[3]), params()
    )
    loaded["layers"]["1"] = mixed["layers"]["1"]
    with pytest.raises(flora.LoraError, match="activated by other tokens"):
        flora.peft.save(tmp_path / "b", loaded)
