"""Training steps of other projects as shipped, and of the diffusers network with hand-tuned training.

Each function builds a network for a `Work` and returns a function that takes one optimizer step, in the order of that
project's own loop: batch, noise, loss, backward pass, clipping, optimizer, weight average. smalldiffusion has no
clipping and no average. Progress bars, trackers and data loaders are omitted. Sampling uses the project's own sampler
and, if it has them, its averaged weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.models.unet import attended_resolutions, stage_resolutions
from src.models.winograd import Conv3x3
from src.training.compile import compile_network


class Work(NamedTuple):
    """Data and size of a network: model_channels * channel_mult[i] channels at stage i."""

    images: Tensor
    """Integers (N, C, H, W) on the device, so that no loop waits for data."""
    batch_size: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    """Of each stage."""
    num_head_channels: int
    device: torch.device
    bf16: bool = False
    compile_mode: str | None = None
    """Of torch.compile, for the hand-tuned network."""
    num_steps: int = 100_000
    """Length of the learning-rate decay."""
    num_values: int = 256
    """Number of values of a pixel."""
    transformer: dict[str, Any] | None = None
    """Arguments of a DiTTransformer2DModel, in place of a U-Net."""

    def batch(self) -> Tensor:
        """Return random images (B, C, H, W) in [-1, 1] on the device."""
        chosen = torch.randint(len(self.images), (self.batch_size,), device=self.images.device)
        return self.images[chosen].float() * (2 / (self.num_values - 1)) - 1


class Contender(NamedTuple):
    """A network, a function that takes one training step, and one that samples."""

    net: nn.Module
    step: Callable[[], None]
    sample: Callable[[int, int], Tensor] | None = None
    """(number of samples, network calls per sample) -> images (n, C, H, W) in [-1, 1]."""


def diffusers(work: Work) -> Contender:
    """Follow examples/unconditional_image_generation/train_unconditional.py with --use_ema on one device."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    net = diffusers_net(work, head_channels=8)  # its default
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=work.num_steps)

    def step() -> None:
        clean = work.batch()
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=work.device).long()
        loss = F.mse_loss(net(scheduler.add_noise(clean, noise, t), t).sample.float(), noise.float())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        loss.detach().item()  # for its logs

    def sample(n: int, calls: int) -> Tensor:
        """Sample as the script with --ddpm_num_inference_steps=`calls`, which is better here than DDIM."""
        ema.store(net.parameters())
        ema.copy_to(net.parameters())
        scheduler.set_timesteps(calls)
        x = torch.randn(n, *work.images.shape[1:], device=work.device)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
        ema.restore(net.parameters())
        return x.clamp(-1, 1)

    return Contender(net, step, sample)


def tuned_diffusers(work: Work) -> Contender:
    """Train the diffusers network with channels_last, fewer heads, fused AdamW, bf16, and our compile mode."""
    net = diffusers_net(work, work.num_head_channels).to(memory_format=torch.channels_last)
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    update = get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    alpha, sigma = (x.sqrt().float().to(work.device) for x in (alpha_bar, 1 - alpha_bar))
    forward = compile_network(net, work.compile_mode) or net

    def step() -> None:
        clean = work.batch()
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=work.device)
        x = alpha[t].view(-1, 1, 1, 1) * clean + sigma[t].view(-1, 1, 1, 1) * noise
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.bf16):
            out = forward(x.contiguous(memory_format=torch.channels_last), t, None, False)[0]
        F.mse_loss(out.float(), noise).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            update(average, parameters, None)

    return Contender(net, step)


def diffusers_net(work: Work, head_channels: int) -> nn.Module:
    """Return the network of diffusers with the weight shapes of ours.

    A `UNet2DModel` has norms of 32 groups, ours fewer. A `DiTTransformer2DModel` has the options of the DiT paper.
    """
    from diffusers import UNet2DModel

    if work.transformer is not None:
        return _Transformer(work.transformer).to(work.device).train()
    down = tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in work.attention)
    up = tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(work.attention))
    channels = work.images.shape[1]
    net: nn.Module = UNet2DModel(
        sample_size=work.images.shape[-1],
        in_channels=channels,
        out_channels=channels,
        layers_per_block=work.num_res_blocks,
        block_out_channels=tuple(work.model_channels * m for m in work.channel_mult),
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=head_channels,
    )
    return net.to(work.device).train()


class _Transformer(nn.Module):
    """A `DiTTransformer2DModel` of one class."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.net = DiTTransformer2DModel(**arguments, num_embeds_ada_norm=1)

    def forward(self, x: Tensor, t: Tensor, labels: None = None, return_dict: bool = True) -> Any:
        labels_of_batch = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.net(x, t.expand(len(x)), class_labels=labels_of_batch, return_dict=return_dict)


def lucidrains(work: Work) -> Contender:
    """Follow `Trainer.train` of denoising-diffusion-pytorch, without accelerate.

    Each stage has two blocks, and linear attention where it has no full attention.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    channels, size = work.images.shape[1], work.images.shape[-1]
    net = Unet(work.model_channels, dim_mults=work.channel_mult, channels=channels, full_attn=work.attention)
    diffusion = GaussianDiffusion(net, image_size=size).to(work.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10).to(work.device)

    def step() -> None:
        diffusion.train()
        loss = diffusion((work.batch() + 1) / 2)
        loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def sample(n: int, calls: int) -> Tensor:
        average = ema.ema_model.eval()
        average.sampling_timesteps, average.is_ddim_sampling = calls, calls < average.num_timesteps
        images: Tensor = average.sample(batch_size=n)
        return images * 2 - 1

    return Contender(net, step, sample)


def smalldiffusion(work: Work) -> Contender:
    """Run smalldiffusion's own `training_loop`, a generator that keeps the graph of a loss between steps."""
    from smalldiffusion import ScheduleDDPM, Unet, training_loop

    channels, size = work.images.shape[1], work.images.shape[-1]
    net = Unet(
        size,
        channels,
        channels,
        ch=work.model_channels,
        ch_mult=tuple(work.channel_mult),
        num_res_blocks=work.num_res_blocks,
        attn_resolutions=tuple(size >> stage for stage, has in enumerate(work.attention) if has),
        dropout=0.0,
    ).to(work.device)
    steps = training_loop(_EndlessBatches(work), net, ScheduleDDPM(), epochs=1)
    next(steps)

    def step() -> None:
        next(steps)

    return Contender(net, step)


class _EndlessBatches(NamedTuple):
    """An infinite loader of batches."""

    work: Work

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        while True:
            yield self.work.batch()


PEERS: dict[str, Callable[[Work], Contender]] = {
    "diffusers": diffusers,
    "diffusers, tuned by hand": tuned_diffusers,
    "lucidrains": lucidrains,
    "smalldiffusion": smalldiffusion,
}


WITH_TRANSFORMER = ("diffusers", "diffusers, tuned by hand")
"""Projects that have a diffusion transformer."""
IN_FLOAT32 = ("diffusers", "lucidrains", "smalldiffusion")
"""Projects whose loops train in float32 by default."""


def as_large_as(model: DictConfig, data: DictConfig, images: Tensor, device: torch.device) -> Work:
    """Return the work of a network as large as `model`: the same channels, blocks and attention resolutions."""
    if "depth" in model:
        head = model.hidden_size // model.num_heads
        arguments = {"num_attention_heads": model.num_heads, "attention_head_dim": head, "num_layers": model.depth}
        arguments |= {"in_channels": model.channels or data.channels, "sample_size": data.image_size}
        return Work(
            *(images, data.batch_size, model.hidden_size, (), 0, (), head, device),
            num_values=data.num_values,
            transformer=arguments | {"patch_size": model.patch_size},
        )
    resolutions = stage_resolutions((data.image_size, data.image_size), model.patch_size, len(model.channel_mult))
    attended = attended_resolutions(model.attention_resolutions, resolutions)
    return Work(
        images,
        data.batch_size,
        model.model_channels,
        tuple(model.channel_mult),
        model.num_res_blocks,
        tuple(resolution in attended for resolution in resolutions),
        model.num_head_channels or model.model_channels * model.channel_mult[-1],
        device,
        num_values=data.num_values,
    )


def flops(step: Callable[[], Any]) -> int:
    """Return the FLOP of the matrix products and direct convolutions of one step, forward and backward.

    Winograd convolution needs fewer operations, so its apparent speed may exceed the peak. Fused attention counts the
    product that its backward pass recomputes: 0.4% of a step of unet_ddpm.
    """
    from torch.utils.flop_counter import FlopCounterMode

    direct = patch.object(Conv3x3, "winograd_pays", lambda *_: False)
    eager = torch.compiler.set_stance("force_eager")
    with FlopCounterMode(display=False) as counter, direct, eager:
        step()
    return int(counter.get_total_flops())
