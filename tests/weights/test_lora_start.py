"""A run goes on from the factors of a LoRA file, or says why it cannot."""

import jax
import numpy as np
import pytest
import tiny_sd
from flax.traverse_util import flatten_dict, unflatten_dict

from alignment_jax.models import lora
from alignment_jax.models.stable_diffusion import stable_diffusion
from alignment_jax.training.state import lora_partition
from alignment_jax.weights import lora_files

UNET, BOTH = "ddpo-pytorch", rf"({lora.TARGETS['ddpo-pytorch']})|({lora.TARGETS['text_encoder']})"


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    bundle = stable_diffusion(tiny_sd.write("sd15", tmp_path_factory.mktemp("sd15")))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), jax.eval_shape(bundle.init, jax.random.key(0)))


def fresh(params, rank=3, targets=UNET):
    return lora.init(jax.random.key(1), params, rank=rank, targets=targets)


def random(params, rank=3, targets=UNET):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), fresh(params, rank, targets))


def write(path, factors, params, form="peft", rank=3, alpha=None):
    write = lora_files.write_peft if form == "peft" else lora_files.write_kohya
    write(path, factors, params, rank=rank, alpha=alpha, prefix={name: name for name in factors})
    return path


def same(a, b, atol=0.0):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-6 if atol else 0, atol=atol, err_msg=k)


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("targets", [UNET, BOTH])
def test_exported_factors_come_back_as_the_start(form, targets, params, tmp_path):
    written = random(params, targets=targets)
    path = write(tmp_path / "x.safetensors", written, params, form)
    start, ranks, scale = lora_files.factors(path, jax.eval_shape(lambda: params), fresh(params, targets=targets))
    same(start, written)
    assert scale == 1.0 and set(ranks.values()) == {3}
    same(lora_files.factors(path, params)[0], written)


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_alpha_is_folded_so_that_the_runs_own_scale_gives_the_files_change(form, scale, params, tmp_path):
    """The trap: factors taken over without alpha / rank start from another model."""
    written = random(params)
    path = write(tmp_path / "x.safetensors", written, params, form, alpha=6.0)
    start, _, at = lora_files.factors(path, params, fresh(params), scale=scale)
    assert at == scale
    same(lora.merge(params, start, at), lora.merge(params, written, 2.0), atol=1e-6)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(lora.merge(params, start, at)), jax.tree.leaves(params), strict=True))


def test_what_the_file_leaves_out_starts_fresh(params, tmp_path):
    """Kernels it has not, and directions beyond a lower rank, change nothing at first and can be trained."""
    written = flatten_dict(random(params), sep="/")
    kernels = sorted({k.rpartition("/")[0] for k in written})
    first, low = kernels[0], kernels[1]
    some = {k: v for k, v in written.items() if not k.startswith(first)}
    some |= {f"{low}/a": some[f"{low}/a"][:, :2], f"{low}/b": some[f"{low}/b"][:2]}
    path = tmp_path / "x.safetensors"
    names = {k: lora_files.torch_names.torch_name(k.removeprefix("unet/")).removesuffix(".weight") for k in kernels}
    parts = {f"unet.{names[k]}.lora_{t}.weight": np.ascontiguousarray(some[f"{k}/{s}"].T)
             for k in kernels[1:] for t, s in (("A", "a"), ("B", "b"))}  # fmt: skip
    lora_files._write(path, parts, np.float32)
    new = fresh(params)
    start, ranks, _ = lora_files.factors(path, params, new)
    assert first not in ranks and ranks[low] == 2 and max(ranks.values()) == 3
    same(lora.merge(params, start), lora.merge(params, unflatten_dict(some, sep="/")), atol=1e-6)
    start, new = flatten_dict(start, sep="/"), flatten_dict(new, sep="/")
    assert np.array_equal(start[f"{first}/a"], new[f"{first}/a"]) and not np.any(start[f"{first}/b"])
    assert np.array_equal(start[f"{low}/a"][:, 2:], new[f"{low}/a"][:, 2:]) and not np.any(start[f"{low}/b"][2:])


def test_the_start_is_traced_as_well(params, tmp_path):
    """Shapes of what is trained are asked for before anything is in memory."""
    path = write(tmp_path / "x.safetensors", random(params), params)
    start = jax.eval_shape(lambda p: lora_files.factors(path, p, fresh(p))[0], params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh(params))


def test_files_that_do_not_fit_the_run_are_refused(params, tmp_path):
    path = write(tmp_path / "x.safetensors", random(params), params)
    with pytest.raises(ValueError, match="factors of rank 3 and this run's are of rank 2, as at unet/.*; set lora.rank=3"):
        lora_files.factors(path, params, fresh(params, rank=2))
    with pytest.raises(ValueError, match="factors of rank 3 and this run's are of rank 4, as at unet/.*; set lora.rank=3"):
        lora_files.factors(path, params, fresh(params, rank=4))
    both = write(tmp_path / "both.safetensors", random(params, targets=BOTH), params)
    with pytest.raises(ValueError, match=r"adapts 8 of 40 kernels .* not train, in text_encoder:\n(?s:.*)Widen lora.targets"):
        lora_files.factors(both, params, fresh(params))
    with pytest.raises(ValueError, match=r"kernels that this run does not train, in unet:"):
        lora_files.factors(both, params, fresh(params, targets="text_encoder"))
    with pytest.raises(ValueError, match="cannot go on from .* at scale 0"):
        lora_files.factors(path, params, fresh(params), scale=0.0)
    wide = {**params, "unet": jax.tree.map(lambda x: np.zeros([2 * n for n in x.shape]), params["unet"])}
    with pytest.raises(ValueError, match="is this LoRA of another model"):
        lora_files.factors(path, wide, fresh(wide))
    other = {"unet": {"mine": {"kernel": np.zeros((8, 8), np.float32)}}}
    with pytest.raises(ValueError, match="keys are unknown. A LoRA of another model?"):
        lora_files.factors(path, other, lora.init(jax.random.key(0), other, rank=3))
    with pytest.raises(FileNotFoundError, match="no LoRA file at"):
        lora_files.factors(tmp_path / "gone.safetensors", params, fresh(params))


def test_a_run_whose_config_names_a_file_starts_from_it(params, tmp_path):
    written = random(params)
    path = write(tmp_path / "x.safetensors", written, params)
    trained, frozen = lora_partition(rank=3, targets=UNET, scale=0.5, file=str(path)).init(jax.random.key(0), params)
    assert frozen is params
    same(lora.merge(params, trained, 0.5), lora.merge(params, written, 1.0), atol=1e-6)
