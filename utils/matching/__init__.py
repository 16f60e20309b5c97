"""The outer loop: what an iteration draws, the step of the pairs, its guard, first rates and memory."""

from utils.matching.draws import Draws
from utils.matching.first_rates import FIT, fit_first_rates
from utils.matching.learner import OPTIMIZERS, PairLearner
from utils.matching.memory import Fitting, OutOfMemory, Room, fit_room, guarded, pair_chunk_advice
from utils.matching.prefetch import Prefetch
from utils.matching.pursuit import Dictionary, pursue
from utils.matching.record import iteration_numbers
