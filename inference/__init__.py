"""Kernels: each takes a program and returns an algorithm whose `run(key)` gives a `Posterior`."""

from ponder.inference import resampling as resampling
from ponder.inference.chains.particle_gibbs import particle_gibbs as particle_gibbs
from ponder.inference.exhaustive import exact as exact
from ponder.inference.particles.entropic_smc import entropic_smc as entropic_smc
from ponder.inference.particles.importance_sampling import importance_sampling as importance_sampling
from ponder.inference.particles.smc import smc as smc
from ponder.inference.running.algorithm import Algorithm as Algorithm
from ponder.inference.running.progress import Progress as Progress
from ponder.inference.search.best_of_n import best_of_n as best_of_n
from ponder.inference.search.majority_vote import majority_vote as majority_vote
