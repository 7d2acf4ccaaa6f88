"""Questions over the built-in text, made by templates, so that there is something to learn answering with on any
machine.

A template is a form of sentence, the question that it answers, and the part that is the answer. Contexts are paragraphs
of one text in a row, blanks and line ends being one space. A question that has several answers in its context has all
of them. The text is Python's (`builtin`); how a person would ask it is not learnt from these.

`python -m mlm_mpi.data.templates FILE.json [SEED]` writes them as a file of SQuAD's.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mlm_mpi.data import builtin
from mlm_mpi.data.squad import Answer, Question, written
from mlm_mpi.files import publish
from mlm_mpi.rng import key_of, uniform

_LONGEST, _SHORTEST = 480, 80  # characters of a context
_MOST = 6  # questions of a context
_SENTENCE = re.compile(r"(?<=[.:;]) +(?=[A-Z*`\"'])")
_END = r"(?=[.,;:](?: |$)| \()"
_NAME = r"(?!(?:If|When|This|It|That|There|These|Those|They|Which|What|Note|For|In|And|But|Or|Not)\b)"
_NAME += r"[A-Z*`\"'](?:(?!\b(?:if|that|which|when|and|or)\b)[^.,;:()]){2,50}"
_ACTS = (
    "Return|Returns|Create|Creates|Get|Gets|Set|Sets|Write|Writes|Read|Reads|Convert|Converts|Check|Checks|Add|Adds|"
    "Remove|Removes|Send|Sends|Parse|Parses|Test|Tests|Make|Makes|Find|Finds|Initialize|Open|Opens|Print|Prints|Run|"
    "Runs|Call|Calls|Raise|Raises|Compute|Computes|Build|Builds|Generate|Load|Copy|Update|Replace|Provide|Provides"
)
# (form of a sentence, question); the answer is the group "answer"
_TEMPLATES = [(re.compile(form), question) for form, question in (
    (rf"^(?P<act>{_ACTS}) (?P<answer>[^.,;:()]{{4,80}}?){_END}", "What does it {act}?"),
    (r"(?P<answer>\b[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Iteration|Exit)\b)", "Which exception is named?"),
    (rf"^If (?P<one>[^.,;:()]{{5,70}}), (?P<answer>[^.,;:()]{{5,90}}?){_END}", "What happens if {one}?"),
    (rf"^When (?P<one>[^.,;:()]{{5,70}}), (?P<answer>[^.,;:()]{{5,90}}?){_END}", "What happens when {one}?"),
    (rf"^(?P<one>[A-Z][^.,;:()]{{5,70}}) if (?P<answer>[^.,;:()]{{5,80}}?){_END}", "On what condition: {one}?"),
    (rf"^(?P<one>[A-Z][^.,;:()]{{5,90}}),? because (?P<answer>[^.;:()]{{5,90}}?){_END}", "Why: {one}?"),
    (rf"^(?P<one>{_NAME}) (?P<verb>is|are) (?P<answer>(?:an?|the|one of) [^.,;:()]{{4,80}}?){_END}",
     "What {verb} {one}?"),
    (rf"^(?P<one>{_NAME}) (?P<verb>is|are) (?P<done>\w+ed) (?P<by>by|to|in|with|from|for|as|on|into) "
     rf"(?P<answer>[^.,;:()]{{4,70}}?){_END}", "What {verb} {one} {done} {by}?"),
    (rf"^(?P<one>{_NAME}) (?P<must>must|should|may|can) be (?P<answer>[^.,;:()]{{3,60}}?){_END}",
     "What {must} {one} be?"),
    (rf"\b(?P<one>[\w*`]+) defaults to (?P<answer>[^\s,;:()]+?){_END}", "What does {one} default to?"),
    (r"\b(?:version|Python) (?P<answer>\d+\.\d+(?:\.\d+)?)", "Which version is named?"),
    (rf"\binstead of (?P<answer>[^.,;:()]{{3,60}}?){_END}", "What is it instead of?"),
)]  # fmt: skip


def questions(seed: int) -> Iterator[Question]:
    """Those over the built-in text, some of each context, drawn by the seed. The same on every machine that has all of
    the text."""
    found = builtin.documents()
    number = 0
    for place in sorted(found):
        for context in dict.fromkeys(_contexts(found[place])):
            asked = list(_asked(context).items())
            draws = uniform(key_of(seed, "questions", context), 0, max(1, len(asked)), 0)
            for which in sorted(sorted(range(len(asked)), key=lambda one: draws[one])[:_MOST]):
                question, answers = asked[which]
                number += 1
                yield Question(
                    f"built-in text {place}: {question!r}", question, context, answers, id=f"builtin-{number}"
                )


def _contexts(text: str) -> Iterator[str]:
    """Its paragraphs, joined as long as they fit."""
    context = ""
    for paragraph in (" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text)):
        if context and len(context) + 1 + len(paragraph) > _LONGEST:
            yield from _fitting(context)
            context = ""
        context = f"{context} {paragraph}" if context else paragraph
    yield from _fitting(context)


def _fitting(context: str) -> Iterator[str]:
    if len(context) > _LONGEST:
        context = context[: context.rfind(". ", 0, _LONGEST) + 1]
    if len(context) >= _SHORTEST:
        yield context


def _asked(context: str) -> dict[str, tuple[Answer, ...]]:
    """The questions that the sentences of a context answer, each with its answers in their order."""
    made: dict[str, dict[Answer, None]] = {}
    start = 0
    for sentence in _SENTENCE.split(context):
        start = context.index(sentence, start)
        for form, template in _TEMPLATES:
            for match in form.finditer(sentence):
                groups = match.groupdict()
                answer = groups.pop("answer").rstrip()
                groups |= {"act": groups["act"].lower().removesuffix("s")} if "act" in groups else {}
                made.setdefault(template.format(**groups), {})[Answer(start + match.start("answer"), answer)] = None
        start += len(sentence)
    return {question: tuple(answers) for question, answers in made.items()}


if __name__ == "__main__":
    publish(Path(sys.argv[1]), written(questions(int(sys.argv[2]) if sys.argv[2:] else 0), "Python"))
