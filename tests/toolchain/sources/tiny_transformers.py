"""Any configuration of transformers made small: every size that a configuration has by a usual name is set."""

from __future__ import annotations

import re
from typing import Any

HEADS, WIDTH, LAYERS = 4, 32, 1

SIZES: tuple[tuple[str, int], ...] = (
    (r"num_(key_value|kv)_heads|num_global_key_value_heads|n_kv_heads|multi_query_group_num", 2),
    (r"(.*_)?(num|n)_(\w+_)?heads|n_heads?|attention_heads|num_attention_groups|\w*n_heads?", HEADS),
    (r"(global_)?head_dim|d_kv|attention_head_size|kv_channels|v_head_dim|dim_head|\w*head_dim", WIDTH // HEADS),
    (r"(num|n)_(\w+_)?layers?|n_layer|\w*_layers|num_blocks|\w+_num_layers", LAYERS),
    (r"vocab_size|\w+_vocab_size", 130),
    (r"(\w+_)?intermediate_size|\w*ffn_dim|d_ff|d_inner|n_inner|\w*ffn_size|feedforward_dim|d_inner_hid", 2 * WIDTH),
    (r"max_position_embeddings|n_positions|max_\w*positions?", 64),
    (
        r"\w*hidden_size|\w*hidden_dim|d_model|\w*d_model|embed_dim|dim|n_embd|\w*embedding_size|\w*embed_dim|emb_dim",
        WIDTH,
    ),
    (r"projection_dim|\w*projection_size|encoder_hidden_dim|encoder_hidden_size|cross_attention_hidden_size", WIDTH),
    (r"image_size", 64),
    (r"rotary_dim|qk_rope_head_dim|qk_nope_head_dim", WIDTH // HEADS),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|n_experts", 4),
    (r"num_queries|num_query_tokens", 6),
    (r"num_experts_per_tok|top_k|moe_topk|moe_k", 2),
)
KEPT = re.compile(r"num_labels|.*token_id|num_channels|num_hidden_groups|num_mel_bins|.*_kernel.*|num_feature_levels")


def shrink(config: Any, depth: int = 0) -> Any:
    """The same configuration with small sizes, and the configurations inside it too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 3:
            shrink(value, depth + 1)
        elif isinstance(value, int) and not isinstance(value, bool) and not KEPT.fullmatch(name):
            smaller = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            set_quietly(config, name, min(smaller, value) if value > 0 else value)
        elif isinstance(value, list | tuple) and re.fullmatch(r"depths|\w*_depths|num_blocks|\w*layers", name):
            set_quietly(config, name, type(value)(1 for _ in value))
    layers, stages = getattr(config, "num_hidden_layers", None), getattr(config, "stage_names", None)
    if isinstance(layers, int) and stages and len(stages) > layers + 1 and not hasattr(config, "depths"):
        for name, value in (("stage_names", stages[: layers + 1]), ("_out_features", [stages[layers]])):
            set_quietly(config, name, value)
        set_quietly(config, "_out_indices", [layers])
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and name in ("layer_types", "mlp_layer_types") and value:
            count = getattr(config, "num_hidden_layers", LAYERS)
            kinds = list(dict.fromkeys(value))
            set_quietly(config, name, [kinds[i % len(kinds)] for i in range(count)])
        if re.fullmatch(r"(pad|bos|eos|cls|sep|mask|decoder_start)_token_id", name) and isinstance(value, int):
            set_quietly(config, name, min(value, 3))
    return config


def set_quietly(config: Any, name: str, value: Any) -> None:
    """Set an attribute unless the configuration forbids it."""
    try:
        setattr(config, name, value)
    except Exception:
        return
