"""What each sub-command of `python -m fusedmm` does with its parsed arguments.

Recipe settings become flags here (`--loop.steps 100`). Left out: parsing itself, which
fusedmm.__main__ does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.text import Text

from fusedmm.models import CLIP, load
from fusedmm.train import console, end_to_end, parallel
from fusedmm.train.clip import ClipRecipe, evaluate_bases, evaluate_clip
from fusedmm.train.config import add_flags, flags_to_dict, from_dict, merged, read_yaml
from fusedmm.train.data import ATTRIBUTION, OpenMoji
from fusedmm.train.job import Job, run, show_bases, show_matching, show_retrieval
from fusedmm.train.loop import Interrupted, device
from fusedmm.train.recipes import load_data, run_clip, run_vilbert
from fusedmm.train.search import search
from fusedmm.train.systems import SYSTEMS, Sources, load_system
from fusedmm.train.systems.run import run_system, show
from fusedmm.train.table import collect, write_page
from fusedmm.train.vilbert import ViLBERTRecipe, evaluate_vilbert

CLASSES = {"clip": ClipRecipe, "vilbert": ViLBERTRecipe}
RECIPES = (*CLASSES, *SYSTEMS)


def settings_class(name: str) -> type:
    """The settings of a recipe."""
    return CLASSES[name] if name in CLASSES else load_system(name).Recipe


def fail(error: object) -> None:
    """Say why a command ended early."""
    console.console.print(Text(f"fusedmm: {error}", style="red"))


def add_recipe_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Give the sub-parser in use the settings of its recipe as flags."""
    choices = parser._subparsers._group_actions[0].choices  # argparse has no public way to them
    if argv[:1] == ["run"]:
        add_flags(choices["run"], Job)
    elif argv[:1] == ["train"]:
        recipe = next((a for a in argv[1:] if a in RECIPES), None)
        if recipe is not None:
            add_flags(choices["train"], settings_class(recipe))


def given_settings(args: argparse.Namespace, cls: type) -> dict:
    """Settings of the YAML file, if one was named, under those of the flags."""
    below = read_yaml(args.config) if args.config is not None else {}
    return merged(below, flags_to_dict(args, cls))


def _stopped(error: Interrupted) -> int:
    fail(f"{error}; the same command goes on from there")
    return 130


def do_run(args: argparse.Namespace) -> int:
    """The main job."""
    console.configure_logging()
    job = from_dict(Job, given_settings(args, Job))
    try:
        run(job, root=args.runs, name=args.name, cache_dir=args.cache, fresh=args.fresh)
    except Interrupted as error:
        return _stopped(error)
    return 0


def do_train(args: argparse.Namespace) -> int:
    """One recipe, by one process or by those that torchrun started."""
    console.configure_logging()
    with parallel.processes():
        console.console.quiet = parallel.rank() > 0
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    cls = settings_class(args.recipe)
    recipe = from_dict(cls, given_settings(args, cls))
    folder = args.runs / (args.name or args.recipe)
    try:
        if args.recipe == "clip":
            data = load_data(args.cache, recipe.limit, recipe.model.image_size, args.data)
            if metrics := run_clip(recipe, data, folder, fresh=args.fresh):
                show_retrieval(metrics["retrieval"])
        elif args.recipe in SYSTEMS:
            given = {"clip": args.clip} if args.clip else {}
            sources = Sources(args.cache, args.runs, given, args.data)
            if metrics := run_system(args.recipe, recipe, sources, folder, fresh=args.fresh):
                show(metrics)
                console.say(f"report: {folder / 'report.html'}")
        else:
            clip_dir = args.clip or args.runs / "clip"
            size = load(clip_dir).model.config.image_size
            data = load_data(args.cache, recipe.limit, size, args.data)
            metrics = run_vilbert(recipe, data, clip_dir, folder, fresh=args.fresh)
            if metrics:
                show_matching(metrics["matching"])
    except Interrupted as error:
        return _stopped(error)
    console.say(f"model: {folder}")
    return 0


def _data_of(recipe: dict, size: int, args: argparse.Namespace) -> OpenMoji:
    return load_data(args.cache, recipe.get("limit"), size, args.data)


def do_table(args: argparse.Namespace) -> int:
    """The tables of docs/recipes.md from finished runs."""
    console.configure_logging()
    store = args.page.with_suffix("")
    names = collect(args.runs, store, list(RECIPES), settings_class)
    write_page(args.page, store, list(RECIPES))
    console.say(f"{args.page}: {', '.join(names) or 'no new runs'}")
    return 0


def do_compare(args: argparse.Namespace) -> int:
    """Whole steps of several recipes, ours against standard; their part of docs/recipes.md."""
    console.configure_logging()
    store = args.page.with_suffix("")
    sources = Sources(args.cache, args.runs, {"clip": args.clip} if args.clip else {})
    end_to_end.write(store, end_to_end.end_to_end(sources, args.cases, args.steps))
    write_page(args.page, store, list(RECIPES))
    console.say(f"{args.page}, {store / 'end_to_end.json'}")
    return 0


def do_eval(args: argparse.Namespace) -> int:
    """The figures of a trained model on a split."""
    console.configure_logging()
    folder = args.folder or args.runs / "openmoji" / "clip"
    model, tokenizer, config = load(folder)
    model.to(device())
    precision = config["recipe"]["loop"]["precision"]
    if isinstance(model, CLIP):
        data = _data_of(config["recipe"], model.config.image_size, args)
        figures = evaluate_clip(model, tokenizer, data, args.split, precision)
        show_retrieval({name: r.as_dict() for name, r in figures.items()})
        show_bases(evaluate_bases(model, tokenizer, data, args.split, precision))
        return 0
    clip = load(args.clip or folder.parent / "clip").model.to(device())
    data = _data_of(config["recipe"], clip.config.image_size, args)
    show_matching(evaluate_vilbert(model, clip, tokenizer, data, args.split, precision))
    return 0


def do_search(args: argparse.Namespace) -> int:
    """The drawings that fit the words best, as a table and, on a colour terminal, as pictures."""
    console.configure_logging()
    folder = args.folder or args.runs / "openmoji" / "clip"
    model, _, config = load(folder)
    if not isinstance(model, CLIP):
        raise ValueError(f"search: {folder}: expected a clip model, got {config['model']!r}")
    data = _data_of(config["recipe"], model.config.image_size, args)
    hits = search(folder, " ".join(args.text), data, count=args.count)
    rows = [
        (hit.drawing.emoji, hit.drawing.caption, hit.drawing.split, f"{hit.score:.3f}")
        for hit in hits
    ]
    console.table(" ".join(args.text), ("", "drawing", "split", "cosine"), rows)
    if console.console.color_system in ("truecolor", "256"):
        for line in thumbnails(data, [hit.row for hit in hits[:5]]):
            console.console.print(line)
    console.say(f"drawings: {ATTRIBUTION}")
    return 0


def thumbnails(data: OpenMoji, rows: Sequence[int], *, side: int = 20) -> list[Text]:
    """Drawings side by side as lines of half blocks, two pixels a character."""
    pixels = data.pixels(list(rows))
    small = pixels.unfold(2, pixels.shape[2] // side, pixels.shape[2] // side)
    small = small.unfold(3, pixels.shape[3] // side, pixels.shape[3] // side).mean(dim=(-1, -2))
    small = (small[:, :, :side, :side] * 255).round().int()
    lines = []
    for y in range(0, small.shape[2] - 1, 2):
        line = Text()
        for picture in small:
            for x in range(small.shape[3]):
                top, bottom = picture[:, y, x].tolist(), picture[:, y + 1, x].tolist()
                style = (
                    f"rgb({top[0]},{top[1]},{top[2]}) on rgb({bottom[0]},{bottom[1]},{bottom[2]})"
                )
                line.append("\N{UPPER HALF BLOCK}", style=style)
            line.append("  ")
        lines.append(line)
    return lines
