"""The invented worlds: the same seed makes the same world, held-out names are new, and what is flagged is true."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from rlm_plugins.errors import UsageError
from rlm_plugins.reader.world import (
    KINDS,
    LONG_ANSWER_FACTS,
    Entity,
    Example,
    World,
    attribute_of,
    split_of,
)


def invented_words(world: World) -> set[str]:
    """Every invented word of a world: entities, and values that are names."""
    words: set[str] = set()
    for entity in world.entities:
        words |= _words_of(entity.kind, entity.name)
        for name, value in entity.facts.items():
            kind = attribute_of(entity.kind, name).value
            if kind in KINDS or kind == "name":
                words |= _words_of(kind, value)
    return words


def _words_of(kind: str, name: str) -> set[str]:
    if kind == "book":
        return {name}
    return {name.split()[0]} if kind == "firm" else set(name.split())


def examples(world: World, kind: str, count: int, documents: int) -> Iterator[Example]:
    rng = random.Random(f"{kind}{documents}")
    for _ in range(count):
        yield world.example(kind, rng, documents=documents)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def world() -> World:
    return World(11, split="held_out", entities=60)


def test_a_seed_makes_one_world_and_another_seed_another() -> None:
    assert World(3).entities == World(3).entities
    assert World(3).corpus() == World(3).corpus()
    assert World(3).entities != World(4).entities


def test_a_world_does_not_depend_on_pythons_hash_seed() -> None:
    assert [entity.label for entity in World(5, entities=3).entities] == [
        entity.label for entity in World(5, entities=3).entities
    ]
    assert split_of("Velgar") == "train"


def test_held_out_worlds_share_no_name_with_training_worlds() -> None:
    train = set[str]().union(*(invented_words(World(seed, entities=60)) for seed in range(30)))
    held_out = set[str]().union(*(invented_words(World(seed, split="held_out", entities=60)) for seed in range(30)))
    assert len(train) > 1000
    assert len(held_out) > 500
    assert not train & held_out
    assert all(split_of(word) == "train" for word in train)
    assert all(split_of(word) == "held_out" for word in held_out)


def test_every_entity_has_every_attribute_of_its_kind_in_canonical_order(world: World) -> None:
    for entity in world.entities:
        assert list(entity.facts) == [attribute.name for attribute in KINDS[entity.kind]]


def test_links_lead_to_the_entity_whose_name_is_the_value(world: World) -> None:
    linked = [(entity, name, target) for entity in world.entities for name, target in entity.links.items()]
    assert len(linked) > 10
    for entity, name, target in linked:
        assert world[target].label == entity.facts[name]
        assert world[target].kind == attribute_of(entity.kind, name).value


def test_no_two_entities_share_a_linked_value_of_one_attribute(world: World) -> None:
    seen = [(entity.kind, name, target) for entity in world.entities for name, target in entity.links.items()]
    assert len(seen) == len(set(seen))


def test_there_are_homonyms_and_their_labels_tell_them_apart(world: World) -> None:
    labels = [(entity.kind, entity.label) for entity in world.entities]
    assert len(labels) == len(set(labels))
    names = [(entity.kind, entity.name) for entity in world.entities]
    assert len(set(names)) < len(names)
    for entity in world.entities:
        alike = [other for other in world.entities if (other.kind, other.name) == (entity.kind, entity.name)]
        assert bool(entity.qualifier) == (len(alike) > 1)


def test_a_document_states_its_facts_and_names_its_entity(world: World) -> None:
    rng = random.Random(0)
    entity = world.entities[0]
    passage = world.document(entity, ["river", "flag"], rng)
    assert entity.label in passage.text
    assert entity.facts["river"] in passage.text
    assert entity.facts["flag"] in passage.text
    assert passage.title is None
    assert passage.metadata == {"entity": entity.id, "attributes": ["river", "flag"]}


def test_a_document_may_leave_the_name_to_its_title(world: World) -> None:
    entity = world.entities[0]
    for seed in range(20):
        passage = world.document(entity, ["river", "goods"], random.Random(seed), titled=True, named=False)
        assert passage.title == entity.label
        assert entity.name not in passage.text


def test_sentences_begin_with_a_capital_and_end_with_a_full_stop(world: World) -> None:
    for passage in world.corpus():
        assert re.fullmatch(r"([A-Z][^.]*\.)( [A-Z][^.]*\.)*", passage.text), passage.text


@pytest.mark.parametrize("documents", [1, 2, 3, 10])
def test_a_held_answer_stands_in_a_gold_document(world: World, documents: int) -> None:
    for example in examples(world, "held", 80, documents):
        assert example.holds_answer
        assert len(example.documents) == documents
        (gold,) = example.gold
        passage = example.documents[gold]
        assert example.answer in passage.text
        assert example.entity.label in passage.text or example.entity.label == passage.title
        assert example.entity.label in example.question
        assert example.answer == example.entity.facts[example.attribute]


@pytest.mark.parametrize("kind", ["unrelated", "missing", "same_relation"])
@pytest.mark.parametrize("documents", [1, 2, 3])
def test_documents_flagged_as_useless_do_not_state_the_fact(world: World, kind: str, documents: int) -> None:
    for example in examples(world, kind, 80, documents):
        assert not example.holds_answer
        assert not example.gold
        for passage in example.documents:
            own = passage.metadata["entity"] == example.entity.id
            assert not (own and example.attribute in passage.metadata["attributes"])
            if kind == "unrelated":
                assert not own
                assert example.attribute not in passage.metadata["attributes"]
        if kind == "missing":
            assert any(passage.metadata["entity"] == example.entity.id for passage in example.documents)


def test_without_documents_nothing_is_held(world: World) -> None:
    example = world.example("unrelated", random.Random(1), documents=0)
    assert example.documents == ()
    assert not example.holds_answer


def test_two_hops_need_two_documents(world: World) -> None:
    for example in examples(world, "two_hop", 40, 3):
        assert len(example.gold) == 2
        first, second = example.attribute.split("/")
        target = world[example.entity.links[first]]
        assert example.answer == target.facts[second]
        assert target.name not in example.question
        assert example.entity.label in example.question


def test_long_answers_tell_canonical_sentences_in_canonical_order(world: World) -> None:
    some: list[float] = []
    for example in examples(world, "long", 60, 3):
        assert len(example.facts) == LONG_ANSWER_FACTS
        assert example.answer == " ".join(sentence for _, _, sentence, _ in example.facts)
        stated = {
            name
            for passage in example.documents
            if passage.metadata["entity"] == example.entity.id
            for name in passage.metadata["attributes"]
        }
        for name, value, sentence, held in example.facts:
            assert held == (name in stated)
            assert value in sentence
        some.append(sum(held for *_, held in example.facts) / LONG_ANSWER_FACTS)
        assert example.holds_answer == (some[-1] == 1)
    assert min(some) == 0
    assert max(some) == 1


def test_the_corpus_states_every_fact_and_numbers_its_passages(world: World) -> None:
    corpus = world.corpus()
    identities = [passage.id for passage in corpus]
    assert len(identities) == len(set(identities))
    stated = {(p.metadata["entity"], name) for p in corpus for name in p.metadata["attributes"]}
    assert stated == {(entity.id, name) for entity in world.entities for name in entity.facts}
    assert 0.3 < sum(passage.title is not None for passage in corpus) / len(corpus) < 0.7


def test_entities_of_a_small_world_work_too() -> None:
    small = World(1, entities=1)
    rng = random.Random(0)
    assert len(small.entities) == 1
    assert len(small.example("held", rng, documents=1).documents) == 1
    with pytest.raises(UsageError, match="linked"):
        small.example("two_hop", rng, documents=2)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UsageError, match="split"):
        World(1, split="test")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="entities=0"):
        World(1, entities=0)
    with pytest.raises(UsageError, match="no attribute 'river' of kind 'person'"):
        attribute_of("person", "river")
    world = World(1)
    with pytest.raises(UsageError, match="at least one attribute"):
        world.document(world.entities[0], [], random.Random(0))


def test_an_entity_without_a_namesake_is_called_by_its_name() -> None:
    assert Entity("e", "town", "Velgar").label == "Velgar"
    assert Entity("e", "town", "Velgar", qualifier="by the sea").label == "Velgar by the sea"
