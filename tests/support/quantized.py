"""A quantized weight of the simplest kind, without the library that makes real ones."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """W = scale q, with a scale whose shape broadcasts with q's."""

    q: jax.Array
    scale: jax.Array

    shape = property(lambda self: self.q.shape)
    dtype = property(lambda self: self.scale.dtype)


def dense_of(quantized):
    return quantized.q.astype(quantized.dtype) * quantized.scale
