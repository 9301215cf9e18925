"""Reasoning tasks with exact graders, for measuring and for teaching.

Each task is a module; they have the same functions, among them `problems`, `prompt_text`, `grade`,
`extract_answer`, `exact_value` and `exact_reward`. What they share is in `ponder.tasks.grading`.

    countdown         reach a target from four numbers: few steps, and the first one decides
    countdown_five    the same with five numbers, and a step more
    operation_chain   eight operations on a running value: easy steps, but one slip is carried to the end
    synthetic_reward  rewards with errors of a chosen size, for any of them
"""

from ponder.tasks import countdown as countdown
from ponder.tasks import countdown_five as countdown_five
from ponder.tasks import operation_chain as operation_chain
from ponder.tasks import synthetic_reward as synthetic_reward
