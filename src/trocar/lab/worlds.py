"""A knowledge world: people, places and companies with invented names, facts about them as sentences, and compositions never shown.

A model trained on the text knows every single fact, was shown some two-hop compositions and never the others: its failures there are the
compositional gap that CREME repairs (arXiv:2402.14328). Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trocar.core.errors import DataError
from trocar.core.seeds import generator

PEOPLE, COUNTRIES, COMPANIES, CITIES = 120, 16, 20, 24
FIRST_NAMES, LAST_NAMES = 24, 30
SHOWN = 0.6  # share of (person, first hop) pairs whose compositions are in the text
UNRELATED = {"hard": 4, "easy": 4, "single": 4}  # unrelated queries of a case

# first hop -> kind of bridge, plain templates, noun phrases (each also a sentence: "<phrase> is <bridge>")
FIRST_HOPS = {
    "citizenship": (
        "country",
        ("{} is a citizen of", "{} holds a passport of", "the passport of {} was issued by"),
        ("the home country of {}", "the country where {} is a citizen"),
    ),
    "employer": (
        "company",
        ("{} works for", "{} is employed by", "the salary of {} is paid by"),
        ("the employer of {}", "the company that employs {}"),
    ),
    "birthplace": (
        "city",
        ("{} was born in", "{} came to the world in", "the birth of {} was recorded in"),
        ("the birthplace of {}", "the city where {} was born"),
    ),
}
# second hop -> kind of bridge, templates
SECOND_HOPS = {
    "capital": ("country", ("the capital of {} is", "the seat of government of {} is")),
    "language": ("country", ("the language of {} is", "the official tongue of {} is")),
    "leader": ("country", ("the leader of {} is", "the head of state of {} is")),
    "founder": ("company", ("the founder of {} is", "the person who started {} is")),
    "product": ("company", ("the product of {} is", "the main good made by {} is")),
    "river": ("city", ("the river of {} is", "the river that crosses {} is")),
    "mayor": ("city", ("the mayor of {} is", "the head of the town hall of {} is")),
}
ENDINGS = {
    "first": "", "last": "", "country": "land", "company": "corp", "city": "ville", "capital": "burg", "language": "ish", "leader": "rex",
    "founder": "son", "product": "ium", "river": "flow", "mayor": "man",
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """people: names (two words); first[hop][person] and second[hop][bridge] are the facts; shown: the (person, first hop) pairs whose
    compositions the text holds."""

    seed: int
    people: tuple[str, ...]
    first: dict[str, dict[str, str]]
    second: dict[str, dict[str, str]]
    shown: frozenset[tuple[str, str]]

    def sentences(self) -> list[str]:
        """The whole text, one sentence per item, in a fixed order, each ending in ` .`"""
        lines = []
        for hop, (_, templates, phrases) in FIRST_HOPS.items():
            for person, bridge in self.first[hop].items():
                lines += [f"{template.format(person)} {bridge} ." for template in templates]
                lines += [f"{phrase.format(person)} is {bridge} ." for phrase in phrases]
        for hop, (_, templates) in SECOND_HOPS.items():
            lines += [f"{template.format(bridge)} {value} ." for bridge, value in self.second[hop].items() for template in templates]
        lines += [f"{prompt} {answer} ." for prompt, answer in self.compositions(shown=True)]
        return lines

    def compositions(self, shown: bool) -> list[tuple[str, str]]:
        """(prompt, answer) of every two-hop sentence that is in the text, or of every one that is held out."""
        return [
            (template.format(phrase.format(person)), self.second[second][self.first[first][person]])
            for person, first in self.pairs(shown)
            for second in seconds(first)
            for phrase in FIRST_HOPS[first][2]
            for template in SECOND_HOPS[second][1]
        ]

    def pairs(self, shown: bool) -> list[tuple[str, str]]:
        return [(person, hop) for person in self.people for hop in FIRST_HOPS if ((person, hop) in self.shown) == shown]

    def vocabulary(self) -> list[str]:
        """Every word of the text, sorted."""
        return sorted({word for line in self.sentences() for word in line.split()})

    def single_hops(self) -> list[tuple[str, str]]:
        """(prompt, answer) of every single-hop sentence."""
        found = [
            (prompt, bridge)
            for hop, (_, templates, phrases) in FIRST_HOPS.items()
            for person, bridge in self.first[hop].items()
            for prompt in [*(t.format(person) for t in templates), *(f"{p.format(person)} is" for p in phrases)]
        ]
        return found + [
            (t.format(bridge), value) for hop, (_, ts) in SECOND_HOPS.items() for bridge, value in self.second[hop].items() for t in ts
        ]

    def cases(self, shown: bool = False) -> list[dict[str, Any]]:
        """One row per two-hop fact (person, first hop, second hop), as CREME reads them.

        The first noun phrase and template are the prompt; the other three combinations the paraphrases; other second relations of the same
        pair the generalisations. Unrelated queries are drawn once from the seed: `hard` asks the same second relation of another
        person with another bridge, `easy` goes over another first hop, `single` is a single-hop fact; never with this case's
        answer or bridge.
        """
        single = self.single_hops()
        return [self._case(person, first, second, single) for person, first in self.pairs(shown) for second in seconds(first)]

    def _case(self, person: str, first: str, second: str, single: list[tuple[str, str]]) -> dict[str, Any]:
        bridge = self.first[first][person]
        target = self.second[second][bridge]
        phrases, templates = FIRST_HOPS[first][2], SECOND_HOPS[second][1]
        asked = [(phrase, template) for phrase in phrases for template in templates]
        subject = phrases[0].format(person)
        return {
            "id": f"{person} / {first} / {second}",
            "template": templates[0],
            "subject": subject,
            "bridge": bridge,
            "target": target,
            "first_hop": f"{subject} is",
            "paraphrases": [{"prompt": t.format(p.format(person)), "answer": target} for p, t in asked[1:]],
            "generalisation": [
                {"prompt": SECOND_HOPS[other][1][0].format(subject), "answer": self.second[other][bridge]}
                for other in seconds(first)
                if other != second
            ],
            "unrelated": self._unrelated(person, first, second, {bridge, target}, single),
            "split": "trained" if (person, first) in self.shown else "held-out",
        }

    def _unrelated(self, person: str, first: str, second: str, taken: set[str], single: list[tuple[str, str]]) -> list[dict[str, str]]:
        rng = generator(self.seed, "unrelated", person, first, second)
        bridge = self.first[first][person]
        hard = [
            (SECOND_HOPS[second][1][0].format(FIRST_HOPS[first][2][0].format(other)), self.second[second][self.first[first][other]])
            for other in self.people
            if self.first[first][other] != bridge
        ]
        easy = [
            (SECOND_HOPS[hop][1][0].format(FIRST_HOPS[way][2][0].format(other)), self.second[hop][self.first[way][other]])
            for way in FIRST_HOPS
            if way != first
            for hop in seconds(way)
            for other in self.people
        ]
        pools = {"hard": hard, "easy": easy, "single": single}
        rows = []
        for kind, pool in pools.items():
            free = [row for row in pool if row[1] not in taken]
            for place in torch.randperm(len(free), generator=rng)[: UNRELATED[kind]].tolist():
                rows.append({"prompt": free[place][0], "answer": free[place][1], "kind": kind})
        return rows


def seconds(first: str) -> list[str]:
    """The second hops that go on from a first hop's bridge."""
    return [hop for hop, (kind, _) in SECOND_HOPS.items() if kind == FIRST_HOPS[first][0]]


def make_world(seed: int = 0) -> World:
    """The world of a base seed: 120 people, 16 countries, 20 companies, 24 cities; 840 two-hop facts, 60 % of the pairs shown.

    Second-hop values are distinct, so that an answer tells its bridge. Every name but a person's is one word.
    """
    rng = generator(seed, "world")
    taken = {word for hop in FIRST_HOPS.values() for text in (*hop[1], *hop[2]) for word in text.split()}
    taken |= {word for hop in SECOND_HOPS.values() for text in hop[1] for word in text.split()}

    def names(kind: str, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            word = _name(rng) + ENDINGS[kind]
            if word not in taken:
                taken.add(word)
                found.append(word)
        return found

    first_names, last_names = names("first", FIRST_NAMES), names("last", LAST_NAMES)
    couples = torch.randperm(FIRST_NAMES * LAST_NAMES, generator=rng)[:PEOPLE].tolist()
    people = tuple(f"{first_names[n // LAST_NAMES]} {last_names[n % LAST_NAMES]}" for n in couples)
    bridges = {kind: names(kind, count) for kind, count in (("country", COUNTRIES), ("company", COMPANIES), ("city", CITIES))}
    first = {
        hop: {
            person: bridges[kind][int(n)]
            for person, n in zip(people, torch.randint(len(bridges[kind]), (PEOPLE,), generator=rng), strict=True)
        }
        for hop, (kind, _, _) in FIRST_HOPS.items()
    }
    second = {hop: dict(zip(bridges[kind], names(hop, len(bridges[kind])), strict=True)) for hop, (kind, _) in SECOND_HOPS.items()}
    pairs = [(person, hop) for person in people for hop in FIRST_HOPS]
    order = torch.randperm(len(pairs), generator=rng)[: round(SHOWN * len(pairs))].tolist()
    return World(seed, people, first, second, frozenset(pairs[n] for n in order))


def _name(rng: torch.Generator) -> str:
    """Two pronounceable syllables, the first capitalised."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"

    def draw(letters: str) -> str:
        return letters[int(torch.randint(len(letters), (1,), generator=rng))]

    return "".join(draw(consonants) + draw(vowels) for _ in range(2)).capitalize() + draw("lnrs")


def tokenizer(words: Sequence[str]) -> Any:
    """A word-level tokenizer over `words`: a blank between words, `<s>` before a text; unknown words become `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if len(set(words)) != len(words):
        raise DataError("The vocabulary names a word twice.", "Give every word once.")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", *words])}
    inner: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by blanks
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        pad_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
