"""Names of settings and options in other libraries; typing one of them prints a hint."""

from collections.abc import Collection

FOREIGN_NAMES = {
    # diffusers, guided-diffusion, EDM, denoising-diffusion-pytorch, Lightning.
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps",
    "data.batch_size batch_size": "batch",
    "data.batch_size": "train_batch_size",
    "schedule names": "beta_schedule noise_schedule",
    "guidance.scale": "cfg_scale guidance_scale w",
    "model.channel_mult": "dim_mults",
    "ckpt resume": "checkpoint checkpoint_path ckpt_path",
    "resume": "ckpt",
    "conditioning": "class_cond",
    "diffusion.clip_x0": "clip_denoised",
    "data.root": "data_dir",
    "data": "dataset",
    "schedule.num_steps num_steps": "diffusion_steps num_timesteps",
    "callbacks.ema.decay": "ema_decay ema_rate",
    "trainer.max_steps=STEPS": "epochs max_epochs num_epochs trainer.max_epochs",
    "trainer.devices devices": "gpus",
    "trainer.gradient_clip_val": "grad_clip max_grad_norm",
    "trainer.max_steps": "iterations train_num_steps",
    "optimizer.lr": "learning_rate",
    "loss.type": "loss_type",
    "data.microbatch_size": "microbatch",
    "trainer.precision precision": "mixed_precision",
    "model.model_channels": "num_channels",
    "sampler.steps": "num_inference_steps num_sampling_steps sampling_timesteps",
    "n": "num_samples",
    "schedule.num_steps": "num_train_timesteps",
    "hydra.run.dir": "outdir output_dir results_folder",
    "diffusion.prediction": "parameterization prediction_type",
    "cond": "prompt",
    "checkpoint_every": "save_interval",
    "timestep_sampler": "schedule_sampler",
    "lr_scheduler sampler": "scheduler",
    "trainer.max_steps sampler.steps num_steps": "steps",
}
"""Names by the setting to type instead; if several settings, the first that the command has."""

FOREIGN_KEYS = {name: setting for setting, names in FOREIGN_NAMES.items() for name in names.split()}

FOREIGN_OPTIONS = {
    "loss=huber": "loss=simple loss.type=huber",
    "loss=l1": "loss=simple loss.type=l1",
    "loss=l2": "loss=simple",
    "loss=mse": "loss=simple",
    "loss=rescaled_mse": "loss=hybrid",
    "sampler=ddpm": "sampler=ancestral",
    "sampler=dpm++": "sampler=dpmpp_2m",
    "sampler=edm": "sampler=heun",
    "schedule=flow": "schedule=rectified_flow",
    "schedule=sigmoid": "schedule=sigmoid_jabri",
    "schedule=squaredcos_cap_v2": "schedule=cosine",
    "timestep_sampler=loss-second-moment": "timestep_sampler=importance",
}
"""Options of config groups under other names."""


def renamed_key(key: str, known: Collection[str]) -> str | None:
    """Return the setting among `known` that has a foreign name, or a name without its groups; None if there is none."""
    for new in FOREIGN_KEYS.get(key, "").split():
        if new.partition("=")[0] in known or new.startswith("hydra."):
            return new
    same = [name for name in known if name.endswith(f".{key}")]
    return same[0] if len(same) == 1 else None
