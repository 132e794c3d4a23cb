"""`mlxtune verify`: computes a report's figures again and names each that differs. Knows what to show."""

import sys
from pathlib import Path

import click

from mlxtune.cli import display

MOST_SHOWN = 50  # differences; --json has all


@click.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Let the models answer again as well, those of the comparison too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(run: Path, full: bool, as_json: bool) -> None:
    """Compute every figure of a run's report again from the files in its folder.

    Compares the hashes of files and weights, the scores and tables with the predictions, the comparison and its
    verdict with those of its candidates, what was forgotten, judged and learned from fewer rows with its lines, and
    the pages with the figures. Exit code 1 and a line for each that differs. With --full the models are evaluated and
    compared again, best on the machine that made the run; no server is asked, and nothing is trained.

    \b
    Example:
      mlxtune verify runs/quickstart
      mlxtune verify runs/quickstart --full
    """
    from mlxtune import machine
    from mlxtune.rundir import RunDir
    from mlxtune.verify import verify

    if full:
        machine.configure()
    with display.phases() as show:
        done = verify(RunDir(run), full=full, on_progress=show)
    if as_json:
        display.result_json(done.to_dict())
    else:
        for each in done.differences[:MOST_SHOWN]:
            line = f"{each.file}: {each.key}: stated {each.stated}, found {each.found}"
            display.result(display.harmless(" ".join(line.split())))
        if len(done.differences) > MOST_SHOWN:
            display.result(f"and {len(done.differences) - MOST_SHOWN:,} more; --json has all")
        if done.unchecked:
            display.note(display.harmless(f"not checked: {', '.join(done.unchecked)}"))
        compared = f"{done.figures:,} figures, {done.files:,} files, {done.predictions:,} predictions"
        verdict = f"{display.count(len(done.differences), 'difference')}" if done.differences else "all as stated"
        display.note(f"{compared}: {verdict}")
        if not done.differences:
            display.result("verified")
    if done.differences:
        sys.exit(1)
