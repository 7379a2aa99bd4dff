"""Time and memory of a training step of ACTR and LPMFlow, against a plain implementation of the same equations.

The plain implementation follows the papers line by line, with the same parameters: each image by itself, attention
weights written out, all of q, k and v for both sides of a cross-attention, one path after the other, one replaced token
after the other. Flow and gradients are checked to be equal first, but for `bf16`. `speed` is the plain step's processor
time divided by the head's, measured in turns (above 1: the head is faster). `memory` is the head's peak in a step
divided by the plain step's, weights excluded, gradients included. The head runs in the ways of `WAYS`. In float32, but
for `bf16`; without dropout. The input is tokens of iBOT's shape.

    python benchmarks/rendering.py --batch 1        # writes results/rendering_cpu.csv
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import corrzoo
from corrzoo.callbacks.compiling import compile_matcher
from corrzoo.geometry import size_of
from corrzoo.heads import ACTR, LPMFlow, actr, lpmflow, tokens
from corrzoo.matcher import Matcher
from corrzoo.tables import write_csv
from corrzoo.types import Features, Match
from measuring import RESULTS, peak_bytes, timed

HEADS = tokens.ATTENTION_HEADS
PLAIN_WAY = "plain"
WAYS = ("", "compile", "bf16", "checkpointing", "checkpointing bf16")
"""How the head runs, in words: `compile` as `--model.compile true`, `bf16` as `--trainer.precision bf16-mixed`."""


def split_heads(x: Tensor) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=HEADS)


def attention(self: tokens.Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, -1))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return self.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))


def window_attention(self: tokens.WindowAttention, x: Tensor, bias: None = None) -> Tensor:
    """Cut windows out, and join them again after the attention."""
    side, (rows, columns) = self.index.shape[0], (length // self.window for length in x.shape[1:3])
    cut = rearrange(x, "b (r i) (s j) c -> (b r s) (i j) c", i=self.window, j=self.window)
    table = self.bias_table[self.index.flatten()].view(side, side, HEADS)
    found = attention(self, cut, table.permute(2, 0, 1).contiguous())
    return rearrange(found, "(b r s) (i j) c -> b (r i) (s j) c", r=rows, s=columns, i=self.window)


def cross_attention(self: tokens.CrossAttention, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    q = split_heads(self.qkv(s).chunk(3, -1)[0])
    _, k, v = (split_heads(part) for part in self.qkv(t).chunk(3, -1))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return self.proj(rearrange(weights @ v, "b h n d -> b n (h d)")), weights.sum(1)


def refinement(self: tokens.WindowRefinement, maps: Tensor) -> Tensor:
    x = rearrange(maps, "b c h w -> b h w c")
    z = x + self.attention(self.norm1(x))
    z = z + self.mlp(self.norm2(z))
    return self.channels(rearrange(x + self.norm(z), "b h w c -> b c h w"))


def alignment(self: actr.AsymmetricAlignment, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = s + self.pos_embed
    s_update, t_update = self.self_attention(self.norm1(s)), self.self_attention(self.norm1(t))
    s = s + s_update + self.mlp(self.norm2(s_update))
    t = t + t_update + self.mlp(self.norm2(t_update))
    update, correlation = self.cross_attention(self.norm1(s), self.norm1(t))
    update = tokens.arf(update)
    s = s + update + self.mlp(self.norm2(update))
    if self.target_weight is not None:
        t = t + t * self.target_weight * correlation.detach().mean(1).unsqueeze(-1).sigmoid()
    return s, t, correlation


def match_actr(self: ACTR, src: Features, trg: Features) -> Match:
    s, t = self.tokens(src), self.tokens(trg)
    coarse = []
    for block in self.blocks:
        s, t, correlation = block(s, t)
        coarse.append(self.soft_argmax(correlation[:, 1:, 1:]))
    refined = [self.super_resolution(tokens.upscale(flow), tokens.as_map(s)) for flow in coarse]
    return Match(tokens.to_pixels(torch.stack(refined).mean(0), size_of(src.image)), correlation)


def pyramid(self: lpmflow.FeatureSuperResolution, s: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Enlarge each image by itself."""
    s1, t1, m11 = self.decoder1(s, t)
    s2, t2 = self.up(s1), self.up(t1)
    s12, t12, m12 = self.decoder2(s1, t2)
    s21, t21, m21 = self.decoder2(s2, t1)
    s2, _, m22 = self.decoder3(self.up(s12) + s21, t12 + self.up(t21))
    return {"11": m11, "12": m12, "21": m21, "22": m22}, s2


def region_bias(self: lpmflow.RegionBias) -> Tensor:
    padded = torch.cat([self.table, torch.zeros_like(self.table[:, :1])], 1)
    return padded[:, self.index.flatten()].unflatten(1, self.index.shape)


def match_lpmflow(self: LPMFlow, src: Features, trg: Features) -> Match:
    s, t = self.tokens(src), self.tokens(trg)
    s, masked = self.hide_tokens(s, t)
    s, t = self.encoder(s, t)
    correlations, features = self.pyramid(s, t)
    found = [self.soft_argmax(lpmflow.to_fine(correlations[scales], self.grid)) for scales in self.flows]
    flows = [tokens.upscale(flow) for flow in found]
    flow = flows[-1] + self.integration(flows, tokens.as_map(features))
    return Match(tokens.to_pixels(flow, size_of(src.image)), correlations["22"], {"masked": masked, "tokens": s})


def self_contrast(tokens: Tensor, masked: Tensor, neighbours: Tensor) -> Tensor:
    losses = []
    for x, hidden in zip(tokens, masked, strict=True):
        terms = []
        for i in hidden.tolist():
            query = F.normalize(x[i], dim=0)
            around = F.normalize(neighbours[i - 1] @ x[1:].detach(), dim=0)
            others = [F.normalize(x[j], dim=0) for j in hidden.tolist() if j != i]
            logits = torch.stack([query @ around, *(query @ other for other in others)]) / lpmflow.CONTRAST
            terms.append(logits.logsumexp(0) - logits[0])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


PLAIN: dict[type[nn.Module], Callable[..., object]] = {
    tokens.WindowAttention: window_attention,
    tokens.Attention: attention,
    tokens.CrossAttention: cross_attention,
    tokens.WindowRefinement: refinement,
    actr.AsymmetricAlignment: alignment,
    lpmflow.FeatureSuperResolution: pyramid,
    lpmflow.RegionBias: region_bias,
}


def plain(model: Matcher) -> Matcher:
    """Replace the forward passes by the plain implementation, with the same parameters."""
    for module in model.modules():
        if type(module) in PLAIN:
            module.forward = MethodType(PLAIN[type(module)], module)
    model.match = MethodType(match_actr if isinstance(model, ACTR) else match_lpmflow, model)
    return model


def build(head: str, way: str) -> Matcher:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": 0.0} if head == "LPMFlow" else {}
    options["checkpointing"] = "checkpointing" in way
    model = corrzoo.create_matcher(head, "ibot_b16", "random", backbone_size=256, **options).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    if "compile" in way:
        compile_matcher(model)
    return plain(model) if way == PLAIN_WAY else model


def step(model: Matcher, src: Features, trg: Features, way: str) -> tuple[Tensor, Tensor]:
    """Flow and the gradient of one loss, back to the source's features."""
    torch.manual_seed(1)  # the same tokens are masked
    model.zero_grad()
    maps = src.maps[0].detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in way):
        match = model.match(src._replace(maps=[maps]), trg)
        loss = match.flow.square().mean().sqrt()
        if "masked" in match.extras:
            contrast = self_contrast if way == PLAIN_WAY else lpmflow.self_contrast
            loss = loss + contrast(match.extras["tokens"], match.extras["masked"], model.neighbours).mean()
    loss.backward()
    return match.flow.detach(), maps.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heads", nargs="+", choices=["ACTR", "LPMFlow"], default=["ACTR", "LPMFlow"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.fallback_random = True  # LPMFlow hides the same tokens when compiled
    rows = []
    for head in args.heads:
        models = {way: build(head, way) for way in (PLAIN_WAY, *WAYS)}
        image = torch.zeros(args.batch, 3, 256, 256)
        maps = [torch.randn(args.batch, 768, 16, 16) for _ in range(2)]
        src, trg = (Features(image, [x], x.mean((2, 3))) for x in maps)
        found = {way: step(model, src, trg, way) for way, model in models.items()}
        flow, grad = found[PLAIN_WAY]
        for way, (flow2, grad2) in found.items():
            if "bf16" not in way:
                torch.testing.assert_close(flow2, flow, rtol=1e-3, atol=1e-2)  # pixels of 256
                torch.testing.assert_close(grad2, grad, rtol=1e-2, atol=1e-3 * grad.abs().max().item())
        rounds = [{way: timed(step, m, src, trg, way)[0] for way, m in models.items()} for _ in range(args.rounds)]
        for model in models.values():
            model.zero_grad()
        memory = {way: peak_bytes(step, model, src, trg, way)[0] / 2**20 for way, model in models.items()}
        for way in WAYS:
            ratios = [times[PLAIN_WAY] / times[way] for times in rounds]
            row = {"head": head, "options": way, "batch": args.batch}
            row |= {"speed": f"{statistics.median(ratios):.3f}", "low": f"{min(ratios):.3f}"}
            row |= {"high": f"{max(ratios):.3f}", "rounds": args.rounds}
            row |= {"memory": f"{memory[way] / memory[PLAIN_WAY]:.3f}", "memory_mib": round(memory[way])}
            row |= {"rendering_mib": round(memory[PLAIN_WAY]), "threads": args.threads, "torch": torch.__version__}
            rows.append(row)
            print(row, flush=True)
    write_csv(args.out / "rendering_cpu.csv", rows)


if __name__ == "__main__":
    main()
