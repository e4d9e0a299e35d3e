"""Runs a list of stages: what each depends on, which of them are done, and where an interrupted run resumes.

Every folder of a stage holds inputs.json, what the results depend on, and run.json, what they were computed with. A
stage runs when the fingerprint of its inputs is not the one in its `DONE` file, or a file that it lists is not as it
was. Work inside a stage is kept batch by batch, so a killed run loses at most the batch in flight. A stage can be run
alone; what was made from earlier results of it is then marked as stale by a file `STALE` in its folder that says why.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtrack_jax import compatibility
from backtrack_jax.checks import check_windows
from backtrack_jax.config import ROLES, Experiment
from backtrack_jax.files import environment, store
from backtrack_jax.files.console import say
from backtrack_jax.files.paths import shown_fields
from backtrack_jax.models import checkpoint
from backtrack_jax.report.stage import REPORT
from backtrack_jax.stages.analysis import ANALYSIS
from backtrack_jax.stages.annotations import ANNOTATIONS
from backtrack_jax.stages.base import Context, Stage
from backtrack_jax.stages.steering import STEERING
from backtrack_jax.stages.traces import TRACES
from backtrack_jax.stages.vectors import VECTORS

STAGES: tuple[Stage, ...] = (TRACES, ANNOTATIONS, VECTORS, STEERING, ANALYSIS, REPORT)
"""The stages of the paper, in order."""

_EARLIER = "earlier stages"  # field of inputs.json: fingerprint of those of the stage before


def stage_names(wanted: Sequence[str], stages: Sequence[Stage] = STAGES) -> tuple[str, ...]:
    """Full names of stages given by name, by number or by the word in them; all of them if none is given.

    Raises:
      ValueError: names a stage that does not exist.
    """
    names = {alias: stage.name for stage in stages for alias in (stage.name, *stage.name.split("-"))}
    if unknown := [w for w in wanted if w not in names]:
        known = ", ".join(stage.name for stage in stages)
        raise ValueError(f"--stages: {unknown} unknown; accepted: {known} (or their numbers)")
    chosen = {names[w] for w in wanted} or set(names.values())
    return tuple(stage.name for stage in stages if stage.name in chosen)


class Run:
    """One experiment on disk.

    Attributes:
      experiment: as it is run: with the traces that vectors are read off, if any wanted stage reads vectors.
      stages: all stages, in order.
      wanted: those that were asked for.
      context: what the stages share.
    """

    def __init__(
        self,
        experiment: Experiment,
        wanted: Sequence[str] = (),
        stages: Sequence[Stage] = STAGES,
        redo: Sequence[str] = (),
    ):
        """Finds every input and reads the small ones; nothing is computed or written yet.

        Args:
          experiment: what is run.
          wanted: names of stages, as `stage_names` gives them; empty for all.
          stages: all that there are.
          redo: names of stages that are computed anew, with the wanted ones after them, though they are done.

        Raises:
          ValueError, FileNotFoundError: name what is missing or wrong.
        """
        self.stages = tuple(stages)
        self.wanted = tuple(stage for stage in stages if stage.name in wanted) if wanted else self.stages
        if any(stage.reads_vectors for stage in self.wanted):
            experiment = experiment.for_vectors()
            check_windows(experiment)
        # In one order, as conditions are numbered by it.
        roles = tuple(role for role in ROLES if role in experiment.roles)
        self.experiment = experiment = dataclasses.replace(experiment, roles=roles)
        workdir = Path(os.path.expanduser(experiment.workdir)) / experiment.name
        self.context = Context(experiment, workdir, self.wanted[-1].name)
        compatibility.check_planned(experiment)
        self.context.inputs = self._find_inputs()
        if redo:
            names = [stage.name for stage in self.stages]
            first = min(map(names.index, redo))
            self.context.redone = {stage.name for stage in self.wanted if names.index(stage.name) >= first}
            if absent := set(redo) - self.context.redone:
                raise ValueError(f"--redo={min(absent)} is not among the stages that are run; add it to --stages")

    @property
    def workdir(self) -> Path:
        """Folder of the run's results."""
        return self.context.workdir

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """Name of a stage -> its inputs, with the fingerprint of those of the stage before."""
        return self.context.inputs

    def _find_inputs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        before = ""
        for stage in self.stages:

            def chained(own: Mapping[str, Any], stage: Stage = stage, before: str = before) -> dict[str, Any]:
                # Through JSON, so that what is compared is what is written.
                return json.loads(json.dumps({**own, _EARLIER: before, "format": stage.format}))

            own = stage.settle(
                self.experiment,
                stage.inputs(self.experiment),
                lambda own, chained=chained, stage=stage: store.peek(self.workdir, stage.name, chained(own)),
            )
            found[stage.name] = chained(own)
            before = store.fingerprint(found[stage.name])
        return found

    def run(self) -> None:
        """Runs the wanted stages that are not done, each after those it builds on."""
        needed = self.needed()
        to_do = [stage for stage in self.wanted if not self.done(stage)]
        for stage in to_do:
            stage.prepare(self.context)  # before the first stage, which may take hours
        self._check_models(to_do)
        self.workdir.mkdir(parents=True, exist_ok=True)
        with store.locked(self.workdir):
            self._say_what_is_not_read()
            stale = ""
            for stage in needed:
                self._run_stage(stage)
                stale = self._mark_stale()
            if stale:
                say(stale)
        last = self.wanted[-1]
        say(f"results are in {self.context.folder(last) / last.page if last.page else self.workdir}")

    def _say_what_is_not_read(self) -> None:
        for role in (role for role in ROLES if role not in self.experiment.roles and self.experiment.model(role).path):
            say(f"{role}.path={self.experiment.model(role).path} is not read: roles={self.experiment.roles}")
        for stage in self.wanted:
            for note in stage.notes(self.context):
                say(note)

    def needed(self) -> tuple[Stage, ...]:
        """The wanted stages and all that they build on; ValueError names one that is neither wanted nor done."""
        needed = self._up_to(self.wanted[-1])
        if absent := [stage for stage in needed if stage not in self.wanted and not self.done(stage)]:
            raise ValueError(
                f"{self.wanted[-1].name} builds on {absent[0].name}, which is not done for this config; "
                "add it to --stages"
            )
        return needed

    def _up_to(self, last: Stage) -> tuple[Stage, ...]:
        return self.stages[: self.stages.index(last) + 1]

    def _run_stage(self, stage: Stage) -> None:
        own = (self.workdir, stage.name, self.inputs[stage.name])
        if stage.name in self.context.redone:
            self.context.redone.remove(stage.name)
            if kept := store.set_aside_for_good(*own):
                say(f"{stage.name}: is redone; the results so far are in {kept.relative_to(self.workdir)}")
        elif found := store.adopt(*own):
            say(f"{stage.name}: taken over from {found.relative_to(self.workdir.parent)}")
        folder = store.StageFolder(self.workdir, stage.name, self.inputs[stage.name])
        if folder.done:
            say(f"{stage.name}: done before")
            return
        if folder.changed:
            say(f"{stage.name}: runs again, since {', '.join(folder.changed)} changed; old results are in superseded/")
        elif folder.misfits:
            say(f"{stage.name}: runs again, since {', '.join(folder.misfits)} is missing or not as it was written")
        else:
            say(f"{stage.name}:")
        self._check_commits(stage)
        self._describe(folder.path / store.RUN)
        stage.run(self.context, folder.path)
        if changed := self._changed_since(stage):
            folder.set_aside()  # as part of it may be of the old files and part of the new ones
            raise ValueError(f"{', '.join(changed)} has changed since this run began; run it again")
        folder.finish()

    def _changed_since(self, last: Stage) -> list[str]:
        """Inputs up to a stage that are no longer what the run found when it began: models and files, by content."""
        now = self._find_inputs()
        names = [stage.name for stage in self._up_to(last)]
        changed = {field for name in names for field in store.changes(self.inputs[name], now[name])}
        return sorted(changed - {_EARLIER})

    def _mark_stale(self) -> str:
        """Marks stages made from results of an earlier stage that have since been replaced; says which and why."""
        stale: list[str] = []
        reason, before, earlier = "", "", ""
        for stage in self.stages:
            folder = self.context.folder(stage)
            if (own := store.read_inputs(folder)) is None:
                break
            if not reason and own.get(_EARLIER) != before:
                reason = f"made from results of {earlier} that have been replaced"
            if reason:
                stale.append(stage.name)
            if store.mark_stale(folder, reason):
                stage.mark_stale(folder, reason)
            before, earlier = store.fingerprint(own), stage.name
        if not stale:
            return ""
        numbers = ",".join(name.partition("-")[0] for name in stale)
        return f"stale, {reason}: {', '.join(stale)}; bring up to date with --stages={numbers}"

    def _hub_commits(self) -> dict[str, str]:
        models = {role: self.experiment.model(role) for role in self.experiment.roles}
        commits = {role: checkpoint.hub_commit(spec.path, spec.revision or None) for role, spec in models.items()}
        return {role: commit for role, commit in commits.items() if commit}

    def _check_commits(self, stage: Stage) -> None:
        """Refuses to build on results from another commit of a hub id, which no fingerprint shows.

        Raises:
          ValueError: names both commits and the stage.
        """
        if not stage.model_roles(self.experiment):
            return
        now = self._hub_commits()
        for earlier in self._up_to(stage):
            path = self.context.folder(earlier) / store.RUN
            if not earlier.model_roles(self.experiment) or not path.exists():
                continue
            before = store.read_json(path).get("hub_commits", {})
            for role, commit in now.items():
                if before.get(role, commit) != commit:
                    raise ValueError(
                        f"{role}.path={self.experiment.model(role).path} is at commit {commit}, {earlier.name} in "
                        f"{self.workdir} was computed with {before[role]}; set {role}.revision, or take another workdir"
                    )

    def _describe(self, path: Path) -> None:
        """Writes what a stage is computed with; what an interrupted run had computed its part with is kept."""
        described = {"config": dataclasses.asdict(shown_fields(self.experiment)), **environment.describe()}
        described["hub_commits"] = self._hub_commits()
        if path.exists():
            before = store.read_json(path)
            earlier = before.pop("earlier", [])
            earlier += [before] * (before != json.loads(json.dumps(described)))
            described |= {"earlier": earlier} if earlier else {}
        store.write_text(path, json.dumps(described, indent=1) + "\n")

    def reason(self, stage: Stage) -> str:
        """Why a stage is to be done, and what happens to results that are there; or where they are taken from."""
        own = (self.workdir, stage.name, self.inputs[stage.name])
        folder = self.context.folder(stage)
        if self.done(stage):
            beside = None if store.peek(*own) else store.peek_beside(*own)
            return f"taken over from {beside.relative_to(self.workdir.parent)}" if beside else ""
        if stage.name in self.context.redone:
            return "--redo; results so far are kept in superseded/"
        if (before := store.read_inputs(folder)) is None:
            return ""
        if changed := [name for name in store.changes(before, own[2]) if name != _EARLIER]:
            return f"{', '.join(changed)} changed; the results that are there go to superseded/"
        if store.fingerprint(before) != store.fingerprint(own[2]):
            return "an earlier stage changed; the results that are there go to superseded/"
        return "unfinished or damaged; it resumes where it left off"

    def done(self, stage: Stage) -> bool:
        """Whether a stage is complete under the present inputs, here or in a run beside this one."""
        return self.context.finished(stage) is not None

    def _check_models(self, to_do: Sequence[Stage]) -> None:
        """Finds, before any long work, what is wrong with one of the models or the tokenizer."""
        e, context = self.experiment, self.context
        needed = {role for stage in to_do for role in stage.model_roles(e)}
        roles = tuple(role for role in e.roles if role in needed)
        if not roles:
            return
        _ = context.mesh  # refuses more devices than there are, before anything is fetched
        compatibility.check_fetched(e, roles)
        for role in roles:
            config, tokenizer = context.architecture(role), context.tokenizer
            not_read = compatibility.check_markers(e, role, config, tokenizer)
            compatibility.check_vocabulary(role, config, tokenizer, not_read)
        for stage in to_do:
            stage.check(context)
