"""Find, measure and steer backtracking in reasoning models.

A JAX reproduction of Ward et al., "Reasoning-Finetuning Repurposes Latent Representations in Base Models" (2025).
"""

from importlib.metadata import version

__version__ = version("backtrack-jax")
