"""A LangChain chain that answers by REPLUG, offline: the shipped model reads a world that was made up.

Each retrieved document gets a prompt of its own, and the next-token distributions are mixed. The answer streams through
an ordinary chain; the trace on the message says what each document weighed, before the answer and after it.
"""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_rlm import ChatReplug, RLMEmbeddings

from rlm_plugins import embedded_encoder, embedded_reader
from rlm_plugins.reader.world import World

world = World(7, split="held_out")
town = next(entity for entity in world.entities if entity.kind == "town" and not entity.qualifier)

store = InMemoryVectorStore(RLMEmbeddings(embedded_encoder()))
store.add_texts([passage.text for passage in world.corpus(titled=0.0)])

chat = ChatReplug(llm=embedded_reader(), retriever=store, k=5, max_tokens=24)
chain = ChatPromptTemplate.from_template("Who founded {town}?") | chat | StrOutputParser()

print(f"Who founded {town.label}? ", end="")
for piece in chain.stream({"town": town.label}):
    print(piece, end="", flush=True)
print(f"   (the world says: {town.facts['founder']})")

for title, model in (
    ("Weights from the embeddings", chat),
    ("The same say for every document", chat.model_copy(update={"weights": "uniform"})),
):
    message = model.invoke(f"Who founded {town.label}?")
    trace = message.response_metadata["replug"]
    print(f"\n{title}: {message.text}")
    print(f"  documents that could be replaced without changing the answer: {trace['robust_radius']}")
    texts = {document.id: document.page_content for document in store.similarity_search(town.label, k=100)}
    for document in trace["documents"]:
        before, after = document["weight"], document["posterior_weight"]
        print(f"  weight {before:.2f}, after the answer {after:.2f}  {texts.get(document['id'], '')[:70]}")

message = chat.invoke(f"Who founded {town.label}?", trace="full")  # what a call says wins
tokens = message.response_metadata["replug"]["tokens"]
print("\nWhich document decided each token:", list(zip(tokens["text"], tokens["decided_by"], strict=True)))
