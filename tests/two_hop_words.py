"""A few words about homes and capitals, and random models that read them: what the tests of causal localisation share."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trocar.anatomy import Anatomy, tiny_model
from trocar.trace.queries import language_tower

WORDS = ["the", "capital", "language", "of", "home", "employer", "Ann", "Bob", "Cid", "Aland", "Bland", "Cland", "is", *"uvwxyz"]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox", "opt", "phi3"]
PROMPTS = ["the capital of the home of Ann is", "the language of the employer of Bob is", "the capital of Cid is"]
SUBJECTS = ["the home of Ann", "the employer of Bob", "Cid"]
SOURCES = ["the capital of Aland is", "Bland is", "the language of Cland is"]
SOURCE_SUBJECTS = ["Aland", "Bland", "Cland"]
ANSWERS = ["u", "v w", "x y z"]
BRIDGES = ["Aland", "Bland Bob", "Cland"]


def tokenizer() -> Any:
    """A blank between words, no beginning of text."""
    inner: Any = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[UNK]", "[BOS]", *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


_MADE: dict[str, Any] = {}


def model_of(family: str) -> Any:
    if family not in _MADE:
        _MADE[family] = tiny_model(family).double()
    return _MADE[family]


def point_of(model: Any, kind: str, layer: int) -> str:
    tower = language_tower(Anatomy.of(model)).name
    name = {"block": "resid_post", "attention": "attn_out", "mlp": "mlp_out", "head": "heads", "neuron": "neurons"}[kind]
    return f"{tower + '.' if tower else ''}L{layer}.{name}"
