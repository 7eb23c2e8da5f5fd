"""Adapter files of several processes: one writes what all of them hold."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from flora._files.safetensors import read
from tests.support import process_worker

PROCESS = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)
import jax, numpy as np
from jax.sharding import Mesh
import flora
from flora._files.adapter import load, save
from tests.support.process_worker import model_and_data

port, index, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=60)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
adapted, _ = model_and_data(mesh)
assert not adapted["first"]["kernel"].a.is_fully_addressable
save(path, adapted)
base, _ = flora.split(adapted)
again = load(path, base)
for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
    assert x.dtype == y.dtype
    for one, two in zip(x.addressable_shards, y.addressable_shards, strict=False):
        if x.sharding == y.sharding:
            np.testing.assert_array_equal(one.data, two.data)
assert again["first"]["kernel"].a.sharding == adapted["first"]["kernel"].a.sharding
"""


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path):
    worker = pathlib.Path(process_worker.__file__)
    paths = os.pathsep.join((str(worker.parents[2]), str(worker.parent)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = [
        [sys.executable, "-c", PROCESS, str(port), str(i), str(tmp_path / "x")]
        for i in range(2)
    ]
    jobs = [
        subprocess.Popen(
            a, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE
        )
        for a in argv
    ]
    try:
        errors = [job.communicate(timeout=280)[1].decode()[-3000:] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert [job.returncode for job in jobs] == [0, 0], errors
    file = read(tmp_path / "x")
    assert file.infos["a/first/kernel"].shape == (8, 2)
    drawn = np.asarray(file.array("a/first/kernel"))
    assert np.isfinite(drawn).all()
    assert len(np.unique(drawn)) == 16  # the shards of all processes, each in its place
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
