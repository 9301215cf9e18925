"""Kernels: each takes a program and returns an algorithm whose `run(key)` gives a `Posterior`."""

from ponder.inference import resampling as resampling
from ponder.inference.driver import Algorithm as Algorithm
from ponder.inference.driver import Progress as Progress
from ponder.inference.exhaustive import exact as exact
from ponder.inference.importance import importance_sampling as importance_sampling
from ponder.inference.sequential import smc as smc
