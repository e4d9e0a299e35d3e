"""What the commands that run for long have in common: help that shows defaults, and ends that say what to do next."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from backtrack_jax.judges.settings import JudgeStopped


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description alone."""


@contextlib.contextmanager
def ends_in_one_line(*, remedy: str, resumed: str) -> Iterator[None]:
    """Ends the process with one line where the block raises what a user can mend; other errors keep their traceback.

    Args:
      remedy: what to do where the device's memory does not suffice.
      resumed: how a command that was stopped by Ctrl-C goes on.
    """
    message = f"stopped; {resumed}"
    before = signal.getsignal(signal.SIGINT)
    try:
        # A KeyboardInterrupt that comes while JAX's callback of the garbage collector runs would be lost. Who ignores
        # SIGINT, as a shell's background jobs do, goes on ignoring it.
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda number, frame: _leave(message))
        yield
    except (ValueError, OSError, FloatingPointError, JudgeStopped) as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: the device is out of memory; {remedy} ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        _leave(message)
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _leave(message: str) -> NoReturn:
    """Ends the process at once, as Ctrl-C does: Python's shutdown crashes where XLA still compiles in its threads.

    What is on disk is always whole, so nothing needs the shutdown.
    """
    try:
        print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if nobody reads them any more
        os._exit(130)
