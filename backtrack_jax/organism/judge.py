"""The grammar judge: exact labels of the small pair's sentences, and which sentences fit its grammar at all."""

from collections.abc import Sequence

from backtrack_jax.config import Experiment
from backtrack_jax.data.records import LABELS, OTHER, Annotation, Section, Trace
from backtrack_jax.data.text import reasoning, reasoning_end, split_sentences
from backtrack_jax.judges.base import Judge
from backtrack_jax.organism.grammar import label_of, may_go_on


class GrammarJudge(Judge):
    """Labels sentences exactly, in texts of the small pair."""

    name = "grammar"
    labels = (*LABELS, OTHER)

    def annotate(self, e: Experiment, traces: Sequence[Trace]) -> list[Annotation]:
        """Labels every sentence, see the function `annotate`; ValueError if no text has one of the small pair's."""
        del e
        annotated = [annotate(trace) for trace in traces]
        if not any(section.label != OTHER for annotation in annotated for section in annotation.sections):
            raise ValueError(
                f"judge='grammar': no sentence of {len(traces)} texts is one of the small pair's, and it knows no "
                "others; expected another judge, such as 'keyword' or 'openai'"
            )
        return annotated


JUDGE = GrammarJudge()


def annotate(trace: Trace) -> Annotation:
    """Labels the sentences of a trace of the small pair.

    Args:
        trace: the trace; only its reasoning is labelled, up to `data.text.reasoning_end`.

    Returns:
        One section per sentence, with the label that the grammar gives it, `other` where it is not a sentence of it.
    """
    text = reasoning(trace)
    spans = split_sentences(text)
    return Annotation(
        trace.id, JUDGE.name, tuple(Section(label_of(text[start:stop]) or OTHER, start, stop) for start, stop in spans)
    )


def fitting(reply: str) -> tuple[int, int]:
    """Sentences of a reply's reasoning that fit the grammar, and all its sentences.

    A last sentence without its end, where the reply ran into the limit of new tokens, is not counted, unless even
    what there is of it fits no sentence: a reply may fall apart without another full stop.
    """
    end = reasoning_end(reply)
    text = reply[:end]
    sentences = [text[start:stop] for start, stop in split_sentences(text)]
    if end == len(reply) and sentences and not sentences[-1].endswith(".") and may_go_on(sentences[-1]):
        sentences.pop()
    return sum(label_of(sentence) is not None for sentence in sentences), len(sentences)
