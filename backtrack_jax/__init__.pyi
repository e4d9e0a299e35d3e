# The public API. `as` marks a name as exported; `__init__.py` loads them on first use.
# ruff: noqa: I001

# Load a model with its tokenizer, and put problems to it.
from .models.loading import load_model as load_model
from .models.decoder import Decoder as Decoder
from .models.config import ModelConfig as ModelConfig
from .models.tokenizer import Tokenizer as Tokenizer
from .models.prompts import (
    EncodedTrace as EncodedTrace,
    PromptFormat as PromptFormat,
    encode_trace as encode_trace,
    prompt_ids as prompt_ids,
)
from .models.batching import left_pad as left_pad, right_pad as right_pad

# Read windows before labelled sections off the residual stream.
from .data.records import (
    Annotation as Annotation,
    Problem as Problem,
    Reply as Reply,
    Section as Section,
    Trace as Trace,
)
from .extract import (
    TokenTrace as TokenTrace,
    WindowPlan as WindowPlan,
    WindowSums as WindowSums,
    window_sums as window_sums,
)

# Turn them into steering vectors.
from .vectors import SteeringVector as SteeringVector, cosine as cosine, difference_of_means as difference_of_means

# Say what is done to the residual stream.
from .intervention import (
    Intervention as Intervention,
    ablate as ablate,
    add_vector as add_vector,
    clamp as clamp,
    gaussian_noise as gaussian_noise,
    keeping_norm as keeping_norm,
    no_intervention as no_intervention,
    noise_outside as noise_outside,
    noise_within as noise_within,
    self_amplify as self_amplify,
    stack_rows as stack_rows,
    when_component as when_component,
    when_token as when_token,
)

# Generate under it.
from .sampling import Sampling as Sampling
from .generate import Row as Row, generate_rows as generate_rows, generate_text as generate_text, row_key as row_key

# Run a whole experiment.
from .config import Experiment as Experiment
from .checks import check as check
from .pipeline import Run as Run
from .finished import FinishedRun as FinishedRun, load_run as load_run

__all__: list[str]
__version__: str
