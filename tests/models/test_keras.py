"""`Adapted` of the how-to on Keras: `model.fit` trains the factors, as they stand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora
from tests.support.pages import defined

# Their warnings are theirs.
pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 12)).astype("float32"), np.arange(16) % 5
IDS = RNG.integers(1, 31, (4, 6))
IDS[:, 4:] = 0  # padding


@functools.cache
def page():
    import keras

    names = {"keras": keras, "jax": jax, "jnp": jnp, "flora": flora}
    return defined("keras.md", "Adapted", names)


def functional(policy="float32"):
    import keras

    x = keras.Input((12,))
    y = keras.layers.Dense(32, activation="relu", name="up", dtype=policy)(x)
    y = keras.layers.BatchNormalization(name="norm", dtype=policy)(y)
    y = keras.layers.Dropout(0.1, seed=1, name="dropout")(y)
    y = keras.layers.Dense(16, activity_regularizer="l2", name="mid", dtype=policy)(y)
    return keras.Model(x, keras.layers.Dense(5, name="head", dtype="float32")(y))


def sequential():
    import keras

    layers = keras.layers
    made = layers.Dense(32, name="up"), layers.ReLU(), layers.Dense(5, name="head")
    model = keras.Sequential(made, name="net")
    model(X[:1])
    return model


def subclass():
    import keras

    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.up = keras.layers.Dense(32, name="up")
            self.head = keras.layers.Dense(5, name="head")

        def call(self, x):
            return self.head(keras.ops.relu(self.up(x)))

    model = Net()
    model(X[:1])
    return model


MODELS = {
    "functional": functional,
    "mixed bfloat16": lambda: functional("mixed_bfloat16"),
    "sequential": sequential,
    "subclass": subclass,
}


def compiled(model, optimizer=None, **config):
    import keras

    config = {"rank": 4, "alpha": 8, "target": "up/kernel"} | config
    adapted = page()(model, flora.LoraConfig(**config), X[:1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adapted.compile(
        optimizer or keras.optimizers.AdamW(1e-2), loss, metrics=["accuracy"]
    )
    return adapted


def values(model):
    return {v.path: np.array(v.value) for v in model.weights}


@pytest.mark.parametrize("name", MODELS)
def test_fit_trains_the_adapter_alone(name, tmp_path):
    model = MODELS[name]()
    before = values(model)
    start = model.predict(X, verbose=0)
    adapted = compiled(model, dropout=0.1, train="head/*")
    np.testing.assert_allclose(adapted.predict(X, verbose=0), start, atol=1e-6)
    fit = functools.partial(adapted.fit, X, Y, batch_size=8, verbose=0)
    losses = fit(epochs=4, validation_data=(X, Y)).history
    assert losses["loss"][-1] < losses["loss"][0]
    assert losses["val_loss"][-1] < losses["val_loss"][0]
    trained, after = adapted.predict(X, verbose=0), values(model)
    changed = {p for p in before if not np.array_equal(before[p], after[p])}
    norms = {"norm/moving_mean", "norm/moving_variance"}
    assert changed == norms & {*before}
    assert len(adapted.trainable_variables) == 4

    path = tmp_path / "adapter.safetensors"
    also = "norm/moving_*" if changed else ()
    flora.save(path, adapted.tree(), also=also)
    again = MODELS[name]()
    for v in again.weights:
        v.assign(before[v.path])
    fresh = compiled(again, dropout=0.1, train="head/*")
    fresh.put(flora.load(path, {v.path: v.value for v in again.weights}))
    np.testing.assert_allclose(fresh.predict(X, verbose=0), trained, atol=1e-6)
    merged = fresh.merged().predict(X, verbose=0)
    tolerance = 2e-2 if "bfloat16" in name else 1e-5
    np.testing.assert_allclose(merged, trained, atol=tolerance * abs(trained).max())


def test_a_step_of_fit_is_the_step_of_its_gradients():
    import keras

    model = sequential()
    adapted = compiled(model, keras.optimizers.SGD(0.5))
    tree = jax.tree.map(jnp.copy, adapted.tree())

    def loss_fn(tree):
        logits, *_ = flora.lora(adapted.forward)(tree, [], X)
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(16), Y])

    loss, grads = flora.value_and_grad(loss_fn)(tree)
    fitted = adapted.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_allclose(fitted.history["loss"], loss, rtol=1e-6)
    for name in "ab":
        old, grad = (getattr(t["net/up/kernel"], name) for t in (tree, grads))
        new = getattr(adapted.tree()["net/up/kernel"], name)
        np.testing.assert_allclose(new, old - 0.5 * grad, atol=1e-6)
    assert np.any(np.asarray(grads["net/up/kernel"].b))


def test_frozen_batch_norms_keep_their_statistics():
    model = functional()
    model.get_layer("norm").trainable = False
    before = values(model)
    compiled(model).fit(X, Y, verbose=0)
    after = values(model)
    assert all(np.array_equal(before[p], after[p]) for p in before)


def test_masks_and_losses_of_the_layers_count():
    """Padded tokens are left out of the loss, and added losses are in it."""
    import keras

    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(x**2))
            return x

    def build():
        ids = keras.Input((6,), dtype="int32")
        y = keras.layers.Embedding(31, 8, mask_zero=True, name="embed")(ids)
        y = Penalty(name="penalty")(keras.layers.Dense(9, name="up")(y))
        y = keras.layers.LSTM(7, return_sequences=True, name="lstm")(y)
        return keras.Model(ids, keras.layers.Dense(31, name="head")(y))

    model, loss = build(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    want = model.evaluate(IDS, IDS, verbose=0)
    config = flora.LoraConfig(rank=2, target=["lstm_cell/*kernel", "embed/*"])
    adapted = page()(model, config, IDS[:1])
    adapted.compile("sgd", loss)
    np.testing.assert_allclose(adapted.evaluate(IDS, IDS, verbose=0), want, rtol=1e-6)
    adapted.fit(IDS, IDS, verbose=0)


def test_a_run_resumes_from_weights_of_keras(tmp_path):
    import keras

    adapted, path = compiled(functional()), tmp_path / "run.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    adapted.fit(X, Y, verbose=0, epochs=2, callbacks=[checkpoint])
    again = compiled(functional())
    again.load_weights(path)
    jax.tree.map(np.testing.assert_array_equal, again.tree(), adapted.tree())


def test_gradients_accumulate():
    import keras

    optimizer = keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=2)
    adapted = compiled(functional(), optimizer)
    losses = adapted.fit(X, Y, epochs=6, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_two_weights_of_one_path_are_refused():
    import keras

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = keras.layers.Dense(12, name="same")
            self.two = keras.layers.Dense(5, name="same")

        def call(self, x):
            return self.two(self.one(x))

    model = Net()
    model(X[:1])
    with pytest.raises(ValueError, match="Two weights have one path"):
        compiled(model, target="kernel")


def test_dense_layers_agree_with_enable_lora():
    model = sequential()
    adapted = compiled(model, alpha=6.0)
    tree = adapted.tree()
    w = tree["net/up/kernel"]
    a = np.array(w.a)  # Keras donates what its variables hold
    b = jnp.asarray(RNG.normal(size=w.b.shape), jnp.float32)
    adapted.put(tree | {"net/up/kernel": dataclasses.replace(w, b=b)})
    got = adapted.predict(X, verbose=0)
    layer = model.layers[0]
    layer.enable_lora(4, lora_alpha=6.0)
    layer.lora_kernel_a.assign(a)
    layer.lora_kernel_b.assign(b)
    np.testing.assert_allclose(got, model.predict(X, verbose=0), atol=1e-4)


def test_operations_are_named_by_the_line_that_calls_keras():
    import keras

    model = subclass()

    def fn(tree, x):
        scope = [(v, tree[v.path]) for v in model.weights]
        with keras.StatelessScope(scope):
            return model(x)

    report = flora.coverage(fn, {v.path: v.value for v in model.weights}, X)
    (use,) = report["net/up/kernel"].uses
    assert use.source.startswith("test_keras.py:")
    assert use.source.endswith("(call)")


def gemma():
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=31, num_layers=2, num_query_heads=4, num_key_value_heads=2,
        hidden_dim=16, intermediate_dim=44, head_dim=6,
    )  # fmt: skip
    return keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)


def test_gemma_of_keras_hub():
    import keras

    model, ids = gemma(), np.where(IDS > 0, IDS, 7)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    config = flora.LoraConfig(rank=2, target="*kernel", exclude="*_1/ffw*")
    adapted = page()(model, config, inputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adapted.compile(keras.optimizers.AdamW(5e-2), loss)
    losses = adapted.fit(inputs, ids, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    logits, tree = adapted.predict(inputs, verbose=0), adapted.tree()

    prompt = inputs | {"padding_mask": (np.arange(6) < 3) * np.ones_like(ids)}
    model.compile(sampler="greedy")

    def generate(tree, seeds, prompt):
        variables = [*model.weights, *adapted.seeds()]
        values = [*(tree[v.path] for v in model.weights), *seeds]
        with keras.StatelessScope(zip(variables, values, strict=True)):
            return model.generate_step(prompt, stop_token_ids=None)["token_ids"]

    seeds, prompt = [v.value for v in adapted.seeds()], jax.tree.map(jnp.array, prompt)
    tokens = jax.jit(flora.lora(generate))(tree, seeds, prompt)
    plain = adapted.merged()
    merged = plain.predict(inputs, verbose=0)
    np.testing.assert_allclose(merged, logits, atol=1e-5 * abs(logits).max())
    again = plain.generate(jax.tree.map(np.array, prompt), stop_token_ids=None)
    np.testing.assert_array_equal(again["token_ids"], tokens)
