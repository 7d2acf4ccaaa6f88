"""Figures of translations: sacrebleu's, a dictionary from pairs of texts, what is said without sacrebleu."""

import sys

import numpy as np
import pytest

from mlm_mpi.data import dictionary
from mlm_mpi.data.tokenizer import Tokenizer
from mlm_mpi.errors import ConfigError
from mlm_mpi.figures import translations

PAIRS = [
    ("the house", "la maison"), ("The red house!", "La maison rouge !"), ("a red flower", "une fleur rouge"),
    ("the flower", "la fleur"), ("a house", "une maison"), ("", "rien"),
]  # fmt: skip


def test_a_dictionary_finds_which_words_go_together() -> None:
    known = dictionary.learned(PAIRS)
    assert known == {"the": "la", "house": "maison", "red": "rouge", "a": "une", "flower": "fleur"}
    assert dictionary.translated("The  big house, a FLOWER.", known) == "La  big maison, une Fleur."
    assert dictionary.learned([]) == {} and dictionary.learned([("a", ""), ("b!", "?")]) == {}


def test_probabilities_are_those_of_two_rounds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of "the house" / "la maison" and "house" / "maison" every word meets "maison" half of the time at first; after a
    round it is "house" that explains it, so that "the" becomes "la"."""
    some = [("the house", "maison la"), ("house", "maison")]
    monkeypatch.setattr(dictionary, "_ROUNDS", 1)
    assert dictionary.learned(some) == {"the": "maison", "house": "maison"}, "equal: the one that is seen first"
    monkeypatch.setattr(dictionary, "_ROUNDS", 2)
    assert dictionary.learned(some) == {"the": "la", "house": "maison"}


def test_a_dictionary_may_do_without_some_pairs() -> None:
    """As if they had not been there to count; what is known of the others stays."""
    lexicon = dictionary.Lexicon(PAIRS)
    assert lexicon.without(np.zeros(len(PAIRS), bool)) == dictionary.learned(PAIRS)
    flowers = np.array([False, False, True, True, False, False])
    assert lexicon.without(flowers) == {"the": "la", "house": "maison", "red": "rouge", "a": "une"}
    assert lexicon.without(~flowers) == {"a": "une", "red": "rouge", "flower": "fleur", "the": "la"}
    assert lexicon.without(np.ones(len(PAIRS), bool)) == {}


def test_a_hint_stands_in_front_of_a_source() -> None:
    tokens = Tokenizer.bytes()
    ids, nothing = dictionary.hinted(tokens, ["the house", ""], ["la maison", ""])
    assert tokens.decode(ids.tolist()) == "la maisonthe house" and not len(nothing)
    assert tokens.decode(dictionary.bare(ids, tokens.eot).tolist()) == "the house"


def test_figures_are_those_of_sacrebleu_and_say_how_they_were_counted() -> None:
    pytest.importorskip("sacrebleu")
    targets = ["la maison rouge est grande", "une fleur rouge"]
    exact = translations.figures(targets, targets)
    assert exact["bleu"] == pytest.approx(100) and exact["chrf"] == pytest.approx(100)
    assert exact["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    told = translations.figures(["la maison est grande", "la fleur"], targets) | translations.baselines(PAIRS, PAIRS)
    assert 0 < told["bleu"] < told["chrf"] < 100 and told["copy_chrf"] < 20 < 60 < told["dictionary_chrf"]
    lines = translations.lines(told)
    assert len(lines) == 4 and f"{told['dictionary_bleu']:.2f} BLEU" in lines[3]


def test_without_sacrebleu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match="--translate counts by sacrebleu, which is not installed: pip install"):
        translations.check("--translate")
    lines = translations.lines(translations.baselines(PAIRS, PAIRS))
    assert len(lines) == 2 and all("needs sacrebleu: pip install 'mlm-mpi[examples]'" in line for line in lines)
