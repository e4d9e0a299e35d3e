"""What the claims are measured with, against plain numpy, scikit-learn and the text itself."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import cosine_similarity

from backtrack_jax.analysis.backtracking import count_keywords
from backtrack_jax.analysis.statistics import rate_interval
from backtrack_jax.data.records import Trace
from backtrack_jax.extract import WindowPlan, WindowSums
from backtrack_jax.models import checkpoint
from backtrack_jax.organism import corpus, grammar, measure
from backtrack_jax.organism.belief import log_odds
from backtrack_jax.organism.measure import Pair


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(checkpoint.resolve("package:backtrack_jax/organism"))


@pytest.fixture(scope="module")
def traces(pair: Pair) -> list[Trace]:
    """Documents of the reasoning process with the tokens that a model would have sampled."""
    made = []
    for number, document in enumerate(
        d for d, _ in zip(corpus.documents(grammar.REASONING, 3), range(30), strict=False)
    ):
        assert document.problem
        ids = tuple(pair.tokenizer.encode(document.reply)) + tuple(pair.tokenizer.stop_ids)
        made.append(Trace(f"a/{number}", "a", "", document.problem.problem, document.reply, token_ids=ids))
    return made


def test_log_odds_stand_at_the_tokens_they_are_of(pair: Pair, traces: list[Trace]) -> None:
    for trace in traces:
        assert trace.token_ids
        reasoning = trace.text.partition("\n")[0]
        words = grammar.split_tokens(reasoning)
        found = measure._log_odds_of_tokens(pair.tokenizer, trace, grammar.REASONING)
        assert len(found) == len(trace.token_ids)
        assert [pair.tokenizer.decode([i]).strip() for i in trace.token_ids[: len(words)]] == words
        np.testing.assert_array_equal(found[: len(words)], log_odds(words, grammar.REASONING))
        assert np.isnan(found[len(words) :]).all()


def test_sections_start_at_the_first_token_of_their_sentence(pair: Pair, traces: list[Trace]) -> None:
    read = pair.read(traces, seed=1)
    backtracking = shuffled = 0
    for trace, tokens in zip(traces, read, strict=True):
        sentences = trace.text.partition("\n")[0].split(". ")
        starts = sorted({at for label, at in tokens.starts if label != measure.SHUFFLED})
        assert [pair.tokenizer.decode([tokens.ids[at]]).strip() for at in starts] == [
            grammar.split_tokens(sentence)[0] for sentence in sentences
        ]
        for label, at in tokens.starts:
            backtracks = pair.tokenizer.decode([tokens.ids[at]]).strip() in grammar.KEYWORDS
            if label != measure.SHUFFLED:
                assert backtracks == (label == "backtracking")
            backtracking += label == "backtracking"
            shuffled += label == measure.SHUFFLED
    assert shuffled == backtracking > 0


def test_vectors_of_labels_with_few_windows_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others are MeanAct(D+) - MeanAct(D), which holds D+."""
    monkeypatch.setattr(measure, "FEWEST_WINDOWS", 20)
    labels = ("backtracking", "deduction", "rare", measure.SHUFFLED)
    groups = {label: (label,) for label in labels} | {"all": labels[:3]}
    plan = WindowPlan(labels, groups, (measure.WINDOW, (0, 0)), ())
    rng = np.random.default_rng(0)
    sums = WindowSums.zeros(plan, 3, 4)
    sums.sums = rng.standard_normal(sums.sums.shape)
    sums.counts = rng.integers(50, 90, sums.counts.shape).astype(float)
    sums.read = np.array([[20, 0], [400, 0], [19, 900], [20, 0], [439, 900]])
    found = measure.label_vectors(sums)
    assert set(found) == {"backtracking", "deduction", measure.SHUFFLED, "overall mean"}
    mean = sums.sums[0, :, :, 0] / sums.counts[0, :, 0][:, None]  # of traces' means, [L, G, D]
    np.testing.assert_allclose(found["overall mean"], mean[:, 4], rtol=1e-5)
    for number, label in enumerate(labels):
        if label in found:
            expected = mean[:, number] - mean[:, 4]
            np.testing.assert_allclose(cosine_similarity(found[label], expected).diagonal(), 1, rtol=1e-5)


@pytest.mark.parametrize(("role", "process"), [("base", grammar.BASE), ("reasoning", grammar.REASONING)])
def test_belief_is_the_regression_of_torch_s_states_on_the_exact_filter(
    pair: Pair, traces: list[Trace], role: str, process: grammar.Process
) -> None:
    """Every token whose belief is known, of the 16-bit weights in float32 torch; probabilities by their own formula."""
    torch = pytest.importorskip("torch", reason="needs torch to compare with")
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    folder = checkpoint.resolve("package:backtrack_jax/organism") / role
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = pair.read(traces, seed=1)
    states, odds = [], []
    for trace, tokens in zip(traces, read, strict=True):
        exact = log_odds(grammar.split_tokens(trace.text.partition("\n")[0]), process)
        known = np.flatnonzero(~np.isnan(exact))  # none from the base process's first Wait on
        with torch.no_grad():
            hidden = peer.model(torch.tensor([list(tokens.ids)]), output_hidden_states=True).hidden_states
        states.append(hidden[3][0, tokens.reply_start + known].double().numpy())
        odds.append(exact[known])
    x, y = np.concatenate(states), np.concatenate(odds)
    found = measure.belief(pair, role, traces, read, per_trace=1000)
    assert found.tokens == len(y) > 400
    certain = np.isinf(y)  # within the sentences that begin with Wait or Hmm
    assert certain.any() == (role == "reasoning") and (y[certain] < 0).all()
    first = np.arange(len(y)) < sum(map(len, odds[:15]))
    for scale, kept, direction, scores in (
        (np.where(certain, 0, 1 / (1 + np.exp(-y))), np.full(len(y), True), found.direction, found.r_squared),
        (y, ~certain, found.log_odds_direction, found.log_odds_r_squared),
    ):
        slope = LinearRegression().fit(scale[kept, None], x[kept]).coef_[:, 0]
        np.testing.assert_allclose(direction[2], slope, atol=1e-4 * float(np.abs(slope).max()))
        fit, test = kept & first, kept & ~first
        assert scores[2] == pytest.approx(measure.r_squared(x[fit], scale[fit], x[test], scale[test]), abs=1e-3)


def test_cosines_are_those_of_scikit_learn() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5, 16))
    np.testing.assert_allclose(measure.cosines(a, b), cosine_similarity(a, b).diagonal())


def test_the_lens_compares_the_keywords_with_all_words(pair: Pair) -> None:
    model = pair.models["reasoning"]
    assert model.lm_head is not None
    directions = np.random.default_rng(0).standard_normal((8, pair.shape[1])).astype(np.float32)
    words = list(range(300, 340))
    logits = directions.astype(np.float64) @ np.asarray(model.lm_head.weight[...], np.float64)[words].T
    excess, spread = measure.keyword_lens(model, directions, [words[3], words[7]], words)
    np.testing.assert_allclose(excess, logits[:, [3, 7]].mean(1) - logits.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread, logits.std(1), rtol=1e-4)


def test_coherence_and_rate_of_a_cell(traces: list[Trace]) -> None:
    good = [trace.text for trace in traces]
    words = [word.strip(".,:;").lower() for text in good for word in text.split() if any(map(str.isalpha, word))]
    counts = [count_keywords(text) for text in good]
    found = measure.cell(good)
    assert found.fitting == 1 and found.problems == len(good)
    assert found.rate == pytest.approx((words.count("wait") + words.count("hmm")) / len(words), rel=0.01)
    assert 0 < found.low <= found.rate <= found.high
    broken = measure.cell([text.replace(" the ", " the the ") for text in good])
    assert broken.fitting < 0.5
    assert (found.low, found.high) == rate_interval([c.hits for c in counts], [c.words for c in counts])
    silent = measure.cell([text.replace(" Wait", " So").replace(" Hmm", " So") for text in good])
    assert silent.rate == silent.low == 0 < silent.high < 0.05
