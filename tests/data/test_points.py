"""Points in the plane: each distribution lies where its formula says, and mixture labels are right."""

import itertools
import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torch.testing import assert_close

from src.config.search_path import CONF
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global kstest, PointsDataModule, checkerboard, moons, rings, swiss_roll
    from scipy.stats import kstest

    from src.data.points import PointsDataModule, checkerboard, moons, rings, swiss_roll


PRESETS = ["points", "swiss_roll", "rings", "checkerboard", "mixture"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points_of(drawn) -> Tensor:
    """Return the points without labels."""
    return drawn[0] if isinstance(drawn, tuple) else drawn


def configured(name: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return instantiate(compose("train", overrides=[f"data={name}"]).data)


@pytest.mark.parametrize("name", PRESETS)
def test_configs_give_centered_points_of_unit_size(name):
    """(n, 2) float32, finite; each axis is centered with a standard deviation near 1."""
    points = points_of(configured(name).distribution(4000, seeded()))
    assert points.shape == (4000, 2)
    assert points.dtype == torch.float32
    assert points.isfinite().all()
    assert points.mean(0).abs().max() < 0.3
    assert points.std(0).min() > 0.5
    assert points.std(0).max() < 1.6


@for_each("draw", lambda: [moons, swiss_roll, rings, checkerboard])
def test_points_depend_on_the_generator_only(draw):
    """The same seed gives the same points, another seed others; torch's global generator does not move."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    points = points_of(draw(50, seeded(1)))
    assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert_close(points_of(draw(50, seeded(1))), points, rtol=0, atol=0)
    assert (points_of(draw(50, seeded(2))) != points).any(1).all()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_rings_have_equally_spaced_radii(count):
    """Without noise, radii are 2 k / count, equally frequent, at uniform angles."""
    n = 6000
    points, labels = rings(n, seeded(), count=count, noise=0.0)
    x = points.double()
    number = x.norm(dim=1) * count / 2
    nearest = number.round()
    assert_close(number, nearest, rtol=0, atol=1e-5)
    assert torch.equal(labels.targets, nearest.long() - 1)  # from the innermost outwards
    names = {1: ["ring 1"], 3: ["inner", "middle", "outer"]}
    assert labels.classes == names.get(count, [f"ring {k}" for k in range(1, count + 1)])
    shares = torch.bincount(nearest.long(), minlength=count + 1)[1:] / n
    assert len(shares) == count
    assert (shares - 1 / count).abs().max() < 5 * math.sqrt(1 / count / n)
    angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) + 0.5
    assert kstest(angle.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("cells", [2, 4, 6])
def test_checkerboard_fills_the_dark_squares(cells):
    """Column plus row is even; all such squares are equally and uniformly filled."""
    n = 12_000
    x = checkerboard(n, seeded(), cells=cells).double()
    scaled = (x + 2) * cells / 4
    assert scaled.min() >= 0
    assert scaled.max() <= cells
    # a float32 coordinate that rounds up to the next square is not a point in it
    column, row = (scaled - 1e-6).floor().clamp(min=0).long().unbind(1)
    assert ((column + row) % 2 == 0).all()
    squares = cells**2 // 2
    shares = torch.bincount(column * cells + row, minlength=cells**2) / n
    assert torch.count_nonzero(shares) == squares
    assert (shares[shares > 0] - 1 / squares).abs().max() < 5 * math.sqrt(1 / squares / n)
    assert kstest((scaled % 1).flatten().numpy(), "uniform").pvalue > 1e-3


def distance_to_moons(points: np.ndarray) -> np.ndarray:
    """Distance to the nearer of the two half circles that moons() draws before noise, scaled and centered."""
    p = points / 1.5 + [0.5, 0.25]

    def to_arc(q: np.ndarray) -> np.ndarray:
        """To the upper unit half circle: the circle above the axis, its nearer end below."""
        ends = np.minimum(np.hypot(q[:, 0] - 1, q[:, 1]), np.hypot(q[:, 0] + 1, q[:, 1]))
        return np.where(q[:, 1] >= 0, np.abs(np.hypot(*q.T) - 1), ends)

    return 1.5 * np.minimum(to_arc(p), to_arc([1, 0.5] - p))


def test_moons_lie_on_two_half_circles():
    """Exactly without noise, otherwise at a distance of 1.5 noise; half of the points on each."""
    n = 4000
    points, labels = moons(n, seeded(), noise=0.0)
    clean = points.double().numpy()
    assert distance_to_moons(clean).max() < 1e-5
    on_upper = np.abs(np.hypot(clean[:, 0] / 1.5 + 0.5, clean[:, 1] / 1.5 + 0.25) - 1) < 1e-5
    assert abs(on_upper.mean() - 0.5) < 5 * math.sqrt(0.25 / n)
    assert [labels.classes[k] for k in labels.targets] == np.where(on_upper, "upper", "lower").tolist()
    noisy = moons(n, seeded(), noise=0.05)[0].double().numpy()
    away = distance_to_moons(noisy)
    assert away.max() < 1.5 * 0.05 * 5
    # one Gaussian coordinate, across the arc: its second moment is the noise's (curvature adds a part in 400)
    assert np.mean(away**2) == pytest.approx((1.5 * 0.05) ** 2, rel=0.15)


def test_moons_match_scikit_learn():
    """scikit-learn's points (without noise) lie on the same two half circles."""
    from sklearn.datasets import make_moons

    theirs = 1.5 * (make_moons(200, noise=None)[0] - [0.5, 0.25])
    assert distance_to_moons(theirs).max() < 1e-6


def test_swiss_roll_has_radius_equal_to_angle():
    """radius x 7.5 is the angle, uniform over 1.5 turns; noise has its standard deviation."""
    clean = swiss_roll(4000, seeded(), noise=0.0).double()
    clean = clean + torch.tensor([2.0, 2 / (3 * math.pi)]) / 7.5  # undo the centering
    angle = 7.5 * clean.norm(dim=1)
    on_spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 7.5
    assert_close(on_spiral, clean, rtol=0, atol=1e-5)
    assert kstest(angle.numpy(), "uniform", args=(1.5 * math.pi, 3 * math.pi)).pvalue > 1e-3
    moved = (
        swiss_roll(4000, seeded(), noise=0.05).double() - swiss_roll(4000, seeded(), noise=0.0)
    ) / 0.05  # the noise is drawn last
    assert moved.abs().max() < 5
    assert abs(moved.square().mean() - 1) < 5 * math.sqrt(2 / 8000)


@pytest.mark.parametrize("cells", [0, 1, 3, -2])
def test_odd_checkerboards_raise(cells):
    with pytest.raises(ValueError, match=rf"data\.source\.cells={cells} must be"):
        checkerboard(4, seeded(), cells=cells)


def test_points_depend_on_the_split_seed():
    """Dataset and split do not depend on the run's seed."""

    def opened(**seeds) -> PointsDataModule:
        data = PointsDataModule(moons, num_samples=200, batch_size=10, **seeds)
        data.setup()
        return data

    def points(data: PointsDataModule) -> Tensor:
        return data.source.fetch(range(200))

    first, same, other = opened(seed=1), opened(seed=2), opened(split_seed=3)
    assert first.shape == (2,)
    assert_close(points(first), points(same), rtol=0, atol=0)
    assert first.val_indices == same.val_indices
    assert (points(first) != points(other)).any(1).all()
    assert len(set(map(tuple, points(first).tolist()))) == 200


def test_a_mixture_labels_its_components():
    """Points of each class follow their component; distributions without components have no labels."""
    data = configured("mixture")
    data.setup()
    points, labels = data.source.fetch(range(20_000)), data.source.labels
    assert labels.classes == [f"component {k}" for k in range(1, 6)]
    mixture = data.distribution
    for k in range(5):
        own = points[labels.targets == k].double()
        assert abs(len(own) / 20_000 - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 20_000)
        standing = ((own - mixture.means[k]) / mixture.stds[k]).flatten()
        assert kstest(standing.numpy(), "norm").pvalue > 1e-3
    assert_close(mixture(9, seeded()), mixture.draw(9, seeded())[0], rtol=0, atol=0)
    for name in ("swiss_roll", "checkerboard"):
        other = configured(name)
        other.setup()
        assert other.source.labels is None


@pytest.mark.parametrize("num", [1, 0, -5])
def test_too_few_points_raise(num):
    with pytest.raises(ValueError, match=rf"data\.num_samples={num} must be at least 2"):
        PointsDataModule(moons, num_samples=num)


@pytest.mark.parametrize("name", PRESETS)
def test_configs_open_and_split(name):
    """Each YAML builds a data module with distinct points, split by val_fraction."""
    data = configured(name)
    data.setup()
    assert abs(len(data.val_indices) - 2000) < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    assert len(data.val_indices) + len(data.train_indices) == 20_000
    x = data.examples(16)
    assert x.shape == (16, *data.shape)
    assert x.dtype == torch.float32
    for i, j in itertools.pairwise(range(16)):
        assert not torch.equal(x[i], x[j])
