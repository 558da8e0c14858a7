"""The UNet computes what diffusers' does, under diffusers' names; fixtures are made by references/unet.py."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FIXTURES
from flax.traverse_util import flatten_dict
from references.unet import weights

from alignment_jax.models.attention import attention
from alignment_jax.models.unet import unet
from alignment_jax.weights.torch_names import import_torch, torch_name, torch_shape

HERE = Path(__file__).parent
CASES = ("sd1", "sd2", "sdxl", "lcm")
SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
FULL = {
    "sd15_unet": {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "sd21_unet": {**SD2, "upcast_attention": True, "dual_cross_attention": False, "num_class_embeds": None},
    "sdxl_unet": {
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "resnet_out_scale_factor": 1.0, "upcast_attention": None, "attention_type": "default",
    },
}  # fmt: skip


def load(name):
    """(config, inputs in call order, keyword inputs, output of diffusers)."""
    with np.load(FIXTURES / f"unet_{name}.npz") as file:
        data = dict(file)
    config, y = json.loads(str(data.pop("config"))), data.pop("y")
    del data["versions"]
    return config, [data.pop(k) for k in ("x", "t", "states")], data, y


def parameters(name, net, *args, **kwargs):
    like = jax.eval_shape(net.init, jax.random.key(0), *args, **kwargs)["params"]
    shapes = {torch_name(k): torch_shape(k, v.shape) for k, v in flatten_dict(like, sep="/").items()}
    return import_torch(weights(name, shapes), like)


@pytest.mark.parametrize("name", CASES)
def test_output_is_that_of_diffusers(name):
    config, args, kwargs, y = load(name)
    net = unet(config)
    ours = jax.jit(net.apply)({"params": parameters(name, net, *args, **kwargs)}, *args, **kwargs)
    assert ours.shape == y.shape and ours.dtype == jnp.float32
    error = np.abs(ours - y).max() / np.abs(y).max()
    print(f"{name}: {error:.1e} of the output's scale {np.abs(y).max():.2f}")
    assert error < 2e-5


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_are_those_of_the_checkpoint(name):
    net = unet(FULL[name])
    x, t, states = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 77, net.cross_attention_dim))
    extra = {"pooled": jnp.zeros((1, 1280)), "time_ids": jnp.zeros((1, 6))} if name == "sdxl_unet" else {}
    tree = flatten_dict(jax.eval_shape(net.init, jax.random.key(0), x, t, states, **extra)["params"], sep="/")
    ours = {torch_name(k): list(torch_shape(k, v.shape)) for k, v in tree.items()}
    assert ours == json.loads(gzip.decompress((HERE / "manifests" / f"{name}.json.gz").read_bytes()))


def test_rematerialised_blocks_change_neither_output_nor_gradient():
    config, args, kwargs, _ = load("lcm")
    params = parameters("lcm", unet(config), *args, **kwargs)

    def loss(params, net):
        y = net.apply({"params": params}, *args, **kwargs)
        return jnp.mean(y**2), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, y), gradient = run(params, unet(config))
    (_, y_remat), gradient_remat = run(params, unet(config, remat=True))
    np.testing.assert_allclose(y, y_remat, atol=1e-5)
    assert "remat" in str(jax.make_jaxpr(lambda p: loss(p, unet(config, remat=True))[0])(params))
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_remat), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_bfloat16_is_near_float32():
    config, args, kwargs, y = load("sd2")
    net = unet(config, dtype=jnp.bfloat16)
    ours = jax.jit(net.apply)({"params": parameters("sd2", net, *args, **kwargs)}, *args, **kwargs)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - y).max() / np.abs(y).max() < 0.05


def test_implementations_of_attention_agree():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 3, 8)), jnp.float32) for n in (5, 7, 7))
    mask = jnp.arange(7) < jnp.array([[4], [7]])
    for m in (None, mask):
        plain = attention(q, k, v, m)
        np.testing.assert_array_equal(plain, attention(q, k, v, m, implementation="einsum"))
        np.testing.assert_allclose(plain, attention(q, k, v, m, implementation="xla"), atol=1e-6)
    with pytest.raises(ValueError, match="'einsum', 'xla' or 'cudnn'"):
        attention(q, k, v, implementation="flash")


def test_every_cross_attention_passes_through_one_function(monkeypatch):
    config, args, kwargs, _ = load("sdxl")
    seen = []

    def spy(module, q, k, v, *, implementation=None):
        seen.append((".".join(module.path), q.shape, k.shape))
        return attention(q, k, v)

    monkeypatch.setattr("alignment_jax.models.blocks.cross_attention", spy)
    jax.eval_shape(unet(config).init, jax.random.key(0), *args, **kwargs)
    assert len(seen) == len(set(seen)) == 8  # two layers in each of the down block, the middle and the up block's two
    name = "up_blocks.0.attentions.1.transformer_blocks.1.attn2"
    assert seen[-1] == (name, (2, 4 * 6, 4, 16), (2, 7, 4, 16))


@pytest.mark.parametrize(("change", "words"), [
    ({"_class_name": "FluxTransformer2DModel"}, ["FluxTransformer2DModel", "UNet2DConditionModel"]),
    ({"class_embed_type": "timestep"}, ["class_embed_type", "'timestep'", "None"]),
    ({"act_fn": "gelu"}, ["act_fn", "'gelu'", "'silu'"]),
    ({"addition_embed_type": "image"}, ["addition_embed_type", "'image'", "'text_time'"]),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, ["down_block_types", "AttnDownBlock2D", "CrossAttnDownBlock2D"]),
    ({"layers_per_blok": 2}, ["layers_per_blok", "layers_per_block"]),
    ({"attention_head_dim": [5, 10]}, ["attention_head_dim", "(5, 10)"]),
    ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, ["transformer_layers_per_block"]),
    ({"cross_attention_dim": [768] * 4}, ["cross_attention_dim", "one number"]),
])  # fmt: skip
def test_unsupported_configs_are_named(change, words):
    with pytest.raises(ValueError) as error:
        unet({**FULL["sd15_unet"], **change})
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_conditions_are_named():
    config, (x, t, states), kwargs, _ = load("sdxl")
    call = lambda net, *args, **kw: jax.eval_shape(net.init, jax.random.key(0), *args, **kw)
    with pytest.raises(ValueError, match="give pooled"):
        call(unet(config), x, t, states)
    with pytest.raises(ValueError, match="make 66 features; wanted 64"):
        call(unet(config), x, t, states, **{**kwargs, "pooled": np.zeros((2, 18))})
    with pytest.raises(ValueError, match=r"wanted \[B,L,24\]"):
        call(unet(config), x, t, states[..., :20], **kwargs)
    with pytest.raises(ValueError, match="channels come last"):
        call(unet(config), x.transpose(0, 3, 1, 2), t, states, **kwargs)
    with pytest.raises(ValueError, match="no addition_embed_type"):
        call(unet(load("sd1")[0]), x, t, states, **kwargs)
    with pytest.raises(ValueError, match="no time_cond_proj_dim"):
        call(unet(load("sd1")[0]), x, t, states, timestep_cond=np.zeros((2, 12)))


def test_num_attention_heads_goes_before_attention_head_dim():
    config, args, kwargs, _ = load("lcm")
    params = parameters("lcm", unet(config), *args, **kwargs)
    program = lambda **change: str(jax.make_jaxpr(
        lambda p: unet({**config, **change}).apply({"params": p}, *args, **kwargs))(params))  # fmt: skip
    assert program(attention_head_dim=8, num_attention_heads=4) == program(attention_head_dim=4)
    assert program(attention_head_dim=8, num_attention_heads=None) != program(attention_head_dim=4)


@pytest.mark.parity
def test_fixtures_are_what_diffusers_computes_today(parity_python, tmp_path):
    subprocess.run([parity_python, HERE / "references" / "unet.py", tmp_path], check=True, stderr=sys.stderr)
    for name in CASES:
        with np.load(tmp_path / f"unet_{name}.npz") as new, np.load(FIXTURES / f"unet_{name}.npz") as old:
            assert set(new) == set(old)
            for key in set(old) - {"config", "versions"}:
                np.testing.assert_allclose(new[key], old[key], atol=1e-5 * np.abs(old[key]).max())
