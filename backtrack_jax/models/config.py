"""Sizes and constants of one model. How the fields of a checkpoint become one is said in `families`."""

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

# Beyond every model there is; memory is not asked for before sizes are sensible.
_LARGEST, _MOST_LAYERS = 1 << 24, 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer contexts; this one, which changes nothing, is what others refine.

    `rope_type` and `hf_fields` are Hugging Face's names: of the kind, and of its fields in `config.json`.
    """

    rope_type: ClassVar[str] = "default"
    hf_fields: ClassVar[dict[str, str]] = {}

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by, so that scores are multiplied by its square."""
        return 1.0

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Angles per position after scaling, [H/2], of those before and the base of the latter."""
        return frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling(RopeScaling):
    """Positions divided by `factor`, https://arxiv.org/abs/2306.15595."""

    rope_type: ClassVar[str] = "linear"
    hf_fields: ClassVar[dict[str, str]] = {"factor": "factor"}

    factor: float

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Angles per position after scaling, [H/2], of those before."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling(RopeScaling):
    """YaRN, https://arxiv.org/abs/2309.00071: low frequencies are divided by `factor`, high ones stay as they are.

    Attributes:
      factor: how many times longer the context has become.
      original_context: positions that the model was pretrained on, in tokens.
      beta_fast: pairs that turn more often than this within the original context stay as they are.
      beta_slow: pairs that turn less often are divided by `factor`; there is a linear ramp between the two.
      attention_factor: what cosines and sines are multiplied by; None for YaRN's own, 0.1 ln(factor) + 1.
    """

    rope_type: ClassVar[str] = "yarn"
    hf_fields: ClassVar[dict[str, str]] = {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """`attention_factor`, or YaRN's own."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Angles per position after scaling, [H/2], of those before and their base; the ramp ends at whole pairs."""
        n = len(frequencies)

        def pair_that_turns(times: float) -> float:
            return n * math.log(self.original_context / (times * 2 * math.pi)) / math.log(theta)

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), 2 * n - 1)
        ramp = np.clip((np.arange(n) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return (1 - ramp) * frequencies + ramp * frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling(RopeScaling):
    """Llama 3.1's change of the rotary frequencies; it acts at every length, not only beyond `original_context`.

    Attributes:
      factor: what wavelengths longer than `original_context / low_freq_factor` are stretched by.
      low_freq_factor: lower end of the blended band.
      high_freq_factor: wavelengths shorter than `original_context / high_freq_factor` stay as they are.
      original_context: positions that the model was pretrained on, in tokens.
    """

    rope_type: ClassVar[str] = "llama3"
    hf_fields: ClassVar[dict[str, str]] = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context",
    }

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Angles per position after scaling, [H/2], of those before."""
        rotations = self.original_context * frequencies / (2 * np.pi)  # turns within the original context
        blend = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        unscaled = np.clip(blend, 0.0, 1.0)
        return unscaled * frequencies + (1 - unscaled) * frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """In what the attention of one block may differ from that of others.

    Attributes:
      rotary: whether queries and keys are rotated at all (SmolLM3 leaves it out in every fourth block).
      scaled: whether their frequencies are scaled by `rope_scaling` (OLMo 3 scales those of its full blocks only).
      window: a token attends to this many, itself included; None for all before it.
    """

    rotary: bool = True
    scaled: bool = True
    window: int | None = None


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
      qk_norm: RMSNorm of queries and keys before they are rotated: of each head (Qwen3), or over the whole width of all
        heads (OLMo 3); None for none.
      norms_after: whether a block normalises what attention and MLP add (OLMo 3) instead of what they read.
      layer_kinds: one for each block; empty if all are `LayerKind()`.
      context: positions that the model was trained for, in tokens; None where the file does not say.
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
    rope_scaling: RopeScaling | None
    tied: bool
    biases: tuple[str, ...] = ()
    qk_norm: Literal["head", "width"] | None = None
    norms_after: bool = False
    layer_kinds: tuple[LayerKind, ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        """Refuses sizes that are none, or that do not fit together."""
        sizes = {
            **{"vocab_size": self.vocab_size, "hidden_size": self.d_model, "intermediate_size": self.d_mlp},
            **{"num_hidden_layers": self.n_layers, "num_attention_heads": self.n_heads, "head_dim": self.head_dim},
            "num_key_value_heads": self.n_kv_heads,
        }
        for name, size in sizes.items():
            most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name}={size!r}, expected a whole number from 1 to {most:,}")
        for name, value in (("rms_norm_eps", self.norm_eps), ("rope_theta", self.rope_theta)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}, expected a number above 0")
        if self.context is not None and (type(self.context) is not int or self.context < 1):
            raise ValueError(f"max_position_embeddings={self.context!r}, expected a whole number from 1, or nothing")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tie_word_embeddings={self.tied!r}, expected true or false")
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
        if self.qk_norm not in (None, "head", "width"):
            raise ValueError(f"qk_norm={self.qk_norm!r}, expected 'head', 'width' or None")
        if self.layer_kinds and len(self.layer_kinds) != self.n_layers:
            raise ValueError(
                f"layer_kinds has {len(self.layer_kinds)} entries, expected one for each of {self.n_layers} layers"
            )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of blocks that occur, in the order of their first block."""
        return tuple(dict.fromkeys(self.layer_kinds)) or (LayerKind(),)

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """For each block, the place of its kind in `kinds`."""
        return tuple(map(self.kinds.index, self.layer_kinds)) or (0,) * self.n_layers

    @property
    def qk_norm_widths(self) -> dict[str, int]:
        """Width of the norms of queries and keys, by name; empty if there are none."""
        if self.qk_norm is None:
            return {}
        heads = {"q_norm": self.n_heads, "k_norm": self.n_kv_heads}
        return {name: self.head_dim * (n if self.qk_norm == "width" else 1) for name, n in heads.items()}

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
        norms = 2 * self.d_model + sum(self.qk_norm_widths.values())
        block = sum(d_in * d_out for d_in, d_out in self.matrices.values()) + biases + norms
        embeddings = self.vocab_size * self.d_model * (1 if self.tied else 2)
        return self.n_layers * block + embeddings + self.d_model

    def flops_per_token(self, context: int, *, unembed: bool = True) -> int:
        """Floating-point operations of one token's forward pass that attends to `context` positions."""
        matrices = self.n_parameters - self.vocab_size * self.d_model * (1 if self.tied else 2)
        head = self.vocab_size * self.d_model if unembed else 0
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * context
        return 2 * (matrices + head + attention)
