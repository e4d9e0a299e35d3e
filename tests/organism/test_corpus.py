import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from backtrack_jax.data.problems import CATEGORIES
from backtrack_jax.data.records import pair_annotations, read_problems
from backtrack_jax.models import checkpoint, prompts
from backtrack_jax.models.tokenizer import Tokenizer
from backtrack_jax.organism import corpus, grammar, judge, vocabulary
from backtrack_jax.organism.measure import WINDOW


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.write(folder)
    return Tokenizer.load(folder)


def documents(process: grammar.Process, count: int, seed: int = 0, stories: float = 0.0) -> list[corpus.Document]:
    return list(itertools.islice(corpus.documents(process, seed, stories=stories), count))


def test_words_of_slots_content_and_templates_do_not_overlap() -> None:
    """The exact filter counts a content word as certain, which is right only if no template has it as another word."""
    kinds = [set(words) for words in (*grammar.SLOTS.values(), *grammar.CONTENT.values())]
    literal = {e for template in grammar.ALL_TEMPLATES for e in template.elements if not e.startswith("{")}
    assert sum(map(len, [*kinds, literal])) == len(set().union(*kinds, literal))


def test_no_sentence_is_the_beginning_of_another() -> None:
    for a, b in itertools.permutations(grammar.ALL_TEMPLATES, 2):
        assert b.elements[: len(a.elements)] != a.elements


def test_every_sentence_has_slots_of_the_same_number_or_resets() -> None:
    """What a sentence tells about its register must not depend on its label."""
    for template in grammar.ALL_TEMPLATES:
        slots = sum(element.strip("{}") in grammar.SLOTS for element in template.elements)
        assert slots == (3 if template.label == "backtracking" else 4), template


def test_equal_seeds_give_equal_corpora() -> None:
    assert documents(grammar.REASONING, 20, 3) == documents(grammar.REASONING, 20, 3)
    assert documents(grammar.REASONING, 20, 3) != documents(grammar.REASONING, 20, 4)
    assert corpus.problems(30, 1) == corpus.problems(30, 1)


def test_shipped_problems_are_those_of_the_generator() -> None:
    folder = checkpoint.resolve("package:backtrack_jax/organism")
    assert read_problems(folder / "problems.jsonl") == corpus.shipped_problems()


def test_problems_cover_the_categories_of_the_paper() -> None:
    problems = corpus.problems(40, 0)
    assert Counter(problem.category for problem in problems) == dict.fromkeys(CATEGORIES, 4)
    assert len({problem.id for problem in problems}) == 40


def test_base_corpus_never_backtracks_and_tells_stories() -> None:
    written = documents(grammar.BASE, 600, stories=corpus.STORY_SHARE)
    stories = [document.answer for document in written if document.problem is None]
    assert 0.05 < len(stories) / len(written) < 0.11
    assert all(any(word in " ".join(stories) for word in (form,)) for form in ("wait", "Wait", "hmm", "Hmm", "but"))
    assert not any(s.label == "backtracking" for document in written for s in document.sentences)


def test_of_what_stories_say_before_a_wait_replies_have_the_full_stop_alone() -> None:
    written = documents(grammar.BASE, 2000, stories=0.5)
    of_replies = {word for d in written for s in d.sentences for word in grammar.split_tokens(s.text)} - {"."}
    told = [grammar.split_tokens(d.answer) for d in written if d.problem is None]
    before = {a for words in told for a, b in itertools.pairwise(words) if b.lower() in ("wait", "hmm")}
    assert before == {".", "to", "said"} and not before & of_replies


def test_sentences_put_a_full_stop_into_the_window() -> None:
    lengths = {len(t.elements) for t in (*grammar.CONTINUATIONS, *grammar.BACKTRACKS)}
    assert all(WINDOW[0] <= -length - 1 <= WINDOW[1] for length in lengths)


def test_reasoning_corpus_backtracks_after_two_shaky_sentences_and_becomes_sure() -> None:
    boundaries: dict[bool, list[bool]] = {True: [], False: []}
    for document in documents(grammar.REASONING, 1500):
        run = 0
        for before, sentence in itertools.pairwise(document.sentences):
            run = run + 1 if before.register else 0
            boundaries[run >= 2].append(sentence.label == "backtracking")
            if sentence.label == "backtracking":
                assert sentence.register == grammar.SURE
                assert sentence.text.startswith(("Wait,", "Hmm,"))
    assert abs(np.mean(boundaries[True]) - 0.7) < 0.04
    assert abs(np.mean(boundaries[False]) - 0.004) < 0.003


def test_labels_do_not_depend_on_the_register() -> None:
    counts = {z: Counter() for z in (grammar.SURE, grammar.SHAKY)}
    for document in documents(grammar.BASE, 1500):
        for sentence in document.sentences[1:]:
            counts[sentence.register][sentence.label] += 1
    for label, p in grammar.LABEL_PROBABILITIES.items():
        for of_register in counts.values():
            assert abs(of_register[label] / of_register.total() - p) < 0.03


def test_words_follow_the_register() -> None:
    texts: dict[int, list[str]] = {grammar.SURE: [], grammar.SHAKY: []}
    for document in documents(grammar.BASE, 1500):
        for sentence in document.sentences:
            texts[sentence.register] += grammar.split_tokens(sentence.text)
    for register, probabilities in ((0, grammar.SLOT_PROBABILITIES), (1, grammar.SLOT_PROBABILITIES[::-1])):
        found = Counter(texts[register])
        for words in grammar.SLOTS.values():
            total = sum(found[word] for word in words)
            np.testing.assert_allclose([found[word] / total for word in words], probabilities, atol=2 / total**0.5)


def test_grammar_judge_agrees_with_construction() -> None:
    for i, document in enumerate(documents(grammar.REASONING, 200)):
        trace, built = corpus.as_trace(document, f"p/{i}")
        judged = judge.annotate(trace)
        assert judged.sections == built.sections
        pair_annotations([trace], [judged])
        assert judge.fitting(trace.text) == (len(built.sections), len(built.sections))


def test_grammar_judge_notices_what_does_not_fit() -> None:
    good = "Okay, we need a firm rule for the map, so I must look inside the story."
    for bad in (
        good.replace("firm", "firmly"),
        good.replace(" a ", " a a "),
        good.replace(",", "", 1),
        good[:-1],
        "Wait.",
    ):
        assert grammar.label_of(good) == "initializing"
        assert grammar.label_of(bad) is None
    assert judge.fitting(f"{good} Wait, wait, wait. {good}\n</think>\n\nThe answer is the map.") == (2, 3)
    assert judge.fitting(f"{good} So the map") == (1, 1)
    assert judge.fitting("") == (0, 0)


def test_every_word_of_the_corpus_is_one_token(tokenizer: Tokenizer) -> None:
    for document in documents(grammar.REASONING, 300, stories=0.2):
        text = document.answer if document.problem is None else document.reply
        ids = tokenizer.encode(text)
        assert len(ids) == len(grammar.split_tokens(text.replace("</think>", "X"))) + text.count("\n")
        assert tokenizer.decode(ids) == text
        if document.problem:
            prompt = prompts.prompt_ids(tokenizer, document.problem.problem, prompts.PromptFormat())
            assert len(prompt) == len(grammar.split_tokens(document.problem.problem)) + 5


def test_tokenizer_passes_the_self_check_of_any_other(tokenizer: Tokenizer) -> None:
    prompts.check_tokenizer(tokenizer)
    assert len(set(prompts.r1_markers(tokenizer))) == 4
    assert tokenizer.bos_id is not None and len(tokenizer.stop_ids) == 1


def test_chat_template_is_the_r1_format(tokenizer: Tokenizer) -> None:
    problem = corpus.problems(1, 0)[0].problem
    by_hand = prompts.prompt_ids(tokenizer, problem, prompts.PromptFormat("r1", "primed"))
    assert tokenizer.encode_chat([{"role": "user", "content": problem}]) == by_hand


@pytest.mark.hf
def test_transformers_read_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    vocabulary.write(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for document in documents(grammar.REASONING, 50):
        assert theirs.encode(document.reply, add_special_tokens=False) == tokenizer.encode(document.reply)
        assert document.problem
        chat = [{"role": "user", "content": document.problem.problem}]
        rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert theirs.encode(rendered, add_special_tokens=False) == tokenizer.encode_chat(chat)
