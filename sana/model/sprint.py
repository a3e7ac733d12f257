"""SANA-Sprint (arXiv:2503.09641): a student that draws in one to four steps, taught by a flow model.

Two kinds of update alternate. The student's (network): continuous-time consistency (sCM) along the teacher's path with
guidance, and the adversarial loss of LADD on the teacher's features. The discriminator's: its heads tell re-noised data
from re-noised samples of the student, and captions that belong to an image from those that do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sana.flow.trig import linear_time, trig, trig_field, x0_from_field
from sana.model.base import Optimisation, OptimizerFactory, Schedule, share_of_good, weighted_mean
from sana.model.frozen import Frozen, Place
from sana.model.teacher import start_student
from sana.model.text_to_image import TextToImage, compile_blocks
from sana.network.discriminator import FeatureDiscriminator
from sana.network.uncertainty import LogVariance
from sana.objective.adversarial import hinge_discriminator, hinge_generator, r1, roll_within
from sana.objective.consistency import consistency, consistency_tangent, semi_discrete, semi_discrete_end, tangent_norm
from sana.ops.random import normal, spread, uniform
from sana.types import Batch, Condition, Grid

Timestep = Callable[[Tensor], Tensor]


class SprintModule(TextToImage):
    """Distils `teacher` into `network`, which starts as the teacher does.

    A batch belongs to one kind of update, in turns: student, discriminator, student, ... `trainer.max_steps`, schedules
    and the warm-up of the tangent count updates of the student. A weight of 0 turns its term off.

    Args:
        network: the student; velocity of the linear path, with an embedding of the guidance scale.
        autoencoder, text_encoder, null_mask, seed, compile, frozen: see `sana.model.image.ImageModule`.
        teacher: frozen velocity of the linear path; None in a recipe that only draws.
        discriminator: heads on the teacher's features; None without adversarial loss.
        timestep: uniform numbers -> angles tau of the consistency loss.
        fake_timestep: of the points from which samples are made for the discriminator.
        noise_timestep: of the noise through which the discriminator sees data and samples.
        optimizer, schedule, clip_norm, ema_decay: of the student, see `Optimisation`.
        discriminator_optimizer, discriminator_schedule: of the heads, which are clipped alike.
        guidance: scales of the teacher's guidance, one drawn for each sample.
        scm_weight, adversarial_weight: of the student's two losses.
        r1_weight: of the penalty on the heads' gradient; 0 for none, as published. Not under FSDP.
        adversarial_start: updates of the student before the discriminator joins in; until then only the consistency
            loss is paid for. Published 0.
        mismatch: whether data under another sample's caption count as fake.
        tangent_warmup: updates of the student over which the derivative enters the tangent. Published 4,000 "steps",
            which count both kinds of update. The semi-discrete form has none.
        uncertainty: whether the consistency loss learns its scale by time.
        step: angle of the semi-discrete form, which compares ends of two points of a path; None: the continuous form,
            with its derivative.

    Raises:
        ValueError: a setting is out of range, or the parts do not fit together.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: nn.Module,
        text_encoder: nn.Module,
        teacher: nn.Module | None,
        discriminator: FeatureDiscriminator | None,
        timestep: Timestep,
        fake_timestep: Timestep,
        noise_timestep: Timestep,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        discriminator_optimizer: OptimizerFactory,
        discriminator_schedule: Schedule,
        *,
        guidance: Sequence[float],
        scm_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        r1_weight: float = 0.0,
        adversarial_start: int = 0,
        mismatch: bool = True,
        tangent_warmup: int = 2000,
        uncertainty: bool = True,
        step: float | None = None,
        clip_norm: float | None = 0.1,
        ema_decay: float | None = None,
        null_mask: Literal["own", "caption"] = "own",
        seed: int = 0,
        compile: bool = False,
        frozen: Place = "device",
    ) -> None:
        if min(scm_weight, adversarial_weight, r1_weight, tangent_warmup) < 0 or scm_weight + adversarial_weight == 0:
            raise ValueError(
                "scm_weight, adversarial_weight, r1_weight and tangent_warmup are not negative, and one of the first "
                f"two is positive; got {scm_weight}, {adversarial_weight}, {r1_weight} and {tangent_warmup}"
            )
        if adversarial_start < 0 or (adversarial_start and not scm_weight):
            raise ValueError(
                "adversarial_start is not negative, and 0 where scm_weight is 0 and nothing would be learnt before it; "
                f"got {adversarial_start}"
            )
        if step is not None and not 0 < step < math.pi / 2:
            raise ValueError(f"step is an angle in (0, pi/2) or null, got {step}")
        if not guidance or getattr(network, "guidance_embed", None) is None:
            raise ValueError(
                f"a student of SANA-Sprint embeds the guidance scale, one of a list; got network.guidance_embed="
                f"{getattr(network, 'guidance_embed', None) is not None} and model.guidance={list(guidance)}"
            )
        mine = Optimisation(optimizer, schedule, clip_norm, ema_decay)
        theirs = Optimisation(discriminator_optimizer, discriminator_schedule, clip_norm, None)
        plans = {"network": mine}
        if uncertainty and scm_weight:
            plans["uncertainty"] = replace(mine, ema_decay=None)
        if adversarial_weight and discriminator is not None:
            plans["discriminator"] = theirs
        parts = {"autoencoder": autoencoder, "text_encoder": text_encoder, "teacher": teacher}
        super().__init__(
            plans,
            network,
            Frozen(frozen, **parts),
            caption_dropout=0.0,
            null_mask=null_mask,
            seed=seed,
            compile=compile,
        )
        if teacher is not None:
            start_student(network, teacher)
            if compile:
                compile_blocks(teacher)
        self.uncertainty = LogVariance() if "uncertainty" in plans else None
        self.discriminator = discriminator if "discriminator" in plans else None
        self.timestep, self.fake_timestep, self.noise_timestep = timestep, fake_timestep, noise_timestep
        self.guidance = [float(g) for g in guidance]
        self.scm_weight, self.adversarial_weight, self.r1_weight = scm_weight, adversarial_weight, r1_weight
        self.mismatch, self.tangent_warmup, self.step = mismatch, tangent_warmup, step
        self.adversarial_start = adversarial_start
        self.verdict: dict[str, Tensor | float] = {}  # of the last update of the discriminator

    def trainables(self) -> dict[str, nn.Module]:
        """The student, whose updates count; the scale of its loss; the discriminator."""
        parts = {"network": self.network, "uncertainty": self.uncertainty, "discriminator": self.discriminator}
        return {name: part for name, part in parts.items() if part is not None}

    def on_fit_start(self) -> None:
        """As every recipe, once all that training needs is there.

        Raises:
            ValueError: a part is missing.
        """
        if "teacher" not in self.frozen:
            raise ValueError("model.teacher: training needs one, such as {_target_: sana.model.teacher.teacher, "
                             "ckpt: scenes}")  # fmt: skip
        if self.adversarial_weight and self.discriminator is None:
            raise ValueError("model.discriminator: needed unless model.adversarial_weight is 0")
        if self.r1_weight and self.device_mesh is not None:  # its second derivative would meet weights given back
            raise ValueError("model.r1_weight: not with strategy=fsdp, which has no second derivatives; set it to 0")
        super().on_fit_start()

    @property
    def phase(self) -> Literal["network", "discriminator"]:
        """Whose turn it is; told by the counters, so that a run that is gone on with knows it too."""
        if not self.adversarial or self.updates["network"] - self.adversarial_start <= self.updates["discriminator"]:
            return "network"
        return "discriminator"

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator has joined in."""
        return self.discriminator is not None and self.updates["network"] >= self.adversarial_start

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch of the student's or of the discriminator's loss."""
        self.begin_batch(batch.key)
        with self.timed("text"):
            condition = self.condition(batch)
        with self.timed("autoencoder"):
            x0 = self.latents(batch)
        with self.timed("model"):
            guided = replace(condition, guidance=self.scales(batch.index))
            if self.phase == "network":
                self.report |= self.verdict
                self._teach(x0, guided, batch)
            else:
                self._judge(x0, guided, batch)
                self.verdict = {**self.report, "train/discriminator/loss": self.report["train/discriminator/loss"]}
        self.finish_batch(len(batch.caption))

    def scales(self, index: Tensor) -> Tensor:
        """The guidance scales (b,) of the samples at these positions."""
        which = (uniform(self.seed, index, "guidance") * len(self.guidance)).long()
        return torch.tensor(self.guidance, device=index.device)[which]

    def field(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """The student's field (x, tau) -> F on the circle, in the type of x."""
        return trig_field(lambda x, t: self.network(x, t, condition))

    @torch.no_grad()
    def teacher_field(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """The teacher's field with guidance, ``u + g (c - u)``, at points of the circle; one call of the network.

        Args:
            x: (b, c, 1, h, w).
            tau: (b, 1).
            condition: captions and guidance scales.
        """
        assert condition.guidance is not None
        null = self.null_like(condition)
        masks = None if null.mask is None or condition.mask is None else torch.cat([null.mask, condition.mask])
        both = Condition(torch.cat([null.text, condition.text]), masks)
        with self.frozen.working("teacher", self.device) as (teacher, _):
            field = trig_field(lambda x, t: teacher(x, t, both))
            u, c = field(torch.cat([x, x]), torch.cat([tau, tau])).chunk(2)
        return u + condition.guidance.view(-1, 1, 1, 1, 1) * (c - u)

    def features(self, x0: Tensor, condition: Condition, index: Tensor, purpose: str) -> dict[int, Tensor]:
        """What the teacher's blocks make of latents behind noise, for the discriminator.

        Args:
            x0: (b, c, 1, h, w) data or samples.
            condition: captions; guidance is not looked at.
            index: (b,) positions, for the noise.
            purpose: of the noise; its angle is the same for all purposes.
        """
        assert self.discriminator is not None
        # Not spread evenly as the other angles are: then it would follow from the angle that the sample was made at.
        tau = self.noise_timestep(uniform(self.seed, index, "discriminator time"))[:, None]
        x = trig(x0, normal(self.seed, index, f"discriminator noise, {purpose}", tuple(x0.shape[1:])), tau)
        scale = 1 / (tau.cos() + tau.sin()).view(-1, 1, 1, 1, 1)
        plain = Condition(condition.text, condition.mask)
        with self.frozen.working("teacher", self.device) as (teacher, _):
            return teacher.features(x * scale, linear_time(tau), plain, self.discriminator.layers)

    def _teach(self, x0: Tensor, condition: Condition, batch: Batch) -> None:
        """The student's update."""
        index, tau = batch.index, self._angles(self.timestep, batch.index, "timestep")
        noise = normal(self.seed, index, "noise", tuple(x0.shape[1:]))
        points = [(trig(x0, noise, tau), tau)] if self.scm_weight else []
        if self.adversarial:
            points.append(self._start_of_fake(x0, index))
        aim = self._aim(*points[0], condition) if self.scm_weight else None
        # One call for both losses: the larger batch is the faster one, and weights that are sharded come once.
        x, angles = (torch.cat(parts) for parts in zip(*points, strict=True))
        students = self.field(_repeat(condition, len(points)))(x, angles).chunk(len(points))
        loss, others = x0.new_zeros(()), []
        if aim is not None:
            losses = self._consistency(students[0], aim, *points[0], condition)
            self.noted = {"t": tau, "loss": losses.detach()}
            term = weighted_mean(losses, batch.weight)
            self.report["train/scm"] = term.detach() / share_of_good(batch)
            loss = loss + self.scm_weight * term
            others = ["uncertainty"] if self.uncertainty is not None else []
        if self.adversarial:
            term = self._deceive(x0_from_field(*points[-1], students[-1]), condition, batch)
            self.report["train/generator"] = term.detach() / share_of_good(batch)
            loss = loss + self.adversarial_weight * term
        self.report["train/loss"] = loss.detach() / share_of_good(batch)
        aiming = 0 if aim is None else 1 if self.step is not None else 2  # a derivative costs two passes
        self._count(x0, condition, student=3 * len(points) + aiming, teacher=2 * (aim is not None))
        self.optimise("network", loss, *others)

    def _aim(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """What the consistency loss moves the student to: a tangent, or in the semi-discrete form an end."""
        with torch.no_grad():
            target = self.teacher_field(x, tau, condition)
            if self.step is not None:
                return semi_discrete_end(self.field(condition), x, tau, target, self.step)
            warmup = min(1.0, (self.updates["network"] + 1) / self.tangent_warmup) if self.tangent_warmup else 1.0
            with torch.compiler.set_stance("force_eager"):  # compiled code has no forward derivative
                tangent = consistency_tangent(self.field(condition), x, tau, target, warmup)
        self.report["train/tangent_norm"] = tangent_norm(tangent).mean()
        self.report["train/tangent_warmup"] = warmup
        return tangent

    def _consistency(self, student: Tensor, aim: Tensor, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        scale = None if self.uncertainty is None else self.uncertainty(linear_time(tau), condition.guidance)
        if self.step is None:
            return consistency(student, aim, tau, scale)
        return semi_discrete(x0_from_field(x, tau, student), aim, scale)

    def _start_of_fake(self, x0: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Points and angles from which the student makes a sample for the discriminator."""
        tau = self._angles(self.fake_timestep, index, "fake time")
        return trig(x0, normal(self.seed, index, "fake noise", tuple(x0.shape[1:])), tau), tau

    def _deceive(self, fake: Tensor, condition: Condition, batch: Batch) -> Tensor:
        """The student's adversarial loss, whose gradient stops at the samples: the heads get none."""
        assert self.discriminator is not None
        sample = fake.detach().requires_grad_()
        self.discriminator.eval()  # its power iteration goes on in its own updates
        losses = hinge_generator(self.discriminator(self.features(sample, condition, batch.index, "fake")).float())
        self.discriminator.train()
        term = weighted_mean(losses, batch.weight)
        (slope,) = torch.autograd.grad(term, sample)
        return term.detach() + (slope * (fake - sample.detach())).sum()

    def _judge(self, x0: Tensor, condition: Condition, batch: Batch) -> None:
        """The discriminator's update."""
        heads, index = self.discriminator, batch.index
        assert heads is not None
        with torch.no_grad():
            point = self._start_of_fake(x0, index)
            sets = {"real": x0, "fake": x0_from_field(*point, self.field(condition)(*point))}
            if self.mismatch:
                sets["mismatch"] = roll_within(x0, heads.group)
            seen = {name: self.features(x, condition, index, name) for name, x in sets.items()}
        if self.r1_weight:
            seen["real"] = {i: value.requires_grad_() for i, value in seen["real"].items()}
        logits = {name: heads(features).float() for name, features in seen.items()}
        fake = torch.cat([logits[name] for name in logits if name != "real"], dim=1)
        losses = 0.5 * hinge_discriminator(logits["real"], fake)
        if self.r1_weight:
            penalty = r1(logits["real"], list(seen["real"].values()))
            self.report["train/discriminator/r1"] = penalty.detach().mean()
            losses = losses + self.r1_weight * penalty
        loss = weighted_mean(losses, batch.weight)
        self.report["train/discriminator/loss"] = loss.detach() / share_of_good(batch)
        self.report |= {f"train/discriminator/{name}": value.detach().mean() for name, value in logits.items()}
        self._count(x0, condition, student=1, teacher=len(sets))
        self.optimise("discriminator", loss)

    def _angles(self, distribution: Timestep, index: Tensor, purpose: str) -> Tensor:
        """Angles (b, 1), which cover every batch evenly."""
        return distribution(spread(self.seed, index, purpose))[:, None]

    def _count(self, x0: Tensor, condition: Condition, student: int, teacher: int) -> None:
        """Add the operations of so many forward passes of each; a backward counts two."""
        count = getattr(self.network, "flops", None)
        if count is None or self.replaying:
            return
        b, _, f, h, w = x0.shape
        patch = int(getattr(self.network, "patch", 1))
        self.flops += (student + teacher) * b * count(Grid(f, h // patch, w // patch), condition.text.shape[1])


def _repeat(condition: Condition, n: int) -> Condition:
    """The conditions of n batches that share them."""
    parts = (condition.text, condition.mask, condition.guidance)
    text, mask, guidance = (None if part is None else torch.cat([part] * n) for part in parts)
    assert text is not None
    return Condition(text, mask, guidance)
