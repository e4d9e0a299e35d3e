# The public API. Names are re-exported as they are spelled here; `__init__.py` loads them on first use.
# ruff: noqa: F401, I001

# Load a model with its tokenizer, and put problems to it.
from .models.loading import load_model
from .models.decoder import Decoder
from .models.config import ModelConfig
from .models.tokenizer import Tokenizer
from .models.prompts import EncodedTrace, PromptFormat, encode_trace, prompt_ids
from .models.batching import left_pad, right_pad

# Read windows before labelled sections off the residual stream.
from .data.records import Annotation, Problem, Reply, Section, Trace
from .extract import TokenTrace, WindowPlan, WindowSums, window_sums

# Turn them into steering vectors.
from .vectors import SteeringVector, cosine, difference_of_means

# Say what is done to the residual stream.
from .intervention import Intervention, ablate, add_vector, gaussian_noise, no_intervention, self_amplify, stack_rows

# Generate under it.
from .sampling import Sampling
from .generate import Row, generate_rows, generate_text, row_key

# Run a whole experiment.
from .config import Experiment
from .checks import check
from .pipeline import Run

__version__: str
