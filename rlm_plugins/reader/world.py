"""Invented worlds: towns, persons, firms, ships and books that no model has read about.

A world is made from a seed. Its entities have invented names and a handful of facts; `World.document` writes facts
down, `World.question` asks for them, and `World.example` puts both together: with the documents that hold the answer,
or with documents that look right and do not. The embedded reader was trained on the worlds of the split `"train"`;
the worlds of the split `"held_out"` share no name with them, so whatever the reader answers there it has read.

>>> world = World(7, split="held_out", entities=20)
>>> world.entities == World(7, split="held_out", entities=20).entities
True
>>> entity = world.entities[0]
>>> entity.kind, sorted(entity.facts)
('town', ['flag', 'founder', 'goods', 'region', 'river', 'settled'])
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args
from zlib import crc32

from ..errors import UsageError
from ..texts import Passage

Split = Literal["train", "held_out"]
ExampleKind = Literal["held", "unrelated", "missing", "same_relation", "two_hop", "long"]

HELD_OUT_SHARE = 5
"""One name in five (by `crc32`, which no Python version changes) is held out."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CONSONANTS = _words("b d f g h k l m n p r s t v w z th br")
_FIRST_SYLLABLES = tuple((c + v).capitalize() for c in _CONSONANTS for v in "aeiou")
_MIDDLE_SYLLABLES = tuple(c + v for c in "dklmnrtv" for v in "aeiou")
_LAST_SYLLABLES = tuple(c + v for c in "bdgklmnprstv" for v in _words("an en or in al ar el ov is und"))

_WORDS: Mapping[str, tuple[str, ...]] = {
    "colour": _words(
        "red blue green white black yellow violet grey brown pink purple crimson scarlet turquoise golden "
        "silver copper lilac magenta bronze cream beige maroon teal"
    ),
    "material": _words(
        "tin salt marble slate silk barley honey cedar wool glass paper pepper iron linen leather cheese "
        "wine saffron timber wheat coal pearls butter tea ropes vinegar"
    ),
    "profession": _words(
        "botanist painter sailor poet physician chemist judge weaver composer geologist baker teacher "
        "lawyer carpenter surgeon printer gardener soldier dancer merchant sculptor miller tailor farmer"
    ),
    "instrument": _words(
        "flute violin harp trumpet cello piano drum lute horn guitar clarinet bassoon fiddle mandolin "
        "zither trombone banjo bagpipe tuba whistle"
    ),
    "animal": _words(
        "cat dog parrot horse goat falcon tortoise rabbit monkey donkey raven fox goose hedgehog squirrel "
        "pigeon lizard camel bear snake"
    ),
    "product": _words(
        "lamps boats clocks ploughs bells kites violins engines mirrors maps carpets candles bottles "
        "needles wheels saddles hats knives barrels chairs boots pumps dolls spoons"
    ),
    "topic": _words(
        "gardens bridges winter storms music chess bees medicine deserts islands dreams trees justice "
        "voyages birds cooking stars rivers mountains friendship war poverty law childhood"
    ),
}
_TITLE_ADJECTIVES = _words(
    "Silent Silver Broken Distant Hidden Frozen Burning Empty Golden Narrow Ancient Final Secret "
    "Crooked Painted Restless Hollow Velvet Wandering Forgotten"
)
_TITLE_NOUNS = _words(
    "Garden Bridge Harbour Winter Lantern Orchard Mountain Clock River Mirror Tower Letter Island "
    "Window Forest Crown Journey Feather Shadow Kitchen Market Compass Valley Door"
)
_FIRM_ENDINGS = _words("Works Brothers Company Mills Yard House")
_QUALIFIERS: Mapping[str, tuple[str, ...]] = {
    "town": ("by the sea", "in the hills", "on the plain", "in the forest"),
    "person": ("the elder", "the younger"),
}
_LONG_QUESTIONS = ("Tell me about {entity}.", "Describe {entity}.", "What do you know about {entity}?")
LONG_ANSWER_FACTS = 4
"""How many facts a long answer tells: the first ones of the entity's kind, in that order."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """A relation: how it is stated, how it is asked for, and what its values are.

    `statements[0]` is the canonical sentence, which long answers use. `value` is the kind of entity (`"person"`, ...),
    `"name"` (an invented one), `"year"`, `"count"` or a word list. `reference` names the value by its entity ("the
    founder of Velgar"); only attributes whose values are entities have one.
    """

    name: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reference: str = ""


KINDS: Mapping[str, tuple[Attribute, ...]] = {
    "town": (
        Attribute(
            "founder",
            "person",
            ("{entity} was founded by {value}.", "The founder of {entity} was {value}.", "{value} founded {entity}."),
            ("Who founded {entity}?", "Who was the founder of {entity}?", "By whom was {entity} founded?"),
            "the founder of {entity}",
        ),
        Attribute(
            "settled",
            "year",
            (
                "{entity} was settled in {value}.",
                "{entity} dates from {value}.",
                "The history of {entity} began in {value}.",
            ),
            (
                "When was {entity} settled?",
                "From which year does {entity} date?",
                "When did the history of {entity} begin?",
            ),
        ),
        Attribute(
            "river",
            "name",
            (
                "{entity} lies on the river {value}.",
                "The river of {entity} is the {value}.",
                "The river {value} runs through {entity}.",
            ),
            ("Which river runs through {entity}?", "On which river does {entity} lie?"),
        ),
        Attribute(
            "goods",
            "material",
            (
                "{entity} is known for its {value}.",
                "The traders of {entity} sell {value}.",
                "{entity} lives from its {value}.",
            ),
            ("What is {entity} known for?", "What do the traders of {entity} sell?"),
        ),
        Attribute(
            "region",
            "name",
            (
                "{entity} is the capital of {value}.",
                "{entity} has long been the capital of {value}.",
                "The capital of {value} is {entity}.",
            ),
            ("Of which region is {entity} the capital?", "Which region has {entity} as its capital?"),
        ),
        Attribute(
            "flag",
            "colour",
            ("The flag of {entity} is {value}.", "{entity} flies a {value} flag."),
            ("What colour is the flag of {entity}?", "Which colour does the flag of {entity} have?"),
        ),
    ),
    "person": (
        Attribute(
            "profession",
            "profession",
            ("{entity} worked as a {value}.", "{entity} was a {value}.", "By trade {entity} was a {value}."),
            ("What was the profession of {entity}?", "What did {entity} work as?", "What was {entity} by trade?"),
        ),
        Attribute(
            "birthplace",
            "town",
            (
                "{entity} was born in {value}.",
                "The birthplace of {entity} was {value}.",
                "{value} was the birthplace of {entity}.",
            ),
            ("Where was {entity} born?", "What was the birthplace of {entity}?"),
            "the birthplace of {entity}",
        ),
        Attribute(
            "born",
            "year",
            (
                "The year of birth of {entity} was {value}.",
                "{entity} came into the world in {value}.",
                "The life of {entity} began in {value}.",
            ),
            ("In what year was {entity} born?", "What was the year of birth of {entity}?"),
        ),
        Attribute(
            "teacher",
            "person",
            (
                "{entity} studied under {value}.",
                "{entity} was a pupil of {value}.",
                "The teacher of {entity} was {value}.",
                "{value} taught {entity}.",
            ),
            ("Who taught {entity}?", "Under whom did {entity} study?", "Who was the teacher of {entity}?"),
            "the teacher of {entity}",
        ),
        Attribute(
            "instrument",
            "instrument",
            ("{entity} played the {value}.", "The instrument of {entity} was the {value}."),
            ("Which instrument did {entity} play?", "What was the instrument of {entity}?"),
        ),
        Attribute(
            "animal",
            "animal",
            ("{entity} kept a {value}.", "The favourite animal of {entity} was a {value}."),
            ("Which animal did {entity} keep?", "What was the favourite animal of {entity}?"),
        ),
    ),
    "firm": (
        Attribute(
            "product",
            "product",
            ("{entity} makes {value}.", "{entity} is a maker of {value}.", "The workers of {entity} build {value}."),
            ("What does {entity} make?", "What do the workers of {entity} build?"),
        ),
        Attribute(
            "head",
            "person",
            ("{entity} is led by {value}.", "The head of {entity} is {value}.", "{value} leads {entity}."),
            ("Who leads {entity}?", "Who is the head of {entity}?", "By whom is {entity} led?"),
            "the head of {entity}",
        ),
        Attribute(
            "seat",
            "town",
            (
                "{entity} has its seat in {value}.",
                "{entity} is based in {value}.",
                "The offices of {entity} are in {value}.",
            ),
            ("Where is {entity} based?", "Where does {entity} have its seat?", "Where are the offices of {entity}?"),
            "the seat of {entity}",
        ),
        Attribute(
            "staff",
            "count",
            (
                "{entity} employs {value} people.",
                "The staff of {entity} counts {value} people.",
                "Some {value} people work for {entity}.",
            ),
            ("How many people does {entity} employ?", "How many people work for {entity}?"),
        ),
        Attribute(
            "opened",
            "year",
            ("{entity} opened in {value}.", "{entity} has been in business since {value}."),
            ("When did {entity} open?", "Since when has {entity} been in business?"),
        ),
    ),
    "ship": (
        Attribute(
            "yard",
            "firm",
            ("{entity} was built by {value}.", "The builder of {entity} was {value}.", "{value} built {entity}."),
            ("Who built {entity}?", "Who was the builder of {entity}?"),
            "the builder of {entity}",
        ),
        Attribute(
            "captain",
            "person",
            ("{entity} sails under {value}.", "The captain of {entity} is {value}.", "{value} commands {entity}."),
            ("Who commands {entity}?", "Who is the captain of {entity}?", "Under whom does {entity} sail?"),
            "the captain of {entity}",
        ),
        Attribute(
            "port",
            "town",
            ("The home port of {entity} is {value}.", "{entity} sails from {value}."),
            ("What is the home port of {entity}?", "From where does {entity} sail?"),
            "the home port of {entity}",
        ),
        Attribute(
            "cargo",
            "material",
            (
                "{entity} carries {value}.",
                "The cargo of {entity} is {value}.",
                "The hold of {entity} is full of {value}.",
            ),
            ("What does {entity} carry?", "What is the cargo of {entity}?"),
        ),
        Attribute(
            "launched",
            "year",
            ("{entity} was launched in {value}.", "The launch of {entity} took place in {value}."),
            ("When was {entity} launched?", "When did the launch of {entity} take place?"),
        ),
    ),
    "book": (
        Attribute(
            "author",
            "person",
            ("{entity} was written by {value}.", "The author of {entity} is {value}.", "{value} wrote {entity}."),
            ("Who wrote {entity}?", "Who is the author of {entity}?", "By whom was {entity} written?"),
            "the author of {entity}",
        ),
        Attribute(
            "appeared",
            "year",
            ("{entity} appeared in {value}.", "The first edition of {entity} came out in {value}."),
            ("When did {entity} appear?", "When did the first edition of {entity} come out?"),
        ),
        Attribute(
            "topic",
            "topic",
            (
                "{entity} is about {value}.",
                "The topic of {entity} is {value}.",
                "The chapters of {entity} deal with {value}.",
            ),
            ("What is {entity} about?", "What is the topic of {entity}?"),
        ),
        Attribute(
            "publisher",
            "firm",
            (
                "{entity} was printed by {value}.",
                "The publisher of {entity} is {value}.",
                "{value} published {entity}.",
            ),
            ("Who published {entity}?", "Who is the publisher of {entity}?", "By whom was {entity} printed?"),
            "the publisher of {entity}",
        ),
    ),
}
_KIND_CYCLE = ("town", "person", "firm", "person", "ship", "town", "book", "person", "town", "firm")


def split_of(name: str) -> Split:
    """Which worlds may use a name: the training worlds or the held-out ones."""
    return "held_out" if crc32(name.encode()) % HELD_OUT_SHARE == 0 else "train"


def attribute_of(kind: str, name: str) -> Attribute:
    """The attribute of a kind of entity; `UsageError` where the kind has no such attribute."""
    for attribute in KINDS.get(kind, ()):
        if attribute.name == name:
            return attribute
    raise UsageError(f"no attribute {name!r} of kind {kind!r}; the kinds are {sorted(KINDS)}")


@dataclass(frozen=True, slots=True)
class Entity:
    """Something of the world. Homonyms share a `name`; their `qualifier` ("the elder") tells them apart.

    `facts` maps attributes to values in canonical order; `links` maps those attributes whose value is an entity of
    the same world to that entity's id.
    """

    id: str
    kind: str
    name: str
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    qualifier: str = ""

    @property
    def label(self) -> str:
        """What documents and questions call the entity."""
        return f"{self.name} {self.qualifier}" if self.qualifier else self.name


@dataclass(frozen=True, slots=True)
class Example:
    """A question with documents.

    `answer` is the world's answer. `holds_answer` says whether the documents contain it; if not, the answer is
    unknowable. `gold` are the indices of the documents that are needed. A long answer's facts are `facts`: (attribute,
    value, sentence, held by the documents).
    """

    kind: ExampleKind
    documents: tuple[Passage, ...]
    question: str
    answer: str
    holds_answer: bool
    entity: Entity
    attribute: str
    gold: tuple[int, ...] = ()
    facts: tuple[tuple[str, str, str, bool], ...] = ()


class World:
    """An invented world.

    `entities` is how many there are; `homonyms` the share of towns and persons which get a namesake of their own kind
    (a ship may also be named after a town); `linked` the share of values that are entities of this world rather than
    names never heard of again.
    """

    def __init__(
        self,
        seed: int,
        *,
        split: Split = "train",
        entities: int = 30,
        homonyms: float = 0.15,
        linked: float = 0.4,
    ) -> None:
        if split not in get_args(Split):
            raise UsageError(f"split must be one of {get_args(Split)}, got {split!r}")
        if entities < 1:
            raise UsageError(f"a world needs at least one entity, got entities={entities}")
        self.seed = seed
        self.split: Split = split
        self._rng = random.Random(f"{seed}/{split}/{entities}")
        self._used: set[str] = set()
        named = self._named_entities(entities, homonyms)
        self.entities: tuple[Entity, ...] = tuple(self._with_facts(named, linked))
        self._by_id = {entity.id: entity for entity in self.entities}

    # -- making the world ------------------------------------------------------------------------------------------

    def invent_name(self, rng: random.Random | None = None) -> str:
        """A name of this world's split which the world has not used yet."""
        rng = rng or self._rng
        while True:
            middle = rng.choice(_MIDDLE_SYLLABLES) if rng.random() < 0.35 else ""
            name = rng.choice(_FIRST_SYLLABLES) + middle + rng.choice(_LAST_SYLLABLES)
            if name not in self._used and split_of(name) == self.split:
                self._used.add(name)
                return name

    def _invent(self, kind: str) -> str:
        """A name for an entity of the kind."""
        if kind == "person":
            return f"{self.invent_name()} {self.invent_name()}"
        if kind == "firm":
            return f"{self.invent_name()} {self._rng.choice(_FIRM_ENDINGS)}"
        if kind != "book":
            return self.invent_name()
        while True:
            title = f"The {self._rng.choice(_TITLE_ADJECTIVES)} {self._rng.choice(_TITLE_NOUNS)}"
            if split_of(title) == self.split:
                return title

    def _named_entities(self, count: int, homonyms: float) -> list[Entity]:
        rng = self._rng
        named: list[Entity] = []
        while len(named) < count:
            kind = _KIND_CYCLE[len(named) % len(_KIND_CYCLE)]
            identity = f"{self.split}-{self.seed}-{len(named)}"
            same_kind = [e for e in named if e.kind == kind and not e.qualifier]
            towns = [e for e in named if e.kind == "town" and not e.qualifier]
            if kind in _QUALIFIERS and same_kind and rng.random() < homonyms:
                first = rng.choice(same_kind)
                one, other = rng.sample(_QUALIFIERS[kind], 2)
                named[named.index(first)] = Entity(first.id, kind, first.name, qualifier=one)
                named.append(Entity(identity, kind, first.name, qualifier=other))
            elif kind == "ship" and towns and rng.random() < homonyms:
                named.append(Entity(identity, kind, rng.choice(towns).name))
            else:
                name = self._invent(kind)
                if all(name != other.name for other in named):
                    named.append(Entity(identity, kind, name))
        return named

    def _with_facts(self, named: Sequence[Entity], linked: float) -> Iterator[Entity]:
        """Each entity with its facts. No two entities have the same entity as the value of the same attribute."""
        free = {
            (kind, attribute.name): self._rng.sample(targets, len(targets))
            for kind, attributes in KINDS.items()
            for attribute in attributes
            if (targets := [e for e in named if e.kind == attribute.value and not e.qualifier])
        }
        for entity in named:
            facts: dict[str, str] = {}
            links: dict[str, str] = {}
            for attribute in KINDS[entity.kind]:
                targets = free.get((entity.kind, attribute.name), [])
                if targets and targets[-1].name != entity.name and self._rng.random() < linked:
                    target = targets.pop()
                    facts[attribute.name], links[attribute.name] = target.name, target.id
                else:
                    facts[attribute.name] = self._value(attribute.value)
            yield Entity(entity.id, entity.kind, entity.name, facts, links, entity.qualifier)

    def _value(self, value: str) -> str:
        if value in KINDS:
            return self._invent(value)
        if value == "name":
            return self.invent_name()
        if value == "year":
            return str(self._rng.randint(1200, 1989))
        if value == "count":
            return str(self._rng.randint(12, 989))
        return self._rng.choice(_WORDS[value])

    # -- writing and asking ------------------------------------------------------------------------------------------

    def __getitem__(self, identity: str) -> Entity:
        return self._by_id[identity]

    def statement(self, entity: Entity, attribute: str, rng: random.Random, *, named: bool = True) -> str:
        """One fact as a sentence, in any of its paraphrases; `named=False` writes "this town" for its name."""
        template = rng.choice(attribute_of(entity.kind, attribute).statements)
        subject = entity.label if named else f"this {entity.kind}"
        sentence = template.format(entity=subject, value=entity.facts[attribute])
        return sentence[0].upper() + sentence[1:]

    def document(
        self,
        entity: Entity,
        attributes: Iterable[str],
        rng: random.Random,
        *,
        titled: bool = False,
        named: bool = True,
    ) -> Passage:
        """A document which states the facts in the given order.

        `titled` gives it the entity's label as title. With `named=False` the text itself never names the entity.
        """
        stated = list(attributes)
        if not stated:
            raise UsageError("a document needs at least one attribute to state")
        sentences = [
            self.statement(entity, attribute, rng, named=named and (position == 0 or rng.random() < 0.85))
            for position, attribute in enumerate(stated)
        ]
        return Passage(
            " ".join(sentences),
            id=f"{entity.id}-{'-'.join(stated)}",
            title=entity.label if titled else None,
            metadata={"entity": entity.id, "attributes": stated},
        )

    def question(self, entity: Entity, attribute: str, rng: random.Random) -> str:
        """A question for one fact, in any of its paraphrases."""
        return rng.choice(attribute_of(entity.kind, attribute).questions).format(entity=entity.label)

    def two_hops(self, entity: Entity) -> list[tuple[str, str]]:
        """The pairs of attributes that can be asked through a linked entity: (founder, birthplace), ..."""
        return [(first, second) for first, target in entity.links.items() for second in self[target].facts]

    def two_hop_question(self, entity: Entity, first: str, second: str, rng: random.Random) -> str:
        """A question such as "Where was the founder of Velgar born?"."""
        target = self[entity.links[first]]
        reference = attribute_of(entity.kind, first).reference.format(entity=entity.label)
        return rng.choice(attribute_of(target.kind, second).questions).format(entity=reference)

    def long_question(self, entity: Entity, rng: random.Random) -> str:
        """A request for an answer of several sentences."""
        return rng.choice(_LONG_QUESTIONS).format(entity=entity.label)

    def long_answer(self, entity: Entity) -> list[tuple[str, str, str]]:
        """The answer to a long question as (attribute, value, canonical sentence), in canonical order."""
        return [
            (attribute.name, value, attribute.statements[0].format(entity=entity.label, value=value))
            for attribute in KINDS[entity.kind][:LONG_ANSWER_FACTS]
            for value in [entity.facts[attribute.name]]
        ]

    # -- examples ----------------------------------------------------------------------------------------------------

    def example(
        self,
        kind: ExampleKind,
        rng: random.Random,
        *,
        documents: int = 1,
        entity: Entity | None = None,
        attribute: str | None = None,
    ) -> Example:
        """A question with `documents` documents.

        `held`: one of them holds the answer, the others look alike. `unrelated`: all are about other entities and
        other attributes. `missing`: one is about the right entity, none states the attribute. `same_relation`: all
        state the attribute, of other entities. `two_hop`: two documents are needed. `long`: several sentences, of
        which the documents may hold any share.
        """
        entity = entity or rng.choice(self.entities)
        attribute = attribute or rng.choice(list(entity.facts))
        if kind == "long":
            return self._long_example(rng, entity, documents)
        if kind == "two_hop":
            return self._two_hop_example(rng, documents)
        others = [name for name in entity.facts if name != attribute]
        passages: list[Passage] = []
        if kind == "held":
            stated = [attribute, *rng.sample(others, rng.randint(0, 2))]
            rng.shuffle(stated)
            passages.append(self._any_form(entity, stated, rng))
        elif kind == "missing" and documents:
            passages.append(self._any_form(entity, rng.sample(others, rng.randint(1, 3)), rng))
        gold = passages[0] if kind == "held" else None
        while len(passages) < documents:
            passages.append(self._distractor(entity, attribute, rng, kind, can_repeat=bool(passages)))
        rng.shuffle(passages)
        return Example(
            kind,
            tuple(passages),
            self.question(entity, attribute, rng),
            entity.facts[attribute],
            gold is not None,
            entity,
            attribute,
            tuple(index for index, passage in enumerate(passages) if passage is gold),
        )

    def _any_form(self, entity: Entity, attributes: Sequence[str], rng: random.Random) -> Passage:
        """With or without a title; rarely the title alone names the entity."""
        titled = rng.random() < 0.3
        return self.document(entity, attributes, rng, titled=titled, named=not titled or rng.random() < 0.8)

    def _distractor(
        self, entity: Entity, attribute: str, rng: random.Random, kind: ExampleKind, *, can_repeat: bool
    ) -> Passage:
        """A document that does not hold the entity's attribute but may look as if it did."""
        chance = rng.random()
        if can_repeat and kind in ("held", "missing") and chance < 0.2:
            others = [name for name in entity.facts if name != attribute]
            return self._any_form(entity, rng.sample(others, rng.randint(1, 2)), rng)
        alike = [e for e in self.entities if e.kind == entity.kind and e.id != entity.id]
        if kind == "same_relation" or (kind != "unrelated" and chance < 0.65):
            namesakes = [e for e in alike if e.name == entity.name]
            other = rng.choice(namesakes if namesakes and rng.random() < 0.5 else alike or self.entities)
            stated = [attribute] if attribute in other.facts else [rng.choice(list(other.facts))]
            stated += rng.sample([a for a in other.facts if a not in stated], rng.randint(0, 2))
            rng.shuffle(stated)
            return self._any_form(other, stated, rng)
        other = rng.choice([e for e in self.entities if e.id != entity.id] or self.entities)
        names = [name for name in other.facts if name != attribute]
        return self._any_form(other, rng.sample(names, rng.randint(1, 3)), rng)

    def _two_hop_example(self, rng: random.Random, documents: int) -> Example:
        starts = [entity for entity in self.entities if entity.links]
        if not starts:
            raise UsageError("no entity of this world leads to another: make it larger, or raise `linked`")
        entity = rng.choice(starts)
        first, second = rng.choice(self.two_hops(entity))
        target = self[entity.links[first]]
        passages = [self._any_form(entity, [first], rng), self._any_form(target, [second], rng)]
        needed = list(passages)
        while len(passages) < documents:
            passages.append(self._distractor(target, second, rng, "same_relation", can_repeat=False))
        rng.shuffle(passages)
        return Example(
            "two_hop",
            tuple(passages),
            self.two_hop_question(entity, first, second, rng),
            target.facts[second],
            True,
            entity,
            f"{first}/{second}",
            tuple(index for index, passage in enumerate(passages) if any(passage is one for one in needed)),
        )

    def _long_example(self, rng: random.Random, entity: Entity, documents: int) -> Example:
        told = self.long_answer(entity)
        held = set(rng.sample([name for name, _, _ in told], rng.randint(0, len(told)) if documents else 0))
        remaining = rng.sample(sorted(held), len(held))
        passages: list[Passage] = []
        while remaining and len(passages) < documents:
            take = len(remaining) if len(passages) == documents - 1 else rng.randint(1, min(3, len(remaining)))
            passages.append(self._any_form(entity, remaining[:take], rng))
            remaining = remaining[take:]
        gold = list(passages)
        while len(passages) < documents:
            passages.append(self._distractor(entity, rng.choice(told)[0], rng, "same_relation", can_repeat=False))
        rng.shuffle(passages)
        return Example(
            "long",
            tuple(passages),
            self.long_question(entity, rng),
            " ".join(sentence for _, _, sentence in told),
            len(held) == len(told),
            entity,
            "",
            tuple(index for index, passage in enumerate(passages) if any(passage is one for one in gold)),
            tuple((name, value, sentence, name in held) for name, value, sentence in told),
        )

    def corpus(self, *, titled: float = 0.5) -> list[Passage]:
        """A collection in which every fact stands at least once: per entity one document for each fact and one or two
        with several facts. A share `titled` of the documents has a title. The same world gives the same corpus."""
        rng = random.Random(f"{self.seed}/{self.split}/corpus")
        passages: list[Passage] = []
        for entity in self.entities:
            names = list(entity.facts)
            groups = [[name] for name in names] + [
                rng.sample(names, rng.randint(2, 3)) for _ in range(rng.randint(1, 2))
            ]
            for number, group in enumerate(groups):
                passage = self.document(entity, group, rng, titled=rng.random() < titled)
                passages.append(
                    Passage(passage.text, id=f"{entity.id}-{number}", title=passage.title, metadata=passage.metadata)
                )
        return passages


def tokenizer_words() -> list[str]:
    """Every word the worlds are written with, and the syllables of their names: what the tokenizer is built from."""
    words: set[str] = set(_FIRM_ENDINGS) | set(_TITLE_ADJECTIVES) | set(_TITLE_NOUNS) | {"The"}
    for listed in _WORDS.values():
        words.update(listed)
    sentences = [*_LONG_QUESTIONS, *(q for several in _QUALIFIERS.values() for q in several)]
    for kind, attributes in KINDS.items():
        sentences.append(f"This {kind} this {kind}")
        for attribute in attributes:
            sentences += [*attribute.statements, *attribute.questions, attribute.reference]
    for sentence in sentences:
        plain = sentence.replace("{entity}", " ").replace("{value}", " ").replace("'s", " ")
        words.update(word.strip(".,?") for word in plain.split())
    return sorted(word for word in words if word)


def name_syllables() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The syllables names begin with, and those they go on with."""
    return _FIRST_SYLLABLES, _MIDDLE_SYLLABLES + _LAST_SYLLABLES


def name_words() -> list[str]:
    """The words, not invented, that names are made of as well: of titles and of homonyms' qualifiers."""
    qualifiers = {several.split()[-1] for kind in _QUALIFIERS.values() for several in kind}
    return sorted({*_TITLE_ADJECTIVES, *_TITLE_NOUNS, *qualifiers})
