"""Configs are documented, load through flags, and refuse what could not run with a message that names it."""

import dataclasses
import inspect
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from backtrack_jax import checks, config
from backtrack_jax.config import Experiment
from backtrack_jax.judges.base import trace_judge

ROOT = Path(__file__).parents[1]
SPECS = [kind for _, kind in inspect.getmembers(config, inspect.isclass) if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_field_is_documented(spec: type) -> None:
    lines = inspect.cleandoc(spec.__doc__ or "").split("Attributes:\n")[1].split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    documented = [line.strip().split(":")[0] for line in lines if line[indent : indent + 1].strip()]
    assert documented == [field.name for field in dataclasses.fields(spec)]


def test_specs_can_be_overridden() -> None:
    """`config_flags` builds them without arguments and sets attributes, which a frozen dataclass would refuse."""
    assert len(SPECS) >= 10
    for spec in SPECS:
        made = spec()
        for field in dataclasses.fields(spec):
            setattr(made, field.name, getattr(made, field.name))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_shipped_configs_can_run(path: Path) -> None:
    namespace: dict = {"__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), namespace)
    checks.check(namespace["get_config"]())
    docstring = namespace["__doc__"]
    assert f"--config=configs/{path.name}" in docstring and "Hardware" in docstring


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import configs.paper; configs.paper.get_config()", "jax tokenizers gguf openai numpy"),
        (
            "import configs.paper, backtrack_jax.checks; backtrack_jax.checks.check(configs.paper.get_config())",
            "jax tokenizers gguf openai",
        ),
    ],
    ids=["reading", "checking"],
)
def test_a_config_is_read_and_checked_without(code: str, absent: str) -> None:
    code = (
        f"import sys, {code.removeprefix('import ')}; print([name for name in sys.modules if name in {absent.split()}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def set_field(e: Experiment, name: str, value: object) -> Experiment:
    *path, last = name.split(".")
    holder: object = e
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, last, value)
    return e


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "../elsewhere"),
        ("name", "a/b"),
        ("seed", -1),
        ("roles", ()),
        ("roles", ("base", "teacher")),
        ("roles", ("base", "base")),
        ("roles", ([1],)),
        ("base.path", ""),
        ("base.dtype", "int8"),
        ("base.markers", "shatter"),
        ("base.marker_replacement", " ####"),  # without markers="replace"
        ("base.marker_replacement", 27370),  # as it was while it was an id
        ("prompt.template_arguments", "enable_thinking=false"),
        ("prompt.template_arguments", "[1]"),
        ("prompt.template_arguments", '{"enable_thinking": false}'),  # without prompt.format="chat"
        ("traces.end_marks", (" ",)),
        ("traces.end_marks", (1,)),
        ("prompt.think", "yes"),
        ("annotations.judge", "human"),
        ("annotations.judge", "import"),  # without a file
        ("traces.path", ""),  # released labels of sampled traces
        ("traces.samples", 0),
        ("traces.limit", -1),
        ("vectors.estimator", "median"),
        ("vectors.contrast", "none"),
        ("vectors.label", "backtraking"),
        ("vectors.window", (-8, -13)),
        ("vectors.window", (-8,)),
        ("vectors.window", (-8.5, -3)),
        ("vectors.window", (False, True)),
        ("vectors.layers", (True,)),
        ("steering.layers", (True,)),
        ("steering.offsets", ([1],)),
        ("vectors.layers", (-1,)),
        ("vectors.batch_size", 0),
        ("steering.kinds", ()),
        ("steering.kinds", ("backtraking",)),
        ("steering.kinds", ("noise", "noise")),
        ("steering.kinds", (1,)),
        ("steering.kinds", ([1],)),
        ("steering.kinds", ({1: 2},)),
        ("steering.kinds", ("backtracking + deducton",)),
        ("steering.kinds", ("backtracking + noise",)),
        ("steering.kinds", ("2 * backtracking",)),
        ("steering.baselines", ("backtracking -",)),
        ("steering.layer", ()),
        ("steering.layer", (1, 1)),
        ("steering.baselines", (None,)),
        ("steering.grid_limit", -1),
        ("steering.layer", -1),
        ("steering.magnitudes", ()),
        ("steering.magnitudes", (0.0,)),
        ("steering.magnitudes", (0.0, math.nan)),
        ("steering.magnitudes", (4.0, math.inf)),
        ("steering.magnitudes", ("four",)),
        ("steering.magnitudes", (True,)),
        ("steering.magnitudes", ([1, 2],)),
        ("steering.magnitudes", (10**400,)),
        ("steering.magnitudes", (4.0, 4)),
        ("steering.unit", "sigma"),
        ("steering.span", "reply"),
        ("steering.temperature", -0.1),
        ("steering.temperature", math.nan),
        ("steering.temperature", math.inf),
        ("traces.temperature", math.inf),
        ("steering.top_p", 0.0),
        ("steering.top_p", 1.5),
        ("steering.top_k", -1),
        ("steering.samples", 0),
        ("steering.samples", 100_000_000),
        ("traces.batch_size", 100_000_000),
        ("vectors.batch_size", 100_000_000),
        ("steering.max_new_tokens", 1_000_000_000),
        ("steering.max_new_tokens", 0),
        ("steering.batch_size", 0),
        ("analysis.keywords", (5,)),
        ("data_parallel", 0),
        ("model_parallel", 0),
    ],
)
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    checks.check(tiny.get_config())
    with pytest.raises(ValueError, match="the config cannot run") as error:
        checks.check(set_field(tiny.get_config(), field, value))
    assert field in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # that fault, and no other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("vectors.window", (-3, -3)), ("vectors.offset_window", (0, 0)), ("vectors.batch_size", 1)),
        *(("seed", 0), ("seed", 2**32 - 1), ("steering.top_p", 1.0), ("steering.temperature", 0.0)),
        *(
            (f"{spec}.{field}", 1)
            for spec in ("traces", "steering")
            for field in ("samples", "max_new_tokens", "limit")
        ),
        *((f"{spec}.batch_size", 1) for spec in ("traces", "steering", "analysis")),
        *(("traces.limit", 0), ("steering.grid_limit", 0), ("steering.top_k", 0), ("steering.layer", (0,))),
        *(("analysis.folds", 2), ("analysis.positions", 1), ("analysis.shown", 1), ("analysis.horizons", (1,))),
        *(("analysis.forced_texts", 0), ("analysis.forced_sentences", 0), ("analysis.examples", 0)),
    ],
)
def test_the_least_and_the_most_are_accepted(field: str, value: object) -> None:
    e = set_field(tiny.get_config(), field, value)
    e.steering.grid_limit = min(e.steering.grid_limit, e.steering.limit)
    checks.check(e)


@pytest.mark.parametrize("offsets", [("x",), ([1],), (-1, 0, True)])
def test_offsets_that_are_no_integers(offsets: tuple[object, ...]) -> None:
    e = set_field(tiny.get_config(), "vectors.offsets", offsets)
    with pytest.raises(ValueError) as error:
        checks.check(e)
    assert f"vectors.offsets={offsets!r}, expected integers" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"base.markers": "replace"}, "base.marker_replacement='', expected the text of a token"),
        ({"base.marker_replacement": 27370}, "27370 of Llama-3 is ' ####'"),
        ({"prompt.format": "alpaca"}, "prompt.format='alpaca'"),
        ({"data_parallel": 8}, "vectors.batch_size=4, expected a multiple of data_parallel=8"),
        ({"prompt.format": "plain"}, "base.markers='drop'"),
        ({"prompt.template_arguments": "{"}, "expected a JSON object, such as '{\"enable_thinking\": false}'"),
        ({"prompt.format": "plain", "prompt.system": "Think.", "base.markers": "keep"}, "prompt.system='Think.'"),
        ({"annotations.judge": "keyword", "annotations.variant": "hmm"}, "annotations.variant='hmm'"),
        ({"annotations.judge": "keyword"}, "steering.kinds='deduction'"),  # a label that this judge never gives
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, object], named: str) -> None:
    e = tiny.get_config()
    for field, value in fields.items():
        set_field(e, field, value)
    with pytest.raises(ValueError) as error:
        checks.check(e)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("spec", "field", "value", "accepted"),
    [
        ("steering", "layers", range(3), "a tuple"),
        ("steering", "layers", (1), "a tuple, such as (1, 2) or (1,)"),
        ("steering", "baselines", ("noise"), "a tuple"),
        ("vectors", "window", [-5, -2], "a tuple"),
        ("base", "path", Path("base"), "text"),
        ("vectors", "into_prompt", 1, "True or False"),
        ("traces", "temperature", "hot", "a number"),
        ("traces", "limit", True, "an integer"),
    ],
)
def test_values_of_another_type_are_named(spec: str, field: str, value: object, accepted: str) -> None:
    e = tiny.get_config()
    setattr(getattr(e, spec), field, value)
    with pytest.raises(ValueError, match=re.escape(f"{spec}.{field}={value!r}, expected {accepted}")):
        checks.check(e)


def test_a_file_of_labels_that_nothing_reads_is_refused() -> None:
    e = tiny.get_config()
    e.annotations.path = "labels.jsonl"
    with pytest.raises(ValueError, match=r"annotations\.path='labels\.jsonl', expected .*judge='import'"):
        checks.check(e)


def test_all_faults_are_reported_at_once() -> None:
    e = set_field(set_field(tiny.get_config(), "steering.layer", -2), "vectors.label", "x")
    with pytest.raises(ValueError, match=r"(?s)vectors\.label='x'.*steering\.layer=-2"):
        checks.check(e)


@pytest.mark.parametrize("into_prompt", [False, True])
def test_windows_that_no_sampled_reply_can_hold_are_refused(into_prompt: bool) -> None:
    """Against a search for a section of which the window can be read."""
    e, most = tiny.get_config(), 4
    e.traces.path, e.traces.max_new_tokens, e.steering.offsets, e.vectors.into_prompt = "", most, (), into_prompt
    accepted = set()
    for first, last in itertools.combinations_with_replacement(range(-6, 7), 2):
        e.vectors.window = (first, last)
        try:
            checks.check_windows(e)
        except ValueError as error:
            assert f"vectors.window={(first, last)}, expected one that replies of traces.max_new_tokens=4" in str(error)
        else:
            accepted.add((first, last))
    held = {
        (first, last)
        for first, last in itertools.combinations_with_replacement(range(-6, 7), 2)
        for section in range(most)
        if (into_prompt or section + first >= 0) and section + last < most
    }
    assert accepted == held
    e.vectors.window, e.steering.offsets, e.vectors.offset_window = (-2, -1), (-1, -4, 3), (0, 1)
    with pytest.raises(ValueError, match=r"steering\.offsets=3, which reads the window=\(3, 4\), expected one"):
        checks.check_windows(e)
    e.traces.path = tiny.CHAINS  # replies of any length
    checks.check_windows(e)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "backtracking + deducton",
            "'backtracking + deducton', expected in place of 'deducton' one of initializing",
        ),
        ("ablate:deducton", "'ablate:deducton', expected in place of 'deducton' one of initializing, deduction"),
        ("deducton", "'deducton', expected one of initializing, deduction, adding-knowledge"),
        (
            "backtracking +",
            "'backtracking +' is not a name with an optional weight, expected a label, control or vector",
        ),
        ("backtracking - noise", "'noise' is an operation, not a direction that could be summed, weighted or ablated"),
    ],
)
def test_a_wrong_kind_is_told_what_there_is(entry: str, message: str) -> None:
    e = tiny.get_config()
    e.steering.baselines = (entry,)
    with pytest.raises(ValueError) as error:
        checks.check(e)
    assert message in str(error.value) and str(error.value).splitlines()[1].startswith("  steering.baselines")


def test_sums_and_ablations_are_kinds() -> None:
    e = tiny.get_config()
    e.steering.kinds = ("backtracking + 0.5 * deduction", "adding-knowledge - a/b.npz", "ablate:overall-mean + random")
    e.steering.magnitudes = (0.0, -0.5, 1.0)
    checks.check(e)
    assert e.steering.vector_files == ("a/b.npz",)
    assert e.steering.names == (
        *("backtracking", "deduction", "adding-knowledge", "a/b.npz", "overall-mean", "random", "shuffled"),
    )


def test_magnitudes_of_an_ablation_are_shares() -> None:
    e = tiny.get_config()
    e.steering.baselines, e.steering.magnitudes = ("ablate:backtracking",), (0.0, 4.0)
    with pytest.raises(
        ValueError, match=r"steering.magnitudes=\(0.0, 4.0\), expected -1 to 1: for 'ablate:backtracking'"
    ):
        checks.check(e)
    e.steering.grid_magnitudes, e.steering.magnitudes = (0.0, 8.0), (-1.0, 0.0, 1.0)  # the grid has no ablation
    checks.check(e)


def test_any_label_may_be_imported() -> None:
    e = set_field(set_field(tiny.get_config(), "annotations.judge", "import"), "annotations.path", "labels.jsonl")
    e.vectors.label, e.steering.kinds = "verification", ("verification", "noise")
    checks.check(e)


def test_sampled_traces_need_a_judge_whoever_writes_them() -> None:
    e = set_field(tiny.get_config(), "traces.path", "")  # the reasoning model takes part
    with pytest.raises(ValueError, match="sampled traces come without labels"):
        checks.check(e)
    e.annotations.judge, e.steering.kinds = "keyword", ("backtracking",)
    checks.check(e)


def test_the_author_is_the_reasoning_model_in_any_order() -> None:
    e = tiny.get_config()
    e.base.path = "b"
    for roles, author, tokenizer in ((("reasoning", "base"), "reasoning", "reasoning"), (("base",), "base", "b")):
        e.roles = roles
        assert (e.author, e.tokenizer_path) == (author, tokenizer)
    e.tokenizer = "t"
    assert e.tokenizer_path == "t"


def test_chains_stand_in_for_sampled_traces_alone() -> None:
    for path, expected in (("chains.json", "chains.json"), ("", "example.json")):
        e = set_field(set_field(tiny.get_config(), "traces.path", path), "traces.stand_in", "example.json")
        assert e.for_vectors().traces.path == expected and e.traces.path == path


MISSPELT = ["steering.layr=9", "stering.layer=9", "name.x=9", "layer=9", "vectors.into=1"]


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_override_names_the_fields_there_are(name: str) -> None:
    for argument in (f"--config.{name}", f"-config.{name}", f"--noconfig.{name}"):
        with pytest.raises(ValueError, match="unknown config field") as error:
            checks.check_override(argument)
        assert argument in str(error.value)
    with pytest.raises(ValueError, match="accepted: kinds, layer, magnitudes"):
        checks.check_override("--config.steering.layr=9")


def test_a_list_that_is_given_twice_is_named() -> None:
    once = ["--config.steering.layers=1,2", "--config.vectors.layers=1", "--config.seed=1", "--config.seed=2"]
    checks.check_overrides(once)
    with pytest.raises(ValueError, match=r"--config\.steering\.layers is given 2 times, expected once"):
        checks.check_overrides([*once, "-config.steering.layers", "5"])


def test_overrides_that_exist() -> None:
    for argument in ("--config.steering.layer=9", "--noconfig.vectors.into_prompt", "--config.base.path=a.b"):
        checks.check_override(argument)
    for argument in ("--config=x.py", "--stages=1", "config.nothing"):  # no overrides
        checks.check_override(argument)


@pytest.mark.parametrize(("content", "judge"), [('{"annotated_chain": ""}', "released"), ('{"id": ""}', "keyword")])
def test_chains_inside_a_package_are_known_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, judge: str
) -> None:
    (tmp_path / "chains_of_mine").mkdir()
    (tmp_path / "chains_of_mine" / "__init__.py").touch()
    (tmp_path / "chains_of_mine" / "c.jsonl").write_text(content + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    e = Experiment()
    e.traces.path, e.annotations.judge = "package:chains_of_mine/c.jsonl", "released-or-keyword"
    assert trace_judge(e) == judge


def test_a_limit_of_a_sweep_that_is_not_made_does_not_matter() -> None:
    e = Experiment(base=config.ModelSpec("a"), reasoning=config.ModelSpec("b"))
    e.traces.path, e.steering.limit, e.steering.grid_limit = "chains.json", 2, 12
    checks.check(e)
    e.steering.layers = (1,)
    with pytest.raises(ValueError, match=r"steering\.grid_limit=12, expected at least 0, at most steering\.limit=2"):
        checks.check(e)
