"""The public API: every name of the stub is there, documented, and loaded on first use."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import backtrack_jax
from backtrack_jax.models import checkpoint

STUB = Path(backtrack_jax.__file__).with_suffix(".pyi")


def exported() -> dict[str, str]:
    """Name -> the module that the stub takes it from."""
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"backtrack_jax.{node.module}" for node in imports for alias in node.names}


def test_every_exported_name_is_there_and_documented() -> None:
    names = exported()
    assert sorted(backtrack_jax.__all__) == sorted(names)
    for name, module in names.items():
        value = getattr(backtrack_jax, name)
        assert value is getattr(sys.modules[module], name)
        assert inspect.getdoc(value), name


def test_importing_the_package_or_a_config_loads_no_jax_and_no_tokenizer() -> None:
    code = (
        "import sys, backtrack_jax, backtrack_jax.config; print({'jax', 'flax', 'tokenizers', 'gguf'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_model_is_loaded_with_its_tokenizer() -> None:
    name = "package:backtrack_jax/organism/reasoning"
    model, tokenizer = backtrack_jax.load_model(name, dtype="float32")
    assert model.config == checkpoint.read_config(checkpoint.resolve(name))
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode(" Wait")) == " Wait"
