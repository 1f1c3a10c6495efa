"""The one place that knows how each architecture names its parts. To add a family, add a row and run `trocar.anatomy.conformance.check`.

Names are paths of modules. `a|b` means: whichever of them exists, the first one first (other versions of transformers, other task
heads); an empty alternative is the module itself. Paths of a tower's `root` and `head` start at the model, of `blocks`, `embedding`,
`final_norm` and `pooler` at the root, all others at the block. A name that is not found is absent (a gate, a bias, a post-norm);
`q k v` or `qkv`, `o`, `up` or `gate_up`, and `down` must be there. Which way a weight is stored is decided by the module's type
(`Conv1D` stores (in, out)), sizes are read from the modules themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trocar.core.errors import ConfigError


@dataclass(frozen=True)
class TowerRow:
    """How one tower names its parts.

    layouts: how a fused projection orders its rows, `q,k,v` (all rows of q, then of k, then of v) or `head:q,k,v` (each head's q, k and v
    together). residual: where the norms stand, `pre` (before attention and MLP), `post` (after each addition) or `parallel` (attention
    and MLP read the same input). modality: `text` or `vision`. when: (config attribute, its value, field, what the field is then).
    """

    root: str
    blocks: str
    embedding: str
    attn: str
    roles: Mapping[str, str]
    name: str = ""
    final_norm: str = ""
    head: str = ""
    pooler: str = ""
    mlp: str = ""
    causal: bool = False
    residual: str = "pre"
    modality: str = "text"
    config: str = ""  # the tower's own part of the model's config, "" = the config itself
    layouts: Mapping[str, str] = field(default_factory=dict)
    when: tuple[tuple[str, object, str, object], ...] = ()


@dataclass(frozen=True)
class Family:
    """A row of the table: the model types it serves and its towers (one without a name, or several with names)."""

    name: str
    model_types: tuple[str, ...]
    towers: tuple[TowerRow, ...]


HEADS = "lm_head|score|classifier|qa_outputs"

LLAMA = TowerRow(
    root="model|transformer|",
    blocks="layers",
    embedding="embed_tokens",
    final_norm="norm",
    head=HEADS,
    causal=True,
    attn="self_attn",
    mlp="mlp",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
)
GEMMA = replace(
    LLAMA,
    roles={
        **LLAMA.roles,
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    when=(("use_bidirectional_attention", True, "causal", False),),
)
# A mixture of experts in place of the MLP, in some or all blocks. The roles from `router` on are those of trocar.anatomy.experts.
SPARSE = replace(
    LLAMA,
    roles={
        **LLAMA.roles,
        "experts": "mlp.experts",
        "router": "mlp.gate",
        "shared_up": "mlp.shared_expert.up_proj",
        "shared_gate": "mlp.shared_expert.gate_proj",
        "shared_down": "mlp.shared_expert.down_proj",
        "shared_switch": "mlp.shared_expert_gate",
    },
)
PHI3 = replace(
    LLAMA,
    roles={
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    layouts={"qkv": "q,k,v", "gate_up": "gate,up"},
)
GPT2 = TowerRow(
    root="transformer|",
    blocks="h",
    embedding="wte",
    final_norm="ln_f",
    head=HEADS,
    causal=True,
    attn="attn",
    mlp="mlp",
    roles={
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
    },
    layouts={"qkv": "q,k,v"},
)
GPT_NEOX = TowerRow(
    root="gpt_neox|transformer|",
    blocks="layers",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head=f"embed_out|{HEADS}",
    causal=True,
    residual="pre",
    when=(("use_parallel_residual", True, "residual", "parallel"),),
    attn="attention",
    mlp="mlp",
    roles={
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },
    layouts={"qkv": "head:q,k,v"},
)
OPT = TowerRow(
    root="model.decoder|transformer.decoder|decoder",
    blocks="layers",
    embedding="embed_tokens",
    final_norm="final_layer_norm",
    head=HEADS,
    causal=True,
    when=(("do_layer_norm_before", False, "residual", "post"),),
    attn="self_attn",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
        "attn_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
    },
)
VIT = TowerRow(
    root="vit|",
    blocks="layers",
    embedding="embeddings.patch_embeddings",
    final_norm="layernorm",
    head="classifier",
    pooler="pooler",
    modality="vision",
    attn="attention",
    mlp="mlp",
    roles={
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "attn_norm": "layernorm_before",
        "mlp_norm": "layernorm_after",
    },
)
DEIT = replace(VIT, root="deit|", head="classifier|cls_classifier")
DINOV2 = TowerRow(
    root="dinov2|",
    blocks="encoder.layer",
    embedding="embeddings.patch_embeddings",
    final_norm="layernorm",
    head="classifier",
    modality="vision",
    attn="attention",
    mlp="mlp",
    roles={
        "q": "attention.q_proj|attention.attention.query",
        "k": "attention.k_proj|attention.attention.key",
        "v": "attention.v_proj|attention.attention.value",
        "o": "attention.o_proj|attention.output.dense",
        "up": "mlp.fc1|mlp.up_proj",
        "gate": "mlp.gate_proj",
        "gate_up": "mlp.weights_in",
        "down": "mlp.fc2|mlp.down_proj|mlp.weights_out",
        "attn_norm": "norm1",
        "mlp_norm": "norm2",
        "attn_scale": "layer_scale1",
        "mlp_scale": "layer_scale2",
    },
    layouts={"gate_up": "gate,up"},
)
CLIP_TEXT = TowerRow(
    root="text_model|",
    blocks="encoder.layers",
    embedding="embeddings.token_embedding",
    final_norm="final_layer_norm",
    head="text_projection",
    causal=True,
    attn="self_attn",
    mlp="mlp",
    roles={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "attn_norm": "layer_norm1",
        "mlp_norm": "layer_norm2",
    },
)
CLIP_VISION = replace(
    CLIP_TEXT,
    root="vision_model|",
    embedding="embeddings.patch_embedding",
    final_norm="post_layernorm",
    head="visual_projection|classifier",
    causal=False,
    modality="vision",
)
SIGLIP_TEXT = replace(CLIP_TEXT, head="text_model.head|head", causal=False)
SIGLIP_VISION = replace(CLIP_VISION, head="classifier", pooler="head")
BERT = TowerRow(
    root="bert|",
    blocks="encoder.layer",
    embedding="embeddings.word_embeddings",
    head="cls.predictions.decoder|classifier|qa_outputs|cls.seq_relationship|cls",
    pooler="pooler",
    residual="post",
    when=(("is_decoder", True, "causal", True),),
    attn="attention",
    roles={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "mlp_norm": "output.LayerNorm",
    },
)


def _two(text: TowerRow, vision: TowerRow, text_root: str, vision_root: str) -> tuple[TowerRow, TowerRow]:
    return (
        replace(text, name="text", root=text_root, config="text_config"),
        replace(vision, name="vision", root=vision_root, config="vision_config"),
    )


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a row. Raises ConfigError if one of its model types is taken."""
    for model_type in family.model_types:
        if model_type in FAMILIES:
            raise ConfigError(
                f"Model type '{model_type}' is already served by the family '{FAMILIES[model_type].name}'.", "Use another name."
            )
    FAMILIES.update(dict.fromkeys(family.model_types, family))
    return family


for _family in (
    Family("llama", ("llama",), (LLAMA,)),
    Family("mistral", ("mistral",), (LLAMA,)),
    Family("qwen2", ("qwen2",), (LLAMA,)),
    Family("qwen3", ("qwen3",), (LLAMA,)),
    Family("gemma2", ("gemma2",), (GEMMA,)),
    Family("gemma3", ("gemma3_text",), (GEMMA,)),
    Family(
        "gemma3 (two towers)",
        ("gemma3",),
        _two(GEMMA, SIGLIP_VISION, "model.language_model|language_model", "model.vision_tower|vision_tower"),
    ),
    Family("phi3", ("phi3",), (PHI3,)),
    Family("gpt2", ("gpt2",), (GPT2,)),
    Family("gpt_neox", ("gpt_neox",), (GPT_NEOX,)),
    Family("opt", ("opt",), (OPT,)),
    Family("vit", ("vit",), (VIT,)),
    Family("deit", ("deit",), (DEIT,)),
    Family("dinov2", ("dinov2",), (DINOV2,)),
    Family("clip", ("clip",), _two(CLIP_TEXT, CLIP_VISION, "text_model", "vision_model")),
    Family("clip (text tower)", ("clip_text_model",), (CLIP_TEXT,)),
    Family("clip (vision tower)", ("clip_vision_model",), (CLIP_VISION,)),
    Family("siglip", ("siglip",), _two(SIGLIP_TEXT, SIGLIP_VISION, "text_model", "vision_model")),
    Family("siglip (text tower)", ("siglip_text_model",), (SIGLIP_TEXT,)),
    Family("siglip (vision tower)", ("siglip_vision_model",), (SIGLIP_VISION,)),
    Family("bert", ("bert",), (BERT,)),
):
    register(_family)

# Known to `Anatomy.of(model, experts=True)` only: their attention and norms are a decoder's, their experts have no components.
EXPERT_FAMILIES: dict[str, Family] = {name: Family(name, (name,), (SPARSE,)) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")}
