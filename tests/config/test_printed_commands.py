"""Every printed command can be pasted: a shell, Hydra and OmegaConf return the same value."""

import ast
import random
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from src.compare import with_runs
from src.comparison.survey import run_folders
from src.config.overrides import check_overrides
from src.config.resume import check_unused, expand_resume
from src.config.sweeps import CompareRuns
from src.config.words import last_value, parsed, split_arguments
from src.errors import UsageError, command, format_override, literal, shell_word, usage_errors
from src.export import export
from src.runs import out_of_memory
from src.runs.build import build, close_run
from src.runs.checkpoints import find_checkpoint
from src.sample import sample
from src.train import latent_command, train
from tests.conftest import TINY, compose

NASTY = "out, (a=b) 'q\" é~"
SRC = Path(__file__).parents[2] / "src"
PATHS = ("run", "resume", "ckpt", "runs", "data.root", "encoder", "guidance.model", "hydra.run.dir", "hydra.sweep.dir")
"""Settings of folders and files."""

NAMES = [
    *("plain", "outputs/train/2026-01-01_10-00-00", "2026", "007", "1_000", "1e3", "null", "true", "nan", "inf", "-x"),
    *("+x", "~x", "~", "a b", " a", "a ", "a,b", "(a)", "[a]", "{a:b}", "a=b", "=x", "a:b", "it's", 'q"q', "'\"'"),
    *("`ls`", "$HOME", "${HOME}", "$x${y}", r"\${z}", r"\\${z}", "a\\", "a\\'", 'a\\"', r"\\", "!x", "a!b", "#x", "%1"),
    *("&", "a;b", "a|b", "<", ">", "*", "?", "a\nb", "a\tb", "é~", "日本", "\x7f", "\x1b[0m", "${oc.env:HOME}"),
    *("range(1,2)", "choice(a,b)", "a\u200bb", "\u00a0", "\udcff", NASTY),
]


def words_of(line: str, shell: str = "bash") -> list[str]:
    """Return the arguments that a shell passes for a command line."""
    done = subprocess.run([shell, "-c", f"python() {{ printf '%s\\0' \"$@\"; }}\n{line}"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


def read(override: str) -> object:
    """Return the value that an override sets."""
    return OmegaConf.create({"value": parsed(override).value()})["value"]


def printed(text: str, name: str) -> list[str]:
    """Return the words of the command `src.<name>` at the end of a line of `text`, as a shell splits them."""
    line = next(line for line in text.splitlines() if f"python -m src.{name}" in line)
    words = words_of(line[line.index("python -m src.") :])
    assert words[:2] == ["-m", f"src.{name}"]
    return words[2:]


def test_quoted_names_survive_shell_and_hydra():
    names = [*NAMES]
    chance = random.Random(0)
    letters = "ab'\"\\ ,${}[]()=:~#!%&|;<>*?\n\té日`"
    names += ["".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(300)]
    line = command("sample", *(format_override("run", name) for name in names), format_override("runs", names))
    assert "\n" not in line
    words = words_of(line)[2:]
    alone = f"python {' '.join(map(shell_word, names))}"
    for shell in filter(shutil.which, ("bash", "zsh")):
        assert words_of(line, shell)[2:] == words and words_of(alone, shell) == names
    for name, word in zip(names, words, strict=False):
        assert read(word) == name and parsed(word).key_or_group == "run"
        assert not name.strip() or last_value([word], "run") == name
        if name.isprintable():  # a second reader of the shell's quotes
            assert shlex.split(format_override("run", name)) == [word]
    assert list(read(words[-1])) == names


def test_quoted_values_keep_their_type():
    for value in (None, True, False, 7, 1e-5, 1.5e300, ["a", 1, None], [["x, y", 2.5]], []):
        (word,) = words_of(f"python {format_override('cond', value)}")
        got = read(word)
        assert (list(map(list, got)) if value == [["x, y", 2.5]] else got) == value and literal(value) in word


def test_plain_paths_get_no_quotes():
    for path in ("outputs/train/2026-01-01_10-00-00", "a-b.c+d@e%f", "/x/007"):
        assert format_override("run", Path(path)) == f"run={path}"


def test_texts_in_refusals_stay_as_typed():
    override = format_override("data.columns", ["a, b", "c"])
    with pytest.raises(UsageError) as error, usage_errors():
        raise ValueError(f"{override} must differ; betas=[0.9, 2]")
    assert override in str(error.value) and "betas=[0.9,2]" in str(error.value)


def test_last_value_reads_every_override_form():
    for override in ("resume='it\\'s'", '++resume="it\'s"', '+resume="it\'s"', "resume= 'it\\'s'"):
        assert last_value(["seed=1", override], "resume") == "it's"
    assert last_value(["resume=a", "seed=1", "resume=b"], "resume") == "b"
    assert last_value(["resume=2026"], "resume") == "2026"
    for none in (["resume=null"], ["~resume"], ["resume=a", "resume=null"], ["trust=true"]):
        assert last_value(none, "resume") is None


def test_commands_are_printed_by_errors_alone():
    """`command` writes commands, and `format_override` writes folders after `=`."""
    behind = re.compile(rf"(?:^|[^\w.])(?:{'|'.join(map(re.escape, PATHS))})=\[?['\"]?$")
    wrong = []
    for path in SRC.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docs else None
            if "python -m src" in str(text) and path.name not in ("errors.py", "help.py", "src.py"):
                wrong.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.JoinedStr):
                for text, value in zip(node.values, node.values[1:], strict=False):
                    if isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue):
                        safe = re.search(r"quoted|literal", ast.unparse(value))  # for Hydra, not for a shell
                        if behind.search(str(text.value)) and not safe:
                            wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong, f"use src.errors.command and format_override: {wrong}"


# One run in a folder with such a name; the tests type the commands that it prints.


def train_into(folder: Path, *overrides: str) -> None:
    steps = ["trainer.max_steps=6", "validate_every=3", "checkpoint_every=100"]
    train(compose("train", *TINY, *steps, f"run_dir={literal(folder)}", *overrides))


@pytest.fixture(scope="module")
def run_and_text(tmp_path_factory):
    """Return a folder, and the output of a run in it that stops, resumes and is exported."""
    parent = tmp_path_factory.mktemp("printed") / "outputs" / "train"
    parent.mkdir(parents=True)
    folder = parent / NASTY
    said = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(parent)
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        fault = ["+callbacks.fault._target_=tests.faults.Stop", "+callbacks.fault.rank=0", "+callbacks.fault.step=3"]
        with pytest.raises(SystemExit) as stopped:
            train_into(Path(NASTY), *fault, f"+callbacks.fault.once={literal(parent / 'once')}")
        assert stopped.value.code == 143
        train_into(folder, "trust=true", f"resume={literal(folder)}")
        export(compose("export", f"run={literal(folder)}", f"run_dir={literal(folder)}"))
    return folder, "\n".join(said)


def test_stopped_run_prints_resume_command(run_and_text, monkeypatch):
    folder, text = run_and_text
    monkeypatch.chdir(folder.parent)
    (folder / ".hydra").mkdir(exist_ok=True)  # which only the command line writes
    (folder / ".hydra" / "overrides.yaml").write_text("[seed=0]\n")
    words = printed(text, "train")
    assert last_value(words, "resume") == NASTY  # as seen from the folder where it was typed
    expanded = expand_resume(words)
    check_overrides("train", expanded)
    assert last_value(expanded, "hydra.run.dir") == str(folder)
    assert Path(compose("train", *expanded[:-1]).resume).resolve() == folder


def test_finished_run_and_export_print_sample_commands(run_and_text, tmp_path, monkeypatch):
    folder, text = run_and_text
    monkeypatch.chdir(folder.parent)
    few = ["batch_size=2", "sampler.steps=2", "device=cpu", f"run_dir='{tmp_path}'"]
    exported = text[text.index("exported to") :]
    for words in (printed(text, "sample"), printed(exported, "sample")):
        overrides, flags = split_arguments(words)
        assert not flags and "n=64" in overrides
        check_overrides("sample", overrides)
        assert sample(compose("sample", *(o for o in overrides if o != "n=64"), "n=2", *few)) == tmp_path
    assert last_value(printed(exported, "sample"), "ckpt") == str(folder / "model.safetensors")


def test_out_of_memory_prints_resume_command(run_and_text):
    folder, _ = run_and_text
    cfg = compose("train", *TINY, "trust=true", f"resume={literal(folder)}", f"run_dir={literal(folder)}")
    run = build(cfg)
    try:
        words = printed(out_of_memory.training_oom_message(run), "train")
    finally:
        close_run(run)
    assert last_value(words, "resume") == str(folder)


def test_refusals_print_valid_overrides(run_and_text, monkeypatch):
    folder, _ = run_and_text
    parent = folder.parent
    last = folder / "checkpoints" / "last.ckpt"
    for call, name, value in (
        (lambda: find_checkpoint(f"{folder}x", None), "run", folder),
        (lambda: find_checkpoint(None, str(last.with_name("lost.ckpt"))), "ckpt", last),
        # Folders that hold runs.
        (lambda: find_checkpoint(str(parent), None), "run", folder),
        (lambda: find_checkpoint(str(parent.parent), None), "run", folder),
        (lambda: find_checkpoint(None, str(parent)), "ckpt", None),
        (lambda: expand_resume([f"resume={literal(parent)}"]), "resume", folder),
        (lambda: run_folders([str(parent.parent)]), "runs", [folder]),
        (lambda: check_unused([f"hydra.run.dir={literal(folder)}"]), "resume", folder),
        (lambda: check_overrides("sample", [f"run={NASTY}"]), "run", NASTY),
        (lambda: check_overrides("sample", ["run=a,b"]), "run", "a,b"),
        (lambda: check_overrides("train", [f"run_dir={literal(folder)}"]), "hydra.run.dir", folder),
    ):
        with pytest.raises((UsageError, OSError, ValueError)) as error:
            call()
        message = str(error.value)
        assert "\n" not in message
        right = [value] if value is not None else last.parent.glob("*.ckpt")
        assert any(format_override(name, each) in message for each in right), message


def test_compare_accepts_any_folder_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NASTY, "a=b", "~x", "+x"):
        Path(name).mkdir()
        assert read(with_runs([name])[-1]) == [name]


@pytest.mark.filterwarnings("ignore")
def test_failed_comparison_prints_its_command(tmp_path, monkeypatch, capfd):
    sweep = tmp_path / NASTY
    (sweep / "0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="comparing") as caught:
        CompareRuns(overrides=["devices=2"]).on_multirun_end(
            OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep)}}})
        )
    assert "no run in" in capfd.readouterr().err  # so the folder was found
    words = printed(str(next(w.message for w in caught if "comparing" in str(w.message))), "compare")
    assert read(words[0]) == [str(sweep)]


@pytest.mark.parametrize("size", [8, [16, 24]])
def test_command_of_an_autoencoder_has_the_inferred_size(size: int | list[int], tmp_path: Path) -> None:
    run = SimpleNamespace(directory=tmp_path / NASTY, config=OmegaConf.create({"data": {"image_size": size}}))
    folder, shown = printed(latent_command(run), "train")  # type: ignore[arg-type]
    assert (read(folder), read(shown)) == (str(run.directory), size)
