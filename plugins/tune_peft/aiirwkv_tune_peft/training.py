"""State tuning: the loop is Lightning's, the model and its loss are ours. For the training process only."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from aiirwkv.errors import BadRequest, Conflict
from aiirwkv_llm_rwkv.network.checkpoint import load
from aiirwkv_llm_rwkv.network.model import RWKV
from aiirwkv_llm_rwkv.shelf.library import Files
from aiirwkv_llm_rwkv.shelf.tuned import CARD, STATE, StateCard
from aiirwkv_llm_rwkv.tokenizer import Tokenizer
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor

from .batches import Batch, Batches, collate
from .data import Example, Sample, encode, pack, split
from .runs import Event, Order, Run

__all__ = ["train"]

WARM_UP = 10
"""Steps in which the learning rate rises."""
LAST = 0.01
"""What is left of the learning rate at the end."""

Say = Callable[[Event], None]


def train(order: Order, run: Run, files: Files, examples: Sequence[Example], say: Say) -> None:
    """Carry out an order; leaves the tuned state and its card in the run's folder. Raises errors of ours."""
    request = order.request
    device, dtype = _place(order.device)
    torch.manual_seed(request.seed)
    model = load(files.weights, device, dtype)
    torch.set_num_threads(order.threads or _threads(model))
    vocabulary = files.vocabulary(model.sizes.vocabulary)
    try:
        tokenizer = Tokenizer.load(vocabulary)
    except (OSError, ValueError) as error:
        raise Conflict(f"the vocabulary {vocabulary} cannot be used: {error}") from None
    samples = encode(examples, files.card, tokenizer, request.batch_tokens)
    learnt, held_out = split(samples, request.validation, request.seed)
    assert request.learning_rate is not None
    tuning = Tuning(model, request.learning_rate, request.steps)

    before = evaluate(model, held_out, request.batch_tokens)
    say(Event(0, f"loss {before:.2f} on {len(held_out)} examples held out"))
    _fit(tuning, Batches(learnt, request.batch_tokens, request.steps, request.seed, device), order, run, say)
    after = evaluate(model, held_out, request.batch_tokens)
    if not math.isfinite(after):
        raise _diverged(request.steps, tuning.learning_rate)

    folder = run.result.with_suffix(".new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    states = {name.removeprefix("model."): tensor.cpu() for name, tensor in tuning.learnt().items()}
    save_file(states, folder / STATE)
    card = StateCard(
        name=request.name,
        version=model.version,
        method=request.method,
        base=order.base,
        base_sha256=order.base_sha256,
        precision=str(dtype).removeprefix("torch."),
        owner=order.owner,
        created=time.time(),
        run=order.run,
        data_sha256=hashlib.sha256(run.data.read_bytes()).hexdigest(),
        examples=len(learnt),
        held_out=len(held_out),
        seed=request.seed,
        steps=request.steps,
        learning_rate=tuning.learning_rate,
        batch_tokens=request.batch_tokens,
        loss_before=before,
        loss_after=after,
        seconds=tuning.seconds,
        resumed=tuning.resumed,
        parameters=sum(tensor.numel() for tensor in states.values()),
        sha256={STATE: hashlib.sha256((folder / STATE).read_bytes()).hexdigest()},
    )
    (folder / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(card)))
    shutil.rmtree(run.result, ignore_errors=True)
    os.replace(folder, run.result)


class Tuning(lightning.LightningModule):  # type: ignore[misc]
    """What Lightning trains: a frozen model with an initial wkv state for every layer."""

    def __init__(self, model: RWKV, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds only what is learnt
        self.model = model
        self.learning_rate, self.steps = learning_rate, steps
        self.seconds = 0.0
        self.resumed: list[int] = []
        given = [block.att.time_state for block in model.layers]
        for state, start in zip(model.add_time_state(), given, strict=True):
            if start is not None:  # the base brings a state of its own
                state.data.copy_(start)

    def configure_optimizers(self) -> Any:
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """A short rise, then half a cosine."""
        rest = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))
        return min(1.0, (step + 1) / WARM_UP) * (LAST + (1 - LAST) * rest)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = answer_loss(self.model, batch)
        if not torch.isfinite(loss):
            raise _diverged(self.global_step + 1, self.learning_rate)
        return loss

    def learnt(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.learnt()
        checkpoint["seconds"], checkpoint["resumed"] = self.seconds, self.resumed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds = checkpoint["seconds"]
        self.resumed = [*checkpoint["resumed"], checkpoint["global_step"]]


class Report(lightning.Callback):  # type: ignore[misc]
    """Says how it goes, about four times a second, and stops the clock."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._losses: list[float] = []
        self._tokens = 0
        self._last = self._said = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._last = self._said = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        assert isinstance(module, Tuning)
        now = time.monotonic()
        module.seconds += now - self._last
        self._last = now
        self._losses.append(float(outputs["loss"]))
        self._tokens += int((batch[0] != 0).sum())
        if now - self._said > 0.25 or trainer.global_step == module.steps:
            loss, rate = sum(self._losses) / len(self._losses), self._tokens / (now - self._said)
            self._say(Event(trainer.global_step, f"loss {loss:.2f} · {rate:.0f} tokens/s"))
            self._losses, self._tokens, self._said = [], 0, now


def _fit(tuning: Tuning, batches: Batches, order: Order, run: Run, say: Say) -> None:
    """Train, from the run's checkpoint if there is one."""
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    checkpoints = ModelCheckpoint(
        run.path,
        run.checkpoint.stem,
        train_time_interval=timedelta(seconds=order.checkpoint_seconds),
        enable_version_counter=False,
    )
    device = next(tuning.parameters()).device
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        callbacks=[Report(say), checkpoints],  # in this order: a checkpoint holds the seconds of its last step
        plugins=[LightningEnvironment()],  # not what a cluster's variables would suggest
        max_steps=order.request.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.path,
    )
    trainer.fit(tuning, batches, ckpt_path=run.checkpoint if run.checkpoint.is_file() else None)


def answer_loss(model: RWKV, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross entropy of the tokens that are to be learnt, in nats; the head sees no others."""
    tokens, learnt = batch
    hidden, _ = model.hidden(tokens[:, :-1])
    return F.cross_entropy(model.head(hidden[learnt]).float(), tokens[:, 1:][learnt], reduction=reduction)


@torch.no_grad()
def evaluate(model: RWKV, samples: Sequence[Sample], limit: int) -> float:
    """The mean loss of all answer tokens."""
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].tokens))
    total, count = 0.0, 0
    for batch in pack(order, [len(sample.tokens) for sample in samples], limit):
        tokens, learnt = collate([samples[index] for index in batch], model.emb.weight.device)
        total += float(answer_loss(model, (tokens, learnt), "sum"))
        count += int(learnt.sum())
    return total / count


def _diverged(step: int, rate: float) -> BadRequest:
    return BadRequest(
        f"tune: the loss is not a number any more at step {step}; try a smaller learning_rate than {rate:g}"
    )


def _place(name: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the precision in which models are served on it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise Conflict(f"plugins.tune_peft.device is {name!r}, which cannot be used here: {reason}") from None
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


def _threads(model: RWKV) -> int:
    """Half the cores; one for a small model, whose operations are too short to be worth sharing out."""
    return 1 if model.sizes.width < 512 else max(1, (os.cpu_count() or 1) // 2)
