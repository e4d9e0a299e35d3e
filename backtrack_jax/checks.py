"""Every fault of a config, reported together, before any long work; and of its overrides on the command line.

Nothing here imports JAX, so that a wrong config is refused at once.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

from backtrack_jax import kinds, labelling
from backtrack_jax.config import (
    CONTRASTS,
    ESTIMATORS,
    FILTERS,
    ROLES,
    UNITS,
    Experiment,
    ModelSpec,
    PromptSpec,
    SteeringSpec,
    TraceSpec,
)
from backtrack_jax.judges.base import Judge, trace_judge


def check(experiment: Experiment) -> None:
    """Refuses an experiment that could not run, before any long work.

    Raises:
      ValueError: lists every field that is wrong, its value, and what is accepted.
    """
    e = experiment
    if faults := _type_faults(e):
        raise ValueError("the config cannot run:\n  " + "\n  ".join(faults))
    faults = [*_model_faults(e), *_source_faults(e), *_vector_faults(e), *_steering_faults(e), *_analysis_faults(e)]
    faults += [fault for name in e.questions.ask for fault in _not_one_of("questions.ask", name, e.questions.known)]
    faults += _repeated("questions.ask", e.questions.ask)
    for name in e.questions.ask:
        faults += _OF_QUESTION.get(name, lambda e: [])(e)
    if not re.fullmatch(r"[^/\\\s.][^/\\]*", e.name):
        faults.append(_fault("name", e.name, "the name of a folder"))
    if not (isinstance(e.seed, int) and 0 <= e.seed < 2**32):
        faults.append(_fault("seed", e.seed, "0 to 2^32 - 1"))
    faults += _device_faults(e)
    if faults:
        raise ValueError("the config cannot run:\n  " + "\n  ".join(faults))


def check_windows(experiment: Experiment) -> None:
    """Refuses what stage 3 would refuse only after sampling: windows that no reply of the allowed length can hold.

    Raises:
      ValueError: lists every such window.
    """
    v, most = experiment.vectors, experiment.traces.max_new_tokens
    if experiment.traces.path:  # whose replies have any length
        return
    offsets = {f"steering.offsets={o}, which reads the window": v.window_at(o) for o in experiment.steering.offsets}
    faults = []
    for name, (first, last) in {"vectors.window": v.window, **offsets}.items():
        before, after = 0 if v.into_prompt else max(0, -first), max(0, last)
        if before + after >= most:
            faults.append(_fault(name, (first, last), f"one that replies of traces.max_new_tokens={most} can hold"))
    if faults:
        raise ValueError("no vector could be read:\n  " + "\n  ".join(faults))


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuses what `check_override` does, and a list that is given twice: ValueError names it."""
    lists = [argument.lstrip("-").partition("=")[0] for argument in arguments if check_override(argument) is tuple]
    if twice := [name for name in lists if lists.count(name) > 1]:
        raise ValueError(f"--{twice[0]} is given {lists.count(twice[0])} times, expected once, as one list: 1,2")


def check_override(argument: str) -> type:
    """Refuses `--config.steering.layr=9`: ValueError lists the valid fields. Returns the type of the field."""
    names = re.match(r"--?(?:no)?config\.([^=]+)", argument)
    kind: type = Experiment
    for name in names[1].split(".") if names else ():
        fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            accepted = f"; accepted: {', '.join(fields)}" if fields else ""
            raise ValueError(f"{argument}: unknown config field {name!r}{accepted}")
        made_by = fields[name].default_factory
        kind = made_by if isinstance(made_by, type) else type(fields[name].default)
    return kind


def _fault(field: str, value: object, accepted: str) -> str:
    return f"{field}={value!r}, expected {accepted}"


def _type_faults(spec: Any, prefix: str = "") -> list[str]:
    """Fields whose type differs from that of their default, such as a tuple of one without its comma."""
    accepted = {bool: bool, int: int, float: (int, float), str: str, tuple: tuple}
    meant = {tuple: "a tuple, such as (1, 2) or (1,)", str: "text", bool: "True or False", int: "an integer"}
    faults = []
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            faults += _type_faults(value, f"{name}.")
        elif name == "steering.layer":  # one block or several
            if type(value) is not int and not isinstance(value, tuple):
                faults.append(_fault(name, value, "a tuple of integers, such as (10,)"))
        elif name.endswith(".marker_replacement") and isinstance(value, int):
            faults.append(_fault(name, value, "text: an id is of one vocabulary; 27370 of Llama-3 is ' ####'"))
        elif (kind := type(field.default)) in accepted and (
            not isinstance(value, accepted[kind]) or (isinstance(value, bool) and kind is not bool)
        ):
            faults.append(_fault(name, value, meant.get(kind, "a number")))
    return faults


def _not_one_of(field: str, value: str, accepted: Sequence[str]) -> list[str]:
    return [] if value in accepted else [_fault(field, value, f"one of {', '.join(accepted)}")]


def _repeated(field: str, values: Sequence[object]) -> list[str]:
    again = [value for at, value in enumerate(values) if value in values[:at]]  # no set: a list has no hash
    return [_fault(field, values, "every entry once")] if again else []


def _device_faults(e: Experiment) -> list[str]:
    copies = e.data_parallel
    faults = [
        _fault(field, value, "at least 1")
        for field, value in (("data_parallel", copies), ("model_parallel", e.model_parallel))
        if value < 1
    ]
    sizes = {name: getattr(e, name).batch_size for name in ("traces", "vectors", "steering", "analysis")}
    return faults + [
        _fault(f"{name}.batch_size", size, f"a multiple of data_parallel={copies}")
        for name, size in sizes.items()
        if copies > 1 and size % copies
    ]


def _model_faults(e: Experiment) -> list[str]:
    faults = _repeated("roles", e.roles)
    if not e.roles or any(role not in ROLES for role in e.roles):
        faults.append(_fault("roles", e.roles, f"some of {', '.join(ROLES)}"))
    for role in (role for role in ROLES if role in e.roles):
        faults += _spec_faults(role, e.model(role), "prompt.format", e.prompt.format)
    there = [role for role in ROLES if role in e.roles]
    in_8_bits = [role for role in there if e.model(role).dtype == "int8"]
    if 0 < len(in_8_bits) < len(there):
        accepted = "both models in 8 bits or neither, since their tables stand side by side"
        faults.append(_fault(f"{in_8_bits[0]}.dtype", "int8", accepted))
    return faults


def _spec_faults(name: str, model: ModelSpec, field: str, prompt: str) -> list[str]:
    """Of one model, named so, whose prompt format stands in a field."""
    faults = []
    if not model.path:
        faults.append(_fault(f"{name}.path", "", "a folder, hub id, .gguf file or package:module/file"))
    faults += _not_one_of(f"{name}.dtype", model.dtype, ("bfloat16", "float16", "float32", "int8"))
    faults += _not_one_of(f"{name}.markers", model.markers, ("keep", "replace", "drop"))
    if bool(model.marker_replacement) != (model.markers == "replace"):
        accepted = "the text of a token, such as ' ####', for markers='replace', '' otherwise"
        faults.append(_fault(f"{name}.marker_replacement", model.marker_replacement, accepted))
    if model.markers != "keep" and prompt == "plain":
        faults.append(_fault(f"{name}.markers", model.markers, f"'keep': {field}='plain' has no markers"))
    return faults


def _source_faults(e: Experiment) -> list[str]:
    faults = _not_one_of("prompt.format", e.prompt.format, ("r1", "chat", "plain"))
    faults += _not_one_of("prompt.think", e.prompt.think, ("primed", "generated", "none"))
    if e.prompt.format == "plain" and e.prompt.system:
        faults.append(_fault("prompt.system", e.prompt.system, "'': prompt.format='plain' has no system text"))
    faults += _template_faults(e.prompt)
    if not all(isinstance(mark, str) and mark.strip() for mark in e.traces.end_marks):
        faults.append(_fault("traces.end_marks", e.traces.end_marks, "texts, such as ('</reasoning>',)"))
    return [*faults, *_judge_faults(e), *_sampling_faults("traces", e.traces)]


def _template_faults(prompt: PromptSpec) -> list[str]:
    given = prompt.template_arguments
    if not given:
        return []
    try:
        valid = isinstance(json.loads(given), dict)
    except ValueError:
        valid = False
    if not valid:
        accepted = """a JSON object, such as '{"enable_thinking": false}', or nothing"""
        return [_fault("prompt.template_arguments", given, accepted)]
    if prompt.format != "chat":
        return [_fault("prompt.template_arguments", given, "'': only prompt.format='chat' has a template")]
    return []


def _judge_faults(e: Experiment) -> list[str]:
    faults = _not_one_of("annotations.judge", e.annotations.judge, labelling.trace_judges())
    of_traces = _judge(trace_judge(e))
    of_replies = _judge(e.analysis.judge) if e.analysis.judge in labelling.reply_judges() else None
    if e.annotations.path and of_traces and not of_traces.reads_path:
        readers = " or ".join(repr(judge.name) for judge in labelling.JUDGES if judge.reads_path)
        accepted = f"'', or annotations.judge={readers}, since no other judge reads it"
        faults.append(_fault("annotations.path", e.annotations.path, accepted))
    of_both = [fault for judge in (of_traces, of_replies) if judge for fault in judge.faults(e)]
    return [*faults, *dict.fromkeys(of_both)]


def _judge(name: str) -> Judge | None:
    """The judge with this name; None if there is none, which is reported as a fault of its own."""
    return next((judge for judge in labelling.JUDGES if judge.name == name), None)


def _sampling_faults(name: str, spec: TraceSpec | SteeringSpec) -> list[str]:
    faults = []
    if not 0 <= spec.temperature < math.inf:
        faults.append(_fault(f"{name}.temperature", spec.temperature, "a finite number >= 0"))
    if not 0 < spec.top_p <= 1:
        faults.append(_fault(f"{name}.top_p", spec.top_p, "a number above 0, at most 1"))
    for field, least in (("limit", 0), ("samples", 1), ("max_new_tokens", 1), ("batch_size", 1)):
        value = getattr(spec, field)
        if value < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
        elif value > _MOST[field]:
            faults.append(_fault(f"{name}.{field}", value, f"at most {_MOST[field]:,}"))
    return faults


# Beyond any use, and memory for it would be asked for before anything says so.
_MOST = {"limit": 10**9, "samples": 100_000, "max_new_tokens": 1_000_000, "batch_size": 100_000}


def _labels(e: Experiment) -> Sequence[str] | None:
    """Labels that the judge may give to traces that vectors are read from; None if it may give any."""
    judge = _judge(trace_judge(e.for_vectors()))
    return judge.labels if judge else None


def _vector_faults(e: Experiment) -> list[str]:
    v, labels = e.vectors, _labels(e)
    faults = _not_one_of("vectors.estimator", v.estimator, ESTIMATORS)
    faults += _not_one_of("vectors.contrast", v.contrast, CONTRASTS)
    faults += _not_one_of("vectors.label", v.label, labels) if labels else []
    if len(v.window) != 2 or not _integers(v.window) or v.window[0] > v.window[1]:
        faults.append(_fault("vectors.window", v.window, "(first, last), integers, first <= last"))
    if not _integers(v.offsets):
        faults.append(_fault("vectors.offsets", v.offsets, "integers"))
    if len(v.offset_window) != 2 or not _integers(v.offset_window) or v.offset_window[0] > v.offset_window[1]:
        faults.append(_fault("vectors.offset_window", v.offset_window, "(first, last), integers, first <= last"))
    if not _integers(v.layers) or any(layer < 0 for layer in v.layers):
        faults.append(_fault("vectors.layers", v.layers, "block numbers >= 0"))
    faults += [*_repeated("vectors.offsets", v.offsets), *_repeated("vectors.layers", v.layers)]
    if not 1 <= v.batch_size <= _MOST["batch_size"]:
        faults.append(_fault("vectors.batch_size", v.batch_size, f"1 to {_MOST['batch_size']:,}"))
    return faults


def _integers(values: Sequence[object]) -> bool:
    return all(type(value) is int for value in values)  # which True is not


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def _steering_faults(e: Experiment) -> list[str]:
    s, labels = e.steering, _labels(e)
    faults = [] if s.kinds else [_fault("steering.kinds", s.kinds, "at least one")]
    for field, entries in (("steering.kinds", s.kinds), ("steering.baselines", s.baselines)):
        faults += [*kind_faults(field, entries, labels), *_repeated(field, entries)]
    faults += _not_one_of("steering.unit", s.unit, UNITS)
    entries = [*s.kinds, *s.baselines]
    if s.unit == "kl" and (values := [entry for entry in entries if kinds.strength(entry) == "value"]):
        accepted = (
            f"another unit: strength 0 of {values[0]!r} changes predictions too, so no divergence gives a strength"
        )
        faults.append(_fault("steering.unit", s.unit, accepted))
    if s.span != "all" and not kinds.is_span(s.span):
        faults.append(_fault("steering.span", s.span, "all, prompt, generated, or some of these as in generated[2:18]"))
    if not s.kind_layers or not _integers(s.kind_layers) or min(s.kind_layers) < 0:
        faults.append(_fault("steering.layer", s.layer, "a block number >= 0, or several"))
    faults += _repeated("steering.layer", s.kind_layers)
    if not _integers(s.layers) or any(layer < 0 for layer in s.layers):
        faults.append(_fault("steering.layers", s.layers, "block numbers >= 0"))
    faults += [*_repeated("steering.layers", s.layers), *_repeated("steering.offsets", s.offsets)]
    if not _integers(s.offsets) or any(offset not in e.vectors.offsets for offset in s.offsets):
        faults.append(_fault("steering.offsets", s.offsets, f"some of vectors.offsets, {e.vectors.offsets}"))
    for field in ("magnitudes", "grid_magnitudes", "baseline_magnitudes"):
        magnitudes = getattr(s, field)
        if not magnitudes and field != "magnitudes":
            continue  # those of `magnitudes` stand in for them
        if not any(magnitudes) or not all(map(_finite, magnitudes)):
            faults.append(_fault(f"steering.{field}", magnitudes, "finite numbers, at least one of them not 0"))
        faults += _repeated(f"steering.{field}", magnitudes)
    of_baselines = "baseline_magnitudes" if s.baseline_magnitudes else "magnitudes"
    for entries, field in ((s.kinds, "magnitudes"), (s.baselines, of_baselines)):
        shares = [entry for entry in entries if kinds.strength(entry) == "share"]
        if shares and any(_finite(magnitude) and abs(magnitude) > 1 for magnitude in getattr(s, field)):
            accepted = f"-1 to 1: for {shares[0]!r} they are shares"
            faults.append(_fault(f"steering.{field}", getattr(s, field), accepted))
    swept = s.offsets or s.layers
    if s.grid_limit < 0 or (swept and s.limit and s.grid_limit > s.limit):
        accepted = "at least 0" + (f", at most steering.limit={s.limit}" if s.limit else "")
        faults.append(_fault("steering.grid_limit", s.grid_limit, accepted))
    if s.top_k < 0:
        faults.append(_fault("steering.top_k", s.top_k, "at least 0"))
    return faults + _sampling_faults("steering", s)


def kind_faults(field: str, entries: Sequence[object], labels: Sequence[str] | None) -> list[str]:
    """Entries that are malformed, or name what is neither known, nor a file, nor one of the labels (None: any)."""
    faults = []
    for entry in entries:
        if not isinstance(entry, str):
            faults.append(_fault(field, entry, "labels, controls and vector files, as text"))
            continue
        try:
            names = kinds.parse(entry).names
        except ValueError as error:
            faults.append(f"{field}: {error}")
            continue
        files = f"a file ({', '.join(kinds.VECTOR_SUFFIXES)}, or SAE#ROW)"
        for name in (label for each in names for label in kinds.labels_of(each)):
            if labels and name not in labels:
                operations = kinds.forms() if name == entry else ()
                accepted = f"one of {', '.join((*labels, *kinds.DIRECTIONS, *operations, files))}"
                faults.append(_fault(field, entry, accepted if name == entry else f"in place of {name!r} {accepted}"))
    return faults


def _analysis_faults(e: Experiment) -> list[str]:
    a = e.analysis
    faults = _not_one_of("analysis.judge", a.judge, labelling.reply_judges())
    if not a.keywords or not all(isinstance(word, str) and word and word == word.casefold() for word in a.keywords):
        faults.append(_fault("analysis.keywords", a.keywords, "lower-case words"))
    if not a.horizons or not _integers(a.horizons) or min(a.horizons) < 1:
        faults.append(_fault("analysis.horizons", a.horizons, "integers >= 1"))
    faults += _repeated("analysis.horizons", a.horizons)
    least_of = {"positions": 1, "folds": 2, "shown": 1, "batch_size": 1}
    for field, least in (least_of | dict.fromkeys(("forced_texts", "forced_sentences", "examples"), 0)).items():
        value = getattr(a, field)
        if value < least:
            faults.append(_fault(f"analysis.{field}", value, f"at least {least}"))
    return faults


def _stability_faults(e: Experiment) -> list[str]:
    q, name = e.questions.stability, "questions.stability"
    faults = _not_one_of(f"{name}.filter_by", q.filter_by, FILTERS)
    for field, least in (("boundaries", 0), ("tokens", 1), ("random", 0)):
        if (value := getattr(q, field)) < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
    if q.draws < 2 or q.draws % 2:
        faults.append(_fault(f"{name}.draws", q.draws, "an even number, at least 2: half of them sort, half score"))
    faults += _dose_faults(name, q.magnitude, e)
    if e.traces.temperature == 0:
        accepted = "above 0 where questions.ask has 'stability': else all continuations of a prefix are the same"
        faults.append(_fault("traces.temperature", e.traces.temperature, accepted))
    return faults + _kept_layer_faults(e) + _equal_length_faults(e)


def _dose_faults(name: str, magnitude: float, e: Experiment) -> list[str]:
    """Of the magnitude of a question, 0 for the smallest positive one of the sweep."""
    positive = any(_finite(other) and other > 0 for other in e.steering.magnitudes)
    if _finite(magnitude) and magnitude >= 0 and (magnitude or positive):
        return []
    accepted = "a number above 0, or 0 for the smallest positive one of steering.magnitudes"
    return [_fault(f"{name}.magnitude", magnitude, accepted)]


def _equal_length_faults(e: Experiment) -> list[str]:
    """Of questions that add vectors of their own, all of the length that a magnitude has in the unit."""
    if e.steering.unit != "kl":
        return []
    accepted = f"another unit for questions.ask={e.questions.ask!r}, which compare vectors of equal length"
    return [_fault("steering.unit", e.steering.unit, accepted)]


def _kept_layer_faults(e: Experiment) -> list[str]:
    """Of questions that need the means of sections at the steered layer."""
    layers = e.steering.kind_layers
    if not layers or not _integers(layers) or e.steering.main_layer in e.vectors.layers:
        return []
    accepted = f"steering.layer={e.steering.main_layer} among them, for questions.ask={e.questions.ask!r}"
    return [_fault("vectors.layers", e.vectors.layers, accepted)]


def _transfer_faults(e: Experiment) -> list[str]:
    q, name = e.questions.transfer, "questions.transfer"
    faults = _spec_faults(f"{name}.model", q.model, f"{name}.prompt", q.prompt)
    faults += _not_one_of(f"{name}.prompt", q.prompt, ("plain", "chat", "r1"))
    if not 0 < q.held_out < 1:
        faults.append(_fault(f"{name}.held_out", q.held_out, "a share of the problems, between 0 and 1"))
    for field, least in (("layer", -1), ("positions", 2), ("rank", 1), ("anchors", 1), ("replies", 0)):
        if (value := getattr(q, field)) < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
    if q.anchors > q.positions:
        faults.append(_fault(f"{name}.anchors", q.anchors, f"at most {name}.positions={q.positions}"))
    faults += _dose_faults(name, q.magnitude, e)
    if e.analysis.folds < 2:
        faults.append(_fault("analysis.folds", e.analysis.folds, "at least 2, for questions.ask='transfer'"))
    return faults + _kept_layer_faults(e) + _equal_length_faults(e)


def _sae_faults(e: Experiment) -> list[str]:
    q, name = e.questions.sae, "questions.sae"
    faults = []
    if not q.path:
        faults.append(_fault(f"{name}.path", q.path, "the folder of a sparse autoencoder of SAELens or Llama Scope"))
    for field, least in (("top", 1), ("singles", 0), ("controls", 1), ("traces", 0), ("listed", 1)):
        if (value := getattr(q, field)) < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
    if q.singles > q.top:
        faults.append(_fault(f"{name}.singles", q.singles, f"at most {name}.top={q.top}"))
    largest = max((m for m in e.steering.magnitudes if _finite(m)), default=0)
    if not _finite(q.magnitude) or q.magnitude < 0 or not (q.magnitude or largest > 0):
        accepted = "a number above 0, or 0 for the largest of steering.magnitudes, where one is above 0"
        faults.append(_fault(f"{name}.magnitude", q.magnitude, accepted))
    if e.analysis.forced_texts < 1:
        faults.append(_fault("analysis.forced_texts", e.analysis.forced_texts, "at least 1 where 'sae' is asked"))
    return faults + _equal_length_faults(e)


def _composition_faults(e: Experiment) -> list[str]:
    q, name = e.questions.composition, "questions.composition"
    fields = (("components", 0), ("random", 0), ("subspaces", 0), ("ablated_texts", 0))
    faults = [
        _fault(f"{name}.{field}", value, f"at least {least}")
        for field, least in fields
        if (value := getattr(q, field)) < least
    ]
    faults += _dose_faults(name, q.magnitude, e)
    if not _integers(q.ranks) or min(q.ranks, default=1) < 1 or len(set(q.ranks)) < len(q.ranks):
        faults.append(_fault(f"{name}.ranks", q.ranks, "different numbers of at least 1"))
    if e.analysis.forced_texts < 1:
        accepted = "at least 1, for questions.ask='composition'"
        faults.append(_fault("analysis.forced_texts", e.analysis.forced_texts, accepted))
    return faults + _kept_layer_faults(e) + _equal_length_faults(e)


def _offsets_faults(e: Experiment) -> list[str]:
    q, s, name = e.questions.offsets, e.steering, "questions.offsets"
    faults = [
        _fault(f"{name}.{field}", value, f"one of steering.offsets, {s.offsets}")
        for field, value in (("chosen", q.chosen), ("reference", q.reference))
        if value not in s.offsets
    ]
    if q.chosen == q.reference:
        faults.append(_fault(f"{name}.chosen", q.chosen, f"another offset than {name}.reference"))
    field = "grid_magnitudes" if s.grid_magnitudes else "magnitudes"
    swept = [m for m in getattr(s, field) if _finite(m) and m > 0]
    if q.magnitude not in swept and (q.magnitude or not swept):
        accepted = f"a positive one of steering.{field}={getattr(s, field)}, or 0 for the smallest of these"
        faults.append(_fault(f"{name}.magnitude", q.magnitude, accepted))
    if not any(m == 0 for m in s.magnitudes):
        faults.append(_fault("steering.magnitudes", s.magnitudes, "0 among them, for questions.ask='offsets'"))
    if e.analysis.forced_texts < 1:
        faults.append(_fault("analysis.forced_texts", e.analysis.forced_texts, "at least 1 where 'offsets' is asked"))
    return faults


def _noise_faults(e: Experiment) -> list[str]:
    q, name = e.questions.noise, "questions.noise"
    faults = []
    positive = [m for m in (e.steering.baseline_magnitudes or e.steering.magnitudes) if _finite(m) and m > 0]
    if not _finite(q.magnitude) or q.magnitude < 0 or not (q.magnitude or positive):
        accepted = "a number above 0, or 0 for the largest of steering.baseline_magnitudes or steering.magnitudes"
        faults.append(_fault(f"{name}.magnitude", q.magnitude, accepted))
    for field, least in (("draws", 2), ("seeds", 2), ("burst", 1), ("replies", 0)):
        if (value := getattr(q, field)) < least:
            faults.append(_fault(f"{name}.{field}", value, f"at least {least}"))
    if not _integers(q.ranks) or any(rank < 1 for rank in q.ranks):
        faults.append(_fault(f"{name}.ranks", q.ranks, "integers >= 1"))
    faults += _repeated(f"{name}.ranks", q.ranks)
    if not _finite(q.margin) or q.margin <= 0:
        faults.append(_fault(f"{name}.margin", q.margin, "a number of nats above 0"))
    if q.replies and q.burst >= e.steering.max_new_tokens - 1:
        accepted = (
            f"less than steering.max_new_tokens={e.steering.max_new_tokens} by 2 or more: what follows it is counted"
        )
        faults.append(_fault(f"{name}.burst", q.burst, accepted))
    if e.analysis.forced_texts < 1:
        faults.append(_fault("analysis.forced_texts", e.analysis.forced_texts, "at least 1, for questions.ask='noise'"))
    return faults + _kept_layer_faults(e) + _equal_length_faults(e)


def _side_effects_faults(e: Experiment) -> list[str]:
    q, s, name = e.questions.side_effects, e.steering, "questions.side_effects"
    faults = []
    if not 0 < q.margin < 1:
        faults.append(_fault(f"{name}.margin", q.margin, "a share between 0 and 1"))
    if q.texts < 0:
        faults.append(_fault(f"{name}.texts", q.texts, "at least 0"))
    swept = [m for m in s.magnitudes if _finite(m) and m > 0]
    if q.magnitude not in swept and (q.magnitude or not swept):
        accepted = f"a positive one of steering.magnitudes={s.magnitudes}, or 0 for the largest of these"
        faults.append(_fault(f"{name}.magnitude", q.magnitude, accepted))
    if not any(m == 0 for m in s.magnitudes):
        faults.append(_fault("steering.magnitudes", s.magnitudes, "0 among them, for questions.ask='side_effects'"))
    if e.vectors.label not in s.kinds:
        accepted = f"vectors.label={e.vectors.label!r} among them, for questions.ask='side_effects'"
        faults.append(_fault("steering.kinds", s.kinds, accepted))
    return faults


_OF_QUESTION = {
    "composition": _composition_faults,
    "noise": _noise_faults,
    "offsets": _offsets_faults,
    "sae": _sae_faults,
    "side_effects": _side_effects_faults,
    "stability": _stability_faults,
    "transfer": _transfer_faults,
}
