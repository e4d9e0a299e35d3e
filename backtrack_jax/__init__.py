"""Find, measure and steer backtracking in reasoning models.

A JAX reproduction of Ward et al., "Reasoning-Finetuning Repurposes Latent Representations in Base Models" (2025).

What a notebook needs is here by name, in the groups of `__init__.pyi`; a pipeline run needs `Experiment`, `check` and
`Run`. Behind it, from the ground up: `files` (whole or absent) and `config` (types); `models` (the decoder, which knows
nothing of the rest); `data` (records and text); `intervention`, `sampling`, `generate`, `extract`, `vectors`; `judges`;
`analysis`; `stages`; `report`; `pipeline`. A module imports its own floor or a lower one.

Names are loaded on first use, so that reading a config imports neither JAX nor tokenizers.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("backtrack-jax")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
