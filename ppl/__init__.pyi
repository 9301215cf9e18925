# The public names and where they live: type checkers read this, and `lazy_loader` loads each on first use.

from . import calibration as calibration
from . import inference as inference
from . import models as models
from . import posterior as posterior
from . import tasks as tasks
from . import testing as testing
from .posterior.number import extract_number as extract_number
from .posterior.posterior import Posterior as Posterior
from .posterior.posterior import Stats as Stats
from .potentials.after import after as after
from .potentials.choice import choice as choice
from .potentials.combining import Composable as Composable
from .potentials.expert import expert as expert
from .potentials.grammar import grammar as grammar
from .potentials.json_schema import json_schema as json_schema
from .potentials.power import power as power
from .potentials.regex import regex as regex
from .potentials.text import text as text
from .potentials.tokens import tokens as tokens
from .program.generation import Generation as Generation
from .program.step import Step as Step
from .protocols import Context as Context
from .protocols import Move as Move
from .protocols import Potential as Potential
from .protocols import StateSpaceModel as StateSpaceModel
from .rewards.process_reward import process_reward as process_reward
from .rewards.reliability_plot import plot_reliability as plot_reliability
from .rewards.self_evaluation import self_evaluation as self_evaluation
from .rewards.text_reward import text_reward as text_reward

__version__: str
