"""The net below every reader: what goes wrong in a malformed file ends as one error that names the file.

Readers check what they can name: fields, values, what is accepted. Files that others wrote can be wrong in more ways
than a reader asks about, and what then fails deep in a library is no fault of this program.
"""

import contextlib
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator

_ERRORS: tuple[type[Exception], ...] = (
    *(AttributeError, LookupError, TypeError, UnicodeError, EOFError, ArithmeticError, RecursionError, MemoryError),
    *(AssertionError, NotImplementedError, RuntimeError, SyntaxError, UserWarning),
    *(struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


@contextlib.contextmanager
def named(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """In it, an error that a malformed file leads to is a ValueError that names the file and what was expected.

    ValueError and OSError pass as they are: they say what is wrong.

    Args:
      path: of the file or folder.
      kind: what was expected, with its article.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about the content; their errors count
            yield
    except ValueError as error:
        if isinstance(error, UnicodeError) or not str(error).strip():
            raise ValueError(_text(path, kind, error)) from error
        raise
    except OSError:
        raise
    except _ERRORS as error:
        raise ValueError(_text(path, kind, error)) from error
    except Exception as error:  # libraries in other languages raise plain exceptions
        if type(error) is not Exception:
            raise
        raise ValueError(_text(path, kind, error)) from error


def _text(path: str | os.PathLike[str], kind: str, error: Exception) -> str:
    detail = " ".join(str(error).split())[:200]
    return f"{os.fspath(path)} is malformed, expected {kind} ({type(error).__name__}{': ' if detail else ''}{detail})"
