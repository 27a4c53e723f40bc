"""Lay out a project's W&B workspace: `python -m src.dashboard entity=NAME`, with `report=true` a report of its runs."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.config.cli import launch
from src.errors import UsageError, sentence, usage_errors

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"


def show_dashboard(cfg: DictConfig) -> str:
    """Save the workspace, or the report, to the account; returns where it is to be seen."""
    with usage_errors():
        if not cfg.entity:
            raise ValueError("entity=... is missing: the W&B account or team that the project belongs to")
        try:
            import wandb_workspaces  # noqa: F401 - whether it is there
        except ImportError as error:
            raise ValueError(
                f"src.dashboard needs wandb-workspaces, which is not installed ({sentence(error)}): "
                "pip install -e '.[wandb,dashboard]'"
            ) from error
        made = report(cfg.entity, cfg.project, cfg.name) if cfg.report else workspace(cfg.entity, cfg.project, cfg.name)
        try:
            made.save()
        except Exception as error:  # whatever stands between here and the account
            raise UsageError(
                f"W&B did not take {'the report' if cfg.report else 'the workspace'} for {cfg.entity}/{cfg.project} "
                f"({sentence(error)}): log in by `wandb login`, be online, and let the project have a run"
            ) from error
    print(f"{'Report' if cfg.report else 'Workspace'} of {cfg.entity}/{cfg.project}: {made.url}")
    return str(made.url)


def sections() -> dict[str, list[Any]]:
    """Panels by the name of their section. docs/dashboards.md says what is under their keys."""
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, RunComparer, WeavePanelSummaryTable

    def line(title: str, *keys: str, log: bool = False) -> LinePlot:
        return LinePlot(title=title, x=STEP, y=list(keys), log_y=log or None, title_x="step")

    def media(title: str, *keys: str) -> MediaBrowser:
        return MediaBrowser(title=title, media_keys=list(keys), num_columns=1)

    return {
        "Samples": [
            media("samples from the same noise, over training", "samples"),
            media("at the end", "samples/final"),
            media("from noise to data", "samples/film"),
            media("nearest training samples", "samples/neighbors"),
            WeavePanelSummaryTable(table_name="samples/table"),
        ],
        "Loss": [
            line("training loss", "train/loss", log=True),
            line("training and validation loss", "train/loss", "val/loss", log=True),
            line("gradient norm, before clipping", "train/grad_norm", log=True),
            line("learning rate", "lr"),
        ],
        "Loss by noise level": [
            media("training loss by log-SNR", "loss_by_noise"),
            media("schedule", "schedule"),
        ],
        "Throughput": [
            line("samples per second, of the global batch", "speed/samples_per_second"),
            line("steps per second", "speed/steps_per_second"),
            line("memory, GiB", "memory/gib"),
        ],
        "Validation": [
            line("loss of the averaged weights", "val/loss", log=True),
            line("squared error of the averaged weights", "val/mse", log=True),
            line("bits/dim of held-out data, at most", "val/bits_per_dim"),
            RunComparer(diff_only="split"),
        ],
    }


def workspace(entity: str, project: str, name: str) -> "Workspace":
    """A view of the project with these sections, all open."""
    from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings

    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[Section(name=title, panels=panels, is_open=True) for title, panels in sections().items()],
        settings=WorkspaceSettings(x_axis=STEP),
    )


def report(entity: str, project: str, name: str) -> "Report":
    """The same panels one section under the other, of all runs of the project, grouped as sweeps group them."""
    from wandb_workspaces.reports.v2 import H1, PanelGrid, Report, Runset, TableOfContents

    blocks: list[Any] = [TableOfContents()]
    for title, panels in sections().items():
        runs = Runset(entity=entity, project=project, name="by sweep", groupby=["Group"])
        blocks += [H1(text=title), PanelGrid(runsets=[runs], panels=panels)]
    return Report(entity=entity, project=project, title=name, blocks=blocks)


if __name__ == "__main__":
    launch("dashboard", show_dashboard)
