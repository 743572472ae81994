"""Command line: `info`, `run`, `train RECIPE`, `table`, `compare`, `eval`, `search TEXT`.

Parses and reports; the work is in fusedmm.info and fusedmm.train. Exit status: 0 done, 1 could not,
2 bad usage, 130 stopped by Ctrl-C with its state saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EXPECTED = (ValueError, NotImplementedError, FloatingPointError, OSError, ModuleNotFoundError)


def _parser(recipes: Sequence[str], cases: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusedmm", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, instruction set, each backend and why it is off")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
        sub.add_argument(
            "--cache", type=Path, default=Path(".cache/openmoji"), help="where pixels are kept"
        )
        if name in ("train", "eval", "search"):
            text = "pictures with captions of your own in place of OpenMoji: folder, list or tar"
            sub.add_argument("--data", type=Path, help=text)
        return sub

    fresh = {"action": "store_true", "help": "discard what the run folder holds"}
    run = command("run", "the main job: CLIP and ViLBERT on OpenMoji, tables and report")
    run.add_argument("--name", default="openmoji", help="folder below --runs")
    run.add_argument("--fresh", **fresh)
    config = {"type": Path, "help": "settings in YAML, nested as the flags' names; flags win"}
    run.add_argument("--config", **config)
    train = command("train", "train one recipe")
    train.add_argument("recipe", choices=recipes)
    train.add_argument("--name", help="folder below --runs, default the recipe's name")
    train.add_argument("--clip", type=Path, help="folder of the CLIP that the recipe starts from")
    train.add_argument("--fresh", **fresh)
    train.add_argument("--config", **config)
    table = command("table", "fill docs/recipes.md from the finished runs")
    table.add_argument("--page", type=Path, default=Path("docs/recipes.md"))
    compare = command("compare", "whole training steps of several recipes, ours against standard")
    compare.add_argument("--page", type=Path, default=Path("docs/recipes.md"))
    compare.add_argument("--clip", type=Path, help="folder of a trained CLIP")
    compare.add_argument("--steps", type=int, default=60)
    compare.add_argument("--cases", nargs="+", choices=cases, default=cases)
    evaluate = command("eval", "measure a trained model on a split")
    evaluate.add_argument("folder", type=Path, nargs="?", help="default RUNS/openmoji/clip")
    evaluate.add_argument("--clip", type=Path, help="vilbert: folder of the CLIP it starts from")
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"))
    search = command("search", "the drawings that fit the words best")
    search.add_argument("text", nargs="+")
    search.add_argument("--folder", type=Path, help="default RUNS/openmoji/clip")
    search.add_argument("--count", type=int, default=5)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["info"]:
        from fusedmm import info

        return info.main() or 0
    try:
        from fusedmm.train import commands
    except ModuleNotFoundError as error:
        sys.stderr.write(f"fusedmm: {error.name} is not installed; pip install 'fusedmm[train]'\n")
        return 1
    parser = _parser(commands.RECIPES, list(commands.end_to_end.CASES))
    commands.add_recipe_flags(parser, argv)
    args = parser.parse_args(argv)
    try:
        return getattr(commands, f"do_{args.command}")(args)
    except EXPECTED as error:
        commands.fail(error)
        return 1
    except KeyboardInterrupt:
        commands.fail("stopped; what was finished is kept, the same command goes on from there")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
