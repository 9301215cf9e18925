"""Results: weighted traces, what can be asked of them, and how they are shown and kept."""

from ponder.posterior.posterior import Posterior as Posterior
from ponder.posterior.posterior import Stats as Stats
from ponder.posterior.posterior import Trace as Trace
