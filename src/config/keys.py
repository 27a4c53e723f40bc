"""Names of settings in other libraries and in earlier versions of this one; typing one of them prints a hint."""

import re
from collections.abc import Collection

from src.errors import command

FOREIGN_NAMES = {
    # diffusers, guided-diffusion, EDM, denoising-diffusion-pytorch, Lightning.
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps",
    "data.batch_size batch_size": "batch",
    "data.batch_size": "train_batch_size",
    "schedule names": "beta_schedule ddpm_beta_schedule noise_schedule",
    "names": "schedule",
    "length": "ema sigma_rel",
    "autoencoder": "autoencoder.path",
    "autoencoder.path autoencoder": "vae vae_path",
    "model.depth": "model.num_layers",
    "model.num_res_blocks": "layers_per_block model.layers_per_block",
    "entity": "team",
    "guidance.scale": "cfg_scale guidance_scale w",
    "model.channel_mult": "dim_mults",
    "ckpt resume": "checkpoint checkpoint_path ckpt_path resume_from_checkpoint",
    "resume": "ckpt run",
    "run runs": "resume",
    "conditioning": "class_cond",
    "diffusion.clip_x0": "clip_denoised",
    "data.root": "data_dir train_data_dir",
    "data": "dataset",
    "schedule.num_steps num_steps": "diffusion_steps num_timesteps T",
    "callbacks.ema.decay": "ema_decay ema_rate",
    "trainer.devices devices": "gpus trainer.gpus",
    "trainer.gradient_clip_val": "grad_clip max_grad_norm",
    "callbacks.time_budget.minutes": "minutes time_budget",
    "trainer.max_steps": "iterations train_num_steps",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "adam_weight_decay",
    "data.flip": "random_flip",
    "data.image_size": "resolution",
    "model.attention_resolutions": "attn_resolutions",
    "loss.type": "loss_type",
    "data.microbatch_size": "microbatch",
    "trainer.precision precision": "mixed_precision",
    "model.model_channels": "num_channels",
    "sampler.steps": "ddpm_num_inference_steps num_inference_steps num_sampling_steps sampling_timesteps",
    "n": "num_samples",
    "schedule.num_steps": "ddpm_num_steps num_train_timesteps",
    "hydra.run.dir": "out outdir output output_dir results_folder save_dir",
    "features": "metric metrics",
    "diffusion.prediction": "parameterization prediction_type",
    "cond": "prompt",
    "checkpoint_every": "save_interval",
    "timestep_sampler": "schedule_sampler",
    "lr_scheduler sampler": "scheduler",
    "trainer.max_steps sampler.steps num_steps": "steps",
}
"""Names by the setting to type instead; if several settings, the first that the command has."""

EARLIER_NAMES = {
    "diffusion": "process",
    "diffusion.clip_x0": "process.clip",
    "diffusion.dynamic_threshold": "process.dynamic_clip",
    "loss": "objective",
    "loss.type": "objective.error",
    "timestep_sampler schedule.num_steps": "timesteps",
    "timestep_sampler.uniform_prob": "timesteps.floor",
    "timestep_sampler.history_per_bin": "timesteps.history",
    "timestep_sampler.num_bins": "timesteps.bins",
    "timestep_sampler.warp.std": "timesteps.warp.deviation",
    "conditioning.cond_drop_prob": "conditioning.drop",
    "conditioning.encode.std": "conditioning.encode.deviation",
    "conditioning.encode.max_length": "conditioning.encode.length",
    "conditioning.encode.vocab_size": "conditioning.encode.vocabulary",
    "conditioning.embed.vocab_size": "conditioning.embed.vocabulary",
    "conditioning.embed.max_length": "conditioning.embed.length",
    "conditioning.embed.hidden_size": "conditioning.embed.width",
    "conditioning.embed.num_layers": "conditioning.embed.layers",
    "conditioning.embed.num_heads": "conditioning.embed.heads",
    "conditioning.embed.num_classes": "conditioning.embed.classes",
    "conditioning.embed.num_covariates": "conditioning.embed.values",
    "guidance.model": "guidance.weak",
    "sampler.s_churn": "sampler.churn",
    "sampler.s_tmin": "sampler.churn_min",
    "sampler.s_tmax": "sampler.churn_max",
    "sampler.s_noise": "sampler.churn_noise",
    "model.channel_mult": "model.multipliers",
    "model.num_res_blocks": "model.blocks",
    "model.model_channels model.hidden_size": "model.width",
    "model.attention_resolutions": "model.attention",
    "model.num_heads": "model.heads",
    "model.num_head_channels": "model.head_channels",
    "model.resblock_updown": "model.resample_blocks",
    "model.gradient_checkpointing": "model.checkpointing",
    "model.patch_size": "model.patch",
    "model.time_conditioning": "model.conditioning",
    "data.num_values": "data.levels",
    "data.microbatch_size": "data.micro_batch",
    "data.condition_columns": "data.given",
    "data.std": "data.deviation",
    "data.source.stds": "data.source.deviations",
    "optimized_metric": "optimize",
    "neighbors": "neighbours",
    "neighbors.num_samples": "neighbours.samples",
    "neighbors.num_candidates": "neighbours.among",
    "alignment.detector_steps": "alignment.judge_steps",
    "reference": "against",
    "max_features": "keep",
    "num_memorization": "near",
    "num_val": "held_out",
    "num_terms": "links",
    "callbacks.run_info": "callbacks.beginning",
    "callbacks.graceful_shutdown": "callbacks.stop",
    "callbacks.graceful_shutdown.check_interval_s": "callbacks.stop.seconds",
    "callbacks.checkpoint_every": "callbacks.every",
    "callbacks.nan_guard": "callbacks.guard",
    "callbacks.nan_guard.max_rollbacks": "callbacks.guard.rewinds",
    "callbacks.nan_guard.lr_factor": "callbacks.guard.factor",
    "callbacks.wandb_artifact": "callbacks.artifact",
    "callbacks.throughput": "callbacks.speed",
    "callbacks.samples.num_samples": "callbacks.samples.count",
    "callbacks.bits_per_dim.num_samples": "callbacks.bits_per_dim.samples",
    "callbacks.bits_per_dim.num_terms": "callbacks.bits_per_dim.links",
    "callbacks.loss_by_noise.num_bins": "callbacks.loss_by_noise.bins",
}
"""Names in earlier versions, by the name of today."""

OTHER_KEYS = {
    name: setting
    for table in (FOREIGN_NAMES, EARLIER_NAMES)
    for setting, names in table.items()
    for name in names.split()
}

FOREIGN_OPTIONS = {
    "conditioning=measured": "conditioning=continuous",
    "debug=default": "debug=fast_dev_run",
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

FOREIGN_VALUES = {
    "device=gpu": "cuda",
    "precision=float16": "16-mixed",
    "precision=float32": "32-true",
    "precision=fp16": "16-mixed",
    "precision=fp32": "32-true",
    "prediction=epsilon": "eps",
    "prediction=sample": "x0",
    "prediction=v_prediction": "v",
}
"""Values under other names, by the last part of the setting."""

EXPLANATIONS = {
    "epochs max_epochs num_epochs num_train_epochs": "training is counted in steps: one epoch is the number of "
    "training samples / data.batch_size, so set trainer.max_steps to {value} times that",
    "dataset_name": "the datasets of the Hugging Face Hub are data=hub data.name={value}",
    "noise_scheduler": "the noise schedule is set by schedule=, the sampler by sampler=",
    "num_classes": "classes are counted in the data; add conditioning=class",
    "use_ema": "weights are averaged by default; ~callbacks.ema turns it off",
    "wandb": "add logger=wandb, or leave it out",
    "test train validate": f"this command always trains; evaluate its run with {command('evaluate', 'run=FOLDER')}",
}
"""Hints for settings of other training commands that no setting of ours replaces."""


def explain_key(key: str, value: str, known: Collection[str]) -> str | None:
    """Return the explanation of a setting of other training commands, where `known` are those of ours."""
    if "trainer.max_steps" not in known:
        return None
    return next((text.format(value=value) for keys, text in EXPLANATIONS.items() if key in keys.split()), None)


def run_folder(path: str) -> str:
    """Return the run folder of a checkpoint's path; any other path stays the same."""
    return re.sub(r"/checkpoints/[^/]+\.ckpt$", "", path)


def renamed_key(key: str, known: Collection[str]) -> str | None:
    """Return the setting among `known` that has another name, or a name without its groups; None if there is none."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        for new in OTHER_KEYS.get(".".join(parts[:end]), "").split():
            full = ".".join([new, *parts[end:]])
            if full in known or full.startswith("hydra."):
                return full
    same = [name for name in known if name.endswith(f".{key}") and not name.startswith(("recipe.", "autoencoder."))]
    return same[0] if len(same) == 1 else None
