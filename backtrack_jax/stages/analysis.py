"""Stage 5: what replies, vectors and activations show, as the tables of a list of analyses.

    {table}.csv, {role}.{table}.csv   see each analysis
    {role}.projections.json           tokens of a few traces with their projections
    judged.jsonl                      labels of the replies, where `analysis.judge` is asked
    analyses.json                     name of each analysis -> its fingerprint, and its files

An analysis whose fingerprint is that of earlier results takes them over instead of being computed: one that is added to
the list, or a setting of one, makes no other run again.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import conditions, inputs, labelling
from backtrack_jax.analysis import logit_lens
from backtrack_jax.analysis.base import Analysis, Material, Planned, Question, asked
from backtrack_jax.analysis.judged import FILE as JUDGED_FILE
from backtrack_jax.analysis.judged import JUDGED
from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store, tables
from backtrack_jax.files.console import say
from backtrack_jax.files.tables import Table
from backtrack_jax.generate import row_key
from backtrack_jax.intervention import Intervention
from backtrack_jax.stages import estimates
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.base import Context, Settled, Stage, spec_values
from backtrack_jax.stages.steering import STEERING, load_readings
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS

_MANIFEST = "analyses.json"


class AnalysisStage(Stage):
    """Every table that figures and page are drawn from."""

    name = "5-analysis"
    format = 5

    def __init__(self, analyses: Sequence[Analysis] = ANALYSES):
        """Takes the analyses.

        Raises:
          ValueError: two have one name or one table, an analysis reads the files of another that is not before it, or
            its tables are not a tuple.
        """
        self.analyses = tuple(analyses)
        taken: dict[str, str] = {}
        for analysis in self.analyses:
            for name in ("tables", "role_tables"):
                if isinstance(getattr(analysis, name), str):
                    raise ValueError(
                        f"the analysis {analysis.name!r} has {name}={getattr(analysis, name)!r}, not a tuple"
                    )
            for name in {analysis.name, *analysis.tables, *analysis.role_tables}:
                if name in taken:
                    raise ValueError(f"the analyses {taken[name]!r} and {analysis.name!r} both use the name {name!r}")
                taken[name] = analysis.name
        for number, analysis in enumerate(self.analyses):
            if absent := set(analysis.reads) - {other.name for other in self.analyses[:number]}:
                raise ValueError(f"the analysis {analysis.name!r} reads {min(absent)!r}, which is not listed before it")

    def inputs(self, e: Experiment) -> dict[str, Any]:
        """Which analyses there are, what they measure, and what a judge of replies depends on."""
        judge = labelling.judge_of_replies(e)
        questions = {name: dataclasses.asdict(getattr(e.questions, name)) for name in e.questions.ask}
        questions |= {a.name: a.inputs(e) for a in asked(self.analyses, e) if isinstance(a, Question)}  # files too
        return {
            "analyses": {analysis.name: analysis.version for analysis in asked(self.analyses, e)},
            "analysis": spec_values(e.analysis, "batch_size"),
            "judge": judge.inputs(e) if judge else {},
        } | ({"questions": questions} if questions else {})

    def settle(self, e: Experiment, own: dict[str, Any], found: Settled) -> dict[str, Any]:
        """As for the labels of traces."""
        judge = labelling.judge_of_replies(e)
        return judge.settle(e, own, found, JUDGED_FILE) if judge else own

    def model_roles(self, e: Experiment) -> Sequence[str]:
        """All."""
        return e.roles

    def prepare(self, context: Context) -> None:
        """What the judge of replies needs, such as a key."""
        if judge := labelling.judge_of_replies(context.experiment):
            judge.prepare(context.experiment)

    def check(self, context: Context) -> None:
        """Keywords that no token contains."""
        keywords = context.experiment.analysis.keywords
        try:
            logit_lens.keyword_ids(context.tokenizer, keywords)
        except ValueError as error:
            raise ValueError(f"analysis.keywords={keywords}: {error}") from error

    def notes(self, context: Context) -> list[str]:
        """Says so where the steered layer has no probe and no reliability."""
        layer, kept = context.experiment.steering.main_layer, context.experiment.vectors.layers
        if not kept or layer in kept:
            return []
        return [f"probe and reliability cover vectors.layers={kept} only; add steering.layer={layer} to it"]

    def plan(self, context: Context) -> list[str]:
        """What the analyses that cannot be taken over ask of each model, and of the judge."""
        e = context.experiment
        found = {name for name, _, _ in self._earlier(context)}
        to_do = [a for a in asked(self.analyses, e) if not found.issuperset(_files(a, e))]
        if not to_do:
            return ["tables from earlier results; no model is held"]
        lengths, replies = estimates.trace_lengths(e), estimates.steered_rows(e)
        longest = estimates.longest_prompt(e) + e.steering.max_new_tokens
        lines = []
        for role in e.roles:
            n_conditions = sum(condition.target == role for condition in conditions.planned(e))
            planned = Planned(e, n_conditions, replies[role], longest, lengths)
            if not (parts := [text for a in to_do if (text := a.plan(planned))]):
                continue
            lines.append(f"{role} model: {'; '.join(parts)}")
            config = inputs.architecture(e.model(role).path)
            if config is None:
                lines.append(estimates.unknown_memory(e, role))
                continue
            sizes = [item for a in to_do for item in a.memory(planned, config).items()]
            parts = [f"weights {estimates.weights(e, role, config)}"]
            parts += [f"{name} about {estimates.gigabytes(size)}" for name, size in sizes]
            lines.append(f"  {estimates.memory(e)}: {', '.join(parts)}")
        judged = _plan_of_judge(context, sum(replies.values())) if JUDGED in to_do else []
        head = []
        if any(a not in to_do and _files(a, e) for a in asked(self.analyses, e)):
            held = "" if lines else "; no model is held"
            head = [
                f"computes {', '.join(a.name for a in to_do)}; other tables are taken over from earlier results{held}"
            ]
        return [*head, *lines, *judged]

    def run(self, context: Context, folder: Path) -> None:
        """Every analysis: those that read a model role by role, so that one model is held at a time."""
        e = context.experiment
        self._take_over(context, folder)
        to_do = [analysis for analysis in asked(self.analyses, e) if not _all_there(folder, _files(analysis, e))]
        if to_do:
            material = gather(context)
            for role in context.roles_by_need():
                for analysis in to_do:
                    names = analysis.role_files(role)
                    if not names or not _all_there(folder, names):
                        found = analysis.of_role(material, role, folder)
                        _write(folder, analysis, found, analysis.role_tables, f"{role}.")
            for analysis in to_do:
                if not _all_there(folder, analysis.files(e)):
                    _write(folder, analysis, analysis.finish(material, folder), analysis.tables, "")
        for analysis in asked(self.analyses, e):
            for name in (name for role in e.roles for name in analysis.scratch(role)):
                (folder / name).unlink(missing_ok=True)

    def _fingerprints(self, context: Context) -> dict[str, str]:
        """Name of an analysis -> hash of all that its files depend on."""
        own, e = context.inputs[self.name], context.experiment
        before = {of_replies: store.fingerprint(context.inputs[stage.name]) for of_replies, stage in _LAST_READ.items()}
        judge = {name: own.get(name) for name in ("judge", "unanswered")}  # what `analysis.judge` depends on
        found: dict[str, str] = {}
        for analysis in asked(self.analyses, e):
            depends_on = {
                "earlier stages": before[analysis.of_replies],
                "format": self.format,
                "version": analysis.version,
                "settings": analysis.inputs(e) | (judge if "analysis.judge" in analysis.settings else {}),
                "reads": {name: found[name] for name in analysis.reads},
            }
            found[analysis.name] = store.fingerprint(depends_on)
        return found

    def _earlier(self, context: Context) -> Iterable[tuple[str, str, Path]]:
        """(name of a file, of the analysis, file) of what earlier runs computed under the present fingerprints."""
        wanted = self._fingerprints(context)
        for folder in store.folders(context.workdir, self.name):
            if not (folder / _MANIFEST).exists():
                continue
            for name, entry in store.read_json(folder / _MANIFEST).items():
                if entry["fingerprint"] == wanted.get(name):
                    yield from ((file, name, folder / file) for file in entry["files"] if store.is_whole(folder, file))

    def _take_over(self, context: Context, folder: Path) -> None:
        """Copies what earlier runs computed, as far as it is still valid, and says what the files here depend on."""
        e = context.experiment
        taken = {}
        for file, name, path in self._earlier(context):
            if not (folder / file).exists() and _same_models(path.parent, folder):
                store.write_bytes(folder / file, path.read_bytes())
                taken[name] = None
        if taken:
            say(f"  taken over from earlier results: {', '.join(taken)}")
        fingerprints = self._fingerprints(context)
        manifest = {
            analysis.name: {
                "fingerprint": fingerprints[analysis.name],
                "files": [*_files(analysis, e), *(name for role in e.roles for name in analysis.scratch(role))],
            }
            for analysis in asked(self.analyses, e)
        }
        text = json.dumps(manifest, indent=1) + "\n"
        if not (folder / _MANIFEST).exists() or (folder / _MANIFEST).read_text("utf-8") != text:
            store.write_text(folder / _MANIFEST, text)


ANALYSIS = AnalysisStage()

_LAST_READ: dict[bool, Stage] = {True: STEERING, False: VECTORS}  # whether an analysis reads replies -> stage


def _files(analysis: Analysis, e: Experiment) -> list[str]:
    return [*(name for role in e.roles for name in analysis.role_files(role)), *analysis.files(e)]


def _all_there(folder: Path, names: Sequence[str]) -> bool:
    """Whether none of the files is missing: a finished stage may have lost any of them."""
    return all((folder / name).exists() for name in names)


def _same_models(earlier: Path, folder: Path) -> bool:
    """Whether both were computed with the same commits of hub ids, which no fingerprint shows."""
    described = [store.read_json(path / store.RUN) for path in (earlier, folder) if (path / store.RUN).exists()]
    return len({json.dumps(run.get("hub_commits"), sort_keys=True) for run in described}) < 2


def _write(folder: Path, analysis: Analysis, found: dict[str, Table], expected: Sequence[str], prefix: str) -> None:
    """Writes tables; ValueError if the analysis did not make one that it declares."""
    if missing := [table for table in expected if table not in found]:
        raise ValueError(f"the analysis {analysis.name!r} declares the table {missing[0]!r} but did not make it")
    for table, lines in found.items():
        tables.write(folder / f"{prefix}{table}.csv", lines)


def gather(context: Context) -> Material:
    """What the stages before have left for the analyses."""
    e, read = context.experiment, context.folder(VECTORS)
    labels = VECTORS.read_summary(read)["labels"]
    judge = labelling.judge_of_replies(e)
    return Material(
        experiment=e,
        tokenizer=context.tokenizer,
        model=context.model,
        prompt_ids=context.prompt_ids,
        token_trace=context.token_trace,
        intervention=intervention_of(context),
        traces=TRACES.read(context.folder(TRACES)),
        annotations=ANNOTATIONS.read(context.folder(ANNOTATIONS)),
        labels=labels,
        vectors={
            (role, label): VECTORS.load(read, role, label)
            for role in e.roles
            for label in labels
            if VECTORS.has(read, role, label)
        },
        sums={role: VECTORS.read_sums(read, role) for role in e.roles},
        replies=STEERING.read(context.folder(STEERING)),
        judge=functools.partial(judge.annotate, e) if judge else None,
    )


def intervention_of(context: Context) -> Callable[[records.Condition, str], Intervention]:
    """Gives the row of a condition for the first reply to a problem, as stage 4 sampled it."""
    e = context.experiment
    readings = functools.cache(lambda: load_readings(context))  # for who asks alone
    key_of = functools.cache(lambda problem: row_key(e.seed, problem, 0))

    @functools.cache
    def built(role: str) -> conditions.Interventions:
        config = context.architecture(role)
        return conditions.Interventions(readings(), config.n_layers, config.d_model, e.steering.span)

    return functools.cache(lambda condition, problem: built(condition.target).row(condition, key_of(problem)))


def _plan_of_judge(context: Context, n_replies: int) -> list[str]:
    """What labelling the steered replies takes."""
    e = context.experiment
    judge = labelling.judge_of_replies(e)
    if judge is None:
        return []
    if folder := context.finished(STEERING):
        return judge.plan(e, [reply.trace(n, e.traces.end_marks) for n, reply in enumerate(STEERING.read(folder))])
    standing = records.Problem("-", "-", "X" * estimates.CHARACTERS_PER_TOKEN * estimates.longest_prompt(e))
    return estimates.judging(e, judge, [(standing, 0)] * n_replies, e.steering.max_new_tokens)
