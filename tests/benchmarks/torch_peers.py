"""Training in torch: TRL's DDPOTrainer and AlignPropTrainer, and Diffusion-DPO by its formula. Peers to measure against.

  python torch_peers.py CORE FOLDER JOB
FOLDER: a pipeline as diffusers writes it. JOB: JSON, see CASES in peers.py. Prints a JSON line when it is ready; then for
every line that it reads does one step and prints what the step took. TRL 0.23.1 is the last release with both trainers.
"""

import json
import os
import sys
import time
from pathlib import Path

os.sched_setaffinity(0, {int(sys.argv[1])})
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
sys.modules["torchvision"] = None  # not needed, and of another build in some environments
sys.path.insert(0, str(Path(__file__).parent))
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from process import serve  # noqa: E402


def warmth(images, prompts, metadata):
    """How much redder than blue a picture [B,3,H,W] is: [B]."""
    return (images[:, 0] - images[:, 2]).mean((1, 2)), {}


def trl_pipeline(folder, job):
    from accelerate import PartialState
    from trl import DefaultDDPOStableDiffusionPipeline

    PartialState(cpu=True)  # its logger asks for one before a trainer makes it
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=job["lora"])
    if job["channels_last"]:
        pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def ddpo(folder, job):
    """(unet, step) of TRL's DDPOTrainer: an epoch of one batch, trained on once, at every time."""
    from trl import DDPOConfig, DDPOTrainer

    pipeline = trl_pipeline(folder, job)
    probe(pipeline.unet)
    config = DDPOConfig(mixed_precision="no", sample_num_steps=job["steps"], sample_eta=1.0, sample_guidance_scale=job["guidance"],
                        sample_batch_size=job["batch"], sample_num_batches_per_epoch=1, train_batch_size=job["batch"],
                        train_gradient_accumulation_steps=1)  # fmt: skip
    trainer = DDPOTrainer(config, warmth, lambda: (job["prompt"], {}), pipeline)
    inner, spent = trainer._generate_samples, []

    def generate(**arguments):
        began = time.process_time()
        out = inner(**arguments)
        spent.append(time.process_time() - began)
        return out

    trainer._generate_samples = generate

    def step():
        began = time.process_time()
        trainer.step(0, 0)
        whole = time.process_time() - began
        return {"sample": spent[-1], "train": whole - spent[-1]}

    return pipeline.unet, step


def draft(folder, job):
    """(unet, step) of TRL's AlignPropTrainer with the gradient of the last K steps; it rematerialises every call of the UNet."""
    from trl import AlignPropConfig, AlignPropTrainer

    pipeline = trl_pipeline(folder, job)
    probe(pipeline.unet)
    config = AlignPropConfig(mixed_precision="no", sample_num_steps=job["steps"], sample_eta=1.0, sample_guidance_scale=job["guidance"],
                             train_batch_size=job["batch"], train_gradient_accumulation_steps=1, truncated_backprop_rand=False,
                             truncated_backprop_timestep=job["steps"] - job["k"])  # fmt: skip
    trainer = AlignPropTrainer(config, lambda *inputs: warmth(*inputs)[0], lambda: (job["prompt"], {}), pipeline)

    def step():
        began = time.process_time()
        trainer.step(0, 0)
        return {"step": time.process_time() - began}

    return pipeline.unet, step


def diffusion_dpo(folder, job):
    """(unet, step) of L = -log sigma(-beta/2 [(m_w - m_l) - (m_w_ref - m_l_ref)]), m = mean |eps_theta - eps|^2 (arXiv 2311.12908).

    Pictures and prompts are encoded in the step; winner and loser are one batch, the reference without gradient.
    """
    load = lambda kind, name: kind.from_pretrained(folder, subfolder=name)
    unet, reference = (load(diffusers.UNet2DConditionModel, "unet") for _ in range(2))
    vae, schedule = load(diffusers.AutoencoderKL, "vae"), load(diffusers.DDPMScheduler, "scheduler")
    text, tokenizer = load(transformers.CLIPTextModel, "text_encoder"), load(transformers.CLIPTokenizer, "tokenizer")
    for net in (reference, vae, text):
        net.requires_grad_(False).eval()
    if job["channels_last"]:
        unet, reference = (net.to(memory_format=torch.channels_last) for net in (unet, reference))
    probe(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, weight_decay=1e-2)
    data = np.load(job["pairs"])
    sides = [torch.from_numpy(data[k]).permute(0, 3, 1, 2).float() / 127.5 - 1 for k in ("winner", "loser")]
    ids = tokenizer([job["prompt"]] * job["batch"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    error = lambda net, x, t, states, noise: (net(x, t, states, return_dict=False)[0] - noise).square().mean((1, 2, 3))

    def step():
        began = time.process_time()
        rows = torch.randint(len(sides[0]), (job["batch"],))
        with torch.no_grad():
            latents = vae.encode(torch.cat([side[rows] for side in sides])).latent_dist.sample() * vae.config.scaling_factor
            states = text(ids)[0].repeat(2, 1, 1)
            noise = torch.randn_like(latents[: job["batch"]]).repeat(2, 1, 1, 1)
            t = torch.randint(schedule.config.num_train_timesteps, (job["batch"],)).repeat(2)
            x = schedule.add_noise(latents, noise, t)
            m_ref = error(reference, x, t, states, noise)
        m = error(unet, x, t, states, noise)
        (won, lost), (won_ref, lost_ref) = m.chunk(2), m_ref.chunk(2)
        loss = -F.logsigmoid(-0.5 * job["beta"] * ((won - lost) - (won_ref - lost_ref))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"step": time.process_time() - began, "loss": loss.item()}

    unet.train()
    return unet, step


PROBE = []


@torch.inference_mode()
def probe(unet):
    """What the UNet, before anything is trained, makes of one fixed input: both sides must agree."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, unet.config.sample_size, unet.config.sample_size, 4)).astype(np.float32)
    states = rng.standard_normal((1, 77, unet.config.cross_attention_dim)).astype(np.float32)
    y = unet(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor([500]), torch.from_numpy(states)).sample
    PROBE.extend(y.permute(0, 2, 3, 1).flatten()[:16].tolist())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = json.loads(sys.argv[3])
    versions = [f"torch {torch.__version__}", f"diffusers {diffusers.__version__}", f"transformers {transformers.__version__}"]
    if job["job"] != "diffusion_dpo":
        import trl

        versions.insert(0, f"TRL {trl.__version__}")

    def build():
        unet, step = {"ddpo": ddpo, "draft": draft, "diffusion_dpo": diffusion_dpo}[job["job"]](sys.argv[2], job)
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        return step, {"trained": trained, "probe": PROBE, "versions": versions}

    serve(build)
