"""Training: the configuration of a run, one step, the loop."""

from npdrt.train.config import Config
from npdrt.train.loop import Reporter, Summary
from npdrt.train.opened import Evaluation, Run, open_run
from npdrt.train.run import resume, train

__all__ = ["Config", "Evaluation", "Reporter", "Run", "Summary", "open_run", "resume", "train"]
