"""MT editing: locate heads and neurons in every language direction, keep what they share, add to the heads, switch off loops' neurons
(arXiv 2410.07054). Floor 5."""

from trocar.edit.neurons.config import LocateConfig, RecipeConfig
from trocar.edit.neurons.edit import Sentences, choose, chosen_set, operations, refined
from trocar.edit.neurons.instances import loop_instances, task_instances
from trocar.edit.neurons.locating import Located, locate, set_size
from trocar.edit.neurons.plan import factors, function_vector, heads_add, heads_replace, neurons_scale, random_like, vector_add
from trocar.edit.neurons.prompts import Corpus, Direction, clean_prompts, corrupted_prompts, prompt, split, test_prompts
from trocar.edit.neurons.translations import Rules, Translations, judge, translate

__all__ = [
    "Corpus", "Direction", "LocateConfig", "Located", "RecipeConfig", "Rules", "Sentences", "Translations", "choose", "chosen_set",
    "clean_prompts", "corrupted_prompts", "factors", "function_vector", "heads_add", "heads_replace", "judge", "locate", "loop_instances",
    "neurons_scale", "operations", "prompt", "random_like", "refined", "set_size", "split", "task_instances", "test_prompts", "translate",
    "vector_add",
]  # fmt: skip
