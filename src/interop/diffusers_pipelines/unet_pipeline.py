"""Sample with a U-Net or DiT: classes or text with guidance, patches of pixels, and any noise levels.

This file is part of an exported model. It needs torch and diffusers, and for text the tokenizers library.
"""

import inspect
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class UNetPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A network, `unet` or `transformer`, with its scheduler.

    - `patch_size`: side in pixels of the patches that are stacked as channels before the U-Net.
    - `id2label`: names of the classes of a class-conditional network. The last row of its class embedding is the empty
      class.
    - `guidance_scale`: the default of classifier-free guidance; 1 disables it.
    - `levels`: {"timesteps": [...], "sigmas": [...]} replace those of the scheduler, one of each per evaluation.
    - `sigma_data`: the network has the preconditioning of EDM for data with this standard deviation, and the scheduler
      takes predictions of x_0 (Karras et al. 2022, arXiv 2206.00364, tab. 1).
    - `text`: settings of a text-conditional network, the program network.pt2 of this folder in place of a U-Net:
      "tokenizer" (JSON of the tokenizers library), "max_length", "time_scale", "shape" and example "prompts".
    - `vae`, `latents`: the network samples latents, which the autoencoder decodes after division by the "scale" of
      each channel and addition of its "shift", both {"0": ..., "1": ...}.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer", "vae"]

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        patch_size: int = 1,
        id2label: dict[str, str] | None = None,
        guidance_scale: float = 1.0,
        levels: dict[str, list[float]] | None = None,
        sigma_data: float | None = None,
        text: dict[str, Any] | None = None,
        vae: Any = None,
        latents: dict[str, dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        self.register_to_config(
            patch_size=patch_size,
            id2label=id2label,
            guidance_scale=guidance_scale,
            levels=levels,
            sigma_data=sigma_data,
            text=text,
            latents=latents,
        )
        self.program: Any = None

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return `batch_size` images, or one per entry of `class_labels` (names or indices of classes) or `prompt`.

        Without those, a conditional model cycles through its classes or examples. `num_inference_steps` is 50 by
        default, or the number of `levels`, which are fixed. `eta` is that of the DDIM scheduler.
        """
        device, scheduler = self._execution_device, self.scheduler
        if not isinstance(batch_size, int):
            raise TypeError(f"batch_size={batch_size!r} must be a number; type class_labels=... or prompt=... by name")
        if isinstance(prompt, str):
            prompt = [prompt] * batch_size
        if class_labels is not None and prompt is not None:
            raise ValueError("class_labels and prompt exclude each other; leave one out")
        values = prompt if class_labels is None else class_labels
        if isinstance(values, Tensor):
            values = values.tolist()
        if values is not None:
            batch_size = len(values)
        cond = self.encode(values, batch_size)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        model = self.unet or self.transformer
        dtype = torch.float32 if model is None else model.dtype
        x = randn_tensor((batch_size, *self.input_shape()), generator=generator, device=device, dtype=dtype)

        levels = self.config.levels
        if levels and num_inference_steps is not None:
            raise ValueError("num_inference_steps is fixed by the levels of this pipeline; leave it out")
        scheduler.set_timesteps(num_inference_steps or 50, device=device)
        if levels:
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
        for k, t in enumerate(self.progress_bar(scheduler.timesteps)):
            noisy = scale_input(x, t)  # of variance 1
            if (sigma_data := self.config.sigma_data) is None:
                out = self.guided(noisy, t, cond, scale)
            else:
                sigma = scheduler.sigmas[k]
                std, norm = torch.hypot(sigma, torch.tensor(sigma_data)), torch.hypot(sigma, torch.ones(()))
                out = self.guided(noisy * norm / std, t, cond, scale)
                out = noisy * norm * (sigma_data / std) ** 2 + sigma * sigma_data / std * out
            step = scheduler.step(out, t, x, **settings)
            x = step.prev_sample
        # The last step returns the mean; in fewer steps than in training, that of DDPM would add noise.
        x0 = getattr(step, "pred_original_sample", x)

        images: Any = (self.decode(F.pixel_shuffle(x0, self.config.patch_size)) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, x: Tensor) -> Any:
        """Return the images of samples, which may be latents."""
        if self.vae is None:
            return x
        scale, shift = (x.new_tensor([*self.config.latents[k].values()]).view(-1, 1, 1) for k in ("scale", "shift"))
        return self.vae.decode((x / scale + shift).to(self.vae.dtype)).sample

    def input_shape(self) -> tuple[int, ...]:
        """Return the channels, height and width of an input of the network."""
        if self.config.text is not None:
            return tuple(self.config.text["shape"].values())
        config = (self.unet or self.transformer).config
        size = config.sample_size
        return config.in_channels, *((size, size) if isinstance(size, int) else size)

    def guided(self, x: Tensor, t: Tensor, cond: Tensor | None, scale: float) -> Tensor:
        """Return the output of the network with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""
        channels = x.shape[1]
        if cond is None or scale == 1:
            out: Tensor = self.network(x, t, cond)
        else:
            both = self.network(torch.cat([x, x]), t, torch.cat([cond, self.encode([None], 1).expand_as(cond)]))
            out, reference = both.chunk(2)
            mean = reference[:, :channels] + scale * (out[:, :channels] - reference[:, :channels])
            out = torch.cat([mean, out[:, channels:]], dim=1)
        if getattr(self.scheduler.config, "variance_type", None) == "learned_range":
            return out
        return out[:, :channels]

    def network(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Any:
        """Return the output of the network or of the program for timestep t, counted from 0."""
        if self.transformer is not None:
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if cond is None else cond
            return self.transformer(x, t.expand(len(x)), class_labels=labels).sample
        if self.config.text is None:
            return self.unet(x, t, class_labels=cond).sample
        if self.program is None:
            self.program = self.load_program().to(x.device)
        time = (t.to(x) + 1) / self.config.text["time_scale"]
        return self.program(x, time.expand(len(x)), cond)

    def load_program(self) -> Any:
        """Return the network of network.pt2, from the folder or the repository of the pipeline."""
        path = Path(self.config._name_or_path) / "network.pt2"
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(self.config._name_or_path, "network.pt2"))
        return torch.export.load(path).module()

    def encode(self, values: Sequence[Any] | None, batch_size: int) -> Any:
        """Return conditions (B, ...) for the network, by default examples; None in `values` is the empty one."""
        names, text = self.config.id2label, self.config.text
        if names is None and text is None:
            if values is not None:
                raise ValueError("this model is unconditional; leave out class_labels and prompt")
            return None
        examples = list((text["prompts"] if names is None else names).values())
        if values is None:
            values = [examples[k % len(examples)] for k in range(batch_size)]
        ids = self.tokens(values) if names is None else [self.class_index(value) for value in values]
        return torch.tensor(ids, device=self._execution_device)

    def class_index(self, value: int | str | None) -> int:
        """Return the index of a class, or the number of classes for no class."""
        names = list(self.config.id2label.values())
        if value is None:
            return len(names)
        if value in names:
            return names.index(value)
        if str(value).isdecimal() and int(value) < len(names):
            return int(value)
        raise ValueError(f"class_labels has {value!r}, which must be one of {', '.join(names)} or an index")

    def tokens(self, values: Sequence[str | None]) -> list[list[int]]:
        """Return the token ids of texts: 1, those of the tokenizer plus 3, 2, and 0 as padding."""
        from tokenizers import Tokenizer

        tokenizer, length = Tokenizer.from_str(self.config.text["tokenizer"]), self.config.text["max_length"]
        rows = []
        for value in values:
            text = " ".join(unicodedata.normalize("NFKC", value or "").lower().split())
            ids = [3 + i for i in tokenizer.encode(text, add_special_tokens=False).ids]
            row = [1, *ids[: length - 2], 2]
            rows.append(row + [0] * (length - len(row)))
        return rows
