"""The autoencoders compute what diffusers' do, under diffusers' names; references/autoencoder.py makes the fixtures."""

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
from references.autoencoder import weights

from alignment_jax.models.autoencoder import Autoencoder, autoencoder, tiled_decode, tiny_autoencoder
from alignment_jax.weights.torch_names import import_torch, torch_name, torch_shape

HERE = Path(__file__).parent
CASES = ("kl", "kl_without_quant", "tiny")
KL = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "in_channels": 3,
    "out_channels": 3, "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
FULL = {
    "sd_vae_4ch": autoencoder(KL),
    "sd3_vae_16ch": autoencoder({**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}),
    "taesd": tiny_autoencoder({"_class_name": "AutoencoderTiny", "act_fn": "relu", "latent_magnitude": 3}),
}


def load(name):
    """(network, pixels, z, outputs of diffusers)."""
    with np.load(FIXTURES / f"autoencoder_{name}.npz") as file:
        data = dict(file)
    config = json.loads(str(data.pop("config")))
    return (tiny_autoencoder if name == "tiny" else autoencoder)(config), data.pop("pixels"), data.pop("z"), data


def parameters(name, net, pixels):
    like = jax.eval_shape(net.init, jax.random.key(0), pixels)["params"]
    shapes = {torch_name(k): torch_shape(k, v.shape) for k, v in flatten_dict(like, sep="/").items()}
    return {"params": import_torch(weights(name, shapes), like)}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_diffusers(name):
    net, pixels, z, theirs = load(name)
    params = parameters(name, net, pixels)

    @jax.jit
    def run(params, pixels, z):
        encoded = net.apply(params, pixels, method="encode")
        outputs = dict(zip(("mean", "logvar"), encoded)) if isinstance(net, Autoencoder) else {"latents": encoded}
        return {**outputs, "decoded": net.apply(params, z, method="decode")}

    for key, ours in run(params, pixels, z).items():
        error = np.abs(ours - theirs[key]).max() / np.abs(theirs[key]).max()
        print(f"{name} {key}: {error:.1e} of the output's scale {np.abs(theirs[key]).max():.2f}")
        assert ours.shape == theirs[key].shape and error < 2e-5


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_are_those_of_the_checkpoint(name):
    tree = jax.eval_shape(FULL[name].init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    ours = {torch_name(k): list(torch_shape(k, v.shape)) for k, v in flatten_dict(tree, sep="/").items()}
    assert ours == json.loads(gzip.decompress((HERE / "manifests" / f"{name}.json.gz").read_bytes()))


def test_rematerialised_blocks_change_neither_pixels_nor_gradient():
    net, pixels, z, _ = load("kl_without_quant")
    params = parameters("kl_without_quant", net, pixels)

    def loss(z, net):
        y = net.apply(params, z, method="decode")
        return jnp.mean(y**2), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, y), gradient = run(z, net)
    (_, y_remat), gradient_remat = run(z, net.clone(remat=True))
    np.testing.assert_allclose(y, y_remat, atol=1e-5)
    np.testing.assert_allclose(gradient, gradient_remat, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("name", ["kl_without_quant", "tiny"])
def test_bfloat16_is_near_float32(name):
    net, pixels, z, theirs = load(name)
    params = parameters(name, net, pixels)
    y = jax.jit(lambda p, z: net.clone(dtype=jnp.bfloat16).apply(p, z, method="decode"))(params, z)
    assert y.dtype == jnp.float32
    assert np.abs(y - theirs["decoded"]).max() / np.abs(theirs["decoded"]).max() < 0.05


def test_log_variance_is_clipped():
    net, pixels, _, _ = load("kl")
    params = parameters("kl", net, pixels)
    params["params"]["quant_conv"]["bias"] = np.array([0.0] * 4 + [-99.0] * 2 + [99.0] * 2, np.float32)
    logvar = jax.jit(lambda p, x: net.apply(p, x, method="encode")[1])(params, pixels[:1, :8, :8])
    assert float(logvar.min()) == -30 and float(logvar.max()) == 20


def test_one_tile_is_the_plain_decoder():
    decode = lambda z: 2 * jnp.tile(z, (1, 4, 4, 1))
    z = jnp.ones((1, 8, 6, 2))
    np.testing.assert_array_equal(tiled_decode(decode, z, tile=8, overlap=2), decode(z))
    with pytest.raises(ValueError, match="0 <= overlap < tile"):
        tiled_decode(decode, z, tile=8, overlap=8)


@pytest.mark.parametrize(("size", "overlap"), [((20, 13), 3), ((9, 6), 0), ((6, 31), 5)])
def test_tiles_of_a_local_decoder_make_the_whole(size, overlap):
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32)
    decode = lambda z: jnp.repeat(jnp.repeat(z, 4, 1), 4, 2) ** 2
    tiled = lambda z: tiled_decode(decode, z, tile=8, overlap=overlap)
    np.testing.assert_allclose(jax.jit(tiled)(z), decode(z), atol=1e-5)
    gradient = jax.grad(lambda z: jnp.sum(tiled(z)))(z)
    np.testing.assert_allclose(gradient, jax.grad(lambda z: jnp.sum(decode(z)))(z), atol=1e-3)


def test_blending_leaves_no_seam():
    # each tile adds a constant of its own (its mean), as normalisation does: neighbouring pixels must still be close
    z = jnp.broadcast_to(jnp.arange(24.0)[None, :, None, None] / 24, (1, 24, 8, 1))
    decode = lambda z: jnp.repeat(jnp.repeat(jnp.zeros_like(z) + z.mean(), 2, 1), 2, 2)
    column = tiled_decode(decode, z, tile=8, overlap=4)[0, :, 0, 0]
    step = float(jnp.abs(jnp.diff(tiled_decode(decode, z, tile=8, overlap=0)[0, :, 0, 0])).max())
    assert float(jnp.abs(jnp.diff(column)).max()) < step / 8
    assert float(jnp.diff(column).min()) > -1e-6


@pytest.mark.parametrize(("factory", "config", "words"), [
    (autoencoder, {"_class_name": "AutoencoderDC"}, ["AutoencoderDC", "AutoencoderKL"]),
    (autoencoder, {"act_fn": "relu"}, ["act_fn", "'relu'", "'silu'"]),
    (autoencoder, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, ["up_block_types", "UpDecoderBlock2D"]),
    (autoencoder, {"latent_chanels": 4}, ["latent_chanels", "nearest: latent_channels"]),
    (tiny_autoencoder, {"upsample_fn": "bilinear"}, ["upsample_fn", "'bilinear'", "'nearest'"]),
    (tiny_autoencoder, {"encoder_block_out_channels": [32, 64, 64, 64]}, ["encoder_block_out_channels", "one width"]),
])  # fmt: skip
def test_unsupported_configs_are_named(factory, config, words):
    with pytest.raises(ValueError) as error:
        factory(config)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parity
def test_fixtures_are_what_diffusers_computes_today(parity_python, tmp_path):
    subprocess.run([parity_python, HERE / "references" / "autoencoder.py", tmp_path], check=True, stderr=sys.stderr)
    for name in CASES:
        with np.load(tmp_path / f"autoencoder_{name}.npz") as new, np.load(FIXTURES / f"autoencoder_{name}.npz") as old:
            assert set(new) == set(old)
            for key in set(old) - {"config", "versions"}:
                np.testing.assert_allclose(new[key], old[key], atol=1e-5 * np.abs(old[key]).max())
