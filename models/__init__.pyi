# The public names and where they live: type checkers read this, and `lazy_loader` loads each on first use.

from .config import DecoderConfig as DecoderConfig
from .decoder import Decoder as Decoder
from .language_model import DecoderLM as DecoderLM
from .loading.loading import load as load
from .loading.reward_loading import load_reward as load_reward
from .protocols import LanguageModel as LanguageModel
from .protocols import RewardModel as RewardModel
from .protocols import Tokenizer as Tokenizer
from .reward_model import RewardDecoder as RewardDecoder
from .step_form import StepForm as StepForm
from .table import PieceTokenizer as PieceTokenizer
from .table import TableLM as TableLM
from .table import TableReward as TableReward
from .weights import from_weights as from_weights
