"""The command line: overrides, resuming, output folders."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import src
from src.config.arguments import check_arguments
from src.config.cli import launch
from src.config.compose import key_hint, setting_names
from src.config.keys import FOREIGN_OPTIONS, FOREIGN_VALUES, OTHER_FORMS, OTHER_KEYS
from src.config.overrides import check_overrides
from src.config.resume import check_unused, check_writable, expand_resume, expand_sweep, explain_resume
from src.config.rules import check_value
from src.config.search_path import CONF, config_groups, extra_folders, load_option
from src.config.words import expand_init_from, split_arguments
from src.diffusion.schedules import custom
from src.distributed.ranks import fresh_folder, rank, slurm_tasks
from src.errors import UsageError, format_override
from tests.conftest import HANG_SECONDS, compose


@pytest.mark.parametrize(
    "value",
    [
        *(
            "cat",
            "a red circle",
            "a red circle, two squares",
            'it\'s "big", $HOME `ls` \\ !',
            "[1,2]",
            "größer",
            " cat ",
        ),
        *("7", "1e5", "null", "True", "", [[1.5, 2]], ["x", "ö, y"], 7),
    ],
    ids=repr,
)
def test_format_override_survives_shell_and_hydra(value):
    """A shell splits it, then Hydra parses it."""
    words = subprocess.run(
        ["bash", "-c", f"printf '%s' {format_override('cond', value)}"], capture_output=True, text=True
    ).stdout
    override = OverridesParser.create().parse_override(words)
    assert not override.is_sweep_override()
    assert override.value() == value


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("schedule=zzz", ["unknown schedule 'zzz'", "cosine"]),
        ("seed=[", ["seed=[", "cannot be parsed"]),
        ("trainer.max_steps=1.5", ["trainer.max_steps=1.5", "integer"]),
        ("seed=true", ["seed=true", "integer"]),
        ("seed=null", ["seed=null", "integer"]),
        ("zero_terminal_snr=5", ["zero_terminal_snr=5", "true or false"]),
        ("model.channel_mult=2", ["model.channel_mult=2", "list"]),
        ("optimizer.lr=fast", ["optimizer.lr=fast", "number"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]"]),
        ("recipe.lr=-1", ["recipe.lr=-1"]),
        ("recipe.max_steps=1.5", ["recipe.max_steps=1.5", "integer"]),
        ("trainer.max_steps=all", ["trainer.max_steps=all", "integer"]),
        ("lr=1", ["type optimizer.lr=1"]),
        ("max_steps=1", ["type trainer.max_steps=1"]),
        ("trainer.max_step=1", ["trainer.max_steps?"]),
        ("++optimiser.lr=1", []),
    ],
)
def test_wrong_value_is_refused(override, fragments):
    """The commands of test_hydra_commands.py cover other overrides."""
    if not fragments:  # Hydra accepts it
        with pytest.warns(UserWarning, match=r"did you mean optimizer\.lr\?"):
            check_overrides("train", [override])
        return
    with pytest.raises(UsageError) as error:
        check_overrides("train", [override])
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_setting_without_effect_warns():
    for fragment, *overrides in (
        (r"recipe\.lr=1 .* optimizer\.lr", "recipe.lr=1", "optimizer=sgd"),
        (r"model\.num_heads=2 .* model\.num_head_channels=null", "model.num_heads=2"),
        (r"trainer\.max_steps=7 .*fast_dev_run=true", "debug=fast_dev_run", "trainer.max_steps=7"),
        (r"model\.text=joint", "model=dit_tiny", "model.text=joint"),
    ):
        with pytest.warns(UserWarning, match=fragment):
            check_overrides("train", overrides)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ckpt_path=R/checkpoints/last.ckpt"], ["resume=R"]),
        (["R/checkpoints/last.ckpt"], ["resume=R"]),
        (["conf/experiment/digits.yaml"], ["experiment=digits"]),
        (["optimizer.betas=[0.9,", "0.99]", "seed=1"], ["optimizer.betas=[0.9,0.99]"]),
        (["optimizer.betas=(0.9,0.99)"], ["optimizer.betas=[0.9,0.99]"]),
        (["optimizer.lr=1e-3,"], ["optimizer.lr=1e-3"]),
        (["schedule", "=", "linear"], ["schedule=linear"]),
        (["schedule=", "linear"], ["schedule=linear"]),
        (["schedule", "=linear"], ["schedule=linear"]),
        (["schedul=linear"], ["schedule=linear"]),
        (["trainer.gpus=1"], ["trainer.devices=1"]),
        (["adam_weight_decay=0.1"], ["optimizer.weight_decay=0.1"]),
        (["trainer.max_steps=1e3"], ["trainer.max_steps=1000"]),
        (["trainer.precision=fp16"], ["trainer.precision=16-mixed"]),
        (["diffusion.prediction=v_prediction"], ["diffusion.prediction=v"]),
        (["debug=default"], ["debug=fast_dev_run"]),
        (["debug"], ["debug=fast_dev_run"]),
        (["optimizer.betas=[0.9,0.99,]"], ["optimizer.betas=[0.9,0.99]"]),
        (["callbacks.ema=false"], ["callbacks.ema=null"]),
        (["ema=0.99"], ["callbacks.ema.decay=0.99"]),
        (["~logger=wandb"], ["~logger"]),
        (["seed = 1"], ["seed=1"]),
        (["seed:1"], ["seed=1"]),
        (["~optimizer.lr=5"], ["~optimizer.lr"]),
        (["adam_beta1=0.95"], ["optimizer.betas=[0.95,0.999]"]),
        (["mixed_precision=fp16"], ["trainer.precision=16-mixed"]),
        (["resume_from_checkpoint=latest"], ["resume=auto"]),
        (["noise_schedule=squaredcos_cap_v2"], ["schedule=cosine"]),
        (["timesteps=400"], ["schedule.num_steps=400"]),
        (["--logger.csv.prefix", "a b"], ["logger.csv.prefix=a b"]),
        (["vae=FOLDER"], ["autoencoder.path=FOLDER"]),
        (["seed=0..2"], ["-m", "seed=range(0,3)"]),
        (["-cfg", "job"], ["--cfg"]),
        (["--learning_rate", "1e-3"], ["optimizer.lr=1e-3"]),
    ],
    ids=" ".join,
)
def test_hint_can_be_typed(words, wanted):
    """The words after `type`, as a shell splits them, pass every check."""
    with pytest.raises(UsageError) as error:
        check_overrides("train", split_arguments(words)[0])
    message = str(error.value)
    assert "{" not in message
    hint = shlex.split(re.split(r"\b[Tt]ype ", message)[-1].split(". The ")[0])
    assert hint == wanted
    overrides, flags = split_arguments(hint if "--cfg" not in hint else [*hint, "job"])
    check_overrides("train", overrides, multirun="-m" in flags)


def test_names_of_other_libraries_get_existing_settings():
    groups = config_groups([CONF])
    known = [f"{group}={option}" for group in groups for option in groups[group]]
    for command, keys in (
        ("train", [*OTHER_KEYS, *" ".join(OTHER_FORMS["trainer.max_steps"]).split()]),
        ("sample", [*OTHER_KEYS, *" ".join(OTHER_FORMS["gif"]).split()]),
        ("schedules", OTHER_KEYS),
    ):
        names = setting_names(compose(command))
        for key in keys:
            hint = key_hint(key, "1e3", names, groups)
            words = shlex.split(hint.partition("; type ")[2])
            has = [*names]
            for group, _, option in (word.partition("=") for word in words):
                has += setting_names(load_option(group, option), f"{group}.") if f"{group}={option}" in known else []
            for word in words:
                name, _, value = word.partition("=")
                ours = name in has or name[0] == "+" or re.match(r"hydra\.|logger\.wandb\.", name)
                assert word in known or (ours and (name not in groups or value == "1e3")), (key, hint)


def test_other_forms_and_values_pass_every_check():
    for command, own in (("train", "trainer.max_steps"), ("sample", "gif")):
        jobs: list[dict[str, str]] = []
        texts = list(OTHER_FORMS[own].values())
        texts += [text for text in FOREIGN_OPTIONS.values() if command == "train"]
        for text in texts:  # several in one check, unless they share a node
            nodes = {word.lstrip("+").split("=")[0].split(".")[0]: "" for word in text.split()}
            job = next((job for job in jobs if not job.keys() & nodes.keys()), None)
            if job is None:
                jobs.append(job := {})
            job |= nodes | {next(iter(nodes)): text.format(value=1)}
        for job in jobs:
            check_overrides(command, " ".join(filter(None, job.values())).split())
    for setting, value in FOREIGN_VALUES.items():
        name = {"device": "device", "precision": "trainer.precision", "prediction": "diffusion.prediction"}
        key = setting.partition("=")[0]
        check_value(name.get(key, key), value)


def test_refusal_repeats_the_typed_override():
    for command, *overrides, refused in (
        *(("train", "task=autoencoder", word) for word in ("sampler=ddim", "loss=vlb", "loss.type=l1", "data=points")),
        ("train", "model=autoencoder"),
        ("train", "autoencoder.scale=2"),
        ("evaluate", "analytic=mixture", "run=FOLDER"),
        ("evaluate", "analytic_samples=20"),
        ("evaluate", "ema=[0.05,0.5]"),
        *(("evaluate", word) for word in ("ema=[true,0.1]", "ema=[0.05,yes]", "run=true")),
        ("train", "data=digits", "model=mlp"),
        ("export", "sampler=ddim"),
    ):
        with pytest.raises(UsageError) as error:
            check_overrides(command, [*overrides, refused])
        assert refused in str(error.value) and "..." not in str(error.value)


def test_none_means_no_autoencoder_and_no_initial_weights():
    for command, nodes in (("train", ("autoencoder", "init_from")), ("sample", ("autoencoder", "init_from"))):
        none, null = (
            check_overrides(command, expand_init_from([f"{name}={value}" for name in nodes], command))
            for value in ("none", "null")
        )
        assert none == null
    assert expand_init_from(["autoencoder=none,a,false"], "sample") == ["autoencoder=null,a,null"]
    assert expand_init_from(["autoencoder=none,a"]) == ["autoencoder.path=null,a"]
    check_overrides("export", ["format=safetensors,diffusers", "sampler=ddim"], multirun=True)
    for command, word in (("ema", "length=true"), ("train", "data.image_size=true")):
        with pytest.raises(UsageError, match=rf"{word} must be a"):
            check_overrides(command, [word])
    with pytest.raises(UsageError, match="autoencoder=true"):
        check_overrides("train", expand_init_from(["autoencoder=true"]))


def test_sweep_of_numbers_is_not_offered_as_text():
    for command, word in (
        ("sample", "seed=0,1"),
        ("sample", "guidance.scale=1,2"),
        ("export", "format=onnx,diffusers"),
    ):
        with pytest.raises(UsageError, match=word.partition("=")[0]) as error:
            check_overrides(command, [word])
        assert format_override(*word.split("=")) not in str(error.value)


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("loss.kl_weight=1", "task=autoencoder"),
        ("sampler.foo=3", "has no argument 'foo'"),
        ("test=true", "src.evaluate run="),
        ("train=false", "src.evaluate run="),
        ("wandb=true", "logger=wandb"),
        ("use_ema=true", "callbacks.ema"),
        ("dataset_name=user/birds", "data.name=user/birds"),
        ("epochs=3", "trainer.max_steps"),
        ("max_epochs=3", "trainer.max_steps"),
        ("trainer.max_epochs=3", "trainer.max_steps"),
        ("trainer.min_steps=a", "trainer.max_steps"),
        ("trainer.overfit_batches=a", "trainer.overfit_batches"),
        ("+model/depth=3", "+model.depth=3"),
        ("++callbacks/ema=x", "++callbacks.ema=x"),
        ("model=unet", "mlp, unet_adm"),
    ],
)
def test_far_guess_is_not_offered(word, fragment):
    with pytest.raises(UsageError) as error:
        check_overrides("train", [word])
    assert fragment in str(error.value) and "did you mean" not in str(error.value)


def test_config_folder_above_conf_is_refused(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"type --config-dir {tmp_path / 'conf'}$"):
        extra_folders([], str(tmp_path))
    assert extra_folders([], str(tmp_path / "conf")) == [f"file://{tmp_path / 'conf'}"]
    (tmp_path / "model").mkdir()
    assert extra_folders([], str(tmp_path)) == [f"file://{tmp_path}"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["recipe.lr=1e-3", "recipe.max_steps=7", "recipe.ema_decay=0.9", "recipe.validate_every=5"],
        ["schedule=linear", "schedule.num_steps=100", "trainer.devices=4"],
        ["+trainer.overfit_batches=3"],
        ["++trainer.limit_val_batches=3", "logger=[csv,wandb]"],
        ["data=folder", "data.root=some/where"],
        ["data=folder", "data.root=photos", "data.source.class_depth=all"],
        ["data=folder", "data.root=photos", "data.source.class_depth=2", "data.skip_unreadable=0.5"],
        ["hydra.run.dir=x", "hydra/job_logging=none"],
        ["~callbacks.checkpoint_every"],
        ["logger=none"],
        ["optimizer.lr=1", "diffusion.clip_x0=null", "model.num_head_channels=null", "trainer.devices=[0,1]"],
        ["model.model_channels=${data.batch_size}", "trainer.max_time='00:01:00:00'"],
    ],
)
def test_valid_overrides_pass(overrides):
    check_overrides("train", overrides)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["optimizer._target_=torch.optim.Foo"], ["optimizer._target_=torch.optim.Foo", "'Foo'", "PYTHONPATH="]),
        (["optimizer._target_=nowhere.Foo"], ["optimizer._target_=nowhere.Foo", "'nowhere'", "PYTHONPATH="]),
        (["optimizer._target_=torch.optim.RMSprop"], ["~optimizer.betas ~optimizer.fused"]),
        (["+optimizer.parms=1"], ["'optimizer.parms'", "it takes lr, betas"]),
        (["+trainer.foo=1"], ["'trainer.foo'", "it takes accelerator, devices, strategy"]),
        (["+optimizer.params=1"], ["'optimizer.params'", "it takes lr, betas"]),
        (
            [
                "lr_scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
                "+lr_scheduler.T_max=5",
                "~lr_scheduler.decay",
                "~lr_scheduler.warmup_steps",
            ],
            ["'lr_scheduler.T_max'", "it takes eta_min"],
        ),
        (["trainer.precision=bf17"], ["trainer.precision=bf17", "bf16-mixed"]),
        (["callbacks.time_budget.minutes=10m"], ["callbacks.time_budget.minutes=10m", "such as 10"]),
        (["schedule=custom", "schedule.betas=[0.1,x]"], ["schedule.betas=[0.1, 'x']"]),
    ],
)
def test_wrong_argument_is_refused_on_one_line(overrides, fragments, caplog):
    with pytest.raises(ValueError) as error:
        check_arguments(compose("train", *overrides, "run_dir=x"))
    message = str(error.value)
    assert "\n" not in message and not caplog.records
    assert all(message.count(fragment) == 1 for fragment in fragments), message


def test_invalid_betas_are_refused():
    for betas in ([0.1, 0.2], [0.1] * 10 + [2], [0.1] * 10 + [0]):
        with pytest.raises(ValueError, match=r"schedule\.betas"):
            custom(betas)


def test_refused_resume_names_what_was_typed(tmp_path):
    run, own = started(tmp_path / "run", "model.model_channels=8"), tmp_path / "own"

    def message(*typed):
        typed = [f"resume='{run}'", *typed]
        expanded = expand_resume(typed)
        with pytest.raises(UsageError) as error:
            check_overrides("train", expanded)
        return str(explain_resume(error.value, "train", typed, expanded, []))

    assert message("model=mlp").startswith("model=mlp ")
    assert message("seed=1.5").startswith("seed=1.5 ")
    (run / ".hydra" / "overrides.yaml").write_text("[experiment=mine]")
    assert "unknown experiment" in message()
    sources = [{"path": str(own), "schema": "file"}, {"path": "hydra.conf", "schema": "pkg"}]
    (run / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"config_sources": sources}}}))
    assert f"--config-dir {own}" in message()


def test_every_value_of_a_sweep_is_checked():
    check_overrides("train", ["schedule=linear,cosine", "seed=range(0,3)"], multirun=True)
    with pytest.raises(UsageError, match="cosin"):
        check_overrides("train", ["schedule=linear,cosin"], multirun=True)


def test_split_arguments_separates_flags_and_overrides():
    words = ["-m", "schedule=linear", "--cfg", "job", "--package", "model", "seed=1"]
    assert split_arguments(words) == (["schedule=linear", "seed=1"], ["-m", "--cfg", "job", "--package", "model"])


def test_resume_expands_to_the_saved_overrides(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- schedule=linear\n- resume=old\n- seed=3\n")
    expanded = expand_resume([f"resume={tmp_path}", "trainer.max_steps=9"])
    assert expanded == [
        "schedule=linear",
        "seed=3",
        f"resume={tmp_path}",
        "trainer.max_steps=9",
        f"hydra.run.dir='{tmp_path}'",
    ]
    # The last override wins, so typed ones follow the saved ones.
    again = expand_resume([f"resume={tmp_path}", "schedule=linear"])
    assert again == ["seed=3", f"resume={tmp_path}", "schedule=linear", f"hydra.run.dir='{tmp_path}'"]
    with pytest.raises(UsageError, match="no run to resume"):
        expand_resume([f"resume={tmp_path / 'nowhere'}"])


def test_resume_repeats_patterns_but_no_cache_folder(tmp_path):
    """A run from others must not name a folder to write to; a typed one is used."""
    (tmp_path / ".hydra").mkdir()
    pattern = r"data.source.class_pattern='(cat|dog)_\\d'"
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([pattern, "data.cache_dir=/elsewhere"]))
    resume, folder = f"resume={tmp_path}", f"hydra.run.dir='{tmp_path}'"
    assert expand_resume([resume]) == [pattern, resume, folder]
    assert expand_resume([resume, "data.cache_dir=/mine"]) == [pattern, resume, "data.cache_dir=/mine", folder]
    assert expand_resume([resume, "trust=true"])[:2] == [pattern, "data.cache_dir=/elsewhere"]


def test_existing_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    check_unused([f"hydra.run.dir='{tmp_path}'"])  # it holds no checkpoint
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UsageError, match="already holds a run"):
        check_unused(["seed=1", f"hydra.run.dir='{tmp_path}'"])
    check_unused([f"resume={tmp_path}", f"hydra.run.dir='{tmp_path}'"])
    check_unused([f"hydra.run.dir={tmp_path / 'new'}"])


def started(folder, *overrides, saved=True, ended=False):
    """Create the files of a run that resuming reads."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(list(overrides)))
    (folder / "checkpoints").mkdir()
    if saved:
        (folder / "checkpoints" / "last.ckpt").touch()
    if ended:
        (folder / "metrics.json").touch()
    return folder


def test_resume_auto_finds_sweep_with_same_overrides(tmp_path, monkeypatch):
    """Hydra stores the launcher separately; sweeps that ended while they started are skipped."""
    monkeypatch.chdir(tmp_path)
    typed_overrides = ["seed=0,1", "hydra/launcher=local", "resume=auto"]
    for name, task, hydra in (("1", ["seed=0,1"], ["hydra/launcher=local"]), ("2", ["seed=0,1"], [])):
        folder = tmp_path / "outputs" / "sweeps" / name
        folder.mkdir(parents=True)
        overrides = {"task": [*task, "resume=auto"], "hydra": [*hydra, "hydra.mode=MULTIRUN"]}
        (folder / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": overrides}}))
    for name, text in (("3", ""), ("4", "hydra: ["), ("5", "hydra: {}")):
        (tmp_path / "outputs" / "sweeps" / name).mkdir()
        (tmp_path / "outputs" / "sweeps" / name / "multirun.yaml").write_text(text)
    assert expand_sweep(typed_overrides)[-1].endswith("outputs/sweeps/1'")
    assert expand_sweep(["seed=0,1", "resume=auto"])[-1].endswith("outputs/sweeps/2'")
    assert expand_sweep(["seed=0,2", "resume=auto"]) == ["seed=0,2", "resume=auto"]
    with pytest.raises(UsageError, match="resume="):  # the settings of one run for all would be wrong
        expand_sweep(["seed=0", "resume=outputs/train/a,outputs/train/b"])


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("hydra.run.dir", "hydra.sweep.dir"):
        with pytest.raises(UsageError, match="Not a directory"):
            check_writable(["seed=1", f"{name}='{tmp_path / 'file' / 'run'}'"])
    check_writable([f"hydra.run.dir={tmp_path / 'a' / 'b'}"])
    assert (tmp_path / "a" / "b").is_dir()


def test_slurm_batch_script_counts_as_one_process(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert (slurm_tasks(), rank()) == (1, 0)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (slurm_tasks(), rank()) == (8, 3)


def test_resume_auto_finds_newest_unfinished_run(tmp_path, monkeypatch):
    """The override names the folder, so that other processes do not search."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs" / "train"
    typed_overrides = ["seed=1", "data=points"]
    started(runs / "2026-01-01", *typed_overrides)
    wanted = started(runs / "2026-01-02", "data=points", "seed=1", "resume='/elsewhere'")
    started(runs / "2026-01-03", *typed_overrides, saved=False)
    started(runs / "2026-01-04", *typed_overrides, ended=True)
    started(runs / "2026-01-05", "seed=2", "data=points")
    expanded = expand_resume([*typed_overrides, "resume=auto"])
    assert {f"resume='{wanted}'", f"hydra.run.dir='{wanted}'", *typed_overrides} == set(expanded)
    assert expand_resume(["seed=3", "resume=auto"]) == ["seed=3"]


def test_resume_auto_uses_the_typed_folder(tmp_path):
    """It starts a new run if the folder holds no checkpoint."""
    new, old = tmp_path / "new", started(tmp_path / "it's old", "seed=1")
    assert expand_resume(["resume=auto", f"hydra.run.dir={new}"]) == [f"hydra.run.dir={new}"]
    expanded = expand_resume(["resume=auto", "trainer.max_steps=9", f"hydra.run.dir={old}"])
    assert expanded == ["seed=1", "trainer.max_steps=9", f'resume="{old}"', f'hydra.run.dir="{old}"']


def test_refused_commands_leave_no_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "src.schedules", "names=[]"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent)}, capture_output=True, text=True,
        timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 2 and "names=[]" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_runs_of_one_second_get_different_folders(tmp_path, monkeypatch):
    folders = []
    for _ in range(5):
        monkeypatch.setattr(os, "environ", dict(os.environ))  # another process
        folders.append(fresh_folder(str(tmp_path / "train")))
        assert fresh_folder(str(tmp_path / "train")) == folders[-1]
        monkeypatch.undo()
    assert len({Path(f) for f in folders if Path(f).is_dir()}) == 5


def test_config_groups_omit_base_files():
    groups = config_groups()
    assert {"schedule", "model", "data", "sampler", "trainer", "logger"} <= groups.keys()
    assert "_points" not in groups["data"]


def test_commands_import_nothing_heavy_at_start():
    heavy = "torch", "lightning", "torchvision", "matplotlib", "sklearn", "wandb"
    commands = ", ".join(f"src.{name}" for name in src.COMMANDS)
    code = f"import sys, {commands}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_spin_count_is_set_unless_user_sets_it(own, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", "shedule=cosine"])
    with pytest.raises(SystemExit):
        launch("train", lambda _: None)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_help_shows_settings_of_typed_choices(tmp_path, monkeypatch, capsys):
    """The options of an experiment count too, of the user's folders as well, and a list shows each option."""
    (tmp_path / "experiment").mkdir()
    mine = "# @package _global_\ndefaults:\n  - override /model: mlp\n\nseed: 7 # mine\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(mine)
    cases = {
        ("model=mlp", "data=points"): ("model=mlp", "data=points"),
        ("data=folder", "logger=[csv,wandb]"): ("data=folder", "logger=csv", "logger=wandb", "model=unet_tiny"),
        ("experiment=moons",): ("model=mlp", "data=points", "experiment=moons"),
        ("--config-dir", str(tmp_path), "experiment=mine"): ("model=mlp", "data=digits", "experiment=mine"),
        ("schedule=null", "optimizer.lr=fast"): ("model=unet_tiny", "data=digits"),
    }
    for words, shown in cases.items():
        monkeypatch.setattr(sys, "argv", ["train", *words, "--help"])
        launch("train", lambda _: None)
        text = capsys.readouterr().out
        headings = {line for line in text.splitlines() if line.startswith("Settings of ")}
        assert {f"Settings of {each}:" for each in shown} <= headings
        assert sum(line.startswith(("Settings of model=", "Settings of data=")) for line in headings) == 2
    assert "seed: 7" not in text
