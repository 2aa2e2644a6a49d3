"""TensorBoard in the run folder: a resumed training goes on in the same curves, without the steps that it repeats.

Lightning's logger, told where it resumes; plain, it draws the repeated steps twice. LAVIS has none.
"""

from __future__ import annotations

from pytorch_lightning.loggers import TensorBoardLogger


def tensorboard_logger(folder: str, *, resume_step: int) -> TensorBoardLogger:
    """A logger that writes event files into `folder`, and nothing beside them in folders of its own naming.

    Args:
        folder: of the event files, those of the resumed run included.
        resume_step: optimizer step that training goes on from; what the files hold of later steps is not shown.
    """
    purge_step = resume_step + 1 if resume_step else None
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
