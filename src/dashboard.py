"""Create the W&B workspace of a project: `python -m src.dashboard entity=TEAM`; `report=true` makes a report."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.config.cli import launch
from src.errors import UsageError, sentence, usage_errors

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

STEP = "trainer/global_step"


def show_dashboard(cfg: DictConfig) -> str:
    """Save the workspace or the report to the account; return its URL."""
    with usage_errors():
        if not cfg.entity:
            raise ValueError("entity=null must be the W&B account or team of the project; add entity=TEAM")
        try:
            import wandb_workspaces  # noqa: F401 - checks the installation
        except ImportError as error:
            raise ValueError(
                f"src.dashboard needs wandb-workspaces, which is not installed ({sentence(error)}); run "
                "pip install -e '.[wandb,dashboard]'"
            ) from error
        names = str(cfg.entity), str(cfg.project), str(cfg.name)  # a team named 5 arrives as an integer
        made = report(*names) if cfg.report else workspace(*names)
        try:
            made.save()
        except Exception as error:  # network, login and server errors alike
            raise UsageError(
                f"W&B rejected the {'report' if cfg.report else 'workspace'} of {cfg.entity}/{cfg.project} "
                f"({sentence(error)}); run `wandb login`, and check the network and that the project has a run"
            ) from error
    print(f"{'Report' if cfg.report else 'Workspace'} of {cfg.entity}/{cfg.project}: {made.url}")
    return str(made.url)


def sections() -> dict[str, list[Any]]:
    """Return the panels by section. docs/dashboards.md documents their keys."""
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser, RunComparer, WeavePanelSummaryTable

    def line(title: str, *keys: str, log: bool = False) -> LinePlot:
        return LinePlot(title=title, x=STEP, y=list(keys), log_y=log or None, title_x="step")

    def media(title: str, *keys: str) -> MediaBrowser:
        return MediaBrowser(title=title, media_keys=list(keys), num_columns=1)

    return {
        "Samples": [
            media("samples from the same noise, over training", "samples"),
            media("at the end", "samples/final"),
            media("from noise to data", "samples/trajectory"),
            media("nearest training samples", "samples/neighbors"),
            WeavePanelSummaryTable(table_name="samples/table"),
        ],
        "Loss": [
            line("training loss", "train/loss", log=True),
            line("training and validation loss", "train/loss", "val/loss", log=True),
            line("gradient norm, before clipping", "train/grad_norm", log=True),
            line("learning rate", "lr"),
        ],
        "Loss by noise level": [media("training loss by log-SNR", "loss_by_noise"), media("schedule", "schedule")],
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
    """Return a workspace of the project with all sections open."""
    from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings

    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[Section(name=title, panels=panels, is_open=True) for title, panels in sections().items()],
        settings=WorkspaceSettings(x_axis=STEP),
    )


def report(entity: str, project: str, name: str) -> "Report":
    """Return a report with the same sections, of all runs of the project grouped by sweep."""
    from wandb_workspaces.reports.v2 import H1, PanelGrid, Report, Runset, TableOfContents

    blocks: list[Any] = [TableOfContents()]
    for title, panels in sections().items():
        runs = Runset(entity=entity, project=project, name="by sweep", groupby=["Group"])
        blocks += [H1(text=title), PanelGrid(runsets=[runs], panels=panels)]
    return Report(entity=entity, project=project, title=name, blocks=blocks)


if __name__ == "__main__":
    launch("dashboard", show_dashboard)
