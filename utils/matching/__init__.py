"""The method: pairs that are learned, the student's steps, the sweep back through them, the outer optimizer."""

from utils.matching.draws import Draws, Segment
from utils.matching.first_rates import fit_first_rates
from utils.matching.learner import OPTIMIZERS, PairLearner
from utils.matching.memory import OutOfMemory, fit_pair_chunk, guarded, pair_chunk_advice
from utils.matching.pairs import BATCH_ORDERS, Pairs, draw_batches
from utils.matching.prefetch import Prefetch, prepare
from utils.matching.student import StudentLoss
from utils.matching.sweep import Matching, check_shares, matching_gradient, matching_loss, mean_matching
