"""Names of settings in other libraries and in earlier versions of this one; typing one of them prints a hint."""

import re
from collections.abc import Collection

from src.errors import command, shell_word

FOREIGN_NAMES = {
    # diffusers, guided-diffusion, EDM, denoising-diffusion-pytorch, lightning-hydra-template, Lightning.
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps gradient_accumulate_every",
    "data.batch_size batch_size": "batch train_batch_size",
    "data.microbatch_size": "microbatch batch_gpu",
    "data.edm_augment": "augment",
    "data.flip": "random_flip augment_horizontal_flip xflip",
    "data.image_size": "resolution image_size",
    "data.num_workers": "workers dataloader_num_workers",
    "schedule names": "beta_schedule ddpm_beta_schedule noise_schedule",
    "names": "schedule",
    "length": "ema sigma_rel",
    "autoencoder": "autoencoder.path",
    "autoencoder.path autoencoder": "vae vae_path pretrained_vae_model_name_or_path",
    "init_from.path": "network network_pkl model_path pretrained_model_name_or_path transfer",
    "compile": "model.compile torch_compile",
    "model.depth": "model.num_layers",
    "model.num_res_blocks": "layers_per_block model.layers_per_block",
    "entity": "team",
    "guidance.scale": "cfg_scale guidance_scale w",
    "model.channel_mult": "cres dim_mults",
    "model.model_channels": "cbase dim num_channels",
    "model.attention_resolutions": "attn_resolutions",
    "ckpt resume": "checkpoint checkpoint_path ckpt_path resume_from_checkpoint",
    "resume": "ckpt run",
    "run runs": "resume",
    "diffusion.clip_x0": "clip_denoised",
    "data": "dataset",
    "schedule.num_steps num_steps": "ddpm_num_steps diffusion_steps num_timesteps num_train_timesteps T",
    "callbacks.ema.decay": "ema_decay ema_max_decay ema_rate",
    "callbacks.best": "callbacks.model_checkpoint",
    "trainer.devices devices": "gpus trainer.gpus",
    "trainer.gradient_clip_val": "grad_clip max_grad_norm",
    "trainer.log_every_n_steps": "log_interval",
    "callbacks.time_budget.minutes": "minutes time_budget",
    "trainer.max_steps": "iterations lr_anneal_steps max_train_steps train_num_steps",
    "optimizer": "model.optimizer optim",
    "optimizer.lr": "learning_rate train_lr",
    "optimizer.betas": "adam_betas",
    "optimizer.weight_decay": "adam_weight_decay",
    "lr_scheduler": "model.scheduler",
    "lr_scheduler.warmup_steps": "lr_warmup_steps",
    "loss.type": "loss_type",
    "trainer.precision precision": "mixed_precision",
    "sampler": "solver",
    "sampler.steps": "ddpm_num_inference_steps num_inference_steps num_sampling_steps sampling_timesteps",
    "n": "num_images_per_prompt num_samples",
    "hydra.run.dir": "logging_dir out outdir output output_dir paths.log_dir paths.output_dir results_folder save_dir",
    "features": "metric metrics",
    "diffusion.prediction": "parameterization prediction_type",
    "cond": "class class_idx class_labels prompt",
    "checkpoint_every": "checkpointing_steps save_interval",
    "keep_checkpoints": "checkpoints_total_limit",
    "logger": "report_to",
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
    "loss=pred_noise": "diffusion.prediction=eps",
    "loss=pred_v": "diffusion.prediction=v",
    "loss=pred_x0": "diffusion.prediction=x0",
    "loss=rescaled_mse": "loss=hybrid",
    "lr_scheduler=constant_with_warmup": "lr_scheduler=constant",
    "sampler=ddpm": "sampler=ancestral",
    "sampler=dpm++": "sampler=dpmpp_2m",
    "sampler=edm": "sampler=heun",
    "schedule=flow": "schedule=rectified_flow",
    "schedule=sigmoid": "schedule=sigmoid_jabri",
    "schedule=squaredcos_cap_v2": "schedule=cosine",
    "timestep_sampler=loss-second-moment": "timestep_sampler=importance",
    "trainer=ddp_sim": "trainer=ddp trainer.accelerator=cpu trainer.devices=2",
    "trainer=mps": "trainer.accelerator=mps",
}
"""Options of config groups under other names: the overrides to type instead."""

FOREIGN_VALUES = {
    "device=gpu": "cuda",
    "precision=bf16": "bf16-mixed",
    "precision=float16": "16-mixed",
    "precision=float32": "32-true",
    "precision=fp16": "16-mixed",
    "precision=fp32": "32-true",
    "precision=no": "32-true",
    "prediction=epsilon": "eps",
    "prediction=sample": "x0",
    "prediction=v_prediction": "v",
    "resume=True": "auto",
    "resume=last": "auto",
    "resume=latest": "auto",
    "resume=true": "auto",
}
"""Values under other names, by the last part of the setting."""

OTHER_FORMS = {
    "trainer.max_steps": {
        "adam_beta1 beta1": "optimizer.betas=[{value},0.999]",
        "adam_beta2 beta2": "optimizer.betas=[0.9,{value}]",
        "adam_epsilon eps epsilon": "+optimizer.eps={value}",
        "amp fp16 use_amp use_fp16": "trainer.precision=16-mixed",
        "callbacks.early_stopping": "+callbacks.early_stopping._target_=lightning.pytorch.callbacks.EarlyStopping "
        "+callbacks.early_stopping.monitor=val/loss",
        "calculate_fid": "callbacks=quality",
        "class_cond": "conditioning=class",
        "data.data_dir data_dir train_data_dir": "data=folder data.root={value}",
        "dataset_name": "data=hub data.name={value}",
        "learn_sigma": "loss=hybrid diffusion.variance=learned_range",
        "min_snr_gamma snr_gamma": "weighting=min_snr weighting.gamma={value}",
        "min_snr_loss_weight": "weighting=min_snr",
        "momentum": "optimizer=sgd optimizer.momentum={value}",
        "predict_xstart": "diffusion.prediction=x0",
        "project wandb_project": "logger=wandb logger.wandb.project={value}",
        "run_name task_name": "hydra.run.dir=outputs/train/{value}",
        "save_and_sample_every": "checkpoint_every={value} validate_every={value}",
        "tags": "logger=wandb +logger.wandb.tags={value}",
        "use_kl": "loss=vlb",
        "use_scale_shift_norm": "model.time_conditioning=scale_shift",
    },
    "gif": {  # src.sample
        "S_churn": "sampler=heun sampler.s_churn={value}",
        "S_max": "sampler=heun sampler.s_tmax={value}",
        "S_min": "sampler=heun sampler.s_tmin={value}",
        "S_noise": "sampler=heun sampler.s_noise={value}",
        "height width": "image_size={value}",
        "use_ddim": "sampler=ddim",
    },
}
"""Overrides to type instead of a setting of other libraries, by a setting of the command that has them."""

EXPLANATIONS = {
    "trainer.max_steps": {
        "epochs max_epochs num_epochs num_train_epochs": "training is counted in steps: one epoch is the number of "
        "training samples / data.batch_size, so set trainer.max_steps to {value} times that",
        "duration": "training is counted in steps: set trainer.max_steps to {value} million / data.batch_size",
        "save_images_epochs save_model_epochs snap tick": "training is counted in steps: set validate_every, which "
        "also draws samples, and checkpoint_every",
        "enable_xformers_memory_efficient_attention flash_attn": "attention uses PyTorch's fused kernels; leave it out",
        "data.pin_memory pin_memory": "batches are pinned for GPUs; leave it out",
        "ema_inv_gamma ema_power ema_update_every": "the average follows every step, and its decay rises to "
        "callbacks.ema.decay; leave it out",
        "extras.print_config print_config": "--cfg job prints the configuration",
        "hparams_search": "-m hydra/sweeper=search searches the intervals of other overrides, as in "
        "'optimizer.lr=interval(1e-4,1e-2)'",
        "noise_scheduler": "the noise schedule is set by schedule=, the sampler by sampler=",
        "num_classes": "classes are counted in the data; add conditioning=class",
        "push_to_hub": f"export the run when it has ended: {command('export', 'run=FOLDER', 'hub=user/name')}",
        "use_ema": "weights are averaged by default; ~callbacks.ema turns it off",
        "wandb": "add logger=wandb, or leave it out",
        "test train validate": f"this command always trains; evaluate its run with {command('evaluate', 'run=FOLDER')}",
    },
    "gif": {
        "rho sigma_max sigma_min": "the schedule of the run has the ends of the noise, and sampler.spacing=karras the "
        "levels between them",
        "seeds": "seed=0 n=64 draws 64 samples, each from its own random numbers",
        "timestep_respacing": "type sampler.steps=50 for 50 steps; add sampler=ddim for DDIM",
    },
}
"""Hints for settings of other libraries that no setting of ours replaces, likewise."""


def explain_key(key: str, value: str, known: Collection[str]) -> str | None:
    """Return the hint for a setting of other libraries, where `known` are the settings of the command."""
    for table in (OTHER_FORMS, EXPLANATIONS):
        for names, text in ((names, text) for own in table.keys() & known for names, text in table[own].items()):
            if not any(f"{key}.".startswith(f"{name}.") for name in names.split()):
                continue
            if table is EXPLANATIONS:
                return text.format(value=value)
            is_off = "{value}" not in text and value.lower() in ("false", "null", "none", "0", "no")
            words = [shell_word(word.format(value=value)) for word in text.split()]
            return "leave it out" if is_off else f"type {' '.join(words)}"
    return None


def other_value(setting: str, value: str) -> str:
    """Return the overrides for a setting whose value may have the name of another library."""
    if options := FOREIGN_OPTIONS.get(f"{setting}={value}"):
        return options
    own = FOREIGN_VALUES.get(f"{setting.rpartition('.')[2]}={value}", value)
    return shell_word(f"{setting}={own}")


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
