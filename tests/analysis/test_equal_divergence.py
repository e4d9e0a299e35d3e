"""Lengths at equal divergence: those of an edit whose divergence numpy knows, and a whole stage in the unit `kl`."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import optimize, special

from backtrack_jax import checks, pipeline
from backtrack_jax.analysis import equal_divergence
from backtrack_jax.config import Experiment
from backtrack_jax.data import records
from backtrack_jax.files import store, tables
from backtrack_jax.intervention import Intervention, add_vector, stack_rows
from backtrack_jax.models import checkpoint
from backtrack_jax.models.decoder import Decoder

D, L = 16, 3
LENGTHS = ((3, 6), (5, 2), (4, 9))  # of prompt and reply


def experiment(**settings: object) -> Experiment:
    e = tiny.get_config()
    e.steering = dataclasses.replace(e.steering, unit="kl", magnitudes=(-0.02, 0.0, 0.05), limit=4, **settings)
    return e


def by_numpy(model: Decoder, ids: list[int], start: int, edit: Intervention) -> float:
    """Mean divergence of the predictions of the tokens at `start` and after."""
    tokens, positions = jnp.asarray([ids]), jnp.arange(len(ids))[None]
    p, q = (
        special.log_softmax(
            np.asarray(model.logits(model(tokens, positions, intervention=e).resid), np.float64)[0, start - 1 : -1], -1
        )
        for e in (None, stack_rows([edit]).resolve(jnp.asarray([start])))
    )
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


def test_lengths_cost_what_is_wanted(finished: Path) -> None:
    """By numpy within 5 %, for directions, layers and signs; and where scipy finds the length one by one."""
    model = checkpoint.load("reasoning", dtype="float32")
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, 250, sum(lengths)).tolist(), lengths[0]) for lengths in LENGTHS]
    units = [u / np.linalg.norm(u) for u in rng.standard_normal((4, D))]
    wanted, scales, layers = [0.05, 0.05, 0.002, 0.3], [1.0, -1.0, 20.0, 3.0], [0, 0, 1, 2]

    def row(i: int, length: float, j: int) -> Intervention:
        del j
        return add_vector(jnp.asarray(units[i // 2 * 2], jnp.float32), layers[i], length, n_layers=L)

    names = [f"edit {i}" for i in range(4)]
    lengths, costs = equal_divergence.lengths(model, texts, row, wanted, scales, names, batch_size=5)
    assert np.all(np.sign(lengths) == np.sign(scales))
    for i, length in enumerate(lengths):

        def cost(length: float, i: int = i) -> float:
            return float(np.mean([by_numpy(model, ids, start, row(i, length, 0)) for ids, start in texts]))

        assert cost(length) == pytest.approx(wanted[i], rel=0.05)
        assert costs[i] == pytest.approx(cost(length), rel=0.01)
    alone = optimize.brentq(lambda x: np.log(cost(x) / wanted[3]), lengths[3] / 3, lengths[3] * 3, xtol=1e-4)
    assert lengths[3] == pytest.approx(alone, rel=0.03)
    with pytest.raises(ValueError, match=r"steering.unit='kl': edit 1 costs between .* never 1000; choose another"):
        equal_divergence.lengths(model, texts, row, [0.05, 1000.0], [1.0, 1.0], names, batch_size=5)


@pytest.mark.slow
def test_a_run_in_nats(finished: Path) -> None:
    """Every condition costs its magnitude on problems that are not steered; a killed attempt's lengths are kept."""
    e = experiment(kinds=("backtracking", "noise", "ablate:backtracking"), baselines=("random",), offsets=(), layers=())
    pipeline.Run(e).run()
    folder = finished / "4-steering"
    lines = [line for role in e.roles for line in tables.read(folder / f"{role}.lengths.csv")]
    assert all(line["kl"] == pytest.approx(abs(line["magnitude"]), rel=0.02) for line in lines)
    assert all(np.sign(line["length"]) == np.sign(line["magnitude"]) for line in lines)
    replies = [records.Reply.from_line(line) for line in store.read_lines(folder / "generations.jsonl")]
    in_nats = {reply.condition for reply in replies if reply.condition.kind not in ("unsteered", "ablate:backtracking")}
    assert in_nats == {records.Condition.of(line) for line in lines} and len(in_nats) > 8
    shares = {reply.condition for reply in replies if reply.condition.kind == "ablate:backtracking"}
    assert shares and all(c.length == c.magnitude for c in shares)

    # An attempt that was killed while sampling: a length that was changed there by hand is the length of its replies.
    table = folder / "base.lengths.csv"
    kept = tables.read(table)
    kept[0]["length"] *= 2
    tables.write(table, kept)
    (folder / "DONE").unlink()
    (folder / "generations.jsonl").unlink()
    pipeline.Run(e, ("4-steering",)).run()
    replies = [records.Reply.from_line(line) for line in store.read_lines(folder / "generations.jsonl")]
    assert records.Condition.of(kept[0]) in {reply.condition for reply in replies}


def test_what_it_does_not_go_with_is_refused_before_work(finished: Path) -> None:
    e = experiment(kinds=("clamp:backtracking",))
    with pytest.raises(ValueError, match="strength 0 of 'clamp:backtracking' changes predictions too"):
        checks.check(e)
    e = experiment()
    e.questions.ask = ("noise",)
    with pytest.raises(ValueError, match="which compare vectors of equal length"):
        checks.check(e)
    e = experiment()
    e.steering.limit = 0
    with pytest.raises(ValueError, match=r"steering.limit=0 steers all \d+ problems, expected fewer"):
        pipeline.Run(e).run()
