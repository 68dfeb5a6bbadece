"""The DMD step in PyTorch, with the same networks, weights, losses, optimizers and batch as ours.

It is plain eager PyTorch as in a good implementation: channels last, one batched call where our
step has one, fused AdamW.
"""

from typing import Any

import torch
from torch.nn import functional as F

from dmd_jax.experiment import build
from dmd_jax.models import layers, lpips, unet_edm
from dmd_jax.weights import state_dict

SIGMA_DATA = 0.5


class Step:
    """A function that makes one step per call.

    Args:
      stage: of the recipe dmd, with a network DDPM++ or ADM.
      frozen: parameters of the teacher and the distance, as in the recipe's state.
      batch: a batch of the recipe.
    """

    version = torch.__version__

    def __init__(self, stage: build.Stage, frozen: dict, batch: dict):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, like JAX's default
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings = stage.settings.recipe
        self.dtype = getattr(torch, stage.model.network["dtype"])
        self.module = stage.network.bind(stage.network.abstract)
        self.teacher = self._tensors(frozen["real_score"])
        self.lpips = None
        if frozen["distance"] is not None:
            self.lpips = self._tensors(frozen["distance"])
        self.size = self.settings["distance"].get("size", 224)
        self.generator = _trainable(self.teacher)
        self.fake_score = _trainable(self.teacher)
        self.ema = []
        if self.settings["ema_decay"]:
            self.ema = [v.detach().clone() for v in self.generator.values()]
        self.optimizers = [
            _adamw(self.generator, self.settings["optimizer"]),
            _adamw(self.fake_score, self.settings["fake_score_optimizer"]),
        ]
        process: Any = stage.denoiser.process
        self.levels = self._tensor(process.level(slice(None)))
        self.sigma_max = process.sigma_max
        pairs = batch["pairs"]
        self.pairs = {
            "noise": self._images(pairs["noise"]),
            "image": self._images(pairs["image"]),
            "cond": self._tensor(pairs["cond"]).long(),
        }
        self.cond = self._tensor(batch["fresh"]["cond"]).long()

    def __call__(self):
        n = len(self.cond)
        fresh = {name: torch.randn_like(self.pairs["noise"]) for name in ("z", "eps", "fake_eps")}
        for name, (low, high) in (
            ("t", self.settings["matching_levels"]),
            ("fake_t", self.settings["fake_score_levels"]),
        ):
            fresh[name] = self.levels[torch.randint(low, high + 1, (n,), device=self.device)]
        losses = self.update(fresh)
        return {name: float(loss) for name, loss in losses.items()}

    def update(self, fresh: dict) -> dict:
        """Makes the step of Algorithm 1 with this noise and these times; returns the losses."""
        z = torch.cat([fresh["z"], self.pairs["noise"]])
        cond = torch.cat([self.cond, self.pairs["cond"]])
        sigma_max = torch.full((len(z),), self.sigma_max, device=self.device)
        x, x_pairs = self.denoise(self.generator, self.sigma_max * z, sigma_max, cond).chunk(2)
        with torch.no_grad():
            x_t = x + _expand(fresh["t"]) * fresh["eps"]
            x_real = self.denoise(self.teacher, x_t, fresh["t"], self.cond)
            x_fake = self.denoise(self.fake_score, x_t, fresh["t"], self.cond)
            g = (x_fake - x_real) / (x - x_real).abs().mean((1, 2, 3), keepdim=True)
            g = torch.where(g.isfinite(), g, 0)
        matching = 0.5 * F.mse_loss(x, (x - g).detach())
        regression = self.distance(x_pairs, self.pairs["image"]).mean()
        loss = (
            self.settings["matching_weight"] * matching
            + self.settings["regression_weight"] * regression
        )
        self._optimize(0, self.generator, loss)
        if self.ema:
            torch._foreach_lerp_(
                self.ema, [p.data for p in self.generator.values()], 1 - self.settings["ema_decay"]
            )

        x = x.detach()
        sigma = fresh["fake_t"]
        skip, out, in_, noise = (_expand(c) for c in _edm(sigma))
        x_t = x + _expand(sigma) * fresh["fake_eps"]
        target = (x - skip * x_t) / out
        fake = F.mse_loss(
            self.network(self.fake_score, in_ * x_t, noise.flatten(), self.cond), target
        )
        self._optimize(1, self.fake_score, fake)
        return {
            "matching": matching.detach(),
            "regression": regression.detach(),
            "fake_score": fake.detach(),
        }

    def denoise(self, params, x, sigma, label):
        skip, out, in_, noise = (_expand(c) for c in _edm(sigma))
        return skip * x + out * self.network(params, in_ * x, noise.flatten(), label)

    def network(self, p, x, noise, label):
        """Computes the UNet of `models/unet_edm.py`, DDPM++ or ADM."""
        module = self.module
        x = x.to(self.dtype)
        skips = []
        emb = self._embed(p, noise, label)
        for name in module.enc_names:
            key, block = f"enc.{name}", module.enc[name]
            is_conv = name.endswith("_conv")
            x = self._conv(p, key, x) if is_conv else self._block(p, key, block, x, emb)
            skips.append(x)
        for name in module.dec_names:
            if "block" in name:
                x = torch.cat([x, skips.pop()], 1)
            x = self._block(p, f"dec.{name}", module.dec[name], x, emb)
        top = f"dec.{module.enc_names[0].removesuffix('conv')}"
        if module.family is unet_edm.ADM:
            norm, out = "out_norm", "out_conv"
        else:
            norm, out = f"{top}aux_norm", f"{top}aux_conv"
        return self._conv(p, out, F.silu(self._norm(p, norm, x))).float()

    def distance(self, x, y):
        """Computes LPIPS, or the squared error, of each image."""
        if self.lpips is None:
            return ((x - y) ** 2).mean((1, 2, 3))
        with torch.no_grad():
            target = self._taps(y)
        distance = 0
        for i, (a, b) in enumerate(zip(self._taps(x), target, strict=True)):
            weighted = (a - b) ** 2 * self.lpips[f"lin{i}.model.1.weight"]
            distance = distance + weighted.sum(1).mean((1, 2))
        return distance

    def _taps(self, x):
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear")
        mean = self._tensor(lpips.MEAN)[:, None, None]
        std = self._tensor(lpips.STD)[:, None, None]
        x = ((x + 1) / 2 - mean) / std
        taps = []
        layer = 0
        for widths in lpips.CHANNELS:
            if taps:
                x = F.avg_pool2d(x, 2)
            for _ in widths:
                weight = self.lpips[f"features.{layer}.weight"]
                bias = self.lpips[f"features.{layer}.bias"]
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
                layer += 2
            layer += 1
            taps.append(x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def _embed(self, p, noise, label):
        module = self.module
        adm = module.family is unet_edm.ADM
        freqs = self._tensor(layers.positional_frequencies(module.width // 2, endpoint=not adm))
        angles = noise[:, None] * freqs[None]
        emb = torch.cat([angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()], 1)
        one_hot = F.one_hot(label, module.num_classes).float() if module.num_classes else None
        linear = lambda name, x: F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))
        if adm:
            emb = linear("map_layer1", F.silu(linear("map_layer0", emb)))
            return F.silu(emb + linear("map_label", one_hot) if module.num_classes else emb)
        if module.num_classes:
            emb = emb + linear("map_label", one_hot * module.num_classes**0.5)
        return F.silu(linear("map_layer1", F.silu(linear("map_layer0", emb))))

    def _block(self, p, name, block, x, emb):
        family = block.family
        resample = {
            layers.downsample: lambda a: F.avg_pool2d(a, 2),
            layers.upsample: lambda a: F.interpolate(a, scale_factor=2),
        }
        resample = resample.get(block.resample, lambda a: a)
        h = self._conv(p, f"{name}.conv0", resample(F.silu(self._norm(p, f"{name}.norm0", x))))
        affine = F.linear(emb, p[f"{name}.affine.weight"], p[f"{name}.affine.bias"])
        affine = affine[:, :, None, None].to(self.dtype)
        if family.adaptive_scale:
            scale, shift = affine.chunk(2, 1)
            h = torch.addcmul(shift, self._norm(p, f"{name}.norm1", h), scale + 1)
        else:
            h = self._norm(p, f"{name}.norm1", h + affine)
        h = self._conv(p, f"{name}.conv1", F.silu(h))
        x = resample(x)
        if f"{name}.skip.weight" in p:
            x = self._conv(p, f"{name}.skip", x)
        x = (x + h) * family.skip_scale
        if not block.heads:
            return x
        b, c, height, width = x.shape
        qkv = self._conv(p, f"{name}.qkv", self._norm(p, f"{name}.norm2", x))
        qkv = qkv.reshape(b, block.heads, c // block.heads, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(2, 3).reshape(b, c, height, width)
        return (x + self._conv(p, f"{name}.proj", attended)) * family.skip_scale

    def _conv(self, p, name, x):
        weight = p[f"{name}.weight"].to(self.dtype)
        return F.conv2d(x, weight, p[f"{name}.bias"].to(self.dtype), padding=weight.shape[-1] // 2)

    def _norm(self, p, name, x):
        groups = min(32, x.shape[1] // 4)
        eps = self.module.family.epsilon
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.group_norm(x.float(), groups, weight, bias, eps).to(self.dtype)

    def _optimize(self, i, params, loss):
        # The layer of the augmentation is not used, and has no gradient.
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = torch.zeros_like(p) if grad is None else grad
        clip = (self.settings["optimizer"], self.settings["fake_score_optimizer"])[i].get(
            "clip", 10.0
        )
        torch.nn.utils.clip_grad_norm_(params.values(), clip)
        self.optimizers[i].step()

    def _tensor(self, array):
        return torch.tensor(array.__array__(), device=self.device)

    def _images(self, array):
        return self._tensor(array).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _tensors(self, params):
        tensors = {k: self._tensor(v) for k, v in state_dict.to_torch(params).items()}
        return {
            k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
            for k, v in tensors.items()
        }


def _trainable(tensors):
    """Copies the tensors as parameters."""
    return {
        k: torch.nn.Parameter(v.clone(memory_format=torch.preserve_format))
        for k, v in tensors.items()
    }


def _adamw(params, settings):
    betas = settings.get("beta1", 0.9), settings.get("beta2", 0.999)
    return torch.optim.AdamW(
        params.values(),
        settings["learning_rate"],
        betas,
        weight_decay=settings.get("weight_decay", 0.01),
        fused=True,
    )


def _edm(sigma):
    norm = (sigma**2 + SIGMA_DATA**2).sqrt()
    return (SIGMA_DATA / norm) ** 2, sigma * SIGMA_DATA / norm, 1 / norm, sigma.log() / 4


def _expand(c):
    return c[:, None, None, None]
