"""Figures of answers that were found in texts: exact match and F1 as SQuAD's program has them, beside simple methods.

An answer is compared with each that is given, and the best counts. Answers are compared in small letters, without
punctuation, articles and repeated blanks. Source: Rajpurkar et al., arXiv:1606.05250, section 6.1, and for questions
without an answer, which is right where nothing is answered, arXiv:1806.03822; evaluate-v1.1.py and evaluate-v2.0.py.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")
_WORD = re.compile(r"\S+")
_MOST_WORDS = 12  # of a span of fixed length
_LEARNT_FROM = 2_000  # questions


class Asked(NamedTuple):
    """A question, its context and the answers that are given, () where there is none."""

    question: str
    context: str
    answers: tuple[str, ...]


def normalised(answer: str) -> str:
    """What is compared of an answer."""
    bare = answer.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(answer: str, wanted: str) -> float:
    """1 if two answers are the same, else 0."""
    return float(normalised(answer) == normalised(wanted))


def f1(answer: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the words of an answer; nothing is like nothing alone."""
    found, there = normalised(answer).split(), normalised(wanted).split()
    if not (found and there):
        return float(found == there)
    same = (Counter(found) & Counter(there)).total()
    return 2 * same / (len(found) + len(there))


def best(measure: Callable[[str, str], float], answer: str, wanted: Sequence[str]) -> float:
    """Against the best of the answers that are given; where none has a word, none is wanted."""
    return max(measure(answer, one) for one in [one for one in wanted if normalised(one)] or [""])


def figures(pairs: Iterable[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Exact match and F1, means over questions, of (answer, those that are given); each also of questions that have an
    answer and that have none, where both are there."""
    rows = [(bool(wanted), best(exact, answer, wanted), best(f1, answer, wanted)) for answer, wanted in pairs]
    told: dict[str, Any] = {}
    sides = {"": rows, "answered_": [row for row in rows if row[0]], "unanswered_": [row for row in rows if not row[0]]}
    for name, some in sides.items():
        if name and not 0 < len(some) < len(rows):
            continue
        means = [sum(row[k] for row in some) / max(1, len(some)) for k in (1, 2)]
        told |= {f"{name}questions": len(some), f"{name}exact": means[0], f"{name}f1": means[1]}
    return told


def lines(numbers: dict[str, Any]) -> list[str]:
    """Figures in words, those of simple methods last."""
    n = numbers
    told = [f"exact match         {n['exact']:.4f}", f"F1                  {n['f1']:.4f}, best of the answers given"]
    for name, what in (("answered", "with an answer"), ("unanswered", "without one")):
        if f"{name}_exact" in n:
            exact_, f1_, count = (n[f"{name}_{figure}"] for figure in ("exact", "f1", "questions"))
            told.append(f"  {what:<18}{exact_:.4f} exact, F1 {f1_:.4f}, {count:,} questions")
    for name, (_, what) in _BASELINES.items():
        if f"{name}_exact" in n:
            told.append(f"{what:<20}{n[f'{name}_exact']:.4f} exact, F1 {n[f'{name}_f1']:.4f}")
    return told


def baselines(train: Sequence[Asked], other: Sequence[Asked]) -> dict[str, Any]:
    """Exact match and F1 of simple methods; what has a length has the one that is best in training."""
    told: dict[str, Any] = {}
    learnt_from = [one for one in train[:: -(-len(train) // _LEARNT_FROM) or 1] if one.answers]
    for name, (method, _) in _BASELINES.items():
        lengths = (0,) if method is sentence else range(1, _MOST_WORDS + 1)
        scores = {length: sum(best(f1, method(one, length), one.answers) for one in learnt_from) for length in lengths}
        length = max(scores, key=lambda one: scores[one])
        found = figures((method(one, length), one.answers) for one in other)
        told |= {f"{name}_exact": found["exact"], f"{name}_f1": found["f1"], f"{name}_words": length}
    return told


def sentence(asked: Asked, length: int) -> str:
    """The sentence of the context that has most of the question's words; the first of equal ones."""
    wanted = set(normalised(asked.question).split())
    some = _SENTENCE_END.split(asked.context)
    return max(some, key=lambda one: len(wanted & set(normalised(one).split())))


def beside(asked: Asked, length: int) -> str:
    """So many words behind the longest run of the question's words in the context; the first of equal runs."""
    words, wanted = _WORD.findall(asked.context), set(normalised(asked.question).split())
    here = [bool(bare) and bare in wanted for bare in map(normalised, words)]
    run = [0]
    for is_wanted in here:
        run.append(run[-1] + 1 if is_wanted else 0)
    start = max(range(len(run)), key=lambda place: run[place])
    return " ".join(words[start : start + length] or words[-length:])


def first(asked: Asked, length: int) -> str:
    """The first so many words of the context, the first left out: texts begin with a verb or an article."""
    return " ".join(_WORD.findall(asked.context)[1 : 1 + length])


_BASELINES: dict[str, tuple[Callable[[Asked, int], str], str]] = {
    "sentence": (sentence, "sentence nearest"),
    "beside": (beside, "words behind it"),
    "first": (first, "words at the begin"),
}
