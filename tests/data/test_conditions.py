"""Conditions: encoding, dropping in training, guidance, and runs conditioned on classes or text."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from src.errors import UsageError
from src.models.conditioning import ClassEmbedding, ContinuousEmbedding
from src.models.unet import UNet
from src.rng import StepRng
from src.training.checkpoints import read_checkpoint
from tests.conftest import compose, train_tiny
from tests.models.test_models import TINY, copy_weights, diffusers_twin, normal, randomize


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global LABELED
    global BatchDataset, Covariates, InMemory, Labels, BatchIndices, Classes, Continuous
    from src.data.batches import BatchDataset
    from src.data.conditions import Classes, Continuous
    from src.data.samplers import BatchIndices
    from src.data.sources import Covariates, InMemory, Labels

    LABELED = InMemory(torch.zeros(4, 1, 2, 2), Labels(torch.tensor([2, 0, 1, 2]), ["cat", "dog", "7"]))


def test_classes_are_encoded_by_name_or_index():
    classes = Classes(**Classes.infer_settings(LABELED, {}))
    assert classes([0, "dog", 2, "7", 7, None]).tolist() == [0, 1, 2, 2, 2, 3]
    assert [classes.title(x) for x in (0, "7", None)] == ["cat", "7", "no class"]
    assert [classes.of_sample(LABELED, k, 5) for k in range(4)] == ["7", "cat", "dog", "7"]
    assert Classes(["1", "2", "10"])([1, "2", 10, 0]).tolist() == [0, 1, 2, 0]  # names before indices


def test_classes_of_other_data_are_matched_by_name():
    classes = Classes(["7", "cat", "dog", "bird"])
    classes.check(LABELED)
    assert classes([classes.of_sample(LABELED, k, 0) for k in range(4)]).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"the class 'dog', unknown to the run: .*cat, 7"):
        Classes(["cat", "7"]).check(LABELED)
    with pytest.raises(ValueError, match="conditioning=class"):
        classes.check(InMemory(torch.zeros(3, 2)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("catt", "did you mean cat"),
        (3, r"cat, dog, 7 \(or a number below 3\)"),
        (-1, "below 3"),
        (True, "unknown class"),
    ],
)
def test_unknown_classes_raise_with_a_hint(value, message):
    with pytest.raises(ValueError, match=message):
        Classes(["cat", "dog", "7"])([value])


def test_covariates_are_standardized_and_none_is_nan():
    values = torch.tensor([[10.0, 1.0], [20.0, 1.5], [60.0, 0.5]])
    source = InMemory(torch.zeros(3, 2), covariates=Covariates(values, ["kelvin", "bar"]))
    made = Continuous(**Continuous.infer_settings(source, {}))
    rows = made([made.of_sample(source, k, 0) for k in range(3)])
    assert_close(rows.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    assert_close(rows.square().mean(0), torch.ones(2))
    assert made([None]).isnan().all()
    assert made.title([20.0, 0.5]) == made.title("20, .5") == "kelvin 20, bar 0.5"
    assert_close(made(["20, 0.5"]), made([[20, 0.5]]))
    for wrong in ([20.0], "20", "20,much", [20, math.inf]):
        with pytest.raises(ValueError, match="not a value of kelvin, bar; give 2"):
            made([wrong])
    made.check(source)
    with pytest.raises(ValueError, match=r"condition_columns=\[\] must be \[kelvin,bar\]"):
        made.check(InMemory(torch.zeros(3, 2)))
    seconds = torch.tensor([[1.7e9], [1.7e9 + 1], [1.7e9 + 2]], dtype=torch.float64)  # float32 cannot resolve seconds
    source = InMemory(torch.zeros(3, 2), covariates=Covariates(seconds, ["time"]))
    made = Continuous(**Continuous.infer_settings(source, {}))
    assert_close(
        made([made.of_sample(source, k, 0) for k in range(3)]).flatten(), torch.tensor([-1.0, 0, 1]) * 1.5**0.5
    )
    with pytest.raises(ValueError, match="constant column bar"):
        Continuous.infer_settings(InMemory(torch.zeros(3, 2), covariates=Covariates(torch.ones(3, 1), ["bar"])), {})


@torch.no_grad()
def test_class_embedding_matches_diffusers():
    """UNet2DModel with num_class_embeds adds the class embedding to the time embedding."""
    ours = randomize(UNet(**TINY, condition=partial(ClassEmbedding, num_classes=3))).eval()
    theirs = diffusers_twin({**TINY, "classes": 4})
    copy_weights(ours, theirs)
    x, time, cond = normal(4, 1, 8, 8), torch.tensor([0.1, 0.3, 0.5, 0.9]), torch.tensor([0, 1, 2, 3])
    out = ours(x, time, cond)
    assert_close(out, theirs(x, 1000 * time, class_labels=cond).sample, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[:1], ours(x[:1], time[:1], cond[1:2]))


def test_no_covariates_have_their_own_embedding():
    net = ContinuousEmbedding(8, 2)
    cond = torch.tensor([[0.0, 1.0], [math.nan, math.nan]], requires_grad=False)
    vectors = net(cond).vector
    assert_close(vectors[1], net.nothing)
    vectors.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_captions_are_chosen_by_step_and_position():
    """Independent of process and batch, and uniformly."""

    class Texts:
        examples = ()

        def __call__(self, values):
            return torch.tensor(values)

        def of_sample(self, source, index, choice):
            return choice % 3

    dataset = BatchDataset(LABELED, Texts(), seed=1)
    whole = dataset[BatchIndices(0, 4, [0, 1, 2, 3], step=7)]["cond"].tolist()
    parts = [dataset[BatchIndices(k, 4, [k], step=7)]["cond"].item() for k in range(4)]
    assert whole == parts
    drawn = torch.stack([dataset[BatchIndices(0, 4, [0, 1, 2, 3], step=s)]["cond"] for s in range(300)])
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert_close(shares, torch.full((3,), 1 / 3), atol=0.05, rtol=0)


class Recorder(torch.nn.Module):
    """A network that records its conditions."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.conds = []

    def forward(self, x, time, cond):
        self.conds.append(cond.clone())
        return x * self.weight


def module_of(net, cond_drop_prob):
    from src.diffusion import losses, samplers, schedules
    from src.diffusion.gaussian_diffusion import GaussianDiffusion
    from src.diffusion.noise import NoiseSchedule
    from src.diffusion.timestep_samplers import uniform
    from src.training.module import ConditionSpec, DiffusionModule, Sampler

    return DiffusionModule(
        net,
        NoiseSchedule(schedules.cosine(100)),
        GaussianDiffusion("x0"),
        partial(losses.simple, weighting=losses.uniform_weighting),
        uniform,
        Sampler(samplers.ddim, 2, "trailing"),
        shape=(2,),
        conditioning=ConditionSpec(torch.tensor([5]), torch.arange(5), cond_drop_prob),
    )


def test_guidance_keeps_the_batch_size_of_compiled_networks():
    from src.diffusion.guidance import Guidance

    module, sizes = module_of(Recorder(), cond_drop_prob=0.1), []
    guided = module.sampler._replace(guidance=Guidance(2.0))
    *_, plain = module.sample(range(3), 0, guided, cond=torch.arange(3))

    def recorded(x, *others):
        sizes.append(len(x))
        return module.net(x, *others)

    module.compiled_sampling = recorded
    *_, compiled = module.sample(range(3), 0, guided, cond=torch.arange(3))
    assert torch.equal(plain, compiled)
    assert sizes == [3] * 4  # two steps, each with and without condition


def test_conditions_are_dropped_per_sample_in_training(monkeypatch):
    """Within 4 standard deviations of a binomial with p = 0.1, keyed by step and position; never in validation."""
    net = Recorder()
    module = module_of(net, 0.1)

    def batch(start, size):
        return {"x": torch.zeros(size, 2), "start": start, "total": 100, "cond": torch.arange(start, start + size) % 5}

    for step in range(100):
        monkeypatch.setattr(type(module), "global_step", step)
        module.training_step(batch(0, 100), 0)
    conds = torch.stack(net.conds)
    dropped = conds == 5
    assert abs(dropped.sum().item() - 1000) < 4 * math.sqrt(10_000 * 0.1 * 0.9)
    per_batch = dropped.sum(1)
    assert 0 < per_batch.min() < per_batch.max() < 100  # per sample, not per batch
    # The variance of independent draws.
    assert per_batch.double().var().item() == pytest.approx(9, rel=0.6)
    assert torch.equal(conds[~dropped], (torch.arange(100) % 5).expand(100, 100)[~dropped])

    net.conds.clear()
    for start in range(0, 100, 25):  # four processes
        monkeypatch.setattr(type(module), "global_step", 3)
        module.training_step(batch(start, 25), 0)
    assert torch.equal(torch.cat(net.conds), conds[3])

    net.conds.clear()
    module.log = lambda *args, **kwargs: None
    module.validation_step(batch(0, 100), 0)
    assert torch.equal(net.conds[0], torch.arange(100) % 5)
    assert StepRng(0, 3, 0, 4, torch.device("cpu")).uniform("drop").shape == (4,)


LARGE_STEPS = "optimizer.lr=0.05", "lr_scheduler=constant", "lr_scheduler.warmup_steps=0", "callbacks.ema.decay=0"
"""Settings with which six steps on the digits make samples that differ by class."""
NO_PICTURES = "callbacks.samples=null", "neighbors.num_samples=0"


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """Train six large steps on the digits with classes."""
    folder = tmp_path_factory.mktemp("conditions") / "run"
    train_tiny(folder, "conditioning=class", "guidance.scale=2", *LARGE_STEPS)
    return folder


def test_a_conditional_run_resumes_bit_for_bit(conditional, tmp_path):
    """Also with resume=auto."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    settings = "conditioning=class", "guidance.scale=2", *LARGE_STEPS
    train_tiny(halves, *settings, *NO_PICTURES, "trainer.max_steps=3")
    train_tiny(halves, *settings, *NO_PICTURES, f"resume='{halves}'")
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (conditional, halves)]
    assert [end["global_step"] for end in ends] == [6, 6]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    shutil.copytree(conditional, whole)
    metrics = train_tiny(whole, *settings, "resume=auto")
    assert metrics == pytest.approx(json.loads((whole / "metrics.json").read_text()))  # it was finished
    with pytest.raises(UsageError, match="holds another network"):
        train_tiny(halves, f"resume='{halves}'", "lr_scheduler=constant")


def draw(folder, tmp_path, *overrides):
    from src.sample import sample

    return sample(compose("sample", f"run='{folder}'", f"run_dir='{tmp_path}'", "device=cpu", "n=6", *overrides))


def test_a_run_stores_class_names_for_sampling(conditional, tmp_path):
    import numpy as np

    settings = read_checkpoint(conditional / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert settings["conditioning"]["encode"]["names"] == [str(k) for k in range(10)]
    assert settings["conditioning"]["embed"]["num_classes"] == 10
    weights = read_checkpoint(conditional / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights["net.condition.table.weight"].shape[0] == 11
    folder = draw(conditional, tmp_path, "cond=[0,'7',3]")
    assert (folder / "conditions.txt").read_text().split() == ["0", "0", "7", "7", "3", "3"]
    samples = np.load(folder / "samples.npz")["arr_0"]
    again = np.load(draw(conditional, tmp_path / "b", "cond=[0,7,4]", "batch_size=2") / "samples.npz")["arr_0"]
    assert (samples[:4] == again[:4]).all()
    assert (samples[4:] != again[4:]).any()


def test_guidance_scales_zero_and_one_need_no_guidance(conditional, tmp_path):
    import numpy as np

    def at(name, *overrides):
        return np.load(draw(conditional, tmp_path / name, *overrides) / "samples.npz")["arr_0"]

    nothing, plain = at("nothing", "cond=[null]", "guidance.scale=1"), at("plain", "cond=[3]", "guidance.scale=1")
    assert (at("zero", "cond=[3]", "guidance.scale=0") == nothing).all()
    assert (plain != nothing).any()
    own = at("own", "cond=[3]")
    assert (own == at("two", "cond=[3]", "guidance.scale=2")).all()  # the run's own
    assert (at("file", f"cond='{write(tmp_path / 'conditions.txt', '3')}'") == own).all()
    # An interval without noise levels disables guidance.
    assert (at("far", "cond=[3]", "guidance.scale=9", "guidance.interval=[1e6,1e7]") == plain).all()
    # The model as its own guidance model changes nothing but rounding.
    self_guided = at("self", "cond=[3]", "guidance.scale=3", f"guidance.model='{conditional}'").astype(int)
    assert abs(self_guided - plain).max() <= 16  # one gray value
    with pytest.raises(UsageError, match=r"guidance\.model=.* guidance\.scale=2"):
        at("none", "cond=[3]", "guidance.scale=1", f"guidance.model='{conditional}'")
    assert (at("negative", "cond=[3]", "negative=5") != own).any()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cond=[fish]"], "unknown class 'fish'.*0, 1, 2, 3, 4 and 5 more"),
        (["cond=[11]"], "unknown class '11': did you mean 1"),
        (["cond=absent.txt"], "no file .*absent.txt: cond=FILE.txt has"),
        (["cond=[]"], r"cond=\[\] is empty"),
        (["guidance.scale=-2"], "guidance.scale=-2"),
        (["guidance.interval=[1]"], r"guidance\.interval=\[1\]"),
        (["guidance.scale=much"], "must be a number"),
        (["negative=5", "guidance.scale=1"], "negative=5 has no effect"),
        (["cond=[1,2,3]", "n=2"], "n=2 must be at least 3"),
    ],
)
def test_invalid_conditions_raise_in_sampling(conditional, tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        draw(conditional, tmp_path, *overrides)


def test_an_unconditional_run_refuses_conditions(trained, tmp_path):
    for override in ("cond=[3]", "negative=3"):
        with pytest.raises(UsageError, match="needs a conditional run"):
            draw(trained, tmp_path, override)
    with pytest.raises(UsageError, match=r"guidance\.scale=2"):
        draw(trained, tmp_path, "guidance.scale=2")


@pytest.mark.parametrize(
    ("trained_with", "difference"),
    [
        (["conditioning=class", "diffusion.prediction=x0"], "another diffusion.prediction"),
        (["conditioning=class", "zero_terminal_snr=true"], "another zero_terminal_snr"),
        (None, "another conditioning.encode"),
    ],
)
def test_an_incompatible_guidance_model_is_refused(conditional, trained, tmp_path, trained_with, difference):
    weak = tmp_path / "weak" if trained_with else trained
    if trained_with:
        train_tiny(weak, "trainer.max_steps=1", "validate_every=1", *trained_with, *NO_PICTURES)
    with pytest.raises(UsageError, match=f"{difference}.* than the run, so its outputs differ: choose an") as error:
        draw(conditional, tmp_path, "guidance.scale=2", f"guidance.model='{weak}'")
    assert "\n" not in str(error.value)


def test_an_exported_model_takes_conditions(conditional, tmp_path):
    import numpy as np

    from src.export import export

    export(compose("export", f"run='{conditional}'", f"run_dir='{tmp_path / 'export'}'"))
    (file,) = (tmp_path / "export").rglob("*.safetensors")
    from src.sample import sample

    of_file = sample(
        compose("sample", f"ckpt='{file}'", f"run_dir='{tmp_path / 'a'}'", "device=cpu", "n=4", "cond=[2]")
    )
    of_run = draw(conditional, tmp_path / "b", "cond=[2]", "n=4")
    assert (np.load(of_file / "samples.npz")["arr_0"] == np.load(of_run / "samples.npz")["arr_0"]).all()


def test_an_exported_text_model_keeps_tokenizer_and_examples(tmp_path):
    """Examples may look like paths: and/or."""
    import numpy as np

    from src.export import export
    from src.sample import sample

    small = [
        "data.source.num_samples=60",
        "data.val_fraction=0.2",
        "data.batch_size=4",
        "data=shapes",
        "weighting=uniform",
    ]
    text = [
        "conditioning=text",
        "conditioning.embed.hidden_size=8",
        "conditioning.embed.num_layers=1",
        "model.patch_size=4",
        *NO_PICTURES,
    ]
    examples = "conditioning.encode.examples=['a red circle and/or a blue square']"
    train_tiny(tmp_path / "run", *small, *text, examples, "trainer.max_steps=2", "validate_every=2")
    export(compose("export", f"run='{tmp_path / 'run'}'", f"run_dir='{tmp_path / 'export'}'"))
    (file,) = (tmp_path / "export").rglob("*.safetensors")
    drawn = []
    for name, where in (("a", f"ckpt='{file}'"), ("b", f"run='{tmp_path / 'run'}'")):
        arguments = ["n=2", "device=cpu", "sampler.steps=2", "guidance.scale=2"]
        folder = sample(compose("sample", where, f"run_dir='{tmp_path / name}'", *arguments))
        assert (folder / "conditions.txt").read_text() == 2 * "a red circle and/or a blue square\n"
        drawn.append(np.load(folder / "samples.npz")["arr_0"])
    assert (drawn[0] == drawn[1]).all()
