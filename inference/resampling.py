"""The public name of `ponder.inference.particles.resampling`: resampling schemes."""

from ponder.inference.particles.resampling import Resampling as Resampling
from ponder.inference.particles.resampling import by_name as by_name
from ponder.inference.particles.resampling import effective_sample_size as effective_sample_size
from ponder.inference.particles.resampling import keep_survivors as keep_survivors
from ponder.inference.particles.resampling import multinomial as multinomial
from ponder.inference.particles.resampling import residual as residual
from ponder.inference.particles.resampling import stratified as stratified
from ponder.inference.particles.resampling import systematic as systematic
