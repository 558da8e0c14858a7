"""LoRA files and other layouts against diffusers, transformers and open_clip: fixtures, and once more live.

python tests/parity/test_lora.py FILES_DIR writes the files that references/lora.py reads.
"""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
from common import FIXTURES, random_weights

from alignment_jax.models import lora
from alignment_jax.models.unet import unet
from alignment_jax.weights import files, layouts, lora_files, torch_names

HERE = Path(__file__).parent
SCRIPT = HERE / "references/lora.py"
_spec = importlib.util.spec_from_file_location("lora_reference", SCRIPT)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
RANK, ALPHA = 6, 3.0  # above the ranks that the smallest kernels have
COMPONENTS = {"sd": ("unet", "text_encoder"), "xl": ("unet", "text_encoder", "text_encoder_2")}


def manifest(name):
    return json.loads(gzip.decompress((HERE / f"manifests/{name}.json.gz").read_bytes()))


def tree(shapes):
    """A tree of zeros with the names that a module of ours would have, from a checkpoint's names and shapes."""
    flat = {}
    for name, shape in shapes.items():
        stem, _, ending = name.rpartition(".")
        if ending == "weight" and "embedding" in stem:
            ending = "embedding"
        elif ending == "weight":
            ending = "kernel" if len(shape) > 1 else "scale"
        path = f"{stem}/{ending}" if stem else ending
        shape = torch_names.torch_shape("kernel", shape) if ending == "kernel" and len(shape) == 2 else shape
        if ending == "kernel" and len(shape) == 4:
            shape = tuple(shape[i] for i in (2, 3, 1, 0))
        flat[path] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return unflatten_dict(flat, sep="/")


def clip_shapes(width, mlp, layers):
    """Names and shapes of CLIP's transformer layers."""
    shapes = {}
    for i in range(layers):
        block = f"encoder.layers.{i}"
        for name, (out, into) in {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width),
                                  "self_attn.v_proj": (width, width), "self_attn.out_proj": (width, width),
                                  "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}.items():  # fmt: skip
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    return shapes


def clip(full=False):
    """{checkpoint's name: shape} of the small text encoder, or of the small CLIP with both towers."""
    text = {"embeddings.token_embedding.weight": (11, 12), "embeddings.position_embedding.weight": (7, 12),
            "final_layer_norm.weight": (12,), "final_layer_norm.bias": (12,)} | clip_shapes(12, 20, 2)  # fmt: skip
    if not full:
        return text
    vision = {"embeddings.class_embedding": (16,), "embeddings.patch_embedding.weight": (16, 3, 4, 4),
              "embeddings.position_embedding.weight": (5, 16)} | clip_shapes(16, 24, 2)  # fmt: skip
    vision |= {f"{n}.{e}": (16,) for n in ("pre_layrnorm", "post_layernorm") for e in ("weight", "bias")}
    return ({f"text_model.{k}": v for k, v in text.items()} | {f"vision_model.{k}": v for k, v in vision.items()}
            | {"text_projection.weight": (10, 12), "visual_projection.weight": (10, 16), "logit_scale": ()})  # fmt: skip


def unet_shapes(name):
    net = unet(reference.UNETS[name])
    xl = dict(pooled=jnp.zeros((1, 8)), time_ids=jnp.zeros((1, 6))) if name == "xl" else {}
    run = lambda k: net.init(k, jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 3, 12)), **xl)["params"]
    return jax.eval_shape(run, jax.random.key(0))


def like(name):
    """{component: shapes}: our own UNet, and text encoders with and without text_model. in their names."""
    trees = {"unet": unet_shapes(name), "text_encoder": tree(clip())}
    if name == "xl":
        trees["text_encoder_2"] = tree({f"text_model.{k}": v for k, v in clip().items()} | {"text_projection.weight": (10, 12)})
    return trees


def base(name):
    """The parameters that the reference gives its modules."""
    out = {}
    for component, shapes in like(name).items():
        named = torch_names.names(shapes)
        flat = flatten_dict(shapes, sep="/")
        tensors = random_weights({n: torch_names.torch_shape(p, flat[p].shape) for n, p in named.items()},
                                 seed=int(component == "text_encoder_2"))  # fmt: skip
        out[component] = torch_names.import_torch(tensors, shapes)
    return out


def factors(name):
    """Random factors of every kernel of the UNet, and of the text encoders' layers; b is not zero here."""
    shapes = like(name)
    params = {c: jax.tree.map(lambda s: np.zeros(s.shape, np.float32), t) for c, t in shapes.items()}
    found = lora.init(jax.random.key(0), params, rank=RANK, targets=r"^unet/|encoder\.layers")
    flat = {k: np.asarray(v) for k, v in flatten_dict(found, sep="/").items()}
    made = random_weights({k: v.shape for k, v in flat.items() if k.endswith("/b")})
    return unflatten_dict(flat | made, sep="/")


def places():
    """{layout and model: {our name: where it lies}} of everything that the reference converts."""
    models = {(n, layout): manifest(n) for n, layout in reference.LDM.items()} | {("small_clip", "open_clip"): clip(full=True)}
    return {f"{layout}_{name}": {ours: list(place) for ours, place in layouts.places(names, layout).items()}
            for (name, layout), names in models.items()}  # fmt: skip


def write_files(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, components in COMPONENTS.items():
        for kind, write in (("peft", lora_files.write_peft), ("kohya", lora_files.write_kohya)):
            write(folder / f"{name}_{kind}.safetensors", factors(name), like(name), rank=RANK, alpha=ALPHA,
                  prefix={c: c for c in components})  # fmt: skip
    for name, layout in reference.LDM.items():
        tensors = random_weights({n: (1,) * len(s) for n, s in manifest(name).items()})
        save_file({k: np.asarray(v, order="C") for k, v in layouts.put(tensors, layout).items()},
                  folder / f"{layout}_{name}.safetensors")  # fmt: skip
    files.save_component(folder / "unet", base("sd")["unet"], stem="diffusion_pytorch_model", max_shard_bytes=40_000,
                         config={"_class_name": "UNet2DConditionModel", **reference.UNETS["sd"]})  # fmt: skip
    files.save_component(folder / "text_encoder", base("sd")["text_encoder"],
                         config={"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **reference.TEXT})
    (folder / "places.json").write_text(json.dumps(places()))
    tensors = layouts.put(random_weights(clip(full=True)), "open_clip")
    save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, folder / "open_clip.safetensors")


def fixture(name):
    with np.load(FIXTURES / f"lora_{name}.npz") as stored:
        return {k: stored[k] for k in stored.files}


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_diffusers_gives_our_files_the_weights_that_merge_gives(name):
    want, kohya = fixture(f"{name}_peft"), fixture(f"{name}_kohya")
    assert want.pop("versions").tolist() == kohya.pop("versions").tolist()
    assert want.keys() == kohya.keys() and max(kohya.values()) < 1e-6
    changed = factors(name)
    ours = lora.merge(base(name), changed, ALPHA / RANK)
    touched = {k.rpartition("/")[0] for k in flatten_dict(changed, sep="/")}
    got = {}
    for path, value in flatten_dict(ours, sep="/").items():
        component, _, rest = path.partition("/")
        if path in touched:
            got[component, torch_names.torch_name(rest).removeprefix("text_model.")] = torch_names.to_torch(path, value)
    want = {(k.split("|")[0], k.split("|")[1].removeprefix("text_model.")): v for k, v in want.items()}
    assert got.keys() == want.keys()
    for key in got:
        np.testing.assert_allclose(got[key], want[key], atol=1e-5, err_msg=str(key))


def test_a_file_of_diffusers_with_alpha_in_its_header_reads_as_the_weights_it_stands_for(tmp_path):
    stored = fixture("theirs")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({k.removeprefix("file|"): v for k, v in stored.items() if k.startswith("file|")}, file,
              metadata=json.loads(str(stored["header"])))  # fmt: skip
    shapes = like("sd")["unet"]
    read, scale = lora_files.read_lora(file, shapes)
    assert scale == reference.THEIRS["lora_alpha"] / reference.THEIRS["r"]
    tuned = torch_names.export_torch(lora.merge(base("sd")["unet"], read, scale))
    want = {k.removeprefix("unet|"): v for k, v in stored.items() if k.startswith("unet|")}
    assert len(want) == len(flatten_dict(read, sep="/")) // 2
    for key, value in want.items():
        np.testing.assert_allclose(tuned[key], value, atol=1e-5, err_msg=key)


def test_the_files_and_names_that_the_reference_saw_are_those_written_now(tmp_path):
    seen = fixture("names")
    write_files(tmp_path)
    assert reference.digest(reference.contents(tmp_path)) == str(seen["files"])
    assert reference.digest(places()) == str(seen["places"])


def test_diffusers_converters_undo_our_layout_of_single_files():
    for name, (count, error) in ((n, v) for n, v in fixture("ldm").items() if n != "versions"):
        assert count == len(manifest(name)) and error == 0, name


def test_open_clip_computes_from_our_file_what_transformers_computes():
    assert fixture("open_clip")["errors"].max() < 1e-5


def test_diffusers_and_transformers_read_the_folders_that_we_save():
    assert all(fixture("folders")[name] == 0 for name in ("unet", "text_encoder"))


@pytest.mark.parity
def test_fixtures_are_what_the_reference_gives(parity_python, tmp_path):
    write_files(tmp_path / "files")
    saved = tmp_path / "saved"
    subprocess.run([parity_python, SCRIPT, tmp_path, tmp_path / "files", saved], check=True)
    names = sorted(p.name for p in FIXTURES.glob("lora_*.npz"))
    assert names == sorted(p.name for p in tmp_path.glob("lora_*.npz"))
    for name in names:
        with np.load(tmp_path / name) as fresh:
            stored = fixture(name.removeprefix("lora_").removesuffix(".npz"))
            assert set(fresh.files) == stored.keys()
            for key in stored:
                if stored[key].dtype.kind == "f":
                    np.testing.assert_allclose(fresh[key], stored[key], atol=1e-5, err_msg=f"{name} {key}")
    start = base("sd")
    for component, stem, variant in (("unet", "diffusion_pytorch_model", None), ("unet", "diffusion_pytorch_model", "fp16"),
                                     ("text_encoder", "model", None)):  # fmt: skip
        read = files.load_component(saved / f"saved_{component}", start[component], stem=stem, variant=variant)
        error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), read, start[component])
        assert max(jax.tree.leaves(error)) <= (2e-3 if variant else 0), (component, variant)


if __name__ == "__main__":
    write_files(sys.argv[1])
