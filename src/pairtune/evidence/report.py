"""report.html: one self-contained page about one run or a whole comparison, made from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pairtune.errors import PairtuneError
from pairtune.evidence.figures import save_figures
from pairtune.evidence.page import Page, render
from pairtune.evidence.run_page import reward_change, run_page, stage_of
from pairtune.evidence.runs import is_comparison, read_runs
from pairtune.evidence.tables import save_tables
from pairtune.runs import folder

__all__ = ["make_page", "reward_change", "write_report"]

Paths = str | Path | Sequence[str | Path]


def write_report(runs: Paths, output: str | Path | None = None, *, figures: str | Path | None = None) -> Path:
    """Writes the page of one run folder, of several, or of a comparison; returns where it is.

    Where: `output`; else report.html in the folder, if one was named, or in the current folder. `figures` names a
    folder for the same figures as SVG and PNG and the same tables as CSV and LaTeX. A run that still goes on, stopped
    early or was never evaluated gives what is there.

    Raises PairtuneError if a folder holds no run, a file in it is damaged, the runs are of different stages, or a
    package is missing.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(one) for one in runs]
    target = Path(output) if output is not None else _default_target(folders)
    if target.is_dir():
        raise PairtuneError(f"{target} is a folder; give the report a file name, such as {target / folder.REPORT}")
    page = make_page(folders)
    content = render(page)
    if figures is not None:
        if Path(figures).exists() and not Path(figures).is_dir():
            raise PairtuneError(f"{figures} is a file; name a folder for the figures and tables")
        save_tables(page.tables(), figures)
        save_figures(page.figures(), figures)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.write_atomic(target, content)
    return target


def _default_target(folders: Sequence[Path]) -> Path:
    return folders[0] / folder.REPORT if len(folders) == 1 else Path(folder.REPORT)


def make_page(folders: Sequence[str | Path]) -> Page:
    """What the page of these folders says; see `write_report`."""
    runs = read_runs(folders)
    if len(runs) == 1 and not is_comparison(folders[0]):
        return run_page(runs[0])
    stages = {stage_of(run): run for run in runs}
    if len(stages) > 1:
        (first, one), (second, other), *_ = stages.items()
        raise PairtuneError(
            f"{one.folder} is a run of {first} and {other.folder} one of {second}; a page compares runs of one stage, "
            "so make one for each"
        )
    from pairtune.evidence.comparison_page import comparison_page

    return comparison_page(runs, [Path(one) for one in folders])
