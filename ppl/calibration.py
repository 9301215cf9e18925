"""The public name of `ponder.rewards.calibration`: do scores mean what they say, and maps that make them."""

from ponder.rewards.calibration import PiecewiseLinear as PiecewiseLinear
from ponder.rewards.calibration import Reliability as Reliability
from ponder.rewards.calibration import Temperature as Temperature
from ponder.rewards.calibration import expected_calibration_error as expected_calibration_error
from ponder.rewards.calibration import isotonic as isotonic
from ponder.rewards.calibration import quantile as quantile
from ponder.rewards.calibration import reliability as reliability
from ponder.rewards.calibration import temperature as temperature
