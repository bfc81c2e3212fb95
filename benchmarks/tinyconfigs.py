"""The numbers of a configuration of transformers made small, by what they are called.

Nothing here knows a type by name. `PLANS` are ways to do it, of which one after the other is tried: all widths alike,
widths and heads in the ratios that they have, heads as wide as they were, counts alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY, FIRST_ID = 256, 160
"""Ids from FIRST_ID on are those that stand for something; texts are made of the others."""
LAYERS, HEADS, HEAD, WIDTH, WIDE = 2, 4, 16, 64, 128
Json = dict[str, Any]


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_DROPPED = {"stage_names", "out_features", "_out_features", "_out_indices", "transformers_version"}
_LACKING = {"prediction_length": 6, "context_length": 12}
"""Numbers that have no default."""
_LAYERS = re.compile(
    r"(^|_)(n|num|number_of)_.*(layers?|blocks?)$|^(n_|num_)?layers?$|_layers$|^depth$|_depth$|^encoder_layers$"
)
_HEADS = re.compile(r"heads?$|^n_head|_heads_|num_kv|num_head")
_HEAD = re.compile(
    r"head_dim|head_size|dim_head|d_head|head_width|^d_kv$|qk_.*dim|^v_.*dim|kv_channels|rotary_dim|per_head"
)
_VOCABULARY = re.compile(
    r"vocab_?size|^vocab|num_embeddings$|codebook_size|num_codevectors|n_vocab|vocabulary|num_embeds$"
)
_ID = re.compile(r"(token|_)(id|index|idx)s?$|_token$|_id_|^(eos|bos|pad|unk|mask|sep)_")
_POSITIONS = re.compile(
    r"positions?$|position_embeddings$|max_seq|seq_len(gth)?$|max_length|context_length|max_pos_emb"
)
_PICTURE = re.compile(
    r"image_size$|img_size$|^resolution$|crop_size$|^image_width$|^image_height$|spec_size$"
)
_EXPERTS = re.compile(
    r"experts?$|num_experts|experts$|moe_num_experts$|expert_group|n_group|num_local"
)
_CHOSEN = re.compile(r"per_tok|top_?k|moe_k$|_topk")
_WIDE = re.compile(r"intermediate|ffn|feedforward|mlp_dim|inner|d_ff|mlp_hidden|linear_units")
_WIDTH = re.compile(
    r"dim$|dims$|_dim_|size$|sizes$|channels?$|width|units|filters|d_model|embd|hidden|rank|d_state|planes|features$|proj"
)
_KEPT = re.compile(
    r"kernel|stride|dilat|patch|window|chunk|num_channels|in_channels|in_chans|audio_channels|merge|scale|ratio|factor|"
    r"num_mel|mel_bins|n_mels|num_labels|label|groups?$|bits|pool|conv_kernel|d_conv|feature_size|feat_size|group_size|"
    r"input_dim|stack|block_size|max_2d|coordinate|shape_size|mel_dim"
)
_PLACES = re.compile(r"ind(ex|ic)es$|idxs?$|_layers$|layer_ids$|_indices|_blocks$")


@dataclass(frozen=True)
class Plan:
    """How numbers are made small: `flat` widths are all alike, `ratio` ones keep theirs, `heads` are as wide as
    they were, `counts` keeps widths."""

    kind: str
    layers: int = LAYERS
    picture: int = 64

    def factors(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """By what numbers of heads and widths of one are divided."""
        if self.kind == "counts":
            return 1, 1
        if self.kind == "heads":
            heads = settings.get("num_attention_heads") or settings.get("num_heads") or 2
            return (max(1, heads // 2) if is_int(heads) else 1), 1
        width = next(
            (
                v
                for k in ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim")
                if is_int(v := settings.get(k))
            ),
            768,
        )
        heads = next(
            (
                v
                for k in (
                    "num_attention_heads",
                    "n_head",
                    "num_heads",
                    "encoder_attention_heads",
                    "n_heads",
                    "attention_heads",
                )
                if is_int(v := settings.get(k))
            ),
            12,
        )
        head = settings.get("head_dim")
        head = head if is_int(head) else max(1, width // heads)
        few = next((n for n in (4, 5, 6, 7, 3, 2) if heads % n == 0), 1) if heads > 4 else heads
        small = next((n for n in (16, 8, 20, 24, 12, 32) if head % n == 0), head)
        return max(1, heads // few), max(1, head // min(small, head))


def shrunk(settings: Json, plan: Plan, ids: dict[int, int] | None = None) -> Json:
    """The settings of a configuration with all that makes it large made small."""
    ids = {} if ids is None else ids
    heads, head = plan.factors(settings)
    outs = settings.get("out_indices") or settings.get("_out_indices") or ()
    is_flat = not any(k in settings for k in ("depths", "hidden_sizes", "embed_dims"))
    kinds = max(
        [
            1,
            *(
                len(set(map(str, v)))
                for k, v in settings.items()
                if k.endswith(("types", "_type", "pattern")) and isinstance(v, list)
            ),
        ]
    )
    layers = max(plan.layers, min(kinds, 4))
    if is_flat and isinstance(outs, list | tuple):
        layers = max(layers, len(outs))
    stages = len(settings["depths"]) if isinstance(settings.get("depths"), list | tuple) else 0
    deep = {
        k: v
        for k, v in settings.items()
        if is_int(v) and _LAYERS.search(k) and v > layers and v != stages
    }
    made: Json = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            made[key] = (
                dict(value) if key in ("id2label", "label2id") else shrunk(dict(value), plan, ids)
            )
        elif value is None and key in _LACKING:
            made[key] = _LACKING[key]
        elif key in _DROPPED and is_flat:
            continue
        elif key in ("out_indices", "_out_indices") and is_flat and value:
            made["out_indices"] = list(range(layers - len(value) + 1, layers + 1))
        elif isinstance(value, list | tuple):
            made[key] = _listed(
                key, list(value), plan, layers, set(deep.values()), ids, heads, head
            )
        elif is_int(value):
            made[key] = (
                layers if key in deep else _number(key, value, settings, plan, ids, heads, head)
            )
        elif (
            isinstance(value, float)
            and value.is_integer()
            and is_int(int(value))
            and _VOCABULARY.search(key)
        ):
            made[key] = _number(key, int(value), settings, plan, ids, heads, head)
        else:
            made[key] = value
    return made


def _number(
    key: str,
    v: int,
    settings: Mapping[str, Any],
    plan: Plan,
    ids: dict[int, int],
    heads: int,
    head: int,
) -> int:
    flat, counts = plan.kind == "flat", plan.kind == "counts"
    if v <= 1:
        return v
    if _ID.search(key):
        return (
            v if v < FIRST_ID else ids.setdefault(v, FIRST_ID + len(ids) % (VOCABULARY - FIRST_ID))
        )
    if _VOCABULARY.search(key):
        return min(v, VOCABULARY)
    if key == "image_embedding_size":  # of patches of 16
        return min(v, plan.picture // 16)
    if _PICTURE.search(key):
        return _picture(v, settings, plan)
    if _CHOSEN.search(key):
        return min(v, 2)
    if _EXPERTS.search(key):
        return min(v, 4)
    if key.startswith("max_source"):
        return min(v, 64)
    if _POSITIONS.search(key):
        return min(v, 512)
    if _HEADS.search(key) and not _HEAD.search(key):
        if counts:
            return v
        if not flat:
            return max(1, v // heads)
        of_all = settings.get("num_attention_heads") or settings.get("num_heads")
        is_fewer = ("kv" in key or "key_value" in key) and is_int(of_all) and v < of_all
        return min(v, 2 if is_fewer else HEADS)
    if _KEPT.search(key) or v < 32 or counts:
        return v
    if _HEAD.search(key):
        return HEAD if flat else max(4, v // head)
    if _WIDE.search(key):
        return WIDE if flat else max(8, v // (heads * head))
    if _WIDTH.search(key):
        return WIDTH if flat else max(8, v // (heads * head))
    return v


def _picture(v: int, settings: Mapping[str, Any], plan: Plan) -> int:
    patch = settings.get("patch_size")
    if is_int(patch) and patch > 8:
        return int(min(v, patch * max(1, plan.picture // patch)))
    return min(v, plan.picture)


def _listed(
    key: str,
    v: list[Any],
    plan: Plan,
    layers: int,
    deep: set[int],
    ids: dict[int, int],
    heads: int,
    head: int,
) -> list[Any]:
    if len(v) in deep and len(v) > layers:  # a word or a number for each layer
        words = list(dict.fromkeys(map(repr, v)))
        first = [next(x for x in v if repr(x) == word) for word in words]
        return (first + list(v[1:]))[:layers] if len(words) > 1 else v[:layers]
    if not v or not all(is_int(x) for x in v):
        return [shrunk(x, plan, ids) if isinstance(x, dict) else x for x in v]
    if _ID.search(key):
        return [_number(key, x, {}, plan, ids, 1, 1) for x in v]
    if deep and _PLACES.search(key):
        return [x for x in v if x < layers] or [layers - 1]
    if key == "depths" or (
        key.endswith(("num_blocks", "block_repeats", "per_stage")) and max(v) < 48
    ):
        return (
            [min(x, plan.layers if key == "depths" else 2) for x in v] if "heads" not in key else v
        )
    if _PICTURE.search(key):
        return [min(x, plan.picture) for x in v]
    if "section" in key and sum(v) > HEAD // 2:
        goal = HEAD // 2 if plan.kind == "flat" else max(len(v), sum(v) // head)
        parts = [max(1, x * goal // sum(v)) for x in v]
        return [parts[0] + goal - sum(parts), *parts[1:]]
    if plan.kind == "counts" or _KEPT.search(key):
        return v
    if _HEADS.search(key) and not _HEAD.search(key) and plan.kind == "flat":
        least = math.gcd(*v)
        return [x // least for x in v]
    if _WIDTH.search(key) and min(v) >= 16 and max(v) >= 64:
        least = math.gcd(*v)
        if plan.kind == "flat" and len(set(v)) == 1:
            return [WIDTH for _ in v]
        return [max(8, x * 16 // least) if least >= 16 else x for x in v]
    return v


PLANS = (
    Plan("flat"),
    Plan("ratio"),
    Plan("flat", picture=224),
    Plan("ratio", picture=224),
    Plan("heads"),
    Plan("counts"),
    Plan("flat", layers=4),
    Plan("ratio", layers=4, picture=224),
    Plan("counts", layers=4, picture=224),
)


def agree(settings: Json, made: Json) -> None:
    """What a part gives to the text model is as wide as that, where it was."""
    old, new = (found.get("text_config", found).get("hidden_size") for found in (settings, made))
    parts = [(settings, made), *((v, made[k]) for k, v in settings.items() if isinstance(v, dict))]
    for before, after in parts:
        for key in before:
            if (
                isinstance(key, str)
                and re.match(r"(out|text|output|proj\w*)_(hidden_size|dim)", key)
                and before[key] == old
            ):
                after[key] = new
