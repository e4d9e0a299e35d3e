"""A model together with its tokenizer, in one call."""

import os

from jax.sharding import Mesh
from jax.typing import DTypeLike

from backtrack_jax.models import checkpoint
from backtrack_jax.models.decoder import Decoder
from backtrack_jax.models.tokenizer import Tokenizer


def load_model(
    path_or_id: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Loads a model and the tokenizer that lies beside it.

    Args:
      path_or_id: Hugging Face folder or hub id, GGUF file, Orbax folder, or `package:module/file` for what is inside an
        installed Python package.
      dtype: of the weights; None for the smallest that holds every stored weight exactly.
      mesh: devices to spread the weights over (`models.sharding.make_mesh`); None for the default device.
      revision: commit, tag or branch of a hub id.

    Returns:
      The model and its tokenizer.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load` and `Tokenizer.load`.
    """
    path = checkpoint.resolve(path_or_id, revision)
    tokenizer = Tokenizer.load(path)  # first: it is small, and what is wrong with it shows at once
    return checkpoint.load(path, dtype, mesh), tokenizer
