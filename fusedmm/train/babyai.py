"""BabyAI: episodes of minigrid's expert as tensors, and whole episodes played by a policy.

Episodes are numbered by their seed, so training and test never share one. The expert's steps are
kept in a checksummed cache. Left out: pictures; a view is 7 x 7 cells of three codes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedmm.models.checkpoint import atomic_path

log = logging.getLogger(__name__)

ACTIONS = 7
TEST_SEED = 10**6


class Steps(NamedTuple):
    """The expert's steps: view [K, 7, 7, 3] uint8, which mission [K], action before [K] (ACTIONS
    for none), action [K]; and the missions."""

    view: Tensor
    mission: Tensor
    last: Tensor
    action: Tensor
    missions: tuple[str, ...]


@contextlib.contextmanager
def environment(level: str) -> Iterator[Any]:
    """A minigrid level; what it prints while it samples rooms is dropped.

    Raises: ModuleNotFoundError, the packages of the `recipes` extra are missing.
    """
    try:
        import gymnasium
        import minigrid  # noqa: F401  (registers the levels)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"babyai: {error.name} is not installed; pip install 'fusedmm[recipes]'"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        env = gymnasium.make(level)
        try:
            yield env
        finally:
            env.close()


def expert_steps(
    cache_dir: str | Path,
    level: str,
    episodes: int,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Steps:
    """Steps of the expert in episodes 0..episodes-1, from the cache or played for it."""
    path = Path(cache_dir) / f"{level}-{episodes}.safetensors"
    names = ("view", "mission", "last", "action")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
        if meta.get("sha256") == _digest(tensors):
            return Steps(**tensors, missions=tuple(json.loads(meta["missions"])))
        log.warning("babyai: %s is damaged (checksum differs); playing again", path)
    except FileNotFoundError:
        pass
    except (SafetensorError, OSError, KeyError) as error:
        log.warning("babyai: %s is damaged (%s); playing again", path, error)
    missions: dict[str, int] = {}
    rows: list[tuple[np.ndarray, int, int, int]] = []
    with environment(level) as env:
        from minigrid.utils.baby_ai_bot import BabyAIBot

        for seed in range(episodes):
            seen, _ = env.reset(seed=seed)
            bot, last, done = BabyAIBot(env), ACTIONS, False
            mission = missions.setdefault(seen["mission"], len(missions))
            while not done:
                action = int(bot.replan(None if last == ACTIONS else last))
                rows.append((seen["image"], mission, last, action))
                seen, _, ended, cut, _ = env.step(action)
                last, done = action, ended or cut
            if on_progress is not None:
                on_progress(seed + 1)
    view, *columns = zip(*rows, strict=True)
    tensors = dict(
        zip(names, [torch.from_numpy(np.stack(view)), *map(torch.tensor, columns)], strict=True)
    )
    with atomic_path(path) as tmp:
        meta = {"missions": json.dumps(list(missions)), "sha256": _digest(tensors)}
        save_file(tensors, tmp, meta)
    return Steps(**tensors, missions=tuple(missions))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


Policy = Callable[[Tensor, list[str], Tensor], Tensor]


def play(level: str, episodes: int, policy: Policy, *, misled: bool = False) -> Tensor:
    """Play test episodes side by side; returns which ended in success, [episodes] bool.

    Args:
        policy: (views [B, 7, 7, 3], missions, actions before [B]) -> actions [B].
        misled: tell the policy another episode's mission.
    """
    with contextlib.ExitStack() as stack:
        envs = [stack.enter_context(environment(level)) for _ in range(episodes)]
        seen = [env.reset(seed=TEST_SEED + i)[0] for i, env in enumerate(envs)]
        missions = [s["mission"] for s in seen]
        told = [_another(missions, i) for i in range(episodes)] if misled else missions
        last = torch.full((episodes,), ACTIONS)
        won, alive = torch.zeros(episodes, dtype=torch.bool), list(range(episodes))
        while alive:
            views = torch.from_numpy(np.stack([seen[i]["image"] for i in alive]))
            actions = policy(views, [told[i] for i in alive], last[alive])
            last[alive] = actions
            for i, action in zip(tuple(alive), actions.tolist(), strict=True):
                seen[i], reward, ended, cut, _ = envs[i].step(action)
                if ended or cut:
                    won[i] = reward > 0
                    alive.remove(i)
    return won


def _another(missions: list[str], i: int) -> str:
    """The next mission that is not missions[i]."""
    others = (missions[(i + k) % len(missions)] for k in range(1, len(missions)))
    return next((m for m in others if m.split()[-2:] != missions[i].split()[-2:]), missions[i])
