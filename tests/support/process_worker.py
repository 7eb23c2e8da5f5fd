"""What the tests of processes start: one process of a job, or a saver to be killed.

    python process_worker.py '{"mode": "train", "process": 0, "count": 2, ...}'

It prints one JSON object a line.
"""

import json
import os
import random
import signal
import sys
import time
import warnings

if __name__ == "__main__":
    warnings.simplefilter("error")
    # Another process was writing that program just then: it is compiled here too.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    JOB = json.loads(sys.argv[1])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={JOB['devices']} "
        "--xla_backend_optimization_level=0"
    )

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import flora
from flora.checkpoint import Checkpointer


def say(**line):
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def mlp(p, x):
    x = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"])
    return x @ p["second"]["kernel"] + p["second"]["bias"]


def specs(x):
    """FSDP on in axes over 'data', tensor parallel on out axes over 'model'."""
    if isinstance(x, flora.LoraWeight):
        both = Spec("data", "model"), Spec("data", None), Spec(None, "model")
        return flora.LoraWeight(*both)
    return flora.Trained(Spec("model"))


def placed(tree, sharding):
    """Global arrays of host values that are the same in every process."""

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(place, tree)


def model_and_data(mesh):
    """An adapted, sharded tree, and a batch."""
    drawn, sizes = np.random.default_rng(0), {"first": (8, 16), "second": (16, 8)}
    x = drawn.normal(size=(8, 8)).astype(np.float32)
    params = {
        name: {
            "kernel": 0.3 * drawn.normal(size=(n, m)).astype(np.float32),
            "bias": np.zeros(m, np.float32),
        }
        for name, (n, m) in sizes.items()
    }
    config = flora.LoraConfig(rank=2, alpha=4.0, target="kernel", train="bias")
    adapted = flora.init(jax.random.key(2), config, mlp, params, x)

    def place(leaf):
        found = specs(leaf)
        if isinstance(leaf, flora.Trained):
            return flora.Trained(placed(leaf.value, NamedSharding(mesh, found.value)))
        parts = [
            placed(getattr(leaf, k), NamedSharding(mesh, getattr(found, k)))
            for k in ("base", "a", "b")
        ]
        return flora.LoraWeight(*parts, layout=leaf.layout, rank=2, alpha=4.0)

    nodes = flora.LoraWeight, flora.Trained
    adapted = jax.tree.map(place, adapted, is_leaf=lambda x: isinstance(x, nodes))
    return adapted, placed(x, NamedSharding(mesh, Spec("data")))


def train(devices, steps, directory=None, save_every=2, report=lambda **_: None):
    """Trains from the latest step in the directory, and returns `{step: loss}`."""
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
    adapted, x = model_and_data(mesh)
    apply, y = flora.lora(mlp), np.sin(np.arange(64, dtype=np.float32)).reshape(8, 8)
    tx = flora.optimizer(optax.adamw(1e-2, weight_decay=0.1), adapted)
    state, losses, start = tx.init(adapted), {}, 0

    def loss(tree, x):
        return jnp.mean((apply(tree, x) - y) ** 2)

    def step(adapted, state, x):
        value, grads = flora.value_and_grad(loss)(adapted, x)
        updates, state = tx.update(grads, state, adapted)
        return optax.apply_updates(adapted, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    checkpointer = Checkpointer(directory, max_to_keep=2) if directory else None
    if checkpointer and checkpointer.latest() is not None:
        adapted, state, start = checkpointer.restore(adapted, state)
    report(start=start)
    for n in range(start + 1, steps + 1):
        adapted, state, value = step(adapted, state, x)
        losses[n] = float(value)
        report(step=n, loss=losses[n])
        if checkpointer and n % save_every == 0:
            checkpointer.save(n, adapted, state, metadata={"loss": losses[n]})
            report(returned=n)
            if n % (2 * save_every) == 0:
                checkpointer.wait()
                report(saved=n)
    if checkpointer:
        checkpointer.close()
        report(saved=steps // save_every * save_every)
    return losses


def train_here(job):
    if job["count"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{job['port']}",
            job["count"],
            job["process"],
            initialization_timeout=60,
        )
    assert len(jax.devices()) == 4
    train(jax.devices(), job["steps"], job["directory"], report=say)
    say(done=True)


# --- A saver that is killed ----------------------------------------------------------


def example(step):
    """The adapted tree and the state that step saves."""
    layout = flora.Layout()
    a, b, w = (
        jnp.asarray(np.random.default_rng(seed).normal(size=s), jnp.float32)
        for seed, s in ((step, (64, 8)), (step + 10**6, (8, 96)), (0, (64, 96)))
    )
    weight = flora.LoraWeight(w, a, b.astype(jnp.bfloat16), layout=layout, rank=8)
    return {"kernel": weight}, {"count": jnp.int32(step), "mu": 2 * a}


def save_forever(directory, pipe):
    with Checkpointer(directory, max_to_keep=2) as checkpointer:
        step = (checkpointer.latest() or 0) + 1
        while True:
            checkpointer.save(step, *example(step))
            os.write(pipe, f"{step - 1}\n".encode())  # the one before is on disk
            step += 1


def verify(directory, least):
    """Exits with 0 if all steps on disk are what was saved, `least` or later among."""
    adapted, state = example(0)
    with Checkpointer(directory) as checkpointer:
        steps = checkpointer.steps()
        assert steps[-1] >= least, (steps, least)
        assert len(steps) <= 4, steps
        for step in steps:
            restored = checkpointer.restore(adapted, state, step=step)
            got = jax.tree.leaves((restored.adapted, restored.state))
            for x, want in zip(got, jax.tree.leaves(example(step)), strict=True):
                assert x.dtype == want.dtype
                assert np.array_equal(x, want), step


def forked(fn, *args):
    """Forks before JAX starts, which spares the imports."""
    pid = os.fork()
    if pid:
        return pid
    try:
        fn(*args)
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(repr(error) + "\n")
        os._exit(1)


def kill_savers(job):
    """Kills a saver at random moments, each time after some steps were saved."""
    draw = random.Random(job["seed"])
    for trial in range(job["trials"]):
        read, write = os.pipe()
        pid = forked(save_forever, job["directory"], write)
        os.close(write)
        with os.fdopen(read, "rb") as lines:
            for _ in range(2):  # at least one is on disk
                least = int(lines.readline())
            time.sleep(draw.uniform(0, job["longest"]))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            least = max([least, *map(int, lines.read().split(b"\n")[:-1])])
        left = sorted(os.listdir(job["directory"]))
        _, status = os.waitpid(forked(verify, job["directory"], least), 0)
        say(trial=trial, least=least, left=left, ok=status == 0)


if __name__ == "__main__":
    {"train": train_here, "kill": kill_savers}[JOB["mode"]](JOB)
