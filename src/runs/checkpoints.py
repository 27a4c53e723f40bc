"""Find a checkpoint and check that it fits the configuration."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.config.resume import newest_run, path_hint
from src.errors import first_names, format_override
from src.interop.hub_models import MODEL_FILE, SCHEME, local_copy
from src.runs.nodes import to_plain
from src.training.checkpoints import is_intact, newest_first, weights_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.training.base import TrainingModule


def find_checkpoint(
    run: str | None, ckpt: str | None, init_from: str | None = None, setting: str = "run", takes_models: bool = True
) -> Path:
    """Return the newest intact checkpoint in the folder `run`, the file `ckpt`, or the model `init_from`.

    Each takes a folder or a file; the folder of a diffusers model is returned itself, and a folder without checkpoints
    may hold an exported model. A model of the Hugging Face Hub, `hf://user/name`, is downloaded. `setting` is the
    name of `run` in messages, which do not offer `init_from` without `takes_models`. Raises FileNotFoundError without a
    model there, and ValueError unless exactly one of the three is given.
    """
    given_settings = {setting: run, "ckpt": ckpt, "init_from": init_from}
    typed = {name: value for name, value in given_settings.items() if value is not None}
    if len(typed) != 1:
        sources = ["run=FOLDER (a run folder, under outputs/train, or hf://user/name)"]
        sources += ["ckpt=FILE (one checkpoint or exported model)", "init_from=FOLDER (a model of another project)"]
        offered = sources if takes_models else ["run=FOLDER (a run folder, under outputs/train)", "ckpt=FILE"]
        raise ValueError(
            f"give one of {', '.join(offered[:-1])} and {offered[-1]}"
            + ("" if typed else newest_run("run", Path("outputs/train")))
        )
    ((name, value),) = typed.items()
    if not str(value).strip():
        raise ValueError(f"{name}= is empty: give a value, or leave it out{newest_run(name, Path('outputs/train'))}")
    given = Path(str(value))
    is_hub = str(value).startswith(SCHEME)
    if name == "init_from" and len(given.parts) == 2 and not (given.is_absolute() or given.parent.exists()):
        is_hub = True  # a name as diffusers takes it, such as google/ddpm-cifar10-32
    if is_hub:
        given = local_copy(str(value), name)
    if given.is_file():
        return given
    if not given.is_dir():
        kinds = {"ckpt": ("checkpoint", "*.ckpt"), "init_from": ("model", "*/")}
        kind, pattern = kinds.get(name, ("run folder", "*/"))
        newest = newest_run(name, Path("outputs/train"))
        hint = path_hint(given, name, pattern) or newest or ": runs are in outputs/train"
        raise FileNotFoundError(f"{name}: no {kind} {given.resolve()}{hint}")
    if is_pipeline(given):
        return given
    folder = given.parent if given.name == "checkpoints" else given
    for path in newest_first(folder):
        if is_intact(path):
            return path
        warnings.warn(f"{path} is corrupted; loading the next newest checkpoint", stacklevel=2)
    if (exported := folder / MODEL_FILE).is_file():
        return exported
    hint = newest_run(name, folder) or "; name a run that has saved one"
    setting = format_override(name, folder.resolve())
    raise FileNotFoundError(f"{setting} has no intact checkpoint in checkpoints/, nor {MODEL_FILE}{hint}")


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder holds a pipeline or a model of diffusers."""
    config = folder / "config.json"
    return (folder / "model_index.json").is_file() or (config.is_file() and '"_class_name"' in config.read_text())


def has_averages(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint or an exported model holds averaged weights."""
    return bool(checkpoint.get("averaged")) or "current_model_state" in checkpoint


def choose_weights(
    checkpoint: dict[str, Any], path: Path, ema: bool | float | None
) -> "tuple[dict[str, Tensor], bool]":
    """Return the weights of a checkpoint, and whether they are averages.

    `ema` True takes the averaged weights, False the raw ones, None the averaged ones if there are any, and a number
    the average of that length (`training.power_ema`). Raises ValueError if the checkpoint does not have them.
    """
    if not isinstance(ema, bool | float | int | None):
        raise ValueError(f"{format_override('ema', ema)} must be one length, such as 0.1, in this command")
    if not isinstance(ema, bool | None):
        from src.training.power_ema import with_average

        checkpoint = with_average(checkpoint, path, ema)
    averaged = has_averages(checkpoint) if ema is None else ema is not False
    return weights_of(checkpoint, averaged, path), averaged


def record_path(checkpoint: Path) -> Path | None:
    """Return the path of the data record of a checkpoint's run; None for a file outside a run folder."""
    from src.data.split import FINGERPRINT_FILE

    return checkpoint.parent.parent / FINGERPRINT_FILE if checkpoint.parent.name == "checkpoints" else None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the final metrics of a run, or None if it has not finished or has diverged."""
    path = folder / "metrics.json"
    metrics: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    diverged = metrics is not None and metrics.get("val/loss", 0.0) is None
    return None if diverged else metrics


def check_fit(weights: "Mapping[str, Tensor]", module: "nn.Module", path: Path) -> None:
    """Raise ValueError, naming the first difference, if the `weights` of the file `path` do not fit the module."""
    ours = module.state_dict()
    for name in [*ours, *weights]:
        saved, built = (tuple(state[name].shape) if name in state else "absent" for state in (weights, ours))
        if saved != built:
            raise ValueError(
                f"{path} holds another network: {name} is {saved} there and {built} here; use the settings of its "
                "training, or start a new run"
            )


def load_initial_weights(module: "TrainingModule", init_from: DictConfig) -> str:
    """Load the weights of a trained model that fit the network of `module`, and return what was loaded, in words.

    `init_from` has the path, the kind of `weights` ("ema", "raw", or None for averaged ones if there are any) and the
    `flags` of OpenAI. Raises FileNotFoundError or ValueError without such weights, if none of them fits, or if some
    weights would be neither loaded nor trained.
    """
    from src.runs.imported import read_model
    from src.training.finetuning import plain_name
    from src.training.initial_weights import load_matching

    path, kind = find_checkpoint(None, None, init_from.path), init_from.weights
    override = format_override("init_from", init_from.path)
    checkpoint = read_model(path, init_from.flags)
    averaged = has_averages(checkpoint) if kind is None else kind == "ema"
    if averaged != has_averages(checkpoint) and (averaged or checkpoint.get("averaged")):
        raise ValueError(f"init_from.weights={kind} needs weights that {path} does not have; leave it out")
    weights = weights_of(checkpoint, averaged, path)
    prefix = "net."
    network_weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    report = load_matching(module.net, network_weights)
    if not any(network_weights[name].ndim > 1 for name in report.loaded):  # biases alone may fit by chance
        node = checkpoint["hyper_parameters"]["model"]
        raise ValueError(
            f"{override} has no weights that fit this network: it is a {node['_target_']} with other settings; leave "
            "out the typed settings of model"
        )
    trained = {plain_name(name): parameter.requires_grad for name, parameter in module.net.named_parameters()}
    if untrained := [name for name in report.new if not trained.get(name.split()[0], True)]:
        raise ValueError(
            f"{override} has no weights for {first_names(untrained)}, and freeze or lora "
            "excludes them from training: change freeze, or name them in lora.train"
        )
    return f"{report}, from {path} ({'averaged' if averaged else 'raw'})"


def check_resumed(checkpoint: Mapping[str, Any], cfg: DictConfig, module: "TrainingModule") -> list[str]:
    """Return the `changed_settings` of a resumed run. Raises ValueError for those with which it cannot continue.

    Lightning's counters need the same accumulation, and the optimizer needs its state of each weight.
    """
    from src.training.optim import trial_state

    before, done = checkpoint["hyper_parameters"], checkpoint["global_step"]
    if cfg.trainer.max_steps < done:
        raise ValueError(
            f"trainer.max_steps={cfg.trainer.max_steps} must be at least {done}, the steps that the run has taken: "
            "raise it, or start a new run"
        )
    batches, now = before["trainer"]["accumulate_grad_batches"], cfg.trainer.accumulate_grad_batches
    if batches != now:
        raise ValueError(
            f"trainer.accumulate_grad_batches={now} cannot resume a run that had {batches}: keep it "
            "(data.microbatch_size sets it too), or start a new run"
        )
    saved = checkpoint["optimizer_states"][0]
    states = set().union(*(saved["state"].get(k, ()) for k in saved["param_groups"][0]["params"]))
    assert module.make_optimizer is not None
    if states and (missing := trial_state(module.make_optimizer, 2).keys() - states):
        raise ValueError(
            f"optimizer.* needs {', '.join(sorted(missing))} of each weight, which the run (with "
            f"{before['optimizer']['_target_']}) lacks: resume with the optimizer of the run, or start a new run"
        )
    return changed_settings(before, to_plain(cfg))


FIXED_KEYS = (
    *("model", "schedule", "diffusion", "snr_shift", "zero_terminal_snr", "conditioning"),
    *("data.num_values", "data.value_range", "data.dtype", "data.columns", "data.mean", "data.std"),
    *("data.encoders", "freeze", "lora", "repa", "lr_multipliers", "decay_matrices_only", "optimizer.adamw"),
    *("autoencoder.scale", "autoencoder.shift", "autoencoder.fingerprint"),
)
"""Settings that a resumed run must keep: they determine the meaning of the weights or the optimizer's state."""

MUTABLE_KEYS = (
    *("model.gradient_checkpointing", "conditioning.cond_drop_prob", "lora.dropout"),
    *("repa.weight", "repa.stop_step"),
    *(f"conditioning.encode.{name}" for name in ("cache", "model", "device", "examples")),
)
"""Settings among `FIXED_KEYS` that a resumed run may change."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each setting in which two configurations differ, as "name: old -> new", without the run folder.

    Raises ValueError for a setting among `FIXED_KEYS`.
    """
    old, new = (
        {
            k: v.replace(str(each.get("run_dir")), "") if isinstance(v, str) else v
            for k, v in flatten_settings(each).items()
        }
        for each in (before, now)
    )
    lines = []
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and name.split(".")[0] not in ("recipe", "resume", "run_dir", "trust"):
            lines.append(f"{name}: {old.get(name)} -> {new.get(name)}")
            if {name, name.split(".")[0]} & set(FIXED_KEYS) and name not in MUTABLE_KEYS:
                raise ValueError(f"{lines[-1]} changes the model of a resumed run: keep it, or start a new run")
    return lines


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        result |= flatten_settings(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result
