"""The runs that are compared."""

import pytest

from src.comparison.survey import run_folders


@pytest.mark.parametrize("paths", [[], [""], ["runs", " "]])
def test_empty_paths_are_refused(paths):
    """An empty path would mean the current folder."""
    with pytest.raises(ValueError, match="runs="):
        run_folders(paths)


def test_a_sweep_means_its_jobs_by_number(tmp_path):
    for name in ("10", "9", "0"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "comparison").mkdir()
    assert [folder.name for folder in run_folders([str(tmp_path), str(tmp_path / "9")])] == ["0", "9", "10"]
