"""Tiny decoders: the keys of TINY that generate text from left to right."""

CAUSAL = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_neox-sequential",
    "opt",
    "opt-post-norm",
]
