"""What transformers', open_clip's and diffusers' CLIPs compute on random weights, and scorers built on them.

python tests/parity/references/clip.py [OUT_DIR]
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import FIXTURES, random_weights

LENGTH, EMBED = 16, 24
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGES = ["a t</w>", "t h", "th e</w>", "c at</w>", "d o", "do g</w>", "o n</w>", "r e", "re d</w>", "p h", "o f</w>", "i n"]
PROMPTS = ["A red cat on the dog", "it's 25 cats &amp;amp; <b>dogs</b>", "<|endoftext|> of the caf\u00e9", "", "the cat \U0001f600 " * 6]
SCORED = [0, 4]  # prompts of which the tokenizers of open_clip and transformers make the same
TEXTS = {
    "quick": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60,
              "max_position_embeddings": 12, "eos_token_id": 2, "architectures": ["CLIPTextModel"]},
    "gelu": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 60,
             "max_position_embeddings": 12, "eos_token_id": 50, "hidden_act": "gelu", "projection_dim": 40,
             "architectures": ["CLIPTextModelWithProjection"]},
}  # fmt: skip
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24,
          "patch_size": 8, "hidden_act": "gelu", "projection_dim": 40,
          "architectures": ["CLIPVisionModelWithProjection"]}  # fmt: skip
WHOLE = {
    "model_type": "clip", "projection_dim": EMBED,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "vocab_size": 512 + len(MERGES) + 2, "max_position_embeddings": LENGTH, "eos_token_id": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "image_size": 28, "patch_size": 7},
}  # fmt: skip
HEADS = {
    "v1": {"weight": (1, EMBED), "bias": (1,)},
    **{kind: {f"layers.{n}.{end}": size for n, i, o in zip(numbers, (EMBED, 32, 16, 12, 8), (32, 16, 12, 8, 1))
              for end, size in (("weight", (o, i)), ("bias", (o,)))}
       for kind, numbers in (("linear", (0, 2, 4, 6, 7)), ("relu", (0, 3, 6, 9, 11)))},
}  # fmt: skip


def pictures() -> np.ndarray:
    """Six smooth pictures with some noise, uint8 [6,33,40,3]."""
    from PIL import Image

    rng = np.random.default_rng(3)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((40, 33), Image.Resampling.BICUBIC) for _ in range(6)]
    noise = rng.integers(-12, 13, (6, 33, 40, 3))
    return np.clip(np.stack([np.asarray(c) for c in coarse]).astype(int) + noise, 0, 255).astype(np.uint8)


def main(out: Path) -> None:
    # not needed here, and where it was built for another torch, importing diffusers would fail on it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from PIL import Image
    from torch.nn import functional as F

    # open_clip imports names of it, of which nothing here makes use
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    sys.modules |= {f"torchvision{part}": MagicMock() for part in parts}
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.set_num_threads(1)
    versions = np.array([f"{m.__name__} {m.__version__}" for m in (torch, transformers, open_clip, diffusers)])
    save = lambda name, **arrays: np.savez_compressed(out / f"clip_{name}.npz", versions=versions, **arrays)

    def filled(net, prefix=""):
        """The network with random weights by its names; prefix: of the tower, where transformers leaves it away."""
        full = lambda k: k if k.startswith((prefix, "text_projection", "visual_projection")) else prefix + k
        state = net.state_dict()
        weights = random_weights({full(k): tuple(v.shape) for k, v in state.items()})
        net.load_state_dict({k: torch.from_numpy(np.asarray(weights[full(k)])) for k in state})
        return net.eval().requires_grad_(False)

    rng = np.random.default_rng(0)
    for name, config in TEXTS.items():
        end = 59 if config["eos_token_id"] == 2 else 50
        ids = rng.integers(1, 49, (2, 10))
        ids[0, 6:], ids[1, 9:] = end, end
        if name == "gelu":
            ids[0, 8:] = 0
        projects = "projection_dim" in config
        kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
        net = filled(kind(transformers.CLIPTextConfig(**config)), "text_model.")
        y = net(torch.from_numpy(ids), output_hidden_states=True)
        inner = net.text_model(torch.from_numpy(ids)) if projects else y
        extra = {"projected": y.text_embeds.numpy()} if projects else {}
        save(f"text_{name}", ids=ids.astype(np.int32), config=json.dumps(config), last_hidden_state=y.last_hidden_state.numpy(),
             penultimate=y.hidden_states[-2].numpy(), pooled=inner.pooler_output.numpy(), **extra)  # fmt: skip

    pixels = rng.standard_normal((2, 24, 24, 3)).astype(np.float32)
    net = filled(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)), "vision_model.")
    nchw = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
    y = net(nchw(pixels), output_hidden_states=True)
    save("vision", pixels=pixels, config=json.dumps(VISION), last_hidden_state=y.last_hidden_state.numpy(),
         penultimate=y.hidden_states[-2].numpy(), projected=y.image_embeds.numpy(),
         pooled=net.vision_model(nchw(pixels)).pooler_output.numpy())  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        bpe = Path(folder) / "bpe.gz"
        bpe.write_bytes(gzip.compress("\n".join(["#version", *MERGES]).encode()))
        tokenizer = open_clip.tokenizer.SimpleTokenizer(str(bpe), context_length=LENGTH)
    vocabulary = sorted(tokenizer.encoder, key=tokenizer.encoder.get)
    vocabulary[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    ids = tokenizer(PROMPTS).numpy()

    images = pictures()
    short = lambda x: [28 * s // min(x.size) for s in x.size]
    pillow = [np.asarray(Image.fromarray(x).resize(short(Image.fromarray(x)), Image.Resampling.BICUBIC)) for x in images]
    offsets = [(s - 28) // 2 for s in pillow[0].shape[:2]]
    crop = lambda x: x[..., offsets[0] : offsets[0] + 28, offsets[1] : offsets[1] + 28]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, STD))
    exact = (crop(torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2)) / 255 - mean) / std
    resize = lambda x, antialias=True: crop(F.interpolate(x, size=pillow[0].shape[:2], mode="bicubic", antialias=antialias))
    floats = nchw(images.astype(np.float32) / 255)
    prepared = lambda x, antialias=True: (resize(x, antialias) - mean) / std
    permute = lambda x: x.permute(0, 2, 3, 1).numpy()
    save("pixels", images=images, exact=permute(exact), diff=permute(prepared(floats)), aliased=permute(prepared(floats, False)))

    net = filled(transformers.CLIPModel(transformers.CLIPConfig(**WHOLE)))
    tokens = torch.from_numpy(ids[SCORED])
    y = net(input_ids=tokens, pixel_values=exact[:2])
    save("whole", ids=ids[SCORED].astype(np.int32), pixels=permute(exact[:2]), config=json.dumps(WHOLE), logits=y.logits_per_image.numpy(),
         text=y.text_embeds.numpy(), image=y.image_embeds.numpy())  # fmt: skip

    image = lambda x: F.normalize(net.visual_projection(net.vision_model(x).pooler_output), dim=-1)
    text = F.normalize(net.text_projection(net.text_model(tokens).pooler_output), dim=-1)

    def head(kind):
        """A LAION head: linear layers, with ReLU between them or nothing."""
        weights = {k: torch.from_numpy(v) for k, v in random_weights(HEADS[kind]).items()}
        layers = []
        for stem in dict.fromkeys(k.removesuffix("weight").removesuffix("bias") for k in weights):
            linear = torch.nn.Linear(*weights[f"{stem}weight"].shape[::-1])
            linear.load_state_dict({"weight": weights[f"{stem}weight"], "bias": weights[f"{stem}bias"]})
            layers += [linear] + [torch.nn.ReLU()] * (kind == "relu")
        return torch.nn.Sequential(*(layers[:-1] if kind == "relu" else layers)).requires_grad_(False)

    towers = CLIP(EMBED, CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=7, image_size=28, mlp_ratio=2),
                  CLIPTextCfg(context_length=LENGTH, vocab_size=len(vocabulary), width=32, heads=4, layers=2, mlp_ratio=2))  # fmt: skip
    towers = filled(towers)
    hps_text = towers.encode_text(tokens, normalize=True)
    checker = filled(StableDiffusionSafetyChecker(transformers.CLIPConfig(**WHOLE)))
    seen = lambda x: F.normalize(checker.visual_projection(checker.vision_model(x).pooler_output), dim=-1)
    margins = lambda x: seen(x) @ F.normalize(checker.concept_embeds, dim=-1).T - checker.concept_embeds_weights
    scores = {
        "clip_score": lambda x: (image(x) * text).sum(-1),
        "pick_score": lambda x: net.logit_scale.exp() * (image(x) * text).sum(-1),
        "hps": lambda x: (towers.encode_image(x, normalize=True) * hps_text).sum(-1),
        "safety": lambda x: -margins(x).max(1).values,
    }
    heads = {kind: head(kind) for kind in HEADS}
    scores |= {f"aesthetic_{kind}": lambda x, kind=kind: heads[kind](image(x))[:, 0] for kind in HEADS}
    arrays = {}
    for name, score in scores.items():
        x = floats[:2].clone().requires_grad_(True)
        values = score(prepared(x))
        values.sum().backward()
        # the original of HPS resizes a tensor in any case
        arrays |= {f"{name}/diff": values.detach().numpy(), f"{name}/gradient": permute(x.grad),
                   f"{name}/exact": score(prepared(floats[:2]) if name == "hps" else exact[:2]).numpy()}  # fmt: skip

    class Bare(torch.nn.Module):
        def forward(self, x):
            return None, x

    features = F.normalize(torch.from_numpy(rng.standard_normal((64, EMBED)).astype(np.float32)))
    flagged_pictures = checker(exact, np.zeros((6, 1, 1, 3)))[1]
    checker.vision_model, checker.visual_projection = Bare(), torch.nn.Identity()
    checker.concept_embeds_weights += 0.35
    checker.special_care_embeds_weights += 0.35
    flags = checker(features, np.zeros((64, 1, 1, 3)))[1]
    save("scores", ids=ids.astype(np.int32), prompts=np.array(PROMPTS), vocabulary=np.array(vocabulary), merges=np.array(MERGES),
         open_clip=json.dumps({k: list(v.shape) for k, v in towers.state_dict().items()}), features=features.numpy(),
         flags=np.array(flags), flagged_pictures=np.array(flagged_pictures), heads=json.dumps(HEADS), **arrays)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES)
