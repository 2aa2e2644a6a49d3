"""Where a fresh model gets its first values from: nothing, a BERT, an earlier run, or the checkpoint being resumed.

Section 3.1 (BERT for the Q-Former) and the hand-over from stage 1 to stage 2 (section 3.3). What is read is read before
the model is built; LAVIS reports nothing of what it loads, here every tensor's origin goes to the log and `init.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import OWN_WEIGHTS, STAGE1_ONLY, STAGE2_ONLY, WEIGHTS, load_weights
from blip2train.cli import check
from blip2train.cli.config import build
from blip2train.model.init_report import InitReport, report_part, report_pretrained, report_random
from blip2train.model.precision import check_masters
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from blip2train.model.qformer.bert_checkpoint import BertCheckpoint

log = logging.getLogger(__name__)


class InitialWeights:
    """Fills a freshly built model as a config says, and keeps the report of it.

    Args:
        config: a training config.
        checkpoint: the checkpoint folder of a run that is continued; nothing else is read then.
        words: vocabulary of the Q-Former's tokenizer by id, compared with BERT's where one is read.

    Raises:
        ConfigError, CheckpointError: there is no such BERT or checkpoint, or it cannot be read.
    """

    def __init__(self, config: DictConfig, checkpoint: Path | None, words: Sequence[str]) -> None:
        self.report: InitReport | None = None
        self._stage = check.stage_number(config)
        self._words = words
        self._resumed = checkpoint is not None
        self._pretrained = any(config.model.vision_encoder.get(key) for key in ("pretrained", "weights"))
        self._weights = None if checkpoint is None else checkpoint / WEIGHTS
        self._bert: BertCheckpoint | None = None
        if checkpoint is None and config.init_from not in (None, "scratch"):
            self._weights = find_checkpoint(RunDir.open(config.init_from, where="init_from=")) / WEIGHTS
        elif checkpoint is None and config.init_qformer is not None:
            from blip2train.model.qformer.bert_checkpoint import read_bert

            self._bert = read_bert(config.init_qformer)
            self._try_bert(config)

    def __call__(self, model: nn.Module) -> None:
        """Fill the model, log where its tensors came from, and refuse one that would train in half precision."""
        report = self._fill(model)
        self._bert = None  # its tensors are the model's now
        self.report = report_pretrained(report, "vision_encoder") if self._pretrained else report
        check_masters(model)
        log.info(self.report.summary())

    def _try_bert(self, config: DictConfig) -> None:
        """Find a BERT of other sizes out before the encoder is fetched and the model built."""
        import torch

        from blip2train.model.qformer.bert_init import init_from_bert

        assert self._bert is not None
        with torch.device("meta"):
            qformer = build(config.model.qformer)
        if self._stage == 2:
            qformer.drop_text_branch()
        init_from_bert(qformer, self._bert, self._words)

    def _fill(self, model: nn.Module) -> InitReport:
        if self._weights is not None:
            leave: tuple[str, ...] = ()
            fresh: tuple[str, ...] = ()
            if not self._resumed:
                leave, fresh = (STAGE1_ONLY, STAGE2_ONLY) if self._stage == 2 else ((), ())
                fresh += OWN_WEIGHTS
            return load_weights(model, self._weights, leave=leave, fresh=fresh)
        if self._bert is not None:
            from blip2train.model.qformer.bert_init import init_from_bert
            from blip2train.model.qformer.qformer import QFormer

            qformer = model.get_submodule("qformer")
            assert isinstance(qformer, QFormer)
            return report_part(model, "qformer", init_from_bert(qformer, self._bert, self._words))
        return report_random(model)

    def as_json(self) -> dict[str, Any]:
        """The whole report, for `init.json`."""
        assert self.report is not None, "the model has not been built yet"
        return self.report.as_json()
