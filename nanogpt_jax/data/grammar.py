"""A grammar that writes sentences, and what is known of its texts: each word's probability, so the best possible loss.

A state is what is still to be said, as a stack: words, and symbols that the rules replace. No symbol leads back to
itself, so there are finitely many states, and a sentence visits each at most once. A word leads from a state to one
other only, so whoever has read a text from the beginning of a sentence knows the state.
"""

# N words of a text, S states

import bisect
import functools
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np


class Word(NamedTuple):
    """A word or a mark, and how it agrees with others."""

    text: str
    role: str = ""  # of a word that others agree with: "subject"
    agrees: tuple[str, ...] = ()  # the roles of the words that decide its form
    forms: tuple[str, ...] = ()  # what could stand in its place if it agreed with others, its own text among them


Symbol: TypeAlias = Word | tuple[str, ...]
State: TypeAlias = tuple[Symbol, ...]
Rules: TypeAlias = Callable[..., list[tuple[float, State]]]  # a symbol's parts -> (weight, what replaces it)


class Arc(NamedTuple):
    """A word that may come next."""

    probability: float
    word: Word
    to: int  # number of the state after it


class Grammar:
    """Sentences from the symbol `start`. `rules`: the first part of a symbol -> what the others make of it.

    States have numbers, in the order in which they are met from state 0: the beginning of a sentence, and its end.
    """

    def __init__(self, start: tuple[str, ...], rules: dict[str, Rules]):
        self._rules = rules
        self._numbers: dict[State, int] = {(): 0}
        states: list[State] = [(start,)]
        self.arcs: list[dict[str, Arc]] = []  # [S]: a word's text -> its arc
        for state in states:  # grows meanwhile
            found: dict[str, Arc] = {}
            for probability, word, rest in self._next(state):
                to = self._numbers.setdefault(rest, len(states))
                if to == len(states):
                    states.append(rest)
                before = found.get(word.text, Arc(0.0, word, to))
                assert before[1:] == (word, to), f"after {word.text!r} the state is not known: {before.word} or {word}"
                found[word.text] = Arc(before.probability + probability, word, to)
            self.arcs.append(found)
        self._cumulative = [list(itertools.accumulate(a.probability for a in arcs.values())) for arcs in self.arcs]
        self._choices = [list(arcs.values()) for arcs in self.arcs]

    def _next(self, state: State) -> Iterable[tuple[float, Word, State]]:
        """(probability, word, state after it) of each word that may come next."""
        first, rest = state[0], state[1:]
        if isinstance(first, Word):
            yield 1.0, first, rest
            return
        options = self._rules[first[0]](*first[1:])
        total = math.fsum(weight for weight, _ in options)
        for weight, symbols in options:
            for probability, word, after in self._next(symbols + rest):
                yield weight / total * probability, word, after

    def sentence(self, chance: random.Random) -> list[Word]:
        """One sentence. Uses only `chance.random()`, which gives the same numbers in every version of Python."""
        state, words = 0, []
        while not words or state:
            cumulative = self._cumulative[state]
            arc = self._choices[state][bisect.bisect_right(cumulative, chance.random() * cumulative[-1])]
            words.append(arc.word)
            state = arc.to
        return words

    def read(self, words: Iterable[str]) -> list[Word]:
        """The words of sentences, with how they agree. ValueError if the grammar cannot say them."""
        state, found = 0, []
        for number, text in enumerate(words, start=1):
            if text not in self.arcs[state]:
                raise ValueError(
                    f"word {number}, {text!r}, cannot stand there; possible: {', '.join(self.arcs[state])}"
                )
            arc = self.arcs[state][text]
            found.append(arc.word)
            state = arc.to
        return found

    @functools.cached_property
    def visits(self) -> list[float]:
        """How often a sentence visits each state, on average [S]. Their sum is a sentence's mean number of words."""
        order: list[int] = []  # each state after all to which its words lead
        done, pending = {0}, [(0, iter(self._choices[0]))]
        while pending:
            state, arcs = pending[-1]
            following = next((a.to for a in arcs if a.to not in done), None)
            if following is None:
                order.append(state)
                pending.pop()
            else:
                done.add(following)
                pending.append((following, iter(self._choices[following])))
        visits = [0.0] * len(self.arcs)
        visits[0] = 1.0
        for state in reversed(order):
            for arc in self._choices[state]:
                if arc.to:
                    visits[arc.to] += visits[state] * arc.probability
        return visits

    def entropy(self) -> float:
        """Nats a word: the mean loss of whoever knows the grammar and all words before. Exact."""
        nats = (n * -a.probability * math.log(a.probability) for n, arcs in self._weighted() for a in arcs)
        return math.fsum(nats) / math.fsum(self.visits)

    def _weighted(self) -> Iterable[tuple[float, list[Arc]]]:
        return zip(self.visits, self._choices, strict=True)

    @functools.cached_property
    def _after(self) -> dict[str, dict[int, float]]:
        """A word's text -> the states after it, by how often it leads there. For a text whose beginning is unknown."""
        found: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for visits, arcs in self._weighted():
            for arc in arcs:
                found[arc.word.text][arc.to] += visits * arc.probability
        return found

    def nats(self, words: Sequence[str], block_size: int, stride: int = 0) -> np.ndarray:
        """-log p of each word of a text [N] after the first, by whoever knows the grammar: [N-1] float64.

        A model sees windows of a text (those of `batches.validation`), and so does this: of what stands before a window
        it knows only that it was text of this grammar. In a window it keeps the probability of every state (the forward
        algorithm), until only one is possible. So on average nobody is better in the same windows. In a single window,
        a model that has not seen it is better by c nats with a probability of at most exp(-c) (Markov's inequality for
        the ratio of the likelihoods); in many, nearly so, as they know next to nothing of each other.
        ValueError if the grammar cannot say the text.
        """
        stride = stride or block_size
        nats = np.zeros(len(words) - 1)
        for start in range(0, max(1, len(words) - 1 - block_size + stride), stride):
            belief = self._after.get(words[start], {})
            counted = start + (block_size - stride if start else 0)  # predictions after this place count
            for at in range(start, min(start + block_size + 1, len(words))):
                if at > start:
                    belief = self._followed(belief, words[at])
                total = sum(belief.values())
                if not total:
                    raise ValueError(f"word {at + 1}, {words[at]!r}, cannot stand there")
                if at > counted:
                    nats[at - 1] = -math.log(total)
                belief = {state: weight / total for state, weight in belief.items()}
        return nats

    def _followed(self, belief: dict[int, float], word: str) -> dict[int, float]:
        """The states after `word`, weighted by the probabilities of those before and of the word."""
        after: dict[int, float] = {}
        for state, probability in belief.items():
            if arc := self.arcs[state].get(word):
                after[arc.to] = after.get(arc.to, 0.0) + probability * arc.probability
        return after
