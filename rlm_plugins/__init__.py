"""Retrieval-based language models over a frozen model, as parts of LangChain and LlamaIndex."""
