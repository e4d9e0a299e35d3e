"""What programs are compiled for: the devices that JAX has, or others that are not here."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      memory_bytes: of one device, what JAX may take; 0 where it is not known.
    """

    platform: str
    memory_bytes: int


_named = jax.make_user_context(None)  # a part of the key of compiled programs, so none is taken for another target's


def target() -> Target:
    """The devices that programs are compiled for: those of `compiling_for`, or the ones that JAX has."""
    named = _named.value
    if named is not None:
        return named
    memory = jax.local_devices()[0].memory_stats() or {}
    return Target(jax.default_backend(), memory.get("bytes_limit", 0))


def half() -> np.dtype:
    """The 16-bit float of these devices: bfloat16, but float16 on NVIDIA's before compute capability 8, such as T4."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    old = _named.value is None and capability is not None and float(capability) < 8
    return jnp.dtype(jnp.float16 if old else jnp.bfloat16)


def branches() -> bool:
    """Whether a branch around work that is often not needed is worth it: on a CPU, where it costs nothing.

    On accelerators nothing fuses across a branch, and one that is not captured in a graph is decided on the host.
    """
    return target().platform == "cpu"


@contextlib.contextmanager
def compiling_for(platform: str, memory_bytes: int = 0) -> Iterator[None]:
    """Inside, programs are traced for such devices, whichever are here.

    Args:
      platform: "cpu", "gpu" or "tpu".
      memory_bytes: of one device, what JAX may take; 0 where it is not known.

    Raises:
      ValueError: there is no such platform.
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform={platform!r}, expected cpu, gpu or tpu")
    with _named(Target(platform, memory_bytes)):
        yield
