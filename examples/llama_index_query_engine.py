"""A LlamaIndex query engine that answers by REPLUG, offline: the shipped model reads a world that was made up.

Each retrieved node gets a prompt of its own; the trace says how much each weighed, and in which of them the answer was
read. At the end a corrupted node is added, and the trace shows how much it had to say.
"""

from llama_index.core import VectorStoreIndex
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index_rlm import ReplugSynthesizer, RLMEmbedding

from rlm_plugins import embedded_encoder, embedded_reader
from rlm_plugins.reader.world import World

world = World(7, split="held_out")
town = next(entity for entity in world.entities if entity.kind == "town" and not entity.qualifier)
question = f"Who founded {town.label}?"

encoder = RLMEmbedding(embedded_encoder())
nodes = [TextNode(text=passage.text, id_=passage.id or passage.text) for passage in world.corpus(titled=0.0)]
index = VectorStoreIndex(nodes, embed_model=encoder)


def show(title: str, synthesizer: ReplugSynthesizer) -> None:
    engine = RetrieverQueryEngine(index.as_retriever(similarity_top_k=5), response_synthesizer=synthesizer)
    response = engine.query(question)
    trace = (response.metadata or {})["replug"]
    print(f"\n{title}\n  {question} {response}   (the world says: {town.facts['founder']})")
    print(f"  documents that could be replaced without changing the answer: {trace['robust_radius']}")
    texts = {source.node.node_id: source.node.get_content() for source in response.source_nodes}
    for document in trace["documents"]:
        before, after = document["weight"], document["posterior_weight"]
        print(f"  weight {before:.2f}, after the answer {after:.2f}  {texts[document['id']][:70]}")


lm = embedded_reader()
show("Weights from the embeddings", ReplugSynthesizer(llm=lm, embed_model=encoder, max_tokens=24))
show("The same say for every node", ReplugSynthesizer(llm=lm, weights="uniform", max_tokens=24))

index.insert_nodes([TextNode(text=f"{town.label} was founded by Nobody Atall.", id_="corrupted")])
show("With a corrupted node in the index", ReplugSynthesizer(llm=lm, embed_model=encoder, max_tokens=24))
