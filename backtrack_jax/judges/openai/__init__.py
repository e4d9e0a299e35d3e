"""The online judge: a language model behind any OpenAI-compatible endpoint labels the sentences of traces."""
