"""Recipe `vlmp`: behaviour cloning of BabyAI's expert from instruction and egocentric view.

Success rate in episodes of seeds that training never used, beside a random policy's and beside that
of the same policy told another episode's instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmm.models import Tokenizer
from fusedmm.models.vlmp import VLMP, VLMPConfig
from fusedmm.train import console
from fusedmm.train.babyai import ACTIONS, expert_steps, play
from fusedmm.train.config import LoopConfig
from fusedmm.train.loop import autocast, device
from fusedmm.train.sampling import step_seed
from fusedmm.train.systems.base import Figure, Picture, Sources, System


@dataclass(frozen=True)
class VlmpRecipe:
    """Everything that decides the numbers of this recipe."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, batch_size=128, lr=2e-3, compare_steps=16)
    )
    model: VLMPConfig = field(default_factory=VLMPConfig)
    level: str = "BabyAI-GoToLocal-v0"
    episodes: int = 4000
    test_episodes: int = 200


class Vlmp(System):
    """The policy on a BabyAI level."""

    Recipe = VlmpRecipe
    about = "instruction and egocentric view to action: behaviour cloning of BabyAI's expert"
    op = "co_attention"

    def __init__(self, recipe: VlmpRecipe, sources: Sources, backend: str | None = None) -> None:
        self.recipe = recipe
        with console.meter("watch the expert", recipe.episodes) as meter:
            self.steps = expert_steps(
                sources.cache, recipe.level, recipe.episodes, on_progress=meter.update
            )
        self.tokenizer = Tokenizer.train(
            self.steps.missions,
            vocab_size=recipe.model.vocab_size,
            length=recipe.model.max_position,
        )
        self.tokens = self.tokenizer.encode(self.steps.missions)
        torch.manual_seed(step_seed(recipe.loop.seed, 0, stream=2))
        config = replace(recipe.model, vocab_size=self.tokenizer.vocab_size, actions=ACTIONS)
        self.model = VLMP(config, backend=backend).to(device())

    def logits(self, view: Tensor, tokens: Tensor, last: Tensor) -> Tensor:
        """Action logits of CPU inputs, [B, ACTIONS] fp32."""
        view, tokens, last = (t.to(device()) for t in (view.long(), tokens, last))
        return self.model(view, tokens, tokens != self.tokenizer.pad, last).float()

    def loss(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy to the expert's action."""
        loop, s = self.recipe.loop, self.steps
        g = torch.Generator().manual_seed(step_seed(loop.seed, step, stream=3))
        rows = torch.randint(len(s.action), (loop.batch_size,), generator=g)
        logits = self.logits(s.view[rows], self.tokens[s.mission[rows]], s.last[rows])
        return {"loss": F.cross_entropy(logits, s.action[rows].to(logits.device))}

    @torch.no_grad()
    def act(self, view: Tensor, missions: list[str], last: Tensor) -> Tensor:
        """The likeliest action of each."""
        self.model.eval()
        with autocast(self.recipe.loop.precision):
            return self.logits(view, self.tokenizer.encode(missions), last).argmax(dim=-1).cpu()

    def evaluate(self) -> list[Figure]:
        """Success rates."""
        level, n = self.recipe.level, self.recipe.test_episodes
        g = torch.Generator().manual_seed(0)

        def chance(view: Tensor, missions: list[str], last: Tensor) -> Tensor:
            return torch.randint(ACTIONS, (len(view),), generator=g)

        random = float(play(level, n, chance).double().mean())
        own = float(play(level, n, self.act).double().mean())
        misled = float(play(level, n, self.act, misled=True).double().mean())
        return [
            Figure("success", own, random, "random actions", n),
            Figure("success, told another mission", misled, random, "random actions", n),
        ]

    def gallery(self) -> list[Picture]:
        """First views of training episodes with the action the policy takes there."""
        s = self.steps
        rows = (s.last == ACTIONS).nonzero()[:24, 0]
        missions = [s.missions[i] for i in s.mission[rows].tolist()]
        said = self.act(s.view[rows], missions, s.last[rows])
        names = ("left", "right", "forward", "pick up", "drop", "toggle", "done")
        out = []
        for row, mission, action in zip(rows.tolist(), missions, said.tolist(), strict=True):
            right = action == int(s.action[row])
            out.append(Picture(_drawn(s.view[row]), f"{mission}: {names[action]}", right))
        return out


def _drawn(view: Tensor) -> Tensor:
    """A view as a picture: the colour of what stands in each cell, [3, 56, 56]."""
    colours = torch.tensor(
        [[0.8, 0.2, 0.2], [0.3, 0.7, 0.2], [0.2, 0.4, 0.9], [0.6, 0.4, 0.7], [0.95, 0.85, 0.2],
         [0.6, 0.6, 0.6]]
    )  # fmt: skip
    kind, colour = view[..., 0].long(), view[..., 1].long().clamp(max=5)
    pixels = colours[colour]
    pixels = torch.where((kind == 1)[..., None], torch.ones(3), pixels)  # empty floor
    pixels = torch.where((kind == 0)[..., None], torch.full((3,), 0.15), pixels)  # unseen
    return pixels.permute(2, 1, 0).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
