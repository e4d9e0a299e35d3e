"""Entry point: `python -m backtrack_jax.run --config=configs/smollm2.py`.

Flags become a config, the config becomes a pipeline. `--config.steering.layer=9` overrides a field; a name that does
not exist or a value of the wrong type stops the program. `--dry_run` prints rows, tokens and memory of every stage and
what is already done, and computes nothing.
"""

import ast
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from backtrack_jax import pipeline, plan
from backtrack_jax.checks import check, check_overrides
from backtrack_jax.config import Experiment
from backtrack_jax.files.console import ends_in_one_line


class _ListParser(flags.ArgumentParser):
    """Lists of a config: `0,0.3`, or any Python literal; anything else is taken as comma-separated strings."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        """The list; a default is passed as it is."""
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (ValueError, SyntaxError, TypeError):
            value = [part.strip() for part in argument.split(",") if part.strip()]
        return tuple(value) if isinstance(value, tuple | list) else (value,)


config_flags.register_flag_parser_for_type(tuple, _ListParser())
CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, for instance configs/smollm2.py.")
_STAGES = flags.DEFINE_list(
    "stages", [], f"Run only these stages: {', '.join(pipeline.stage_names([]))} (names or numbers)."
)
_REDO = flags.DEFINE_list("redo", [], "Compute these stages anew, and those after them, though they are done.")
WORKDIR = flags.DEFINE_string("workdir", "", "Folder for results, in place of the config's.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")


def silence_routine_messages() -> None:
    """Of libraries that report accelerators which are absent, and every request."""
    for name in ("jax", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main(argv: Sequence[str]) -> None:
    """Runs the stages of the experiment that the flags describe."""
    silence_routine_messages()
    with ends_in_one_line(
        remedy="lower batch_size of this stage and run again",
        resumed="the same command resumes where this run left off",
    ):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}; overrides look like --config.steering.layer=9")
        experiment: Experiment = CONFIG.value
        if WORKDIR.value:
            experiment.workdir = WORKDIR.value
        check(experiment)
        divide_cpu(experiment.data_parallel * experiment.model_parallel)
        redo = pipeline.stage_names(_REDO.value) if _REDO.value else ()
        run = pipeline.Run(experiment, pipeline.stage_names(_STAGES.value), redo=redo)
        run.needed()
        if not (_DRY_RUN.value and run.workdir.is_dir()):  # a plan of results on a read-only disk writes nothing
            _check_workdir(run.workdir)
        if _DRY_RUN.value:
            print(plan.describe(run))
        else:
            run.run()


def divide_cpu(devices: int) -> None:
    """Has JAX split the CPU into as many devices as the config asks for; no effect if there is an accelerator."""
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # devices are in use already
            jax.config.update("jax_num_cpu_devices", devices)


def _check_workdir(workdir: Path) -> None:
    """Refuses a folder for results that cannot be made or written to; leaves nothing behind."""
    try:
        existing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"--workdir={workdir.parent}, expected a folder that can be made and written to: "
            f"{workdir} is not one ({error.strerror})"
        ) from error


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """Parses the command line; a wrong override ends the program with a message that names it."""
    try:
        argv = [_with_config_file(argument) for argument in argv]
        check_overrides(argv[1:])
        return app.parse_flags_with_usage(list(argv))
    except SyntaxError as error:
        sys.exit(f"error: --config: {error.filename}, line {error.lineno}, is not valid Python ({error.msg})")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _with_config_file(argument: str) -> str:
    """`--config=paper` with the file of that name that comes with the package; other arguments as they are."""
    flag, is_given, name = argument.partition("=")
    if flag.lstrip("-") != "config" or not is_given or not name.isidentifier() or Path(name).exists():
        return argument
    package = Path(__file__).parent
    folders = [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]
    found = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.py") if path.stem[0] != "_"}
    if name not in found:
        raise ValueError(f"--config={name}, expected a file, or one of {', '.join(sorted(found))}")
    return f"{flag}={found[name]}"


def console() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()
