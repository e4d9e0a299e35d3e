"""What accelerators run, on a CPU.

A few lines of the model do something else on a CPU, whose XLA backend lacks some operations and is slow at others:
blocks one by one in decoding, a float32 cache, 16-bit floats looked up as integers. Told that it is not on one, the
package runs the other side of these lines too, which otherwise nothing would run before a user's GPU does.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_generate.py", "test_extract.py", "test_train.py", "models/test_llama.py")
WORDS = "torch or hugging_face or cached or alone or vmap or 16_bit or stops or packed_loss"


@pytest.mark.skipif("config.getoption('--as-accelerator')", reason="this process does it")
def test_what_is_compared_with_torch_holds_on_lines_for_accelerators() -> None:
    pytest.importorskip("torch", reason="needs torch and transformers to compare with")
    chosen = [str(Path(__file__).parent / file) for file in FILES]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--as-accelerator", *chosen, "-k", WORDS]
    done = subprocess.run(tests, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 40, done.stdout
