"""Shrinks a configuration of transformers by the names of its numbers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["small_configs"]

_WIDTH = re.compile(
    r"(^|_)(d_model|d_kv|d_ff|d_inner|d_embed|d_head|d_proj|dims?|n_embd|n_embed|n_inner|n_hidden|hidden_dims?"
    r"|embed_dims?|embedding_dims?|head_dims?|ffn_dims?|mlp_dims?|proj_dims?|projection_dims?|rotary_dims?"
    r"|feature_dims?|channels_list|hidden_sizes?|embedding_sizes?|embed_sizes?|intermediate_sizes?|ffn_sizes?"
    r"|feedforward_sizes?|expert_sizes?|ff_sizes?|mlp_sizes?|state_sizes?|bottleneck_dims?|bottleneck_sizes?"
    r"|widths?|lora_rank|lora_ranks|lora_dims?|conv_dims?|hidden_channels|neck_hidden_sizes|dim_feedforward"
    r"|out_channels|in_channels|channels|latent_dims?|d_latents|d_attn|dim_model|projector_dims?|model_dims?"
    r"|attention_dims?|attention_hidden_sizes?|decoder_dims?|encoder_dims?|codebook_dims?|output_dims?|input_dims?"
    r"|key_dims?|value_dims?|shared_dims?|mrope_section|lru_widths?|conv_sizes?|units|hidden_features|out_features_dim"
    r"|out_hidden_sizes?|reassemble_hidden_sizes?|fusion_hidden_sizes?|ffn_hidden_sizes?)$"
)
_NO_WIDTH = re.compile(
    r"(^|_)(num|image|vocab|patch|kernel|window|input_size|label|max|temporal|pool)(_|$)|^num_channels$|^in_chans$"
)
_LAYERS = re.compile(
    r"(^|_)(layers|n_layers?|num_blocks|depth|num_hidden_layers|num_layers|nlayers|n_blocks)$"
)
_DEPTHS = re.compile(
    r"(^|_)(depths|layers_per_stage|num_layers_per_stage|num_blocks|layer_counts?|stage_layers)$"
)
_EXPERTS = re.compile(r"(^|_)(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts)$")
_CHOSEN_EXPERTS = re.compile(r"(experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)$")
_VOCAB = re.compile(r"(^|_)(vocab_size|vocabulary_size|n_vocab|vocab_size_per_layer_input)$")
_POSITIONS = re.compile(
    r"(^|_)(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_source_positions|max_target_positions)$"
)
_HEADS = re.compile(
    r"(^|_)(num_attention_heads|num_key_value_heads|num_kv_heads|num_heads|n_heads?|n_kv_heads|attention_heads"
    r"|num_query_heads|linear_num_key_heads|linear_num_value_heads)$"
)
_OF_ONE_HEAD = re.compile(
    r"(^|_)(head_dims?|d_kv|d_head|rotary_dims?|mrope_section|kv_channels|lora_ranks?|lora_dims?)$"
)
_TOKEN = re.compile(r"(_token_id|_token_index|_token_ids|_id|_token)$")
_VOCAB_SIZE, _WIDTH_WANTED, _HEAD_WIDTH = 256, 64, 8


def small_configs(config: Any) -> Iterator[Any]:
    """Small copies of a configuration, the smallest first, and the configuration itself last.

    Widths are all divided by one number, so that what divides what stays so; first by one more, by which the
    number of heads is divided too. Layers, experts, the vocabulary and images shrink on their own. Not every
    result can be built: try one after the other.

    Example:
        >>> from transformers import BertConfig
        >>> small = next(small_configs(BertConfig()))
        >>> small.hidden_size, small.num_attention_heads, small.num_hidden_layers
        (24, 3, 2)

    Args:
        config: Of any model of transformers.
    """
    factor = _factor(config)
    heads = _head_factor(config)
    for divisor in dict.fromkeys([factor, max(1, factor // 4), 1]) if heads > 1 else ():
        yield _shrunk(config, divisor, 2, images=True, heads=heads)
    factors = [factor >> shift for shift in range(factor.bit_length())]
    for layers in (2, 4):
        for divisor in factors[:3]:
            yield _shrunk(config, divisor, layers, images=True)
    for divisor in dict.fromkeys([*factors[:2], 1]):
        yield _shrunk(config, divisor, 8, images=False)
    yield copy.deepcopy(config)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for value in vars(config).values():
        if _is_config(value):
            yield from _parts(value)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def _factor(config: Any) -> int:
    """The power of two that leaves about 64 features, and 8 of each head."""
    limits = []
    for part in _parts(config):
        width = next(
            (
                _number(part, name)
                for name in ("hidden_size", "d_model", "n_embd", "dim")
                if _number(part, name)
            ),
            0,
        )
        heads = next(
            (
                _number(part, n)
                for n in ("num_attention_heads", "n_head", "encoder_attention_heads", "num_heads")
                if _number(part, n)
            ),
            0,
        )
        head = _number(part, "head_dim") or (width // heads if width and heads else 0)
        if width:
            limits.append(width / _WIDTH_WANTED)
        if head:
            limits.append(head / _HEAD_WIDTH)
    wanted = min(limits, default=8.0)
    return 1 << max(0, int(math.log2(max(wanted, 1.0))))


def _head_factor(config: Any) -> int:
    """The largest power of two that divides every number of heads, and leaves two of the most."""
    counts = [
        value
        for part in _parts(config)
        for name, value in vars(part).items()
        if _HEADS.search(name) and type(value) is int and value > 1
    ]
    common = math.gcd(*counts) if counts else 1
    power = common & -common
    return power // 2 if counts and power == max(counts) else power


def _number(part: Any, name: str) -> int:
    try:
        value = getattr(part, name, None)
    except Exception:  # each layer has one of its own
        return 0
    return value if type(value) is int else 0


def _shrunk(config: Any, factor: int, layers: int, images: bool, heads: int = 1) -> Any:
    small = copy.deepcopy(config)
    ids: dict[int, int] = {}
    for part in _parts(small):
        old_layers = max(
            (_number(part, name) for name in list(vars(part)) if _LAYERS.search(name)), default=0
        )
        for name, value in list(vars(part).items()):
            if name.startswith("_") or isinstance(value, bool):
                continue
            new = _new(name, value, factor, layers, ids, old_layers, heads)
            if new is not value:
                _set(part, name, new)
        if images:
            _shrink_images(part)
        for width, count in (("hidden_size", "num_attention_heads"), ("d_model", "num_heads")):
            if _number(part, width) and _number(part, count):  # some defaults do not fit together
                _set(part, count, math.gcd(_number(part, width), _number(part, count)))
    return small


def _set(part: Any, name: str, value: Any) -> None:
    try:
        setattr(part, name, value)
    except Exception:  # computed from others, or checked against them
        part.__dict__[name] = value


def _new(
    name: str, value: Any, factor: int, layers: int, ids: dict[int, int], old_layers: int, heads: int
) -> Any:
    if _HEADS.search(name) and type(value) is int:
        return max(1, value // heads)
    if value is None:  # the default of a configuration that every checkpoint sets
        if name == "pad_token_id":
            return 0
        return _VOCAB_SIZE if _VOCAB.search(name) else 2 if _CHOSEN_EXPERTS.search(name) else None
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return {
            key: _sections(item, factor) if key == "mrope_section" else item for key, item in value.items()
        }
    if isinstance(value, (list, tuple)) and len(value) == old_layers > layers and not _WIDTH.search(name):
        return type(value)(value[:layers])
    if isinstance(value, (list, tuple)) and _DEPTHS.search(name):
        return type(value)(min(item, 1) if type(item) is int else item for item in value)
    if _TOKEN.search(name) and not name.startswith("num_"):
        return _in_vocabulary(value, ids)
    if type(value) is int:
        if _VOCAB.search(name):
            return min(value, _VOCAB_SIZE)
        if _POSITIONS.search(name):
            return min(value, 128)
        if _LAYERS.search(name):
            return min(value, layers)
        if _EXPERTS.search(name):
            return min(value, 4)
        if _CHOSEN_EXPERTS.search(name):
            return min(value, 2)
        if re.search(r"(^|_)(n_group|topk_group)$", name):
            return min(value, 1)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name):
        return _divided(value, factor if _OF_ONE_HEAD.search(name) else factor * heads)
    return value


def _sections(value: Any, factor: int) -> Any:
    """The parts of one head that turn with time, height and width: their sum is divided."""
    if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
        return value
    parts = [item // factor for item in value]
    parts[0] += sum(value) // factor - sum(parts)
    return type(value)(parts)


def _divided(value: Any, factor: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_divided(item, factor) for item in value)
    if type(value) is int and value >= 2 * factor:
        return value // factor if value % factor == 0 else value
    return value


def _in_vocabulary(value: Any, ids: dict[int, int]) -> Any:
    """A token's number below the size of the vocabulary; tokens that differed still differ."""
    if isinstance(value, (list, tuple)):
        return type(value)(_in_vocabulary(item, ids) for item in value)
    if type(value) is int and value >= _VOCAB_SIZE:
        return ids.setdefault(value, _VOCAB_SIZE - 1 - len(ids))
    return value


def _shrink_images(part: Any) -> None:
    """Four patches a side of large patches; else 64 pixels."""
    size, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    small = 4 * patch if type(patch) is int and patch >= 8 else 64
    if type(size) is int and size > small:
        _set(part, "image_size", small)
    elif isinstance(size, (list, tuple)) and all(type(side) is int for side in size):
        _set(part, "image_size", type(size)(min(side, small) for side in size))
    elif isinstance(size, Mapping):
        _set(part, "image_size", {key: min(side, small) for key, side in size.items()})
