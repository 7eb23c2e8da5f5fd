"""Eight CPU devices, quick compilation, Keras's backend, fixed before JAX starts."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"
# The same operations in the same order, but code that is made twice as fast.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one worker has compiled the others load, and so do processes of tests.
    COMPILED = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import flax
import flax.linen as nn
import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.support import contract

settings.register_profile(
    "flora",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("flora")


_FLAG = "flax_always_shard_variable"
_SHARDED = getattr(flax.config, _FLAG, None)
_PARAM = nn.Module.param


@pytest.fixture(autouse=True)
def flax_as_it_is(request, monkeypatch):
    """Gemma's import replaces `nn.Module.param`, that of Tunix changes a flag."""
    third_party = request.node.get_closest_marker("third_party")
    if third_party and "gemma" not in request.node.name:
        monkeypatch.setattr(nn.Module, "param", _PARAM)
    before = getattr(flax.config, _FLAG, None)
    if before is None or third_party:
        yield
        return
    flax.config.update(_FLAG, _SHARDED)
    yield
    flax.config.update(_FLAG, before)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def pytest_sessionfinish(session):
    """A worker hands over what it saw."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seen"] = [
            dict(contract.WORST),
            dict(contract.EXAMPLES),
        ]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    errors, examples = getattr(node, "workeroutput", {}).get("seen", ({}, {}))
    for dtype, error in errors.items():
        contract.WORST[dtype] = max(contract.WORST[dtype], error)
    for name, count in examples.items():
        contract.EXAMPLES[name] += count


def pytest_terminal_summary(terminalreporter):
    errors = ", ".join(f"{k} {v:.1e}" for k, v in sorted(contract.WORST.items()))
    terminalreporter.write_line(f"Worst error to max|y|: {errors or 'none'}.")
    drawn = sum(contract.EXAMPLES.values())
    terminalreporter.write_line(f"Examples that Hypothesis drew: {drawn}.")
