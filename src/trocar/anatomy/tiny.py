"""Tiny models of every family with random weights, for tests: of Trocar, and of a row that you add. Floor 1.

Every weight is random, biases and norms too, so that a bias that is forgotten or a norm that is skipped shows. Where the family allows it,
queries are grouped (4 heads on 2 key/value heads) and heads x head size (64) differs from the width (32).
"""

from __future__ import annotations

from typing import Any

import torch

from trocar.core.errors import ConfigError, nearest
from trocar.core.seeds import generator

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT = {**_SMALL, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False}
_IMAGE = {**_SMALL, "image_size": 8, "patch_size": 4}
_DINOV2 = {**{k: v for k, v in _IMAGE.items() if k != "intermediate_size"}, "mlp_ratio": 2}
_CLIP_TEXT = {**_TEXT, "max_position_embeddings": 16}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "sliding_window": 32}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_OPT = {
    **{k: v for k, v in _TEXT.items() if k != "intermediate_size"},
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}

# name -> (prefix of the classes in transformers, their ends: for the task `lm`, `class`, `base`, settings)
_LM = {"lm": "ForCausalLM", "class": "ForSequenceClassification", "base": "Model"}
_PICTURE = {"class": "ForImageClassification", "base": "Model"}
TINY: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llama": ("Llama", _LM, _GROUPED),
    "mistral": ("Mistral", _LM, {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", _LM, {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", _LM, _GROUPED),
    "gemma2": ("Gemma2", _LM, _GEMMA),
    "gemma3_text": ("Gemma3", {**_LM, "class": "TextForSequenceClassification", "base": "TextModel", "config": "TextConfig"}, _GEMMA),
    "gemma3": ("Gemma3", {"lm": "ForConditionalGeneration", "class": "ForSequenceClassification", "base": "Model"},
               {"text_config": {**_GEMMA, "vocab_size": 80}, "vision_config": {**_IMAGE, "model_type": "siglip_vision_model"},
                "mm_tokens_per_image": 4, "image_token_index": 70, "boi_token_index": 71, "eoi_token_index": 72}),
    "phi3": ("Phi3", _LM, _GROUPED),
    "gpt2": ("GPT2", {**_LM, "lm": "LMHeadModel"}, _GPT2),
    "gpt_neox": ("GPTNeoX", _LM, {**_TEXT, "max_position_embeddings": 64, "rotary_pct": 0.5, "tie_word_embeddings": False}),
    "gpt_neox-sequential": ("GPTNeoX", _LM, {**_TEXT, "max_position_embeddings": 64, "use_parallel_residual": False}),
    "opt": ("OPT", _LM, _OPT),
    "opt-post-norm": ("OPT", _LM, {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "vit": ("ViT", _PICTURE, _IMAGE),
    "deit": ("DeiT", _PICTURE, _IMAGE),
    "dinov2": ("Dinov2", _PICTURE, _DINOV2),
    "dinov2-swiglu": ("Dinov2", _PICTURE, {**_DINOV2, "use_swiglu_ffn": True}),
    "clip": ("CLIP", {"base": "Model", "class": "ForImageClassification"},
             {"text_config": _CLIP_TEXT, "vision_config": _IMAGE, "projection_dim": 16}),
    "clip_text_model": ("CLIP", {"base": "TextModel", "class": "TextModelWithProjection", "config": "TextConfig"}, _CLIP_TEXT),
    "clip_vision_model": ("CLIP", {"base": "VisionModel", "class": "VisionModelWithProjection", "config": "VisionConfig"}, _IMAGE),
    "siglip": ("Siglip", {"base": "Model", "class": "ForImageClassification"}, {"text_config": _CLIP_TEXT, "vision_config": _IMAGE}),
    "siglip_text_model": ("Siglip", {"base": "TextModel", "config": "TextConfig"}, _CLIP_TEXT),
    "siglip_vision_model": ("Siglip", {"base": "VisionModel", "config": "VisionConfig"}, _IMAGE),
    "bert": ("Bert", {"lm": "ForMaskedLM", "class": "ForSequenceClassification", "base": "Model"},
             {**_TEXT, "max_position_embeddings": 64}),
}  # fmt: skip

# mixtures of experts, for what asks for `Anatomy.of(model, experts=True)`; of qwen3_moe the first block is dense
_EXPERTS = {**_GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_PLAIN = {k: v for k, v in _EXPERTS.items() if k != "head_dim"}
TINY_EXPERTS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "mixtral": ("Mixtral", _LM, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", _LM, {**_PLAIN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", _LM, {**_EXPERTS, "mlp_only_layers": [0]}),
    "olmoe": ("Olmoe", {"lm": "ForCausalLM", "base": "Model"}, {k: v for k, v in _PLAIN.items() if k != "moe_intermediate_size"}),
}


def tiny_model(name: str, task: str = "", seed: int = 0, **overrides: Any) -> Any:
    """A random model of family `name` (a key of TINY or TINY_EXPERTS) in evaluation mode, float32 on the CPU.

    task: `lm` (language model or masked language model), `class` (classifier, or with the projection), `base` (no head); by default the
    first of them that the family has. overrides: settings of its config; `text_config`/`vision_config` are merged into the defaults.
    """
    known = {**TINY, **TINY_EXPERTS}
    if name not in known:
        raise ConfigError(f"There is no tiny model '{name}'.", nearest(name, known))
    import transformers

    prefix, ends, settings = known[name]
    tasks = [key for key in ("lm", "class", "base") if key in ends]
    task = task or ("base" if name in ("clip", "siglip", "clip_text_model", "clip_vision_model") else tasks[0])
    if task not in tasks:
        raise ConfigError(f"The tiny {name} has no task '{task}'.", nearest(task, tasks))
    merged = dict(settings)
    for key, value in overrides.items():
        merged[key] = {**settings[key], **value} if isinstance(value, dict) and isinstance(settings.get(key), dict) else value
    config = getattr(transformers, prefix + ends.get("config", "Config"))(**merged)
    state = torch.random.get_rng_state()
    model = getattr(transformers, prefix + ends[task])(config)
    torch.random.set_rng_state(state)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter its own random values: matrices with spread 1/sqrt(columns), vectors 0.1 around what they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed, name))
            if parameter.ndim >= 2:
                columns = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
                parameter.copy_(noise / columns**0.5)
            else:
                parameter.add_(0.1 * noise.to(parameter.dtype))


def tiny_inputs(model: Any, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for a model or an Anatomy: random token ids without special ones (rows, length), pixels (rows, channels, side, side)
    or both."""
    from trocar.anatomy.resolve import Anatomy

    anatomy = Anatomy.of(model)
    inputs: dict[str, torch.Tensor] = {}
    for tower in anatomy.towers.values():
        inputs |= tower_inputs(tower, rows, length, seed)
    if anatomy.family.name == "gemma3 (two towers)":
        config = anatomy.model.config
        picture = torch.full((rows, config.mm_tokens_per_image), config.image_token_id)
        inputs["input_ids"] = torch.cat([picture, inputs["input_ids"]], dim=1)
        inputs["token_type_ids"] = (inputs["input_ids"] == config.image_token_id).long()
    return inputs


def tower_inputs(tower: Any, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for one tower alone, for `tower.root(**inputs)`."""
    device = next(tower.root.parameters()).device
    if tower.modality == "text":
        ids = torch.randint(3, min(tower.config.vocab_size, 64), (rows, length), generator=generator(seed, "ids"))
        return {"input_ids": ids.to(device)}
    side = tower.config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (rows, getattr(tower.config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=generator(seed, "pixels"))
    return {"pixel_values": pixels.to(device, next(tower.root.parameters()).dtype)}
