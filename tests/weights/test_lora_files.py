"""LoRA files of both formats: back bit for bit, in everyone's names, and refused when they are of another model."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignment_jax.models import lora
from alignment_jax.training.state import lora_partition
from alignment_jax.weights import lora_files

KEY = jax.random.key(0)
UNET = {
    "conv_in/kernel": (3, 3, 4, 8),
    "down_blocks.0.resnets.0/conv1/kernel": (3, 2, 8, 8),  # not square: the order of its sides shows
    "down_blocks.0.resnets.0/time_emb_proj/kernel": (16, 8),
    "down_blocks.0.attentions.0/proj_in/kernel": (1, 1, 8, 8),
    "down_blocks.0.attentions.0/transformer_blocks.0/attn1/to_q/kernel": (8, 8),
    "down_blocks.0.attentions.0/transformer_blocks.0/attn1/to_out.0/kernel": (8, 8),
    "down_blocks.0.attentions.0/transformer_blocks.0/attn2/to_k/kernel": (12, 8),
    "down_blocks.0.attentions.0/transformer_blocks.0/ff.net.0.proj/kernel": (8, 64),
    "add_embedding.linear_1/kernel": (10, 16),
    "conv_out/kernel": (3, 3, 8, 2),  # narrower than the rank
    "conv_out/bias": (2,),
}
TEXT = {"encoder.layers.0/self_attn.q_proj/kernel": (12, 12), "encoder.layers.0/mlp.fc1/kernel": (12, 20)}
TREES = {"unet": UNET, "text": TEXT, "vae": {"decoder/kernel": (2, 2)}}
PARAMS = {c: unflatten_dict({k: np.zeros(s, np.float32) for k, s in t.items()}, sep="/") for c, t in TREES.items()}
PREFIX = {"unet": "unet", "text": "text_encoder"}
WRITERS = {"peft": lora_files.write_peft, "kohya": lora_files.write_kohya}


def factors(params=PARAMS, targets="unet|text", rank=4):
    found = lora.init(KEY, params, rank=rank, targets=targets)
    return jax.tree.map(lambda x: np.asarray(x + 0.25 * jax.random.normal(KEY, x.shape), np.float32), found)


def leaves(tree):
    return flatten_dict(tree, sep="/")


def same(a, b):
    return leaves(a).keys() == leaves(b).keys() and all(np.array_equal(v, leaves(b)[k]) for k, v in leaves(a).items())


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("kind", WRITERS)
def test_factors_come_back_bit_for_bit_with_their_scale(tmp_path, kind, alpha):
    made = factors()
    WRITERS[kind](tmp_path / "l.safetensors", made, PARAMS, rank=4, alpha=alpha, prefix=PREFIX)
    read, scale = lora_files.read_lora(tmp_path / "l.safetensors", PARAMS, prefix=PREFIX)
    if kind == "peft" and alpha:
        # the file's own scale is 1 and its b are twice ours
        assert scale == 1 and all(np.array_equal(v, leaves(made)[k] * (2 if k.endswith("/b") else 1))
                                  for k, v in leaves(read).items())  # fmt: skip
    else:
        assert scale == (alpha or 4) / 4 and same(read, made)
    ours, theirs = lora.merge(PARAMS, made, (alpha or 4) / 4), lora.merge(PARAMS, read, scale)
    assert all(np.array_equal(v, leaves(theirs)[k]) for k, v in leaves(ours).items())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_convolution_of_the_file_is_that_of_the_merged_kernel(tmp_path, kind):
    made = factors()
    WRITERS[kind](tmp_path / "l.safetensors", made, PARAMS, rank=4, prefix=PREFIX)
    file = load_file(tmp_path / "l.safetensors")
    name = "unet.down_blocks.0.resnets.0.conv1" if kind == "peft" else "lora_unet_down_blocks_0_resnets_0_conv1"
    down, up = (file[f"{name}.{half}.weight"] for half in (("lora_A", "lora_B") if kind == "peft" else ("lora_down", "lora_up")))
    assert down.shape == (4, 8, 3, 2) and up.shape == (8, 4, 1, 1)
    kernel = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    merged = leaves(lora.merge(PARAMS, made, 1.0))["unet/down_blocks.0.resnets.0/conv1/kernel"]
    np.testing.assert_allclose(kernel.transpose(2, 3, 1, 0), merged, atol=1e-6)


def test_names_are_those_that_the_tools_use(tmp_path):
    lora_files.write_peft(tmp_path / "p.safetensors", factors(), PARAMS, rank=4, prefix=PREFIX)
    lora_files.write_kohya(tmp_path / "k.safetensors", factors(), PARAMS, rank=4, prefix=PREFIX)
    peft, kohya = load_file(tmp_path / "p.safetensors"), load_file(tmp_path / "k.safetensors")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in (f"unet.{block}.attn1.to_q", f"unet.{block}.attn1.to_out.0", f"unet.{block}.ff.net.0.proj", "unet.conv_in",
                 "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"):  # fmt: skip
        assert {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= peft.keys()
    for name in (f"lora_unet_{block.replace('.', '_')}_attn1_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1",
                 "lora_unet_label_emb_0_0"):  # fmt: skip
        assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= kohya.keys()
    assert all(v.shape[:1] == (4,) for k, v in peft.items() if "lora_A" in k), "one rank, for every reader"
    two = {"unet": PARAMS["unet"], "text": PARAMS["text"], "text_2": PARAMS["text"]}
    prefix = {**PREFIX, "text_2": "text_encoder_2"}
    lora_files.write_kohya(tmp_path / "xl.safetensors", factors(two), two, rank=4, prefix=prefix)
    assert {k.split("_text")[0] for k in load_file(tmp_path / "xl.safetensors") if "_te" in k and "lora_te" in k} == {
        "lora_te1", "lora_te2"}  # fmt: skip
    assert same(lora_files.read_lora(tmp_path / "xl.safetensors", two, prefix=prefix)[0], factors(two))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_one_component_in_half_precision(tmp_path, dtype):
    params = PARAMS["unet"]
    made = factors(params, targets=".*")
    for write in WRITERS.values():
        write(tmp_path / "l.safetensors", made, params, rank=4, alpha=2.0, dtype=dtype)
        read, scale = lora_files.read_lora(tmp_path / "l.safetensors", params)
        a, b = leaves(lora.merge(params, made, 0.5)), leaves(lora.merge(params, read, scale))
        assert all(np.abs(a[k] - b[k]).max() < 0.03 for k in a)


def peft(params, rank=2):
    """A file's tensors of the attention of PARAMS["unet"], and the weights that they stand for at scale 1."""
    made = factors(params, targets="attn", rank=rank)
    out = {}
    for path, value in leaves(made).items():
        kernel, _, half = path.rpartition("/")
        name = kernel.removesuffix("/kernel").replace("/", ".")
        out[f"{name}.lora_{half.upper()}.weight"] = np.asarray(value.T, order="C")
    return made, out


def first_format(tensors):
    """As diffusers wrote attention processors before it used PEFT."""
    out = {}
    for name, value in tensors.items():
        module, _, rest = name.rpartition(".lora_")
        head, _, last = module.removesuffix(".0").rpartition(".")
        out[f"unet.{head}.processor.{last}_lora.{'down' if rest[0] == 'A' else 'up'}.weight"] = value
    return out


def stability_names(tensors):
    """As kohya's tools name SDXL's modules, after Stability's code."""
    out = {}
    for name, value in tensors.items():
        name = name.replace("down_blocks.0.attentions.0", "input_blocks.1.1")
        module, _, rest = name.rpartition(".lora_")
        out[f"lora_unet_{module.replace('.', '_')}.lora_{'down' if rest[0] == 'A' else 'up'}.weight"] = value
    return out


@pytest.mark.parametrize("form", [
    lambda t: {f"unet.{k}": v for k, v in t.items()}, lambda t: t, first_format, stability_names,
    lambda t: {f"base_model.model.{k}": v for k, v in t.items()},
], ids=["diffusers", "bare", "processors", "kohya_xl", "peft"])  # fmt: skip
def test_names_of_other_writers_are_read(tmp_path, form):
    made, tensors = peft(PARAMS["unet"])
    save_file(form(tensors), tmp_path / "l.safetensors")
    read, scale = lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])
    assert scale == 1 and same(read, made)


def test_alpha_is_read_from_the_header_and_from_the_file_beside_it(tmp_path):
    made, tensors = peft(PARAMS["unet"])
    config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {}, "rank_pattern": {}}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    save_file({f"unet.{k}": v for k, v in tensors.items()}, tmp_path / "l.safetensors", metadata=header)
    assert lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])[1] == 2
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    config["alpha_pattern"] = {"attn2.to_k": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read, scale = lora_files.read_lora(tmp_path / "adapter_model.safetensors", PARAMS["unet"])
    times = {k: (4 if "attn2" in k else 2) if k.endswith("/b") else 1 for k in leaves(made)}
    assert scale == 1 and all(np.array_equal(v, times[k] * leaves(made)[k]) for k, v in leaves(read).items())


NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("change, words", [
    (lambda t: t | {"unet.transformer.blocks.0.attn.lora_A.weight": np.zeros((2, 2))},
     ["1 of 7 keys", "transformer.blocks.0.attn.lora_A", "another model"]),
    (lambda t: t | {f"unet.{NAME.replace('to_q', 'to_u')}.lora_A.weight": np.zeros((2, 2))}, ["to_u", f"nearest: unet.{NAME}"]),
    (lambda t: t | {f"unet.{NAME}.lora_magnitude_vector": np.zeros(2)}, ["another kind of adapter"]),
    (lambda t: t | {f"unet.{NAME}.lora_A.weight": np.zeros((2, 9), np.float32)}, [NAME, "[2, 9]", "kernel [8, 8]"]),
    (lambda t: t | {f"unet.{NAME}.lora_A.weight": np.zeros((3, 8), np.float32)}, [NAME, "ranks 3 and 2 differ"]),
    (lambda t: t | {f"unet.{NAME}.lora_A.weight": np.full((2, 8), np.nan, np.float32)}, [NAME, "NaN"]),
    (lambda t: {k: v for k, v in t.items() if k != f"unet.{NAME}.lora_B.weight"}, [NAME, "no up half"]),
    (lambda t: {}, ["no LoRA factors"]),
])  # fmt: skip
def test_a_file_that_does_not_fit_says_which_keys(tmp_path, change, words):
    _, tensors = peft(PARAMS["unet"])
    save_file(change({f"unet.{k}": v for k, v in tensors.items()}), tmp_path / "l.safetensors")
    with pytest.raises(ValueError) as caught:
        lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_of_many_unknown_keys_ten_are_named(tmp_path):
    save_file({f"unet.other.{i}.lora_A.weight": np.zeros((1, 1)) for i in range(30)}, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="30 of 30 keys") as caught:
        lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])
    assert str(caught.value).count("other.") == 10


def test_files_that_are_not_there_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])
    (tmp_path / "l.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="9 bytes, is not a whole"):
        lora_files.read_lora(tmp_path / "l.safetensors", PARAMS["unet"])


def test_factors_that_are_not_of_the_parameters_are_not_written(tmp_path):
    made = factors(PARAMS["unet"], targets="attn")
    with pytest.raises(ValueError, match="have rank 4; rank=2"):
        lora_files.write_peft(tmp_path / "l.safetensors", made, PARAMS["unet"], rank=2)
    with pytest.raises(ValueError, match="kernel there is None"):
        lora_files.write_peft(tmp_path / "l.safetensors", made, PARAMS["text"], rank=4)
    with pytest.raises(ValueError, match="no component is given for 'unet'"):
        lora_files.write_kohya(tmp_path / "l.safetensors", factors(), PARAMS, rank=4, prefix={"text": "text_encoder"})
    assert not list(tmp_path.iterdir())


def test_the_header_says_which_framework(tmp_path):
    lora_files.write_kohya(tmp_path / "l.safetensors", factors(), PARAMS, rank=4, prefix=PREFIX)
    with safe_open(tmp_path / "l.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name, count, text", [
    ("diffusers", 3, False), ("ddpo-pytorch", 3, False), ("draft", 4, False), ("all-linear", 6, False), ("unet", 10, False),
    ("text_encoder", 1, True), ("unet|text", 12, True),
])  # fmt: skip
def test_named_targets_choose_their_kernels(name, count, text):
    found = lora.init(KEY, PARAMS, rank=2, targets=name)
    assert len(leaves(found)) == 2 * count
    assert any(path.startswith("text") for path in leaves(found)) == text
    one = PARAMS["text" if name == "text_encoder" else "unet"]
    if name not in ("unet", "unet|text"):
        assert len(leaves(lora.init(KEY, one, rank=2, targets=name))) == 2 * count, "the same in a component by itself"


def test_alpha_over_rank_is_the_scale():
    params = {"unet": {"kernel": np.ones((2, 3), np.float32)}}
    trained = {"unet": {"kernel": {"a": np.ones((2, 2)), "b": np.ones((2, 3))}}}
    for kwargs, scale in (({}, 1.0), ({"alpha": 8.0}, 4.0), ({"scale": 0.5}, 0.5)):
        tuned = lora_partition(rank=2, **kwargs).merge(trained, params)
        assert np.array_equal(tuned["unet"]["kernel"], np.full((2, 3), 1 + 2 * scale))
    with pytest.raises(ValueError, match="give one of the two"):
        lora_partition(rank=2, alpha=4.0, scale=2.0)
