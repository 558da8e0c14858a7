"""Feynman-Kac steering, DAS and ReNO in plain torch with diffusers' networks, to measure against.

  python torch_steering.py CORE FOLDER JOB
FOLDER: a pipeline as diffusers writes it. JOB: JSON, see CASES in steering.py. One sample for every line that it reads.
"""

import json
import os
import sys
import time
from pathlib import Path

os.sched_setaffinity(0, {int(sys.argv[1])})
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.modules["torchvision"] = None  # not needed, and of another build in some environments
sys.path.insert(0, str(Path(__file__).parent))
import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from process import serve  # noqa: E402


def warmth(images):
    """How much redder than blue a picture [B,3,H,W] is: [B]."""
    return (images[:, 0] - images[:, 2]).mean((1, 2))


class World:
    """A guided DDIM chain of a pipeline's parts, on the grid that diffusers' scheduler has."""

    def __init__(self, folder, job):
        load = lambda kind, name: kind.from_pretrained(folder, subfolder=name)
        self.unet, self.vae = load(diffusers.UNet2DConditionModel, "unet"), load(diffusers.AutoencoderKL, "vae")
        text, tokenizer = load(transformers.CLIPTextModel, "text_encoder"), load(transformers.CLIPTokenizer, "tokenizer")
        for net in (self.unet, self.vae, text):
            net.requires_grad_(False).eval()
        ids = tokenizer(["", job["prompt"]], padding="max_length", max_length=77, return_tensors="pt").input_ids
        self.states, self.job = text(ids)[0], job
        scheduler = load(diffusers.DDIMScheduler, "scheduler")
        scheduler.set_timesteps(job["steps"])
        self.times, jump = scheduler.timesteps.tolist(), scheduler.config.num_train_timesteps // job["steps"]
        cumulative = scheduler.alphas_cumprod
        self.now = [cumulative[t] for t in self.times]
        self.then = [cumulative[t - jump] if t >= jump else scheduler.final_alpha_cumprod for t in self.times]

    def eps(self, x, t):
        n = len(x)
        both = self.unet(torch.cat([x, x]), t, self.states.repeat_interleave(n, 0), return_dict=False)[0]
        without, with_prompt = both.chunk(2)
        return without + self.job["guidance"] * (with_prompt - without)

    def clean(self, i, x, eps):
        return (x - (1 - self.now[i]).sqrt() * eps) / self.now[i].sqrt()

    def move(self, i, x0, eps):
        """(mean, std) of the next state."""
        a, b = self.now[i], self.then[i]
        std = self.job["eta"] * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        return b.sqrt() * x0 + (1 - b - std**2).clamp(min=0).sqrt() * eps, std

    def decode(self, x0):
        return (self.vae.decode(x0 / self.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def reward(self, x0):
        return warmth(self.decode(x0))


def systematic(log_w):
    n = len(log_w)
    points = (torch.arange(n) + torch.rand(1)) / n
    return torch.searchsorted(torch.softmax(log_w, 0).cumsum(0), points).clamp(max=n - 1)


def chosen(world, x, log_w):
    with torch.no_grad():
        reward = world.reward(x)
        index = torch.distributions.Categorical(logits=log_w + reward / world.job["alpha"]).sample()
        world.decode(x[index : index + 1])
    return reward[index].item()


@torch.no_grad()
def fk(world, job):
    n, alpha = job["particles"], job["alpha"]
    x, before = torch.randn(n, 4, 32, 32), torch.zeros(n)
    for i, t in enumerate(world.times):
        eps = world.eps(x, t)
        x0 = world.clean(i, x, eps)
        value = world.reward(x0) / alpha
        index = systematic(value - before)
        x0, eps, before = x0[index], eps[index], value[index]
        mean, std = world.move(i, x0, eps)
        x = mean + std * torch.randn_like(mean)
    return chosen(world, x, -before)


def das(world, job):
    n, alpha, steps = job["particles"], job["alpha"], job["steps"]
    gamma = 2 ** (1 / (0.87 * steps)) - 1
    x, log_w, before = torch.randn(n, 4, 32, 32), torch.zeros(n), torch.zeros(n)
    for i, t in enumerate(world.times):
        lam = min((1 + gamma) ** i - 1, 1.0)
        x = x.requires_grad_()
        eps = world.eps(x, t)
        x0 = world.clean(i, x, eps)
        value = world.reward(x0) / alpha
        (pull,) = torch.autograd.grad(value.sum(), x)
        with torch.no_grad():
            index = systematic(log_w + lam * value - before)
            before = lam * value[index]
            mean, std = world.move(i, x0[index].detach(), eps[index].detach())
            z, shift = torch.randn_like(mean), std * lam * pull[index]
            x = mean + std * shift + std * z
            log_w = -(shift * z + shift.square() / 2).sum((1, 2, 3))
    return chosen(world, x.detach(), log_w - before)


def reno(world, job):
    z = torch.randn(1, 4, 32, 32).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=5.0, momentum=0.9, nesterov=True)
    size, best = z.numel(), -float("inf")

    def walk(x):
        for i, t in enumerate(world.times):
            eps = world.eps(x, t)
            x, _ = world.move(i, world.clean(i, x, eps), eps)
        return world.reward(x)

    for _ in range(job["iterations"]):
        reward = walk(z)
        norm = z.norm()
        loss = -(reward.sum() + 0.01 * ((size - 1) * norm.log() - norm.square() / 2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([z], 0.1)
        optimizer.step()
        best = max(best, reward.item())
    with torch.no_grad():
        return max(best, walk(z).item())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = json.loads(sys.argv[3])

    def build():
        world = World(sys.argv[2], job)
        rng = np.random.default_rng(0)
        x, states = (rng.standard_normal(s).astype(np.float32) for s in ((1, 32, 32, 4), (1, 77, 768)))
        with torch.inference_mode():
            y = world.unet(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor([500]), torch.from_numpy(states)).sample
        method = {"fk": fk, "das": das, "reno": reno}[job["job"]]

        def step():
            began = time.process_time()
            reward = method(world, job)
            return {"step": time.process_time() - began, "reward": reward}

        return step, {"probe": y.permute(0, 2, 3, 1).flatten()[:16].tolist(), "versions": [f"torch {torch.__version__}"]}

    serve(build)
