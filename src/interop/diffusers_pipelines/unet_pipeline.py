"""Sample with a U-Net: classes with guidance, patches of pixels, and noise levels that no option of diffusers selects.

This file is part of an exported model and needs torch and diffusers only.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class UNetPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A U-Net with its scheduler.

    - `patch_size`: the U-Net sees images whose patches of this many pixels each way are stacked as channels.
    - `id2label`: names of the classes of a class-conditional U-Net. The last row of its class embedding is no class.
    - `guidance_scale`: the default of classifier-free guidance; 1 disables it.
    - `levels`: {"timesteps": [...], "sigmas": [...]} replace those of the scheduler, one of each per evaluation.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        patch_size: int = 1,
        id2label: dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        levels: dict[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(patch_size=patch_size, id2label=id2label, guidance_scale=guidance_scale, levels=levels)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return `batch_size` images, or one per entry of `class_labels`, which are names or indices of classes.

        Without `class_labels`, the images cycle through the classes. `eta` is that of the DDIM scheduler.
        """
        device, dtype, scheduler = self._execution_device, self.unet.dtype, self.scheduler
        if class_labels is not None:
            batch_size = len(class_labels)
        labels = self.encode(class_labels, batch_size)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        patch_size, side = self.config.patch_size, self.unet.config.sample_size
        size = [patch_size * n for n in ((side, side) if isinstance(side, int) else side)]
        shape = (batch_size, self.unet.config.in_channels // patch_size**2, *size)
        x = F.pixel_unshuffle(randn_tensor(shape, generator=generator, device=device, dtype=dtype), patch_size)

        scheduler.set_timesteps(num_inference_steps, device=device)
        if levels := self.config.levels:
            scheduler.timesteps = torch.tensor(levels["timesteps"], device=device)
            scheduler.sigmas = torch.tensor([*levels["sigmas"], 0.0])
            scheduler.num_inference_steps = len(scheduler.timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        settings = {"generator": generator, "eta": eta, "use_clipped_model_output": True}
        known = inspect.signature(scheduler.step).parameters
        settings = {name: value for name, value in settings.items() if name in known}
        scale_input = getattr(scheduler, "scale_model_input", lambda x, _: x)
        # Some schedulers store x / alpha.
        x = x / scale_input(torch.ones((), device=device, dtype=dtype), scheduler.timesteps[0])
        for t in self.progress_bar(scheduler.timesteps):
            out = self.guided(scale_input(x, t), t, labels, scale)
            x = scheduler.step(out, t, x, **settings).prev_sample

        images: Any = (F.pixel_shuffle(x, patch_size) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode(self, class_labels: Sequence[int | str] | None, batch_size: int) -> torch.Tensor | None:
        """Return the indices (B,) of classes given by name or index; None for an unconditional U-Net."""
        names = self.config.id2label
        if names is None:
            if class_labels is not None:
                raise ValueError("class_labels is for class-conditional models, and this one is unconditional")
            return None
        index_of = {name: int(index) for index, name in names.items()}
        if class_labels is None:
            class_labels = [k % len(names) for k in range(batch_size)]
        indices = [index_of.get(str(label), label) for label in class_labels]
        if unknown := [label for label in indices if label not in index_of.values()]:
            raise ValueError(f"class_labels has {unknown[0]!r}, which must be one of {', '.join(index_of)} or an index")
        return torch.tensor(indices, device=self._execution_device)

    def guided(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Return the output of the U-Net with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
        channels = x.shape[1]
        out: torch.Tensor
        if labels is None or scale == 1:
            out = self.unet(x, t, class_labels=labels).sample
        else:
            none = torch.full_like(labels, len(self.config.id2label))
            both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, none])).sample
            out, reference = both.chunk(2)
            mean = reference[:, :channels] + scale * (out[:, :channels] - reference[:, :channels])
            out = torch.cat([mean, out[:, channels:]], dim=1)
        if getattr(self.scheduler.config, "variance_type", None) == "learned_range":
            return out
        return out[:, :channels]
