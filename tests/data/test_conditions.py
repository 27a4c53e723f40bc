"""Conditions: what is asked for, how it reaches the network, and how often it is dropped."""

import json
import math
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
from tests.models.test_models import TINY, copy_weights, diffusers_twin, normal, randomise


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global LABELLED
    global BatchDataset, Covariates, InMemory, Labels, BatchIndices, Classes, Continuous
    from src.data.batches import BatchDataset
    from src.data.conditions import Classes, Continuous
    from src.data.samplers import BatchIndices
    from src.data.sources import Covariates, InMemory, Labels

    LABELLED = InMemory(torch.zeros(4, 1, 2, 2), Labels(torch.tensor([2, 0, 1, 2]), ["cat", "dog", "7"]))


def test_classes_by_name_and_number_and_nothing_is_none_of_them():
    classes = Classes(**Classes.infer_settings(LABELLED, {}))
    assert classes([0, "dog", 2, "7", 7, None]).tolist() == [0, 1, 2, 2, 2, 3]
    assert [classes.title(x) for x in (0, "7", None)] == ["cat", "7", "no class"]
    assert [classes.of(LABELLED, k, 5) for k in range(4)] == ["7", "cat", "dog", "7"]
    assert Classes(["1", "2", "10"])([1, "2", 10, 0]).tolist() == [0, 1, 2, 0]  # names before numbers


def test_data_that_number_their_classes_otherwise_are_asked_by_name():
    classes = Classes(["7", "cat", "dog", "bird"])
    classes.check(LABELLED)
    assert classes([classes.of(LABELLED, k, 0) for k in range(4)]).tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"the class 'dog', which the run was not trained with: .*cat, 7"):
        Classes(["cat", "7"]).check(LABELLED)
    with pytest.raises(ValueError, match="these have none"):
        classes.check(InMemory(torch.zeros(3, 2)))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("catt", "did you mean cat"),
        (3, r"there are cat, dog, 7 \(or a number below 3\)"),
        (-1, "below 3"),
        (True, "unknown class"),
    ],
)
def test_unknown_classes_are_refused_with_the_near_ones(asked, told):
    with pytest.raises(ValueError, match=told):
        Classes(["cat", "dog", "7"])([asked])


def test_measurements_have_mean_0_and_deviation_1_and_nothing_is_no_number():
    values = torch.tensor([[10.0, 1.0], [20.0, 1.5], [60.0, 0.5]])
    source = InMemory(torch.zeros(3, 2), covariates=Covariates(values, ["kelvin", "bar"]))
    made = Continuous(**Continuous.infer_settings(source, {}))
    rows = made([made.of(source, k, 0) for k in range(3)])
    assert_close(rows.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    assert_close(rows.square().mean(0), torch.ones(2))
    assert made([None]).isnan().all()
    assert made.title([20.0, 0.5]) == made.title("20, .5") == "kelvin 20, bar 0.5"
    assert_close(made(["20, 0.5"]), made([[20, 0.5]]))
    for wrong in ([20.0], "20", "20,much", [20, math.inf]):
        with pytest.raises(ValueError, match="no value of kelvin, bar: give 2 numbers"):
            made([wrong])
    made.check(source)
    with pytest.raises(ValueError, match="goes by kelvin, bar, the data by nothing"):
        made.check(InMemory(torch.zeros(3, 2)))
    seconds = torch.tensor([[1.7e9], [1.7e9 + 1], [1.7e9 + 2]], dtype=torch.float64)  # float32 knows no single ones
    source = InMemory(torch.zeros(3, 2), covariates=Covariates(seconds, ["time"]))
    made = Continuous(**Continuous.infer_settings(source, {}))
    assert_close(made([made.of(source, k, 0) for k in range(3)]).flatten(), torch.tensor([-1.0, 0, 1]) * 1.5**0.5)
    with pytest.raises(ValueError, match="bar, which is the same everywhere"):
        Continuous.infer_settings(InMemory(torch.zeros(3, 2), covariates=Covariates(torch.ones(3, 1), ["bar"])), {})


@torch.no_grad()
def test_a_class_joins_the_time_as_in_diffusers():
    """UNet2DModel with num_class_embeds: the class's vector is added to the time's."""
    ours = randomise(UNet(**TINY, condition=partial(ClassEmbedding, num_classes=3))).eval()
    theirs = diffusers_twin({**TINY, "classes": 4})
    copy_weights(ours, theirs)
    x, time, cond = normal(4, 1, 8, 8), torch.tensor([0.1, 0.3, 0.5, 0.9]), torch.tensor([0, 1, 2, 3])
    out = ours(x, time, cond)
    assert_close(out, theirs(x, 1000 * time, class_labels=cond).sample, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[:1], ours(x[:1], time[:1], cond[1:2]))


def test_nothing_measured_is_told_from_every_value():
    net = ContinuousEmbedding(8, 2)
    cond = torch.tensor([[0.0, 1.0], [math.nan, math.nan]], requires_grad=False)
    vectors = net(cond).vector
    assert_close(vectors[1], net.nothing)
    vectors.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_of_several_captions_is_drawn_by_step_and_position():
    """Not by process or batch; and all of them come up."""

    class Texts:
        examples = ()

        def __call__(self, asked):
            return torch.tensor(asked)

        def of(self, source, index, choice):
            return choice % 3

    dataset = BatchDataset(LABELLED, Texts(), seed=1)
    whole = dataset[BatchIndices(0, 4, [0, 1, 2, 3], step=7)]["cond"].tolist()
    parts = [dataset[BatchIndices(k, 4, [k], step=7)]["cond"].item() for k in range(4)]
    assert whole == parts
    drawn = torch.stack([dataset[BatchIndices(0, 4, [0, 1, 2, 3], step=s)]["cond"] for s in range(300)])
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert_close(shares, torch.full((3,), 1 / 3), atol=0.05, rtol=0)


class Told(torch.nn.Module):
    """A network that keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.told = []

    def forward(self, x, time, cond):
        self.told.append(cond.clone())
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
        partial(losses.simple, weighting=losses.uniform),
        uniform,
        Sampler(samplers.ddim, 2, "trailing"),
        shape=(2,),
        conditioning=ConditionSpec(torch.tensor([5]), torch.arange(5), cond_drop_prob),
    )


def test_guidance_calls_a_compiled_network_with_no_other_size():
    from src.diffusion.guidance import Guidance

    module, sizes = module_of(Told(), cond_drop_prob=0.1), []
    guided = module.sampler._replace(guidance=Guidance(2.0))
    *_, plain = module.sample(range(3), 0, guided, cond=torch.arange(3))

    def recorded(x, *others):
        sizes.append(len(x))
        return module.net(x, *others)

    module.compiled_sampling = recorded
    *_, compiled = module.sample(range(3), 0, guided, cond=torch.arange(3))
    assert torch.equal(plain, compiled)
    assert sizes == [3] * 4  # two steps, each of what is asked for and of nothing


def test_conditions_are_dropped_sample_by_sample_in_training_alone(monkeypatch):
    """p = 0.1 of 10,000 samples, within 4 deviations of the binomial; which ones belongs to step and position."""
    net = Told()
    module = module_of(net, 0.1)

    def batch(start, size):
        return {"x": torch.zeros(size, 2), "start": start, "total": 100, "cond": torch.arange(start, start + size) % 5}

    for step in range(100):
        monkeypatch.setattr(type(module), "global_step", step)
        module.training_step(batch(0, 100), 0)
    told = torch.stack(net.told)
    dropped = told == 5
    assert abs(dropped.sum().item() - 1000) < 4 * math.sqrt(10_000 * 0.1 * 0.9)
    per_batch = dropped.sum(1)
    assert 0 < per_batch.min() < per_batch.max() < 100  # per sample, not per batch
    # About as scattered as independent draws are.
    assert per_batch.double().var().item() == pytest.approx(9, rel=0.6)
    assert torch.equal(told[~dropped], (torch.arange(100) % 5).expand(100, 100)[~dropped])

    net.told.clear()
    for start in range(0, 100, 25):  # four processes
        monkeypatch.setattr(type(module), "global_step", 3)
        module.training_step(batch(start, 25), 0)
    assert torch.equal(torch.cat(net.told), told[3])

    net.told.clear()
    module.log = lambda *args, **kwargs: None
    module.validation_step(batch(0, 100), 0)
    assert torch.equal(net.told[0], torch.arange(100) % 5)
    assert StepRng(0, 3, 0, 4, torch.device("cpu")).uniform("drop").shape == (4,)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run of six large steps on the digits that is told their classes, and makes a difference between them."""
    folder = tmp_path_factory.mktemp("conditions") / "run"
    large = "optimizer.lr=0.05", "lr_scheduler.warmup_steps=0", "callbacks.ema.decay=0"
    train_tiny(folder, "conditioning=class", "guidance.scale=2", *large)
    return folder


def test_a_run_with_conditions_goes_on(tmp_path):
    """As if it had never stopped, and by resume=auto of a sweep too."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_tiny(whole, "conditioning=class", "lr_scheduler=constant")
    train_tiny(halves, "conditioning=class", "lr_scheduler=constant", "trainer.max_steps=3")
    train_tiny(halves, "conditioning=class", "lr_scheduler=constant", f"resume='{halves}'")
    ends = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, halves)]
    assert [end["global_step"] for end in ends] == [6, 6]
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    metrics = train_tiny(whole, "conditioning=class", "lr_scheduler=constant", "resume=auto")
    assert metrics == pytest.approx(json.loads((whole / "metrics.json").read_text()))  # it was finished
    with pytest.raises(UsageError, match="holds another network"):
        train_tiny(halves, f"resume='{halves}'", "lr_scheduler=constant")


def draw(folder, tmp_path, *overrides):
    from src.sample import sample

    return sample(compose("sample", f"run='{folder}'", f"run_dir='{tmp_path}'", "device=cpu", "n=6", *overrides))


def test_a_run_keeps_the_names_and_draws_what_is_asked_for(told, tmp_path):
    import numpy as np

    settings = read_checkpoint(told / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert settings["conditioning"]["encode"]["names"] == [str(k) for k in range(10)]
    assert settings["conditioning"]["embed"]["classes"] == 10
    weights = read_checkpoint(told / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights["net.condition.table.weight"].shape[0] == 11
    folder = draw(told, tmp_path, "cond=[0,'7',3]")
    assert (folder / "asked.txt").read_text().split() == ["0", "0", "7", "7", "3", "3"]
    samples = np.load(folder / "samples.npz")["arr_0"]
    again = np.load(draw(told, tmp_path / "b", "cond=[0,7,4]", "batch_size=2") / "samples.npz")["arr_0"]
    assert (samples[:4] == again[:4]).all()
    assert (samples[4:] != again[4:]).any()


def test_scales_one_and_zero_are_the_conditional_and_the_unconditional_samples(told, tmp_path):
    import numpy as np

    def at(name, *overrides):
        return np.load(draw(told, tmp_path / name, *overrides) / "samples.npz")["arr_0"]

    nothing = at("nothing", "cond=[null]", "guidance.scale=1")
    assert (at("zero", "cond=[3]", "guidance.scale=0") == nothing).all()
    assert (at("one", "cond=[3]", "guidance.scale=1") != nothing).any()
    assert (at("own", "cond=[3]") == at("two", "cond=[3]", "guidance.scale=2")).all()  # the run's own
    assert (at("file", f"cond='{write(tmp_path / 'asked.txt', '3')}'") == at("named", "cond=[3]")).all()
    # An interval that nothing lies in is no guidance.
    far = "guidance.interval=[1e6,1e7]"
    assert (at("far", "cond=[3]", "guidance.scale=9", far) == at("plain", "cond=[3]", "guidance.scale=1")).all()
    # The model itself as the weaker one: nothing to lead away from, but for rounding.
    self_led = at("self", "cond=[3]", "guidance.scale=3", f"guidance.model='{told}'").astype(int)
    assert abs(self_led - at("plain2", "cond=[3]", "guidance.scale=1")).max() <= 16  # a gray level
    with pytest.raises(UsageError, match=r"guidance\.model=.* guidance\.scale=2"):
        at("none", "cond=[3]", "guidance.scale=1", f"guidance.model='{told}'")
    assert (at("negative", "cond=[3]", "negative=5") != at("positive", "cond=[3]")).any()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "status"),
    [
        (["cond=[fish]"], "unknown class 'fish': there are 0, 1, 2, 3, 4 and 5 more"),
        (["cond=[11]"], "unknown class '11': did you mean 1"),
        (["cond=absent.txt"], "no file .*absent.txt: cond=FILE.txt has"),
        (["cond=[]"], r"cond=\[\] asks for nothing"),
        (["guidance.scale=-2"], "guidance.scale=-2"),
        (["guidance.interval=[1]"], "two levels of noise"),
        (["guidance.scale=much"], "must be a number"),
        (["negative=5", "guidance.scale=1"], "negative=5 has no effect"),
        (["cond=[1,2,3]", "n=2"], "n=2 leaves out some of the 3 that cond asks for: set n=3"),
    ],
)
def test_wrong_wishes_are_one_line(told, tmp_path, overrides, status):
    with pytest.raises(UsageError, match=status):
        draw(told, tmp_path, *overrides)


def test_a_run_without_conditions_says_that_it_takes_none(trained, tmp_path):
    for override in ("cond=[3]", "negative=3"):
        with pytest.raises(UsageError, match="needs a conditional run"):
            draw(trained, tmp_path, override)
    with pytest.raises(UsageError, match=r"guidance\.scale=2"):
        draw(trained, tmp_path, "guidance.scale=2")


@pytest.mark.parametrize(
    ("trained_with", "told_of"),
    [
        (["conditioning=class", "diffusion.prediction=x0"], "another diffusion.prediction"),
        (["conditioning=class", "zero_terminal_snr=true"], "another zero_terminal_snr"),
        ([], "another conditioning.encode"),
    ],
)
def test_a_weaker_model_of_another_meaning_is_refused(told, tmp_path, trained_with, told_of):
    train_tiny(tmp_path / "weak", "trainer.max_steps=1", "validate_every=1", *trained_with)
    with pytest.raises(UsageError, match=f"{told_of}.* than the run, so its outputs differ: choose an") as error:
        draw(told, tmp_path, "guidance.scale=2", f"guidance.model='{tmp_path / 'weak'}'")
    assert "\n" not in str(error.value)


def test_an_exported_model_can_be_asked_too(told, tmp_path):
    import numpy as np

    from src.export import export

    export(compose("export", f"run='{told}'", f"run_dir='{tmp_path / 'export'}'"))
    (file,) = (tmp_path / "export").rglob("*.safetensors")
    from src.sample import sample

    of_file = sample(
        compose("sample", f"ckpt='{file}'", f"run_dir='{tmp_path / 'a'}'", "device=cpu", "n=4", "cond=[2]")
    )
    of_run = draw(told, tmp_path / "b", "cond=[2]", "n=4")
    assert (np.load(of_file / "samples.npz")["arr_0"] == np.load(of_run / "samples.npz")["arr_0"]).all()


def test_a_text_run_is_exported_with_its_tokenizer_and_keeps_its_examples(tmp_path):
    """Which may look like paths: and/or."""
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
        "neighbors.num_samples=0",
    ]
    examples = "conditioning.encode.examples=['a red circle and/or a blue square']"
    train_tiny(tmp_path / "run", *small, *text, examples, "trainer.max_steps=2", "validate_every=2")
    export(compose("export", f"run='{tmp_path / 'run'}'", f"run_dir='{tmp_path / 'export'}'"))
    (file,) = (tmp_path / "export").rglob("*.safetensors")
    drawn = []
    for name, where in (("a", f"ckpt='{file}'"), ("b", f"run='{tmp_path / 'run'}'")):
        asked = ["n=2", "device=cpu", "sampler.steps=2", "guidance.scale=2"]
        folder = sample(compose("sample", where, f"run_dir='{tmp_path / name}'", *asked))
        assert (folder / "asked.txt").read_text() == 2 * "a red circle and/or a blue square\n"
        drawn.append(np.load(folder / "samples.npz")["arr_0"])
    assert (drawn[0] == drawn[1]).all()
