"""report.html: one self-contained page about one run or a whole comparison, made from run folders alone, with what
judges said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pairtune.errors import PairtuneError
from pairtune.evidence.figures import save_figures
from pairtune.evidence.page import Page, Section, render
from pairtune.evidence.run_page import reward_change, run_page, stage_of
from pairtune.evidence.runs import CELL, Line, is_comparison, is_judged, read_judged, read_runs
from pairtune.evidence.tables import save_tables
from pairtune.runs import folder
from pairtune.runs.display import clean

__all__ = ["make_page", "reward_change", "write_report"]

Paths = str | Path | Sequence[str | Path]


def write_report(runs: Paths, output: str | Path | None = None, *, figures: str | Path | None = None) -> Path:
    """Writes the page of one run folder, of several, or of a comparison; returns where it is. Folders that `pairtune
    judge` wrote are shown with them: those that are named, and those inside a folder that is.

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
    paths = [Path(one) for one in folders]
    judged = read_judged(paths)
    # A judge may write into the folder of what it judged; that folder is a result and a run or a comparison.
    trained = [path for path in paths if not is_judged(path) or is_comparison(path) or _is_run(path)]
    if judged and not trained:
        return _judged_page(judged)
    runs = read_runs(trained)
    if len(runs) == 1 and not is_comparison(trained[0]):
        page = run_page(runs[0])
        return replace(page, sections=[*page.sections[:-1], *_judged_sections(judged), page.sections[-1]])
    stages = {stage_of(run): run for run in runs}
    if len(stages) > 1:
        (first, one), (second, other), *_ = stages.items()
        raise PairtuneError(
            f"{one.folder} is a run of {first} and {other.folder} one of {second}; a page compares runs of one stage, "
            "so make one for each"
        )
    from pairtune.evidence.comparison_page import comparison_page

    return comparison_page(runs, trained, judged)


def _is_run(path: Path) -> bool:
    """Whether a folder has what `read_run` reads a run from."""
    return any((path / name).is_file() for name in (folder.CONFIG, folder.METRICS, folder.EVALUATIONS, CELL))


def _judged_page(judged: Sequence[Line]) -> Page:
    """Of completions whose runs are not at hand, or that no run of ours made."""
    judges = ", ".join(dict.fromkeys(clean(str(result["judge"])) for result in judged))
    names = dict.fromkeys(side["name"] for result in judged for side in result["sides"])
    verdict = f"{len(names)} policies before {judges}."
    return Page("judged", verdict, [], _judged_sections(judged))


def _judged_sections(judged: Sequence[Line]) -> list[Section]:
    if not judged:
        return []
    from pairtune.evidence.comparison_judged import judged_blocks, own_looks

    return [Section("judged", "Judges", "Before a judge", judged_blocks(judged, own_looks(judged)))]
