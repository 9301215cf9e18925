"""Kernels: each takes a program and returns an algorithm whose `run(key)` gives a `Posterior`."""

from ponder.inference import resampling as resampling
from ponder.inference.best_of import best_of_n as best_of_n
from ponder.inference.driver import Algorithm as Algorithm
from ponder.inference.driver import Progress as Progress
from ponder.inference.entropic import entropic_smc as entropic_smc
from ponder.inference.exhaustive import exact as exact
from ponder.inference.gibbs import particle_gibbs as particle_gibbs
from ponder.inference.importance import importance_sampling as importance_sampling
from ponder.inference.sequential import smc as smc
from ponder.inference.voting import majority_vote as majority_vote
