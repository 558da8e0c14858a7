"""Names of other layouts: one to one, both ways, for whole models; and files in them read into our trees."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from alignment_jax.weights import files, layouts, torch_names

MANIFESTS = Path(__file__).parents[1] / "parity/manifests"
CASES = {
    "sd15_unet": ["diffusers", "ldm"], "sdxl_unet": ["diffusers", "ldm_xl"],
    "sd_vae_4ch": ["diffusers", "diffusers_old", "ldm"], "clip_l_text": ["transformers", "open_clip", "ldm", "ldm_xl"],
    "openclip_bigg_text_proj": ["transformers", "open_clip", "ldm_xl"], "openclip_h_text_sd21": ["transformers", "ldm_2"],
    "clip_vit_h14_hf_pickscore": ["transformers", "open_clip"],
}  # fmt: skip


def manifest(name):
    return {k: tuple(v) for k, v in json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes())).items()}


@pytest.mark.parametrize("name, layout", [(n, layout) for n, all_ in CASES.items() for layout in all_])
def test_every_name_of_a_model_maps_and_maps_back(name, layout):
    names = manifest(name)
    where = layouts.places(names, layout)
    back = layouts.back(names, layout)
    assert where.keys() == names.keys() and len(set(where.values())) == len(names)
    assert sorted(n for ours in back.values() for n in ours) == sorted(names)
    packed = [n for n, ours in back.items() if len(ours) > 1]
    assert all(len(back[n]) == 3 and ".in_proj_" in n for n in packed)
    assert bool(packed) == (layout in ("open_clip", "ldm_2") or (layout, name) == ("ldm_xl", "openclip_bigg_text_proj"))
    # seen as a file, the names lead back to the layout and to themselves
    assert layouts.detect(back) in (layout, "ldm" if name.endswith("unet") else layout)
    assert layouts.places(names, layout, back) == where and not layouts.unused(names, where, layout, back)


def test_the_names_of_hpsv2_are_those_of_open_clip_for_the_same_network():
    ours, theirs = manifest("clip_vit_h14_hf_pickscore"), manifest("openclip_vit_h14_hpsv2")
    where = layouts.places(ours, "open_clip", theirs)
    assert {p.name for p in where.values()} == theirs.keys()
    assert all(layouts.taken_shape(p, theirs[p.name]) == ours[n] for n, p in where.items())


def random(shapes):
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def tree_of(tensors):
    """Our tree with these names: every matrix a kernel, so that layouts other than PyTorch's show."""
    flat = {}
    for name, value in tensors.items():
        stem, _, ending = name.rpartition(".")
        kernel = ending == "weight" and value.ndim in (2, 4)
        path = f"{stem}/kernel" if kernel else f"{stem}/scale" if ending == "weight" else f"{stem}/{ending}".lstrip("/")
        flat[path] = torch_names.from_torch(path, value)
    return flat


def nested(flat):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(flat, sep="/")


def small(name):
    """The tensors of a model with every size cut down; what a name says of a shape stays (ranks, thirds)."""
    return random({k: tuple(min(d, 2 if d == 3 else 4) for d in s) for k, s in manifest(name).items()})


def write(folder, tensors):
    save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, folder / "model.safetensors")


def equal(tree, tensors):
    flat, want = flatten_dict(tree, sep="/"), tree_of(tensors)
    return flat.keys() == want.keys() and all(np.array_equal(flat[k], want[k]) for k in want)


@pytest.mark.parametrize("name, layout", [
    ("sd_vae_4ch", "diffusers_old"), ("sd_vae_4ch", "ldm"), ("clip_l_text", "ldm"), ("clip_l_text", "ldm_xl"),
    ("openclip_bigg_text_proj", "ldm_xl"), ("openclip_h_text_sd21", "ldm_2"), ("clip_vit_h14_hf_pickscore", "open_clip"),
])  # fmt: skip
def test_a_file_in_another_layout_reads_as_our_tree(tmp_path, name, layout):
    tensors = small(name)
    stored = layouts.put(tensors, layout)
    write(tmp_path, stored)
    assert equal(files.load_component(tmp_path, nested(tree_of(tensors))), tensors)
    if name == "sd_vae_4ch":
        ndim = stored[next(n for n in stored if n.endswith(("mid_block.attentions.0.query.weight", "mid.attn_1.q.weight")))].ndim
        assert ndim == (4 if layout == "ldm" else 2)


def test_one_file_holds_a_whole_pipeline_and_each_part_reads_its_own(tmp_path):
    parts = {n: small(n) for n in ("sd15_unet", "sd_vae_4ch", "clip_l_text")}
    stored = {k: v for tensors in parts.values() for k, v in layouts.put(tensors, "ldm").items()}
    stored |= {"model_ema.decay": np.zeros(1), "alphas_cumprod": np.zeros(3),
               "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(3)}  # fmt: skip
    write(tmp_path, stored)
    for tensors in parts.values():
        assert equal(files.load_component(tmp_path, nested(tree_of(tensors))), tensors)
    stored["model.diffusion_model.input_blocks.99.0.weight"] = np.zeros(1)
    write(tmp_path, stored)
    with pytest.raises(ValueError, match="unexpected 1: model.diffusion_model.input_blocks.99.0.weight"):
        files.load_component(tmp_path, nested(tree_of(parts["sd15_unet"])))
    assert equal(files.load_component(tmp_path, nested(tree_of(parts["sd_vae_4ch"]))), parts["sd_vae_4ch"])


def test_attention_of_the_autoencoder_may_be_stored_as_kernels_under_either_name(tmp_path):
    tensors = small("sd_vae_4ch")
    for layout in ("diffusers", "diffusers_old"):
        stored = {k: v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v
                  for k, v in layouts.put(tensors, layout).items()}  # fmt: skip
        write(tmp_path, stored)
        assert equal(files.load_component(tmp_path, nested(tree_of(tensors))), tensors)


@pytest.mark.parametrize("ours, theirs", [("", "text_model."), ("text_model.", "")])
def test_the_prefix_of_a_tower_may_be_there_or_not(tmp_path, ours, theirs):
    tensors = small("clip_l_text")
    write(tmp_path, {theirs + k: v for k, v in tensors.items()})
    wanted = {ours + k: v for k, v in tensors.items()}
    assert equal(files.load_component(tmp_path, nested(tree_of(wanted))), wanted)


@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_one_tower_reads_from_a_file_of_both(tmp_path, layout, tower):
    tensors = small("clip_vit_h14_hf_pickscore")
    write(tmp_path, layouts.put(tensors, layout))
    one = {k: v for k, v in tensors.items() if k.startswith(f"{tower}_model.")}
    assert equal(files.load_component(tmp_path, nested(tree_of(one))), one)
    bare = {k.removeprefix(f"{tower}_model."): v for k, v in one.items()}
    assert equal(files.load_component(tmp_path, nested(tree_of(bare))), bare)
    write(tmp_path, layouts.put(tensors, layout) | {"head.weight": np.zeros(2)})
    with pytest.raises(ValueError, match="unexpected 1: head.weight"):
        files.load_component(tmp_path, nested(tree_of(one)))


def test_sd2_conditions_on_the_last_layer_but_one_and_its_file_has_the_last(tmp_path):
    tensors = small("openclip_h_text_sd21")
    last = {k.replace("layers.22.", "layers.23."): v for k, v in tensors.items() if "layers.22." in k}
    stored = layouts.put(tensors | last, "ldm_2") | {
        "cond_stage_model.model.text_projection": np.zeros((4, 4)), "cond_stage_model.model.logit_scale": np.zeros(1),
        "cond_stage_model.model.attn_mask": np.zeros((4, 4))}  # fmt: skip
    write(tmp_path, stored)
    assert equal(files.load_component(tmp_path, nested(tree_of(tensors))), tensors)


def test_packed_attention_needs_all_of_its_thirds_and_a_model_its_own_kind_of_file():
    tensors = {"text_model.encoder.layers.0.self_attn.q_proj.weight": np.zeros((2, 2))}
    with pytest.raises(ValueError, match=r"only \['q'\]"):
        layouts.put(tensors, "open_clip")
    with pytest.raises(ValueError, match="none of them"):
        layouts.places(["layers.0.weight"], "ldm")
    with pytest.raises(ValueError, match="no name for 'other.weight'"):
        layouts.places(["down_blocks.0.resnets.0.conv1.weight", "other.weight"], "ldm")
    with pytest.raises(ValueError, match="choose from diffusers"):
        layouts.places(["a"], "flax")
