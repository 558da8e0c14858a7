"""Where a model's tensors lie in files of other makers: names both ways, and the few tensors that are packed or turned.

Our own names are those of diffusers (UNet, autoencoder) and transformers (CLIP); a layout is another file's idea of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

LAYOUTS = ("diffusers", "diffusers_old", "transformers", "open_clip", "ldm", "ldm_2", "ldm_xl")
BUFFERS = re.compile(r"(^|\.)(position_ids|attn_mask|num_batches_tracked)$")  # stored by some, parameters of nothing
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_TEXT = {"ldm": "cond_stage_model.transformer.", "ldm_xl": "conditioner.embedders.0.transformer."}
OPEN_CLIP_TEXT = {"open_clip": "", "ldm_2": "cond_stage_model.model.", "ldm_xl": "conditioner.embedders.1.model."}
# of a CLIP, but of neither tower: a tower alone may leave them in the file
JOINT = re.compile(r"^(logit_scale|logit_bias|text_projection|visual_projection\.weight|text_projection\.weight|visual\.proj)$")
TEXT = ("text_model.", "transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.")
VISION = ("vision_model.", "visual.")

UNET_TABLE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESNET_TABLE = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
OPEN_CLIP_TABLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection", "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight", "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias", "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}  # fmt: skip


class Place(NamedTuple):
    """Where one of our tensors lies: under which name, and as which third of it (packed q, k, v), turned, or as a 1x1 kernel.

    pointwise: 1 where the file's matrix may be a kernel [O,I,1,1], 2 where it is always written so.
    """

    name: str
    third: int | None = None
    turned: bool = False
    pointwise: int = 0


def detect(present: Collection[str]) -> str:
    """The layout of a file, from the names in it; "diffusers", whose names are ours, where nothing speaks against it."""
    names = set(present)
    if any(n.startswith("conditioner.embedders.") for n in names):
        return "ldm_xl"
    if any(n.startswith("cond_stage_model.model.") for n in names):
        return "ldm_2"
    if any(n.startswith((UNET, VAE, "cond_stage_model.", "input_blocks.", "encoder.down.")) for n in names):
        return "ldm"
    if any(".resblocks." in f".{n}" for n in names):
        return "open_clip"
    if any(re.search(r"(^|\.)(text_model|vision_model|encoder\.layers)\.", n) for n in names):
        return "transformers"
    if any(re.search(r"mid_block\.attentions\.0\.query\.", n) for n in names):
        return "diffusers_old"
    return "diffusers"


def places(names: Collection[str], layout: str, present: Collection[str] = ()) -> dict[str, Place]:
    """{our name: its place in a file of that layout}; one to one but for packed thirds.

    present: the file's names, where there is a file: they decide what the layout leaves open (a prefix text_model., old
    names of attention, a single component without its prefix). Raises ValueError for names that the layout has none for.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    wanted, there = set(names), set(present)
    if layout in ("diffusers", "diffusers_old"):
        return {n: _diffusers(n, layout, there) for n in names}
    if there and wanted <= there:
        return {n: Place(n) for n in names}
    if layout == "transformers":
        return {n: Place(_with_or_without_tower(n, wanted, there)) for n in names}
    kind = component(wanted)
    if layout == "open_clip":
        return {n: _open_clip(_full(n, wanted), "") for n in names}
    if kind == "unet":
        prefix, layers = _prefix(UNET, there), _count(wanted, r"^down_blocks\.0\.resnets\.(\d+)\.")
        return {n: Place(prefix + _ldm_unet(n, wanted, layers)) for n in names}
    if kind == "vae":
        prefix, levels = _prefix(VAE, there), _count(wanted, r"^decoder\.up_blocks\.(\d+)\.")
        return {n: _ldm_vae(n, prefix, levels) for n in names}
    if kind == "clip":
        if layout == "ldm_2" or (layout == "ldm_xl" and "text_projection.weight" in wanted):
            return {n: _open_clip(_full(n, wanted), OPEN_CLIP_TEXT[layout]) for n in names}
        return {n: Place(CLIP_TEXT[layout] + _full(n, wanted)) for n in names}
    raise ValueError(f"a file of layout {layout!r} holds a UNet, an autoencoder and text encoders; this model is none of "
                     f"them (first names: {', '.join(sorted(wanted)[:5])})")  # fmt: skip


def back(names: Collection[str], layout: str) -> dict[str, tuple[str, ...]]:
    """{a file's name: our names, several where it is packed}: the inverse of `places`."""
    found: dict[str, tuple[str, ...]] = {}
    for ours, place in places(names, layout).items():
        found[place.name] = (*found.get(place.name, ()), ours)
    return found


def component(names: Collection[str]) -> str | None:
    """Which network our names are of: "unet", "vae", "clip" or None."""
    if any(n.startswith(("down_blocks.", "mid_block.")) for n in names):
        return "unet"
    if any(re.match(r"(en|de)coder\.(conv_in|mid_block)\.", n) for n in names):
        return "vae"
    if any("embeddings." in n or ".self_attn." in n for n in names):
        return "clip"
    return None


def unused(names: Collection[str], where: Mapping[str, Place], layout: str, present: Collection[str]) -> list[str]:
    """The file's tensors that belong to this model and that no name of ours takes.

    Left out: buffers, other models of a single file, and, for one tower of a CLIP, the other tower and what joins them.
    """
    taken = {p.name for p in where.values()}
    rest = [n for n in present if n not in taken and not BUFFERS.search(n)]
    kind = component(set(names))
    if layout.startswith("ldm"):
        prefix = _common_prefix(taken)
        rest = [n for n in rest if n.startswith(prefix)]
        if kind == "clip":
            # SD2 conditions on the last layer but one: its text encoder is published without the last
            last = _count({p.name for p in where.values()}, r"resblocks\.(\d+)\.")
            rest = [n for n in rest if not JOINT.search(n.removeprefix(prefix))
                    and not ((m := re.search(r"resblocks\.(\d+)\.", n)) and int(m[1]) >= last and layout == "ldm_2")]  # fmt: skip
    elif kind == "clip":
        full = {_full(n, set(names)) for n in names}
        text, vision = (any(n.startswith(t) for n in full) for t in ("text_model.", "vision_model."))
        if not (text and vision):
            rest = [n for n in rest if not JOINT.search(n) and not n.startswith(TEXT if vision else VISION)]
    return sorted(rest)


def take(place: Place, value: np.ndarray) -> np.ndarray:
    """Our tensor out of the file's; a view."""
    if place.third is not None:
        size = value.shape[0] // 3
        value = value[place.third * size : (place.third + 1) * size]
    if place.pointwise and value.ndim > 2:
        value = value.reshape(value.shape[:2])
    return value.T if place.turned else value


def taken_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `take(place, value)` for a value of that shape; the shape itself where it cannot be taken."""
    if place.third is not None:
        shape = (shape[0] // 3, *shape[1:]) if shape and shape[0] % 3 == 0 else shape
    if place.pointwise and len(shape) > 2 and set(shape[2:]) == {1}:
        shape = shape[:2]
    return shape[::-1] if place.turned else shape


def put(tensors: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Our tensors, in PyTorch's layout, as a file of that layout holds them: the inverse of `take` for a whole model."""
    where = places(list(tensors), layout)
    out: dict[str, np.ndarray] = {}
    packed: dict[str, dict[int, np.ndarray]] = {}
    for ours, place in where.items():
        value = tensors[ours].T if place.turned else tensors[ours]
        if place.pointwise == 2 and value.ndim == 2:
            value = value[:, :, None, None]
        if place.third is None:
            out[place.name] = value
        else:
            packed.setdefault(place.name, {})[place.third] = value
    for name, thirds in packed.items():
        if set(thirds) != {0, 1, 2}:
            raise ValueError(f"{name} packs q, k and v; the model has only {[('q', 'k', 'v')[i] for i in sorted(thirds)]}")
        out[name] = np.concatenate([thirds[i] for i in range(3)])
    return out


def _diffusers(name: str, layout: str, there: set[str]) -> Place:
    found = re.match(r"(.*mid_block\.attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)$", name)
    if not found or not name.startswith(("encoder.", "decoder.")):
        return Place(name)
    old = f"{found[1]}.{VAE_OLD[found[2]]}.{found[3]}"
    pointwise = 1 if found[3] == "weight" else 0
    return Place(old if (layout == "diffusers_old" and name not in there) or old in there else name, pointwise=pointwise)


def _full(name: str, wanted: set[str]) -> str:
    """A name of CLIP with its tower's prefix, which some versions of transformers leave away."""
    if not re.match(r"(embeddings|encoder|final_layer_norm|pre_layrnorm|post_layernorm)\b", name):
        return name
    vision = any(n.startswith(("embeddings.patch_embedding", "pre_layrnorm", "embeddings.class_embedding")) for n in wanted)
    return f"{'vision_model' if vision else 'text_model'}.{name}"


def _with_or_without_tower(name: str, wanted: set[str], there: set[str]) -> str:
    full = _full(name, wanted)
    candidates = (name, full, re.sub(r"^(text_model|vision_model)\.", "", full))
    return next((n for n in candidates if n in there), name)


def _open_clip(name: str, prefix: str) -> Place:
    if found := re.match(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name):
        tower, layer, inner, ending = found.groups()
        block = f"{prefix}{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"
        if packed := re.match(r"self_attn\.([qkv])_proj$", inner):
            return Place(f"{block}.attn.in_proj_{ending}", third="qkv".index(packed[1]))
        if inner in CLIP_LAYER:
            return Place(f"{block}.{CLIP_LAYER[inner]}.{ending}")
    if name in OPEN_CLIP_TABLE:
        return Place(prefix + OPEN_CLIP_TABLE[name], turned=name in ("text_projection.weight", "visual_projection.weight"))
    raise ValueError(f"open_clip has no name for {name!r}")


def _ldm_unet(name: str, wanted: set[str], layers: int) -> str:
    stem, _, ending = name.rpartition(".")
    for ours, theirs in UNET_TABLE.items():
        if stem == ours or stem.startswith(f"{ours}."):
            return f"{theirs}{_ldm_resnet(stem.removeprefix(ours))}.{ending}"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..+)$", stem)
    if not found:
        raise ValueError(f"Stable Diffusion's own layout has no name for {name!r}")
    side, block, part, layer, inner = found[1], int(found[2]), found[3], int(found[4]), found[5]
    # a level of the file is its residual blocks and, down, one more for the halving; up has one block more anyway
    first = block * (layers + 1) + (side == "down")
    if part == "downsamplers":
        return f"input_blocks.{first + layers}.0.op.{ending}"
    if part == "upsamplers":
        slot = 2 if any(n.startswith(f"up_blocks.{block}.attentions.") for n in wanted) else 1
        return f"output_blocks.{first + layers}.{slot}{inner}.{ending}"
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if part == "attentions":
        return f"{blocks}.{first + layer}.1{inner}.{ending}"
    return f"{blocks}.{first + layer}.0{_ldm_resnet(inner)}.{ending}"


def _ldm_resnet(inner: str) -> str:
    return f".{RESNET_TABLE.get(inner[1:], inner[1:])}" if inner else ""


def _ldm_vae(name: str, prefix: str, levels: int) -> Place:
    stem, _, ending = name.rpartition(".")
    if found := re.match(r"(.*)mid_block\.attentions\.0\.(.+)$", stem):
        pointwise = 2 if ending == "weight" and found[2] != "group_norm" else 0
        return Place(f"{prefix}{found[1]}mid.attn_1.{VAE_ATTENTION[found[2]]}.{ending}", pointwise=pointwise)
    stem = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", stem)
    stem = re.sub(r"down_blocks\.(\d+)", r"down.\1", stem)
    stem = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", stem)
    stem = re.sub(r"\.resnets\.(\d+)", r".block.\1", stem)
    stem = re.sub(r"\.(down|up)samplers\.0", r".\1sample", stem)
    stem = stem.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return Place(f"{prefix}{stem}.{ending}")


def _prefix(prefix: str, there: set[str]) -> str:
    return "" if there and not any(n.startswith(prefix) for n in there) else prefix


def _common_prefix(names: Collection[str]) -> str:
    known = (UNET, VAE, *CLIP_TEXT.values(), *OPEN_CLIP_TEXT.values())
    return next((p for p in known if p and any(n.startswith(p) for n in names)), "")


def _count(names: Collection[str], pattern: str) -> int:
    return 1 + max((int(m[1]) for n in names if (m := re.search(pattern, n))), default=-1)
