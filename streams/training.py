"""Training with Lightning: truncated backpropagation through a carried state.

    lightning.Trainer(max_steps=1000).fit(StreamModule(config), StreamDataModule(config))

`train` does the same in a folder, with checkpoints, metrics and model folders.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn

from wakesleep.streams.config import as_dict
from wakesleep.streams.distractors import Pool, Ring, collect, empty_pool, own, pasts_of
from wakesleep.streams.errors import Refused, TrainingFailed
from wakesleep.streams.optimizers import make_optimizer, part_norms
from wakesleep.streams.ranks import ALONE, Ranks
from wakesleep.streams.rng import rng_states, set_rng_states
from wakesleep.streams.teacher import admission_loss, fact_ranking, marked
from wakesleep.streams.training_batch import Batch
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import (
    Source,
    StreamDataModule,
    answer_kinds,
    text_tokenizer,
)
from wakesleep.streams.training_draws import Blind, Draw, draw_blind, draw_step, never
from wakesleep.streams.training_health import GateMeans, add_health
from wakesleep.streams.training_key_space import KeySpaces
from wakesleep.streams.training_metrics import (
    SKIPPED,
    Means,
    add_answers,
    add_losses,
    counted,
    measured,
)
from wakesleep.streams.training_run import RunFolder
from wakesleep.streams.training_samples import sample_answer
from wakesleep.streams.training_start import start_from, try_mixture
from wakesleep.streams.training_trainer import make_trainer
from wakesleep.streams.unroll import TokenLoss, Unrolled, last_stored, next_token_loss, unroll
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import StreamState, detach, flatten, to, unflatten

__all__ = ["StreamDataModule", "StreamModule", "TrainingFailed", "prepare", "train"]

CHECKPOINT_KEY = "wakesleep"
VERSION = 3  # of what is under that key
VALIDATION = 1 << 41  # the draws of validation batches are numbered from here


class Evaluated(NamedTuple):
    means: dict[str, float]
    sample: str | None  # a question, and what was answered


class StreamModule(lightning.LightningModule):
    """The model, its losses, and everything that one step hands to the next."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config, self.kinds = config, answer_kinds(config)
        self.model = TTLModel(config.model)
        # plain attributes, not buffers: DDP would give every rank the buffers of rank 0
        self.cursor = 0  # number of the next batch
        self.state: StreamState | None = None  # what the lanes carry, detached
        self.pool = empty_pool(self.model.init_state(1), config.admission.distractor_pool)
        self.means = Means(counted(self.kinds))
        self._tokenizer = text_tokenizer(config)
        self.ranks = ALONE
        self._gates, self._key_spaces = GateMeans(self.model), KeySpaces(self.model)
        self._failed: TrainingFailed | None = None  # in this step; raised when all ranks know
        self._ending = False  # somebody ends the run behind this step
        self._rng: dict[str, Any] | None = None  # of a checkpoint, until training starts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Unroll the segments of a batch; the loss of its tokens and of the admission head."""
        if batch.cursor != self.cursor:
            raise RuntimeError(f"data and memory are out of step: {batch.cursor}, {self.cursor}")
        admission, recompute = self.config.admission, self.config.train.recompute
        blind = draw_blind(self.config, batch.cursor)
        if blind is not None:
            blind = Blind(*(part.to(self.device) for part in blind))
            batch = batch._replace(weight=self._weigh(batch.weight, blind.judged))
        hidden = None if blind is None else self.ranks.mine(blind.tokens)
        batch, draw, total = self._deal(batch.cursor, batch)
        start, floor = self._start(draw, self.state), admission.threshold
        self._gates.start()
        if self.config.train.sleep_drop:
            self._key_spaces.start()
        read = unroll(
            self.model, batch, start, draw, self.pool, floor, recompute, hidden, self.ranks
        )
        tokens = self._next_token(read, batch, total, hidden)
        loss = tokens.loss
        if draw.keep_all and self.config.tokens_before(batch.cursor) >= admission.teach_tokens:
            loss = loss + admission.weight * self._teach(read, batch)
        self._failed = self._failed or self._fault(loss, tokens, read)
        self._count(self.means, tokens, read, batch, draw)
        if self._trainer is not None:  # there is none where a step alone is called
            self.log("loss", tokens.loss.detach(), prog_bar=True)
        self._gates.add_to(self.means)
        add_health(self.means, read.state, read.surprise)
        if self.config.train.sleep_drop:  # on every rank, or those that wait would wait for ever
            self._show_key_spaces(read, batch, draw)
        if self.config.carries:
            self.state = detach(read.state)
        elif self.config.admission.distractor_share:
            turn, passed = batch.cursor, draw.passes
            found = (self.pool, read.state, read.foreign)
            self.pool = collect(*found, turn=turn, passed=passed, ranks=self.ranks)
        self.cursor += 1
        return loss

    @torch.no_grad()
    def evaluate(self, source: Source, batches: int) -> Evaluated:
        """Losses and answers on the first batches of a source; nothing of the training changes."""
        means = Means([*measured(self.kinds), *SKIPPED]).to(self.device)
        state, sample = None, None
        self.model.eval()
        for number in range(batches):
            batch = self.transfer_batch_to_device(source.batch(number), self.device, 0)
            batch, draw, total = self._deal(VALIDATION + number, batch)
            start = self._start(draw, state)
            read = unroll(self.model, batch, start, draw, self.pool, ranks=self.ranks)
            state = read.state if self.config.carries else None
            tokens = self._next_token(read, batch, total)
            self._count(means, tokens, read, batch, draw)
            means.update("nonfinite_rows", read.nonfinite)
            sample = sample or sample_answer(batch, tokens, self._tokenizer)
        self.model.train()
        return Evaluated(means.take(), sample)

    def validation_step(self, source: Source, batch_idx: int) -> None:
        """Evaluate when Lightning says so; in a folder, `RunFolder` does."""
        means = self.evaluate(source, self.config.train.validation_batches).means
        found = {f"val_{name}": value for name, value in means.items()}
        self.log_dict(found, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and the schedule with one step of it per optimiser step."""
        optim = self.config.optim
        optimizer = make_optimizer(self.model, optim)
        total = self.trainer.max_steps if self.trainer.max_steps > 0 else self.config.total_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: optim.rate(s, total))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_after_backward(self) -> None:
        """From the next step on, queries and keys are seen by what this one has shown."""
        self._key_spaces.follow()

    def on_train_batch_end(self, outputs, batch: Batch, batch_idx: int) -> None:
        """Let whoever ends the run wait for the step: no checkpoint has half of its gradient."""
        trainer, whole = self.trainer, (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self._ending = self._ending or trainer.should_stop
        trainer.should_stop = self._ending and (whole or trainer.is_last_batch)

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip by the norm of the whole gradient, note norms, stop where one is not finite."""
        if self.ranks.any(self._failed is not None, self.device):
            raise TrainingFailed(self.ranks.first(str(self._failed or "")))
        limit, norms = gradient_clip_val or math.inf, part_norms(self.model)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True))
        if not math.isfinite(norm):
            bad = [n for n, p in self.model.named_parameters() if not _finite(p.grad)]
            raise self._failure(f"the gradient of {', '.join(bad[:3])}")
        self.means.update("grad_norm", norm)
        for part, norm in norms.items():
            self.means.update(f"grad_norm_{part}", norm)

    def setup(self, stage: str) -> None:
        """Find this process's place among those of the run.

        Raises:
            Refused: the lanes cannot be dealt to them.
        """
        self.ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        self.ranks.check(self.config.train.lanes)

    def on_train_start(self) -> None:
        """Random numbers go on where the checkpoint was made, distractors on the model's device."""
        self._failed = None
        schedule = self.lr_schedulers()  # of a run that may have been made longer
        for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * schedule.lr_lambdas[0](schedule.last_epoch)
        self.pool = self.pool.to(self.device)
        if self._rng is not None:
            set_rng_states(self._rng)
            self._rng = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of, in plain types, of the lanes of all processes."""
        state = self.ranks.gather(self.state)
        for sums in (self.means.sums, self.means.weights):  # from now on the first one has them
            merged = self.ranks.sum(sums)
            sums.copy_(merged if self.ranks.rank == 0 else torch.zeros_like(merged))
        checkpoint[CHECKPOINT_KEY] = {
            "version": VERSION,
            "cursor": self.cursor,
            "state": None if state is None else flatten(state),
            "pool": [ring._asdict() for ring in self.pool.rings],
            "pool_written": self.pool.written,
            "pasts": None if self.pool.pasts is None else flatten(self.pool.pasts),
            "means": [self.means.sums.cpu(), self.means.weights.cpu()],
            "rng": rng_states(),
            "model": as_dict(self.config.model),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            Refused: the checkpoint is another program's or another model's.
        """
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None or saved["version"] != VERSION:
            raise Refused("it was not written by this version of `wakesleep train`")
        if saved["model"] != as_dict(self.config.model):
            raise Refused("it belongs to a model with another config")
        self.cursor, self._rng = saved["cursor"], saved["rng"]
        for sums, kept in zip((self.means.sums, self.means.weights), saved["means"], strict=True):
            sums.copy_(kept if self.ranks.rank == 0 else torch.zeros_like(kept))
        like = self.model.init_state(self.config.train.lanes)
        if saved["state"] is not None:
            self.state = self.ranks.mine(unflatten(like, saved["state"]))
        pasts = None if saved["pasts"] is None else unflatten(pasts_of(like), saved["pasts"])
        rings = tuple(Ring(**ring) for ring in saved["pool"])
        self.pool = Pool(rings, saved["pool_written"], pasts)

    def _deal(self, number: int, batch: Batch) -> tuple[Batch, Draw, Tensor]:
        """This rank's lanes of a batch and of its draws, and what its loss is divided by."""
        draw, total = self._draw(number, batch), batch.weight.sum() / self.ranks.world
        mine = self.ranks.lanes(self.config.train.lanes)
        return batch.part(mine), draw.part(mine), total

    def _draw(self, number: int, batch: Batch) -> Draw:
        if self.config.carries:
            return never(self.config.train.segments_per_step)
        facts = batch.fact.sum(1).cpu().numpy()
        return draw_step(self.config, number, self.pool.size, facts).to(self.device)

    def _start(self, draw: Draw, carried: StreamState | None) -> StreamState:
        if carried is not None:
            return to(carried, self.device)
        lanes = self.config.train.lanes
        fresh = self.model.init_state(lanes, window=draw.window, capacity=draw.capacity)
        return self.ranks.mine(fresh)

    def _show_key_spaces(self, read: Unrolled, batch: Batch, draw: Draw) -> None:
        """Keys of stores that select, and questions to stores that nothing was taken from."""
        asks = batch.recalled > 0
        if draw.sleeps is not None:
            asks = asks & ~draw.sleeps.any(0)[:, None]
        where = (read.position, asks, self.model.window_of(read.state))
        self._key_spaces.take(read.state, *where, selects=not draw.keep_all, ranks=self.ranks)

    def _weigh(self, weight: Tensor, judged: Tensor) -> Tensor:
        return torch.where(judged, weight * self.config.train.blind_weight, weight)

    def _next_token(
        self, read: Unrolled, batch: Batch, total: Tensor, blind: Tensor | None = None
    ) -> TokenLoss:
        output, z_loss = self.model.embedding.weight, self.config.train.z_loss
        return next_token_loss(read.hidden, output, batch, z_loss, blind, total)

    def _teach(self, read: Unrolled, batch: Batch) -> Tensor:
        """The admission loss of a step whose store kept everything."""
        admission, chunk = self.config.admission, self.config.model.chunk
        asked = torch.where(batch.recalled > 0, read.position, -1).amax(1)
        until = last_stored(
            asked, chunk, self.model.window_of(read.state)
        )  # what the last answer could read

        def judged(position: Tensor) -> Tensor:
            return own(position, read.foreign) & (position <= until[:, None, None])

        def spared(position: Tensor) -> Tensor:
            return marked(position, read.stored, batch.value)

        loss, metrics = admission_loss(
            read.state,
            judged,
            spared,
            threshold=admission.threshold,
            positive_weight=admission.positive_weight,
            ranks=self.ranks,
        )
        self.means.update("loss_admission", float(loss.detach()))
        for name, value in metrics.items():
            self.means.update(name, value)
        return loss

    def _count(
        self, means: Means, tokens: TokenLoss, read: Unrolled, batch: Batch, draw: Draw
    ) -> None:
        """Add a step's values for people; means over tokens or answers are weighted by those."""
        chunk, window = self.config.model.chunk, self.model.window_of(read.state)
        reach = window + chunk
        add_losses(means, batch, tokens, self._token_bytes(), reach)
        answered = (batch, tokens.right, tokens.stale, self.kinds, reach, draw.keep_all)
        add_answers(means, *answered)
        until = last_stored(read.state.position, chunk, window)
        facts = fact_ranking(read.state, read.stored, batch.fact, until, draw.keep_all)
        for name, value in facts.items():
            means.update(name, value)

    def _token_bytes(self) -> Tensor | None:
        if self._tokenizer is None:
            return None
        return torch.from_numpy(self._tokenizer.lengths).to(self.device)

    def _fault(self, loss: Tensor, tokens: TokenLoss, read: Unrolled) -> TrainingFailed | None:
        if _finite(loss) and not read.nonfinite:
            return None
        tensors = {
            **dict(self.model.named_parameters()),
            "the hidden states": read.hidden,
            "the next-token loss": tokens.loss,
            "the admission loss": loss,
        }
        inside = f"{read.nonfinite} rows of layers' inputs"  # masked, so not to be seen outside
        return self._failure(next((n for n, x in tensors.items() if not _finite(x)), inside))

    def _failure(self, what: str) -> TrainingFailed:
        return TrainingFailed(
            f"step {self.global_step + 1}, batch {self.cursor}: not finite: {what}\n"
            "The last checkpoint is unharmed. A lower optim.lr or optim.clip may help."
        )


class Run(NamedTuple):
    """A run of which everything was checked and nothing was written."""

    module: StreamModule
    data: StreamDataModule
    trainer: lightning.Trainer
    folder: RunFolder

    def carry_out(self) -> dict[str, Any]:
        """Train; return what the run left, on the first rank:

        `{"output", "steps", "model_sha256", "reads_text", "run_id", "resumed_at"}`.

        Raises:
            TrainingFailed: a loss or gradient is not finite.
            Stopped: a signal came; what was trained is saved.
        """
        first = self.trainer.is_global_zero
        checkpoint = self.folder.open(write=first)
        with warnings.catch_warnings(), self.folder.signals:
            warnings.simplefilter("ignore")  # Lightning's advice on what we do not have
            self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=True)
        return self.folder.close(self.module.model, self.trainer.global_step) if first else {}


def prepare(config: TrainConfig, output: Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Load, build and check everything that a run in the folder `output` needs.

    Raises:
        Refused: the folder holds a run and `resume` is false, or a run with other settings;
            train.start is a model of another config; data or trainer.* that cannot be.
    """
    data = StreamDataModule(config)
    if config.data.kind == "mixture":
        try_mixture(data.source, config)
    folder = RunFolder(config, output, data, quiet=quiet)
    if config.threads:
        torch.set_num_threads(config.threads)
    lightning.seed_everything(config.seed, verbose=False)
    module = StreamModule(config)
    trainer = make_trainer(config, folder)
    if config.train.start is not None:
        start_from(module.model, config)
    make_optimizer(module.model, config.optim)  # one that cannot be is refused here
    Ranks(trainer.global_rank, trainer.world_size).check(config.train.lanes)
    if trainer.is_global_zero:  # the others begin when it has made the folder
        folder.check(module, resume)
    return Run(module, data, trainer, folder)


def train(config: TrainConfig, output: Path, *, resume: bool = False) -> dict[str, Any]:
    """Prepare a run and carry it out; raises what both do."""
    return prepare(config, output, resume=resume).carry_out()


def _finite(x: Tensor | None) -> bool:
    return x is None or bool(torch.isfinite(x).all())
