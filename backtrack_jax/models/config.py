"""Sizes and constants of one model. How the fields of a checkpoint become one is said in `families`."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's change of the rotary frequencies; it acts at every length, not only beyond `original_context`.

    Attributes:
      factor: what wavelengths longer than `original_context / low_freq_factor` are stretched by.
      low_freq_factor: lower end of the blended band.
      high_freq_factor: wavelengths shorter than `original_context / high_freq_factor` stay as they are.
      original_context: positions that the model was pretrained on, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def scaled(self, frequencies: np.ndarray) -> np.ndarray:
        """Angles per position after scaling, [H/2], of those before."""
        rotations = self.original_context * frequencies / (2 * np.pi)  # turns within the original context
        blend = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        unscaled = np.clip(blend, 0.0, 1.0)
        return unscaled * frequencies + (1 - unscaled) * frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model; hashable, so it can be a static argument of a compiled function.

    Attributes:
      family: name of the family in `families.FAMILIES`, which says how the model is written to files.
      vocab_size: V, rows of the embedding.
      d_model: D, width of the residual stream.
      d_mlp: F, width of the gated MLP.
      n_layers: L, number of blocks.
      n_heads: N, query heads.
      n_kv_heads: K, key and value heads; each serves N / K query heads.
      head_dim: H.
      norm_eps: epsilon inside every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how these are scaled, or None for plain rotary embeddings.
      tied: whether the unembedding is the transposed embedding.
      biases: which of a block's matrices add a bias, by name: `q_proj`, `k_proj`, ..., `down_proj`.
    """

    family: str = "llama"
    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tied: bool
    biases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit together."""
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.n_heads} is not a multiple of num_key_value_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")
        if isinstance(self.biases, str):
            raise ValueError(f"biases={self.biases!r}, expected a tuple of names, such as ({self.biases!r},)")
        if unknown := set(self.biases) - self.matrices.keys():
            raise ValueError(f"biases of {sorted(unknown)}, expected some of {', '.join(self.matrices)}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Width in and width out of every matrix of a block, by name."""
        D, F, queries, keys = self.d_model, self.d_mlp, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q_proj": (D, queries),
            "k_proj": (D, keys),
            "v_proj": (D, keys),
            "o_proj": (queries, D),
            "gate_proj": (D, F),
            "up_proj": (D, F),
            "down_proj": (F, D),
        }

    @property
    def n_parameters(self) -> int:
        """Number of scalar weights."""
        biases = sum(self.matrices[name][1] for name in self.biases)
        block = sum(d_in * d_out for d_in, d_out in self.matrices.values()) + biases + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return self.n_layers * block + embeddings + self.d_model

    def flops_per_token(self, context: int, *, unembed: bool = True) -> int:
        """Floating-point operations of one token's forward pass that attends to `context` positions."""
        matrices = self.n_parameters - self.vocab_size * self.d_model * (1 if self.tied else 2)
        head = self.vocab_size * self.d_model if unembed else 0
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * context
        return 2 * (matrices + head + attention)
