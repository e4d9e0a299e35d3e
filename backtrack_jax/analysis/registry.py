"""The list of all analyses: one that is added here is computed, drawn and, as far as it asks for them, sampled for."""

from backtrack_jax.analysis.agreement import AGREEMENT
from backtrack_jax.analysis.base import Analysis
from backtrack_jax.analysis.composition import COMPOSITION
from backtrack_jax.analysis.grids import GRIDS
from backtrack_jax.analysis.judged import JUDGED
from backtrack_jax.analysis.log_odds import LOG_ODDS
from backtrack_jax.analysis.logit_lens import LOGIT_LENS
from backtrack_jax.analysis.noise import NOISE_QUESTION
from backtrack_jax.analysis.offsets_by_group import OFFSETS_BY_GROUP
from backtrack_jax.analysis.probe import PROBE
from backtrack_jax.analysis.rates import RATES
from backtrack_jax.analysis.reliability import RELIABILITY
from backtrack_jax.analysis.sae import SAE_DIRECTIONS
from backtrack_jax.analysis.side_effects import SIDE_EFFECTS
from backtrack_jax.analysis.similarity import SIMILARITY
from backtrack_jax.analysis.stability import STABILITY
from backtrack_jax.analysis.transfer import TRANSFER
from backtrack_jax.analysis.windows import WINDOWS

ANALYSES: tuple[Analysis, ...] = (
    *(JUDGED, RATES, LOG_ODDS, GRIDS, SIMILARITY, LOGIT_LENS, PROBE, RELIABILITY, WINDOWS, AGREEMENT),
    STABILITY,
    COMPOSITION,
    TRANSFER,
    SAE_DIRECTIONS,
    OFFSETS_BY_GROUP,
    NOISE_QUESTION,
    SIDE_EFFECTS,
)
"""All analyses; one may read the files of those before it. Their sentences stand in this order."""
